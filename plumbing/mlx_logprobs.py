"""plumbing/logprobs.py in MLX: log-probabilities of tokens without the logits [M, V], nor their gradient.

Shapes: M positions, V vocabulary, D hidden size, n words of one slice of the vocabulary.
"""

from collections.abc import Callable

from plumbing.mlx_arrays import mx


def sliced_logprobs(hidden: mx.array, head: mx.array, targets: mx.array, *, temperature: float, words: int,
                    learns_head: bool) -> tuple[mx.array, mx.array]:
    """States [M, D], output matrix [V, D], targets [M] -> (log p(target), entropy without a gradient), [M] each, nats.

    float32 whatever the model is. `words`: the size of a slice. `learns_head`: whether the matrix gets a gradient.
    """
    logp, entropy, _ = _for(targets, temperature, words, learns_head)(hidden, head)  # [M] each
    return logp, mx.stop_gradient(entropy)


def _for(targets: mx.array, temperature: float, words: int, learns_head: bool) -> Callable:
    """-> a function of states [M, D] and output matrix W [V, D]: (logp, entropy, log of the softmax's sum), [M] each.

    A lazy graph is not computed in the order of its lines. So each slice is made to depend on what the one before it
    left (`mx.depends`); else the logits of all slices might be there at once.
    """
    def slices(h: mx.array, W: mx.array):
        """For each slice: its first word, w [n, D]."""
        return ((first, W[first:first + words]) for first in range(0, len(W), words))

    def logits(h: mx.array, w: mx.array, after: list) -> mx.array:
        """Float32 whatever the model is: [M, n]."""
        h, w = mx.depends([h, w], after)  # [M, D], [n, D]
        return h.astype(mx.float32) @ w.astype(mx.float32).T / temperature

    @mx.custom_function
    def logprobs(h: mx.array, W: mx.array):
        top, total, mean, wanted = mx.full(len(h), -1e30), *(mx.zeros(len(h)) for _ in range(3))  # [M] each
        for first, w in slices(h, W):
            z = logits(h, w, [top, total, mean, wanted])  # [M, n]
            at = targets - first  # [M]
            here = (at >= 0) & (at < len(w))  # [M]
            found = mx.take_along_axis(z, mx.clip(at, 0, len(w) - 1)[:, None], 1)[:, 0]  # [M]
            before, top = top, mx.maximum(top, z.max(1))  # [M] each: sums so far are in units of exp(before)
            p, shrink = mx.exp(z - top[:, None]), mx.exp(before - top)  # [M, n], [M]
            mean = (mean + total * (before - top)) * shrink + (p * (z - top[:, None])).sum(1)  # [M] sum of p log p
            total = total * shrink + p.sum(1)  # [M]
            wanted = mx.where(here, found, wanted)  # [M]
        norm = top + mx.log(total)  # [M]
        return wanted - norm, mx.log(total) - mean / total, norm

    @logprobs.vjp
    def backward(primals, gradients, outputs):
        (h, W), g, norm = primals, gradients[0][:, None], outputs[2][:, None]  # g and norm [M, 1]
        dh, dW = mx.zeros(h.shape), []  # [M, D], [n, D] of each slice
        for first, w in slices(h, W):
            z = logits(h, w, [dh, *dW[-1:]])  # [M, n]
            target = mx.arange(first, first + len(w)) == targets[:, None]  # [M, n] bool
            dz = g * (target - mx.exp(z - norm)) / temperature  # [M, n]
            dh = dh + dz @ w.astype(mx.float32)  # [M, D]
            if learns_head:
                dW.append((dz.T @ h.astype(mx.float32)).astype(W.dtype))  # [n, D]
        return dh.astype(h.dtype), mx.concatenate(dW) if learns_head else mx.zeros_like(W)

    return logprobs
