"""Layers that keep only their inputs and are computed again in the backward pass (Chen et al. 2016)."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(layer: Callable, x: Tensor, context) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`layer(x, context)`, gradients included, for less memory and about a third more work.

    `context` is a dataclass; what its fields `prompt` and `past` (tuples of tensors) hold may need gradients too.
    """
    n, rest = len(context.prompt), replace(context, prompt=(), past=())

    def run(x: Tensor, *remembered: Tensor) -> tuple[Tensor, ...]:
        # `rest` and not `context`: torch keeps this function as long as the graph. What layers remember is passed as
        # arguments instead, which torch lets go in the backward pass.
        x, own = layer(x, replace(rest, prompt=remembered[:n], past=remembered[n:]))
        return x, *own

    if not x.requires_grad:
        x.requires_grad_()  # with a frozen embedding nothing else tells `checkpoint` that a gradient is wanted
    # Reentrant: it keeps nothing of the layer. The other kind keeps the graph's nodes, thousands of small pieces
    # between the large blocks that come and go, and glibc's heap then grows by half of the weights.
    x, *own = checkpoint(run, x, *context.prompt, *context.past, use_reentrant=True, preserve_rng_state=False)
    return x, tuple(own)
