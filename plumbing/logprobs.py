"""Log-probabilities of tokens without the logits [M, V], which would be the largest tensor of a step by far.

Skip it on a first reading: `model.token_logprobs` shows the three lines that it equals.

Shapes: M positions, V vocabulary, D hidden size, n words of one slice of the vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from plumbing.products import is_slow_bf16, widened


def sliced_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float,
                    words: int) -> tuple[Tensor, Tensor]:
    """States [M, D], output matrix [V, D], targets [M] -> (log p(target), entropy without a gradient), [M] each, nats.

    float32, or float64 for float64 states. `words`: the size of a slice of the vocabulary.
    """
    return _SlicedLogprobs.apply(hidden, head, targets, temperature, words)


class _SlicedLogprobs(torch.autograd.Function):
    """log p(target) for each of M positions, a slice of the vocabulary at a time, and again in backward.

    With z = W h / temperature and p = softmax(z): d logp / dz = onehot(target) - p. So backward needs p, which is as
    large as z. Computing it again costs one more product with W. Keeping it would cost 0.6 GB for 16 completions of 64
    tokens and Qwen's 151,936 words, and plain autograd keeps several such tensors. A slice stays in the processor's
    cache between the product and what is done with it, and all positions together make the product large enough to be
    fast.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, words: int):
        # Allocated before the slices' large blocks. Small results that live on between such blocks would keep glibc
        # from using their memory again, and the heap would grow with every slice.
        top, total, mean = hidden.new_empty(3, -(-len(weight) // words), len(hidden),
                                            dtype=torch.promote_types(hidden.dtype, torch.float32))  # [slices, M] each
        wanted = torch.zeros_like(top[0])  # [M]
        for first, _, z, at, here in _slices(hidden, weight, targets, temperature, words):
            wanted += z.gather(0, at)[0].where(here, 0.0)
            i = first // words
            top[i] = z.amax(0)
            p = z.sub_(top[i]).exp()  # [n, M]
            total[i], mean[i] = p.sum(0), p.mul_(z).sum(0)
        norm = (top + total.log()).logsumexp(0)  # [M], log of the sum of exp(z) over all words
        far = top - norm  # [slices, M]: log p = (z - top) + far
        entropy = -((mean + total * far) * far.exp()).sum(0)  # [M]
        ctx.save_for_backward(hidden, weight, targets, norm)
        ctx.temperature, ctx.words = temperature, words
        ctx.mark_non_differentiable(entropy)
        return wanted - norm, entropy

    @staticmethod
    def backward(ctx, g_logp: Tensor, _):
        hidden, weight, targets, norm = ctx.saved_tensors
        x = hidden.float() if is_slow_bf16(hidden) else hidden  # [M, D]
        g = g_logp / ctx.temperature  # [M]
        d_hidden = torch.zeros_like(x, dtype=norm.dtype)  # [M, D]
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]
        for first, w, z, at, here in _slices(hidden, weight, targets, ctx.temperature, ctx.words):
            dz = z.sub_(norm).exp_().mul_(-g).scatter_add_(0, at, (g * here)[None]).to(w.dtype)  # [n, M]
            d_hidden += dz.T @ w
            if d_weight is not None:
                d_weight[first:first + len(w)] = dz @ x
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def _slices(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float,
            words: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """For each slice of the vocabulary: the number of its first word; its part of the output matrix, w [n, D]; its
    logits z [n, M], float32 or float64; where each target stands in the slice [1, M]; whether it does [M]."""
    x = hidden.float() if is_slow_bf16(hidden) else hidden  # [M, D]
    for first, w in zip(range(0, len(weight), words), weight.split(words)):
        w = widened(w)  # [n, D]
        z = w @ x.T  # [n, M]: the matrix on the left, which is faster for few rows
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # [n, M]
        at = targets - first  # [M]
        here = (at >= 0) & (at < len(w))  # [M]
        yield first, w, z if temperature == 1 else z.div_(temperature), at.clamp(0, len(w) - 1)[None], here
