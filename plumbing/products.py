"""Matrix products in whatever way this machine does them best. Skip it on a first reading: `linear` is F.linear.

F.linear is several times slower than it has to be in two cases: bfloat16 on a CPU without bfloat16 units, and a few
rows times a matrix that does not stay in the processor's cache. In all other cases (on a GPU, float32 in training)
everything here is F.linear.

Shapes: M rows, `in` and `out` features of a weight W [out, in].
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def private(name: str) -> Callable | None:
    """torch's operator "namespace::name", or None where this build lacks it.

    Nobody promises operators that begin with an underscore: torch for Apple silicon is built without oneDNN and FBGEMM,
    and a later release may drop or rename them.
    """
    namespace, name = name.split("::")
    return getattr(getattr(torch.ops, namespace), name, None)


# A CPU without bfloat16 units (most laptops) multiplies bfloat16 at a tenth of float32's speed. There every large
# product is made in float32, from weights that are copied to float32 ("widened") a slice at a time. oneDNN is what uses
# such units, so where torch lacks oneDNN, bfloat16 is slow too.
_has_units = private("mkldnn::_is_mkldnn_bf16_supported")
NARROW_IS_SLOW = not (_has_units and _has_units())


def is_slow_bf16(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that is slow at it: then products with x are made in float32."""
    return NARROW_IS_SLOW and x.dtype == torch.bfloat16 and x.device.type == "cpu"


_SCRATCH: dict[str, Tensor] = {}


def scratch(name: str, *shape: int) -> Tensor:
    """Float32 memory [*shape] that is the same at every call: fresh memory costs as much as a small product."""
    if name not in _SCRATCH or _SCRATCH[name].numel() < math.prod(shape):
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            _SCRATCH[name] = torch.empty(math.prod(shape))
    return _SCRATCH[name][:math.prod(shape)].view(shape)


def widened(w: Tensor) -> Tensor:
    """w [n, in], or where bfloat16 is slow a float32 copy. The next call overwrites it."""
    return scratch("weight", *w.shape).copy_(w) if is_slow_bf16(w) else w


def rows_at_once(W: Tensor, rows: int) -> int:
    """How many rows of W [out, in] are widened at once for a product with `rows` rows of x.

    For few rows of x, the widened slice fits into the processor's cache. For many, neither the slice nor its product
    with x gets large.
    """
    return max(1, 2 ** 20 // W.shape[1] if rows <= 128 else min(2 ** 22 // W.shape[1], 2 ** 23 // rows))


def float32_product(x: Tensor, W: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [M, in] times the transpose of W [out, in] -> [M, out] in `dtype`, made in float32 a slice of W at a time."""
    x, y = x.float().T, x.new_empty(len(x), len(W), dtype=dtype)  # [in, M], [M, out]
    n = rows_at_once(W, x.shape[1])
    for at, w in zip(y.split(n, 1), W.split(n)):
        w = widened(w)  # [n, in]
        at.copy_(torch.mm(w, x, out=scratch("product", len(w), x.shape[1])).T)  # W on the left: faster for few rows
    return y


def float32_gradients(g: Tensor, x: Tensor, W: Tensor, dW: Tensor | None) -> Tensor:
    """Gradient g [M, out] of x W^T -> that of x [M, in]; that of W is added to dW, where there is one."""
    dx, n = torch.zeros_like(x, dtype=torch.float32), rows_at_once(W, len(x))  # [M, in]
    x = x if dW is None else x.float()
    for i, (at, w) in enumerate(zip(g.split(n, -1), W.split(n))):
        at = scratch("gradient", *at.shape).copy_(at)  # [M, n]
        dx.addmm_(at, widened(w))
        if dW is not None:
            dW[n * i:n * (i + 1)] += torch.mm(at.T, x, out=scratch("product", *w.shape))  # [n, in]
    return dx.to(W.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return float32_product(x, W, x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        return float32_gradients(g, x, W, dW), dW


PACKED: dict[int, Callable] = {}  # address of a weight W -> x, b -> x W^T + b from a copy of W; filled by `packed`


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """F.linear(x, W, b) = x W^T + b: x [..., in], W [out, in], b [out] -> [..., out], as this machine does it best."""
    if PACKED and W.data_ptr() in PACKED:
        return PACKED[W.data_ptr()](x, b).to(x.dtype)
    rows = x.numel() // x.shape[-1]
    if not is_slow_bf16(x) or rows <= 2:
        return F.linear(x, W, b)
    y = _Product.apply(x.reshape(rows, -1), W).view(*x.shape[:-1], -1)  # [..., out]
    return y if b is None else y + b


def to_logits(h: Tensor, head: Tensor) -> Tensor:
    """States [n, D] and output matrix [V, D] -> logits [n, V], float32 (float64 stays)."""
    if PACKED and head.data_ptr() in PACKED:
        z = PACKED[head.data_ptr()](h, None)  # [n, V]
    else:
        z = float32_product(h, head) if is_slow_bf16(h) else linear(h, head)  # [n, V]
    return z.to(torch.promote_types(z.dtype, torch.float32))


@contextmanager
def packed(weights: Iterable[Tensor], rows: int, times: int) -> Iterator[None]:
    """Inside, `linear` with these weights [out, in] reads them up to three times as fast. They must not change inside.

    Sampling one token for each of a few rows reads all weights once. On a CPU, F.linear reads them at a quarter of the
    memory's speed. Libraries read at about half of it from copies in an order of their own; making such a copy takes
    the time of ten to thirty products. So copies are made only where at least 16 products (`times`) of at most 128 rows
    (`rows`) come, and only of matrices that do not stay in the processor's cache anyway. No gradients inside: they
    would need W itself.
    """
    try:
        _SCRATCH.clear()  # memory that learning has left there is better used for the copies
        for W in weights if times >= 16 and rows <= 128 else ():
            product = W.device.type == "cpu" and W.numel() > 2 ** 18 and _packed(W.detach(), rows)
            if product:
                PACKED[W.data_ptr()] = product
        yield
    finally:
        PACKED.clear()  # also when memory ends while packing: a copy that stayed would be used after weights change


def has_fbgemm() -> bool:
    """Whether torch multiplies float16 by FBGEMM, which is for x86. Without it the operators exist too, but raise."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def _packed(W: Tensor, rows: int) -> Callable | None:
    """W [out, in] -> a function x [..., in], b [out] or None -> x W^T + b, with a copy of W that is read fast.
    None where this machine has no such way."""
    if W.dtype == torch.float32 or W.dtype == torch.bfloat16 and not NARROW_IS_SLOW:
        reorder, multiply = private("mkldnn::_reorder_linear_weight"), private("mkldnn::_linear_pointwise")
        if not (reorder and multiply and torch.backends.mkldnn.is_available()):
            return None
        P = reorder(W, rows)  # oneDNN's order
        return lambda x, b: multiply(x, P, b, "none", [], "")
    pack, multiply16 = private("quantized::linear_prepack_fp16"), private("quantized::linear_dynamic_fp16")
    if W.dtype != torch.bfloat16 or not (pack and multiply16) or not has_fbgemm():
        return None
    # FBGEMM multiplies float32 rows by a float16 matrix, and widens that in registers where we would widen a copy.
    # Between 2^-17 and 65504 every bfloat16 is a float16 too; a smaller one is rounded by 2^-25 at most.
    low, high = map(float, W.aminmax())
    if not -65504 <= low <= high <= 65504:  # NaN included
        return None
    parts = [pack(w.float(), None) for w in W.chunk(-(-W.numel() // 2 ** 22))]

    def product(x: Tensor, b: Tensor | None) -> Tensor:
        x = x.float().contiguous()  # [..., in]
        y = torch.cat([multiply16(x, part) for part in parts], -1)  # [..., out] float32
        return y if b is None else y + b

    return product
