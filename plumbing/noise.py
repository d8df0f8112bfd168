"""How noisy is a gradient? From M independent gradients of the same weights, each of another batch, without a bias.

Let g_1 .. g_M have the mean mu and the covariance matrix Sigma. Their mean's squared length is not |mu|^2: it is
|mu|^2 + tr(Sigma) / M on average, because each g_m is multiplied with itself, noise and all. So products of two
different batches alone are taken: E[g_m . g_n] = |mu|^2 for m != n. All that is needed is the table of dot products.

    signal = mean of g_m . g_n over m != n                     |mu|^2, without a bias
    spread = mean of |g_m|^2 - signal                          tr(Sigma), the total variance, without a bias
    noise  = spread / signal                                   the variance over the squared length of the mean

A batch of B times as many posts has a B-th of the noise. With a noise of 4 the random part of a gradient is on average
twice as long as the gradient that one wants. The ratio of two unbiased numbers is itself nearly unbiased where the
signal is well seen; the standard error (a jackknife, which leaves out one batch at a time) says how well.

Shapes: M batches, W weights.
"""

from torch import Tensor


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients a and b [M, W] of the same M batches -> sums of a_m . b_n that a jackknife needs, in float64:

    the sum over all m != n []; the same without batch k, for each k [M]; and a_m . b_m [M].
    """
    table = (a @ b.T).double()  # [M, M]
    own = table.diagonal()  # [M]
    across = table.sum() - own.sum()  # []
    return across, across - (table.sum(0) + table.sum(1) - 2 * own), own


def noise(gradients: Tensor) -> dict[str, float]:
    """Gradients [M, W] -> signal, spread, noise and the noise's standard error; M is at least 3.

    A signal that is not above 0 was not seen above the noise: `noise` is then meaningless, and negative or infinite.
    """
    M = len(gradients)
    across, left, own = products(gradients, gradients)  # [], [M], [M]
    signal, signals = across / (M * (M - 1)), left / ((M - 1) * (M - 2))  # [], [M]
    spread, spreads = own.mean() - signal, (own.sum() - own) / (M - 1) - signals  # [], [M]
    ratios = spreads / signals  # [M]
    error = ((M - 1) / M * (ratios - ratios.mean()).square().sum()).sqrt()  # []
    return {"signal": signal.item(), "spread": spread.item(), "noise": (spread / signal).item(), "error": error.item()}


def cosine(a: Tensor, b: Tensor) -> float:
    """Between the mean gradients of a and b [M, W], of the same batches or of others: noise that both share is left
    out. 1: they point in the same direction."""
    n = len(a) * (len(a) - 1)
    dot, a_a, b_b = (products(x, y)[0] / n for x, y in ((a, b), (a, a), (b, b)))  # [] each
    return (dot / (a_a * b_b).sqrt()).item()
