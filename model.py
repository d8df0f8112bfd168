"""The policy: a decoder-only transformer, read from and written to a Hugging Face folder.

One class serves every family: `qwen2`, `qwen3` and `llama` differ by three switches (a bias on q/k/v, a norm on q and
k, an explicit head size), and the switches are set by the folder's own `config.json`. `lfm2` has a short convolution in
place of attention on most layers, and other names. Module names are the names in the safetensors file, so that loading
is a dictionary and not a translation.

Shapes: N rows (= B prompts x G completions, or just rows), T tokens of this call, S tokens a row has read since its
prompt, P prompt tokens, V vocabulary, D hidden size, H query heads, K key/value heads, R = H / K queries that share
one key, hd head size, L width of the convolution.
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")
# Files beside the weights that say how to tokenise, chat and stop: kept in memory by `load`, written again by `save`.
SIDECARS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
            "added_tokens.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Config:
    """The numbers of `config.json` that change the computation, with one spelling for each."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_types: tuple[str, ...]  # "full_attention" or "conv", one a layer
    conv_L_cache: int  # width of LFM2's convolution, as transformers calls it
    conv_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_config(raw: dict, where: str, generation: dict | None = None) -> Config:
    """`config.json` as a dict (and `generation_config.json`, which may name further stop tokens) -> Config.

    A family or feature that this file does not compute is refused here: a model that loads but computes something
    slightly different would train, and teach nothing.
    """
    def size(key, default=None):
        n = default if raw.get(key) is None else raw[key]
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{where}: '{key}' should be a whole number above 0, not {n!r}. Is it the config of a "
                             f"causal language model?")
        return n

    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where} says model_type '{family}': crisp knows {', '.join(FAMILIES)}.")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # new spelling, old spelling
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    lfm2 = family == "lfm2"
    theta = rope.get("rope_theta") or raw.get("rope_theta") or (1e6 if lfm2 else 1e4)
    heads, D, n_layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", D // heads)
    eos = [(source or {}).get("eos_token_id") for source in (raw, generation)]
    eos = [i for ids in eos if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    kinds, attends = raw.get("layer_types"), raw.get("full_attn_idxs") if lfm2 else None
    if kinds is None and isinstance(attends, list | None):  # the older LFM2 configs list only which layers attend
        kinds = ["full_attention" if attends is None or i in attends else "conv" for i in range(n_layers)]
    factor = raw.get("block_ffn_dim_multiplier", 1.0)
    known = isinstance(kinds, list) and all(k == "full_attention" or lfm2 and k == "conv" for k in kinds)
    for refused, says in ((rope_type != "default", f"rope type '{rope_type}'"),
                          (not isinstance(theta, int | float), f"a rope_theta of {theta!r}"),
                          (raw.get("use_sliding_window"), "sliding-window attention"),
                          (raw.get("hidden_act", "silu") != "silu", f"activation '{raw.get('hidden_act')}'"),
                          (heads % kv_heads, f"{heads} query heads on {kv_heads} key/value heads"),
                          (head_dim % 2, f"rotary embedding of an odd head_dim, {head_dim}"),
                          (not isinstance(factor, int | float), f"a block_ffn_dim_multiplier of {factor!r}"),
                          (not known, f"layer_types or full_attn_idxs {str(kinds or attends)[:80]}"),
                          (known and len(kinds) != n_layers, f"{n_layers} layers, but has other layer_types"),
                          (not all(isinstance(i, int) for i in eos), f"the stop tokens {eos}")):
        if refused:
            raise ValueError(f"{where} asks for {says}, which crisp does not compute.")
    bias = not lfm2 and bool(raw.get("attention_bias", False))
    return Config(
        model_type=family, vocab_size=size("vocab_size"), hidden_size=D,
        intermediate_size=lfm2_width(raw, size) if lfm2 else size("intermediate_size"),
        num_hidden_layers=n_layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=raw.get("norm_eps", 1e-5) if lfm2 else raw.get("rms_norm_eps", 1e-6), rope_theta=float(theta),
        max_position_embeddings=size("max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_embedding", raw.get("tie_word_embeddings", lfm2))),
        qkv_bias=family == "qwen2" or bias, o_bias=family != "qwen2" and bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)), qk_norm=family in ("qwen3", "lfm2"),
        layer_types=tuple(kinds), conv_L_cache=size("conv_L_cache", 3), conv_bias=bool(raw.get("conv_bias", False)),
        bos_token_id=raw.get("bos_token_id"), eos_token_ids=tuple(dict.fromkeys(eos)))


def lfm2_width(raw: dict, size: Callable[..., int]) -> int:
    """The feed-forward width of LFM2. Its configured one is meant for two matrices; three of 2/3 of it weigh the same:
    6656 -> 4437 -> 4608, the next multiple of 256."""
    width = size("intermediate_size" if raw.get("block_ff_dim") is None else "block_ff_dim")  # new spelling, old one
    if raw.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        step = size("block_multiple_of", 256)
        width = -(-int(raw.get("block_ffn_dim_multiplier", 1.0) * width) // step) * step
    return width


# --- the layers ------------------------------------------------------------------------------------------------------


# A CPU without bfloat16 units (most laptops) multiplies bfloat16 at a tenth of float32's speed: there every large
# product is made in float32, from weights that are widened a slice at a time.
NARROW_IS_SLOW = not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen(x: Tensor) -> bool:
    """Whether products with x are worth making in float32."""
    return NARROW_IS_SLOW and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def wide_product(x: Tensor, W: Tensor) -> Tensor:
    """x [M, in] times the transpose of W [out, in] -> [M, out] float32. A slice of W, widened, stays in the cache."""
    x = x.float().T  # [in, M]
    return torch.cat([w.float() @ x for w in W.split(max(1, 2 ** 20 // W.shape[1]))]).T.contiguous()


def wide_gradients(g: Tensor, x: Tensor, W: Tensor, dW: Tensor | None) -> Tensor:
    """Gradient g [M, out] float32 of x W^T -> that of x [M, in]; that of W is added to dW, where there is one."""
    dx, x = torch.zeros_like(x, dtype=torch.float32), x.float()
    for i, (at, w) in enumerate(zip(g.split(4096, -1), W.split(4096))):
        dx.addmm_(at, w.float())
        if dW is not None:
            dW[4096 * i:4096 * (i + 1)] += at.T @ x
    return dx.to(W.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return wide_product(x, W).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        return wide_gradients(g.float(), x, W, dW), dW


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """F.linear(x, W, b): x [..., in], W [out, in], b [out] -> [..., out], in whatever order this machine does it best.

    With few rows, reading W is the work, and BLAS reads it up to three times as fast as the left factor: W x^T instead
    of x W^T, which is the same. Not for small matrices, which stay in the cache anyway, and not for training.
    """
    rows = x.numel() // x.shape[-1]
    if widen(x) and rows > 2:
        y = _Product.apply(x.reshape(rows, -1), W)  # [rows, out]
    elif rows <= 256 and W.numel() > 2 ** 18 and x.dtype == torch.float32 and x.device.type == "cpu" \
            and not torch.is_grad_enabled():
        y = (W @ x.reshape(rows, -1).T).T.contiguous()  # [rows, out]
    else:
        return F.linear(x, W, b)
    y = y.view(*x.shape[:-1], -1)
    return y if b is None else y + b


class Linear(nn.Linear):
    """y = W x + b, and with an adapter (`add_lora`) y = W x + b + alpha/rank B A x."""

    def __init__(self, size_in: int, size_out: int, bias: bool):
        super().__init__(size_in, size_out, bias)
        self.register_parameter("lora_A", None)  # [rank, in] once there is an adapter
        self.register_parameter("lora_B", None)  # [out, rank]
        self.scale, self.on = 0.0, True  # alpha / rank; whether the adapter is used

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)  # [..., out]
        if self.lora_A is None or not self.on:
            return y
        # In the adapter's own precision: it is float32 over bf16 weights, or small updates would be rounded away.
        down = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # [..., rank]
        return y + (F.linear(down, self.lora_B) * self.scale).to(y.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019). In float32: bf16 squares lose the small features."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))  # [size]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.dtype == torch.float64 else x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles of rotary position embedding (Su et al. 2021), cos and sin [N, T, 1, hd] for positions [N, T].

    Feature pair (i, i + hd/2) of a head turns by position * theta^(-2i/hd). Angles are float32 (float64 for float64
    models): in bf16 position 1000 and 1001 would be one position.
    """
    exact = torch.promote_types(dtype, torch.float32)
    power = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # [hd/2]
    angle = positions[..., None].to(exact) / (theta ** power).to(exact)  # [N, T, hd/2]
    angle = torch.cat([angle, angle], -1)[:, :, None]  # [N, T, 1, hd]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head of x [N, T, heads, hd] by its position's angles, in the rotate-half layout of Hugging Face."""
    cos, sin = rope  # [N, T, 1, hd] each
    low, high = x.chunk(2, -1)  # [N, T, heads, hd/2] each
    return x * cos + torch.cat([-high, low], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, shared=None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v over a row's own tokens and, where there is one, its group's shared prompt.

    q [N, H, T, hd]; k, v [N, K, S, hd]; allowed [N or 1, 1, T, S] bool, None when every key may be seen;
    shared = (k [B, K, P, hd], v, mask [B, P] or None). Returns [N, H, T, hd].

    The G rows of a group ask the same prompt keys, so their queries are laid side by side and meet one copy of them:
    [G*R*T, hd] x [hd, P] is one large product, where G copies of the keys would be G small ones and G times the memory.
    Both kinds of scores then share one softmax, which makes this equal to plain attention over prompt + own tokens.
    """
    if widen(q):
        shared = shared and (shared[0].float(), shared[1].float(), shared[2])
        return attend(q.float(), k.float(), v.float(), allowed, shared).to(q.dtype)
    if shared is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])
    (N, H, T, hd), (_, K, S, _), (pk, pv, pmask) = q.shape, k.shape, shared
    B, P = pk.shape[0], pk.shape[2]
    G, R = N // B, H // K
    q = q.view(N, K, R * T, hd) * hd ** -0.5
    own = q @ k.transpose(-1, -2)  # [N, K, R*T, S]
    if allowed is not None:
        own = own.view(N, K, R, T, S).masked_fill(~allowed[:, :, None], -torch.inf)
    own = own.reshape(B, G, K, R * T, S).transpose(1, 2)  # [B, K, G, R*T, S]
    grouped = q.view(B, G, K, R * T, hd).transpose(1, 2).reshape(B, K, G * R * T, hd)
    prompt = grouped @ pk.transpose(-1, -2)  # [B, K, G*R*T, P]
    if pmask is not None:
        prompt = prompt.masked_fill(~pmask[:, None, None], -torch.inf)
    scores = torch.cat([prompt.view(B, K, G, R * T, P), own], -1)  # [B, K, G, R*T, P+S]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    wp, wo = weights.split([P, S], -1)  # [B, K, G, R*T, P], [B, K, G, R*T, S]
    out = (wp.reshape(B, K, G * R * T, P) @ pv).view(B, K, G, R * T, hd).transpose(1, 2)  # [B, G, K, R*T, hd]
    out = out.reshape(N, K, R * T, hd) + wo.transpose(1, 2).reshape(N, K, R * T, S) @ v  # [N, K, R*T, hd]
    return out.reshape(N, H, T, hd)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads read K key/value heads, R = H / K to each."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.names = ("out_proj", "q_layernorm", "k_layernorm") if c.model_type == "lfm2" else (
            "o_proj", "q_norm", "k_norm")
        out, q_norm, k_norm = self.names
        self.add_module(out, Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias))
        if c.qk_norm:  # Qwen3 and LFM2: over each head's features, before the rotation
            self.add_module(q_norm, RMSNorm(c.head_dim, c.rms_norm_eps))
            self.add_module(k_norm, RMSNorm(c.head_dim, c.rms_norm_eps))
        self.qk_norm = c.qk_norm

    def forward(self, x, rope, allowed, mask, shared, past):
        """x [N, T, D] -> ([N, T, D], (k, v) of all the row's own tokens [N, K, S, hd])."""
        N, T, _ = x.shape
        q = self.q_proj(x).view(N, T, -1, self.head_dim)  # [N, T, H, hd]
        k = self.k_proj(x).view(N, T, -1, self.head_dim)  # [N, T, K, hd]
        v = self.v_proj(x).view(N, T, -1, self.head_dim)  # [N, T, K, hd]
        out, q_norm, k_norm = self.names
        if self.qk_norm:
            q, k = getattr(self, q_norm)(q), getattr(self, k_norm)(k)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))  # [N, H or K, T, hd]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # [N, K, S, hd]
        read = attend(q.contiguous(), k, v, allowed, shared)  # [N, H, T, hd]
        return getattr(self, out)(read.transpose(1, 2).reshape(N, T, -1)), (k, v)


class ShortConv(nn.Module):
    """LFM2's other operator (Liquid AI 2025): b, c, u = in_proj(x); g = b u; out_proj(c conv(g)).

    conv is depthwise and causal, conv(g)_t = sum_j w_j g_(t-L+1+j): all it remembers is a row's last L - 1 values of g.
    """

    def __init__(self, c: Config):
        super().__init__()
        D = c.hidden_size
        self.in_proj = Linear(D, 3 * D, bias=c.conv_bias)
        self.conv = nn.Conv1d(D, D, c.conv_L_cache, groups=D, bias=c.conv_bias)  # weight [D, 1, L]
        self.out_proj = Linear(D, D, bias=c.conv_bias)

    def forward(self, x, rope, allowed, mask, shared, past):
        """x [N, T, D], mask [N, T] or None -> ([N, T, D], the last L-1 real values of g ([N, L-1, D],)).

        Tokens that follow each other must be neighbours here, whatever padding lies between them: the real ones of a
        row are moved to its front for the convolution, behind what the row (or its prompt) remembers.
        """
        (N, T, D), L = x.shape, self.conv.kernel_size[0]
        b, c, u = self.in_proj(x).chunk(3, -1)  # [N, T, D] each
        g = b * u  # [N, T, D]
        if mask is not None:
            order = mask.long().argsort(dim=1, descending=True, stable=True)[..., None].expand(N, T, D)
            g = g.gather(1, order)
        if past is not None:
            before = past[0]  # [N, L-1, D]
        elif shared is not None:
            before = shared[0].repeat_interleave(N // len(shared[0]), 0)  # [N, L-1, D], of each row's prompt
        else:
            before = g.new_zeros(N, L - 1, D)
        g = torch.cat([before, g], 1)  # [N, L-1+T, D]
        # Three products instead of conv1d: as fast in float32, and several times faster in bf16 on a CPU.
        y = sum(self.conv.weight[:, 0, j] * g[:, j:j + T] for j in range(L))  # [N, T, D]
        if self.conv.bias is not None:
            y = y + self.conv.bias
        if mask is None:
            last = g[:, T:]  # [N, L-1, D]
        else:
            y = torch.zeros_like(y).scatter(1, order, y)  # back to where the tokens stand
            at = mask.sum(1, keepdim=True) + torch.arange(L - 1, device=x.device)  # [N, L-1]
            last = g.gather(1, at[..., None].expand(N, L - 1, D))  # [N, L-1, D]
        return self.out_proj(c * y), (last,)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FeedForward(nn.Module):
    """The same under LFM2's names: w2(silu(w1 x) * w3 x)."""

    def __init__(self, c: Config):
        super().__init__()
        self.w1 = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w3 = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, allowed, mask, shared, past):
        h, own = self.self_attn(self.input_layernorm(x), rope, allowed, mask, shared, past)
        x = x + h
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Lfm2Layer(nn.Module):
    """x += op(norm(x)); x += mlp(norm(x)): op is attention on some layers and the short convolution on the others."""

    def __init__(self, c: Config, kind: str):
        super().__init__()
        self.operator_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if kind == "conv":
            self.conv = ShortConv(c)
        else:
            self.self_attn = Attention(c)
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.feed_forward = FeedForward(c)
        self.kind = kind

    def forward(self, x, rope, allowed, mask, shared, past):
        op = self.conv if self.kind == "conv" else self.self_attn
        h, own = op(self.operator_norm(x), rope, allowed, mask, shared, past)
        x = x + h
        return x + self.feed_forward(self.ffn_norm(x)), own


class Cache:
    """What a decoder remembers, per layer: keys and values of `shared` prompts [B, K, P, hd] and of each row's `own`
    tokens since [N, K, S, hd]; of a convolution its last values, [B, L-1, D] and [N, L-1, D], which hold a row's
    prompt too once the row has read a token of its own.

    Fill it by passing it to `model.hidden`; `share(G)` turns everything read so far into a prompt for G rows each.
    Nothing is written in place, so gradients flow through it: training runs a prompt once for a whole group.
    """

    def __init__(self):
        self.shared = self.own = None  # lists of (k, v) or (last values,), one a layer
        self.shared_mask = self.own_mask = None  # [B, P], [N, S] bool; None: no padding in there
        self.lengths = 0  # real tokens each row has read: a number, or [N, 1]
        self.columns = 0  # S, padding included

    def share(self, G: int) -> "Cache":
        """The B rows read so far become prompts; the next call brings B*G rows, G after G."""
        if self.shared is not None:
            raise ValueError("This cache has been shared before: its prompt would be lost. Start from a new Cache.")
        self.shared, self.own, self.columns = self.own, None, 0
        self.shared_mask, self.own_mask = self.own_mask, None
        if torch.is_tensor(self.lengths):
            self.lengths = self.lengths.repeat_interleave(G, 0)  # [N, 1]
        return self

    def keep(self, prompts: Tensor, rows: Tensor) -> None:
        """Drop what is finished: keep these prompts [B'] and these rows [N'] (B' groups of equal size, in order)."""
        def pick(layers, index):
            return layers and [tuple(t.index_select(0, index) for t in layer) for layer in layers]

        if len(prompts) < self.shared[0][0].shape[0]:  # the large half; copied only when a whole group is done
            self.shared = pick(self.shared, prompts)
            self.shared_mask = self.shared_mask if self.shared_mask is None else self.shared_mask[prompts]
        self.own = pick(self.own, rows)
        self.own_mask = self.own_mask if self.own_mask is None else self.own_mask[rows]
        self.lengths = self.lengths[rows] if torch.is_tensor(self.lengths) else self.lengths


class Transformer(nn.Module):
    """Token ids in, logits out; `hidden` gives the states before the head, which is where the large tensor begins."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.raw_config: dict = {}  # config.json as it was read, for `save`
        self.sidecars: dict[str, bytes] = {}  # files of the folder that pass through unchanged
        self.checkpointing = False  # recompute each layer in backward: less memory, about a third more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        lfm2 = config.model_type == "lfm2"
        self.layers = nn.ModuleList(Lfm2Layer(config, kind) if lfm2 else Layer(config) for kind in config.layer_types)
        self.last_norm = "embedding_norm" if lfm2 else "norm"
        self.add_module(self.last_norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]; the embedding itself when the two are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is its own base, bit for bit: the reference for free. No change without adapters.

        A backward pass under `checkpointing` runs layers again, so it belongs inside as well.
        """
        layers = [m for m in self.modules() if isinstance(m, Linear)]
        before = [m.on for m in layers]
        try:
            for m in layers:
                m.on = False
            yield
        finally:
            for m, on in zip(layers, before):
                m.on = on

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens [N, T] (mask [N, T]: True where a token is real) -> logits [N, T, V]."""
        return linear(self.hidden(tokens, mask=mask), self.head)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """tokens [N, T] -> final hidden states [N, T, D]; with a cache, tokens continue what it has read.

        mask [N, T] bool is False on padding, left or right: nobody attends to it and it takes no position. Its own
        hidden states are meaningless.
        """
        cache = Cache() if cache is None else cache
        (N, T), device = tokens.shape, tokens.device
        read = cache.lengths  # a number, or [N, 1]
        if mask is None:
            positions = (torch.arange(T, device=device) + read).expand(N, T)  # [N, T]
            cache.lengths = read + T
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0) + read  # [N, T]
            cache.lengths = read + mask.sum(1, keepdim=True)
        past, S = cache.columns, cache.columns + T
        if mask is not None or cache.own_mask is not None:
            ones = torch.ones(N, 1, dtype=torch.bool, device=device)  # [N, 1]
            before = ones.expand(N, past) if cache.own_mask is None else cache.own_mask  # [N, past]
            now = ones.expand(N, T) if mask is None else mask.bool()  # [N, T]
            cache.own_mask = torch.cat([before, now], 1)  # [N, S]
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(past)  # [T, S]
        allowed = None if T == 1 else causal[None, None]  # [1, 1, T, S]
        if cache.own_mask is not None:
            # A padded query would see no key at all, and a softmax over nothing is NaN: let it see itself.
            itself = torch.eye(T, S, dtype=torch.bool, device=device).roll(past, 1)  # [T, S]
            allowed = (causal & cache.own_mask[:, None] | itself)[:, None]  # [N, 1, T, S]
        x = self.embed_tokens(tokens)  # [N, T, D]
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)  # 2 x [N, T, 1, hd]
        own = []
        for i, layer in enumerate(self.layers):
            shared = cache.shared and (*cache.shared[i], cache.shared_mask)
            args = (x, rope, allowed, mask, shared, cache.own and cache.own[i])
            if self.checkpointing and torch.is_grad_enabled():
                x, kv = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x, kv = layer(*args)
            own.append(kv)
        cache.own, cache.columns = own, S
        return getattr(self, self.last_norm)(x)


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [n_i] -> (padded on the right with 0, mask), both [len(rows), max n_i]."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(r) for r in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def to_logits(h: Tensor, head: Tensor) -> Tensor:
    """States [n, D] and output matrix [V, D] -> logits [n, V], float32 (float64 stays)."""
    return wide_product(h, head) if widen(h) else linear(h, head).to(torch.promote_types(h.dtype, torch.float32))


# --- log-probabilities without the [T, V] tensor ----------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) for each position, a chunk of positions at a time, and again in backward.

    With z = h W^T / temperature and p = softmax(z): d logp / dz = onehot(target) - p, so backward needs p, which is as
    large as z. Recomputing it costs one more product with W; keeping it would cost 0.6 GB for 16 completions of 64
    tokens and Qwen's 151,936 words, and plain autograd keeps several such tensors.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logp, entropy, norm = [], [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            z = _TokenLogprobs.logits(h, weight, temperature)  # [chunk, V]
            log_p = z.log_softmax(-1)  # [chunk, V]
            logp.append(log_p.gather(-1, t[:, None]).squeeze(-1))  # [chunk]
            norm.append(z.gather(-1, t[:, None]).squeeze(-1) - logp[-1])  # [chunk] log of the sum of exp(z)
            entropy.append(-log_p.exp().mul_(log_p).sum(-1))  # [chunk]
        logp, entropy, norm = torch.cat(logp), torch.cat(entropy), torch.cat(norm)  # [M] each
        ctx.save_for_backward(hidden, weight, targets, norm)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def logits(h, weight, temperature):
        """[chunk, D] x [V, D] -> [chunk, V] in float32 (float64 stays)."""
        z = to_logits(h, weight)
        return z if temperature == 1 else z.div_(temperature)

    @staticmethod
    def backward(ctx, g_logp, _):
        hidden, weight, targets, norm = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)  # [M, D]
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]
        for i in range(0, len(hidden), ctx.chunk):
            at = slice(i, i + ctx.chunk)
            p = _TokenLogprobs.logits(hidden[at], weight, ctx.temperature).sub_(norm[at, None]).exp_()  # [chunk, V]
            g = g_logp[at, None] / ctx.temperature  # [chunk, 1]
            dz = p.mul_(-g).scatter_add_(-1, targets[at, None], g)  # [chunk, V]
            if widen(hidden):
                d_hidden[at] = wide_gradients(dz, hidden[at], weight, d_weight)
                continue
            dz = dz.to(weight.dtype)
            d_hidden[at] = dz @ weight
            if d_weight is not None:
                d_weight.addmm_(dz.T, hidden[at])
        return d_hidden, d_weight, None, None, None


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor, temperature: float = 1.0,
                   chunk: int = 256) -> tuple[Tensor, Tensor]:
    """hidden [..., T, D], targets [..., T] -> (logp, entropy) in nats, each [..., T], float32.

    `hidden[..., t, :]` is the state that predicts `targets[..., t]`. The temperature is the sampler's: it divides the
    logits here as it did there, otherwise the policy that is trained is not the policy that acted. `entropy` is for
    looking at and carries no gradient. At most `chunk` rows of logits exist at any time.
    """
    if temperature <= 0:
        raise ValueError(f"token_logprobs needs a temperature above 0, not {temperature}: a greedy policy has no logp.")
    logp, entropy = _TokenLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), model.head, targets.reshape(-1),
                                         temperature, chunk)
    return logp.view(targets.shape), entropy.view(targets.shape)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def add_lora(model: Transformer, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0) -> None:
    """Freeze the model and give every projection named in `targets` (none: all) an adapter (Hu et al. 2021, LoRA).

        y = W x + alpha/rank B A x        A [rank, in] random, B [out, rank] zero: the first step begins at the base

    A is drawn as in PEFT, uniform in +-1/sqrt(in). Adapters are float32 whatever the weights are. Their parameters are
    called `....q_proj.lora_A`; an optimizer takes those that require a gradient.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    known = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    targets = targets or list(known)
    unknown = [t for t in targets if t not in known]
    if rank < 1 or not alpha > 0 or unknown:
        raise ValueError(f"LoRA needs a rank of at least 1, an alpha above 0 and projections among {', '.join(known)}; "
                         f"got rank {rank}, alpha {alpha} and {', '.join(unknown or targets)}.")
    if any(m.lora_A is not None for m in layers.values()):
        raise ValueError("This model has adapters already: merge_lora them first.")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, m in layers.items():
        if name.rpartition(".")[2] in targets:
            (out, size), device = m.weight.shape, m.weight.device
            A = (torch.rand(rank, size, generator=generator) * 2 - 1) / math.sqrt(size)  # [rank, in]
            m.lora_A = nn.Parameter(A.to(device))
            m.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))  # [out, rank]
            m.scale = alpha / rank


def effective_weight(m: Linear) -> Tensor:
    """W + alpha/rank B A [out, in], in the dtype of W."""
    if m.lora_A is None:
        return m.weight
    return (m.weight.to(m.lora_A.dtype) + m.scale * m.lora_B @ m.lora_A).to(m.weight.dtype)


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Put W + alpha/rank B A where W was and drop the adapters: a plain model again, all of it trainable."""
    for m in model.modules():
        if isinstance(m, Linear):
            m.weight.copy_(effective_weight(m))
            m.lora_A = m.lora_B = None
    model.requires_grad_(True)


def save_adapters(model: Transformer, path: str | Path, base: str = "") -> None:
    """Write the adapters alone, in PEFT's format; `base` is the name or folder of the model that they belong to."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}
    if not layers:
        raise ValueError("There are no adapters to save: add_lora first.")
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
              "lora_alpha": first.scale * rank, "target_modules": sorted({n.rpartition(".")[2] for n in layers}),
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    state = {f"base_model.model.model.{name}.{which}.weight": getattr(m, which).detach().cpu().contiguous()
             for name, m in layers.items() for which in ("lora_A", "lora_B")}
    write_files({
        Path(path) / "adapter_model.safetensors": lambda part: save_file(state, part, metadata={"format": "pt"}),
        Path(path) / "adapter_config.json": lambda part: part.write_text(json.dumps(config, indent=2) + "\n")})


def load_adapters(model: Transformer, path: str | Path) -> None:
    """Give the model the adapters of a PEFT folder, ready to be trained further; the rest of it is frozen."""
    file, raw = Path(path) / "adapter_model.safetensors", read_json(Path(path) / "adapter_config.json")
    wrong = [key for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern",
                             "layer_replication", "lora_bias", "fan_in_fan_out") if raw.get(key)]
    if raw.get("peft_type") != "LORA" or raw.get("bias", "none") != "none" or wrong:
        raise ValueError(f"{path}/adapter_config.json asks for {', '.join(wrong) or 'another method than plain LoRA'}, "
                         f"which crisp does not compute.")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: a PEFT folder needs it beside adapter_config.json.")
    try:
        state = load_file(file)
    except SafetensorError as e:
        raise ValueError(f"{file} is not a whole safetensors file ({e}): copy it again.") from e
    names = {}  # (module, lora_A or lora_B) -> key. The file's names decide: `target_modules` may be a pattern
    for key in state:
        name = key.removeprefix("base_model.model.").removeprefix("model.").removesuffix(".weight")
        names[name.rpartition(".")[::2]] = key
    add_lora(model, raw.get("r", 0), raw.get("lora_alpha", 0), list({name.rpartition(".")[2] for name, _ in names}))
    for name, m in model.named_modules():
        if isinstance(m, Linear) and m.lora_A is not None:
            for which in ("lora_A", "lora_B"):
                key = names.pop((name, which), None)
                here = None if key is None else state[key]
                if here is None or here.shape != getattr(m, which).shape:
                    says = "lacks" if here is None else f"has another shape, {list(here.shape)}, for"
                    raise ValueError(f"{file} {says} {name}.{which}: is it made for this model?")
                with torch.no_grad():
                    getattr(m, which).copy_(here)
    if names:
        raise ValueError(f"{file} holds '{next(iter(names.values()))}', which the model has no place for.")


# --- folders ----------------------------------------------------------------------------------------------------------


def load(name_or_path: str | Path, device: str | None = None, dtype: torch.dtype | None = None):
    """A local Hugging Face folder, or a hub name that is downloaded once -> (model, tokenizer).

    `device`: cuda where there is one, else the CPU. `dtype`: float32 whatever the file holds, because small updates
    vanish in bf16 weights; pass torch.bfloat16 for a frozen model. `tokenizer` is a `tokenizers.Tokenizer`, or None
    when the folder has no tokenizer.json. Raises ValueError or OSError with a sentence that names file and tensor.
    """
    folder = find_folder(name_or_path)
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    generation = read_json(generation) if generation.exists() else None
    config = read_config(raw, str(folder / "config.json"), generation)
    with torch.device("meta"):  # shapes only: no time spent on random numbers that the file replaces
        model = Transformer(config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"There is no device '{device}' here: take cpu, cuda or mps.") from e
    state = read_weights(folder, model, device, dtype or torch.float32)
    model.load_state_dict(state, assign=True)
    model.raw_config = raw
    model.sidecars = {n: (folder / n).read_bytes() for n in SIDECARS if (folder / n).exists()}
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({e}): copy or download it again.") from e
        tokenizer.no_truncation()  # a tokenizer saved by a training run may cut or pad silently
        tokenizer.no_padding()
    return model, tokenizer


def find_folder(name_or_path: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository `owner/name`."""
    path = Path(name_or_path).expanduser()
    if (path / "checkpoint").is_dir() and (path / "model").is_dir():
        return path / "model"  # a run of train.py
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise ValueError(f"{name} is a file: give the folder that holds config.json and model.safetensors.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {name}: give a Hugging Face folder, or a hub name 'owner/name'.")
    return download(name)


def download(name: str) -> Path:
    """The local copy of a hub repository: what is not here yet is fetched, a dropped connection is resumed.

    Only what `load` reads: a repository may hold the same weights in five formats. A busy hub is asked again.
    """
    from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import, needed for names only
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    files = ["config.json", "tokenizer.json", *SIDECARS, "model.safetensors", "model.safetensors.index.json",
             "model-*.safetensors"]
    for wait in (1, 4, 16, None):  # seconds
        try:
            folder = Path(snapshot_download(name, allow_patterns=files))
            break
        except GatedRepoError as e:
            raise OSError(f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
                          f"'hf auth login' or set HF_TOKEN.") from e
        except RepositoryNotFoundError as e:
            raise OSError(f"There is no folder {name}, and the hub shows you no model of that name: check the "
                          f"spelling; if it is private, log in with 'hf auth login' or set HF_TOKEN.") from e
        except Exception as e:  # offline, a full disk, a broken answer: many types, as versions go
            status = getattr(getattr(e.__cause__ or e, "response", None), "status_code", None)
            if wait and status in (429, 500, 502, 503, 504):
                print(f"{name}: the hub answers {status}; trying again in {wait} s.", file=sys.stderr, flush=True)
                time.sleep(wait)
                continue
            if errno.errorcode.get(getattr(e, "errno", None)) in ("ENOSPC", "EDQUOT", "EFBIG"):
                raise OSError(f"There is no room for {name} ({e.strerror}): free some space, or set HF_HOME to a "
                              f"folder on a larger disk. The files that are whole are kept.") from e
            why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise OSError(f"There is no folder {name}, and the hub did not give a model of that name ({why}). "
                          f"Check the spelling and the connection, or pass a local folder.") from e
    if not list(folder.glob("*.safetensors")):
        raise OSError(f"{name} has no model.safetensors on the hub: take a model that has, or convert it with "
                      f"transformers and pass that folder.")
    return folder


def read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a model folder needs config.json and *.safetensors.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}): copy or download it again.") from e
    if not isinstance(value, dict):  # a broken file, not a wrong type in the program
        raise ValueError(f"{path} holds a {type(value).__name__} where an object was expected.")
    return value


def read_weights(folder: Path, model: Transformer, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter of `model` from the folder's safetensors, single or sharded; exactly those, in those shapes."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():  # the single file wins, as it does in transformers
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no 'weight_map': copy or download it again.")
        names = sorted(set(weight_map.values()))
    want = {name: p.shape for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for file in (folder / n for n in names):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: the folder's weights are not complete.")
        try:
            with safe_open(file, framework="pt", device=str(device)) as f:
                for key in f.keys():
                    name = key.removeprefix("model.")
                    if name.endswith("rotary_emb.inv_freq"):  # old files store this table; it is recomputed
                        continue
                    if model.config.tie_word_embeddings and name == "lm_head.weight":
                        name = "embed_tokens.weight"  # a tied matrix may be stored under either name, or both
                        if name in state:
                            continue
                    if name not in want:
                        raise ValueError(f"{file} holds '{key}', which {model.config.model_type} has no place for.")
                    tensor = f.get_tensor(key)
                    if tensor.shape != want[name]:
                        raise ValueError(f"{file}: '{key}' has shape {list(tensor.shape)}, "
                                         f"config.json asks for {list(want[name])}.")
                    state[name] = tensor.to(dtype)
        except SafetensorError as e:
            raise ValueError(f"{file} is not a whole safetensors file ({e}): copy or download it again.") from e
    missing = sorted(want.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, "
                         f"the first is '{missing[0]}'.")
    return state


def save(model: Transformer, tokenizer: Tokenizer | None, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that transformers, vllm and mlx-lm load as it is; `dtype` None keeps the parameters' own.

    Adapters are added to the weights that are written; the model keeps them.
    """
    folder = Path(path)
    merged = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Linear)}
    state = {name if name.startswith("lm_head") else f"model.{name}":
             (effective_weight(merged[name]) if name in merged else p).detach().to("cpu", dtype).contiguous()
             for name, p in model.named_parameters() if not name.endswith(("lora_A", "lora_B"))}
    stored = str(next(iter(state.values())).dtype).removeprefix("torch.")
    raw = dict(model.raw_config)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = stored
    files = {"config.json": json.dumps(raw, indent=2).encode() + b"\n", **model.sidecars}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    write_files({folder / "model.safetensors": lambda part: save_file(state, part, metadata={"format": "pt"}),
                 **{folder / name: lambda part, content=content: part.write_bytes(content)
                    for name, content in files.items()}})
    # Shards that the new file replaces: vllm and mlx-lm would read them instead of it, or beside it.
    for old in (folder / "model.safetensors.index.json", *folder.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    write_files({path: write})


def write_files(files: dict[Path, Callable[[Path], object]]) -> None:
    """Each `write(part)` beside its path, then all renamed: a full disk or a kill while writing leaves the old ones."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files[path](part)
            with open(part, "rb+") as f:
                os.fsync(f.fileno())  # or a power cut could leave a renamed, empty file
            part.chmod(0o644)  # safetensors lets nobody else read what it writes
        for path, part in parts.items():
            os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch.save says RuntimeError when the disk is full
        for part in parts.values():
            if part.exists():
                part.unlink()
        raise OSError(f"Could not write {path} ({(str(e) or type(e).__name__).splitlines()[0]}): what was saved before "
                      f"is untouched. Free some space and try again.") from e
