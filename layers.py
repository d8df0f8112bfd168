"""The pieces of a transformer: norms, rotary positions, attention, convolution, feed-forward, and one layer.

Shapes: N rows (= B prompts x G completions, or just rows), T tokens of this call, S tokens a row has read since its
prompt, P prompt tokens, D hidden size, H query heads, K key/value heads, R = H / K queries that share one key, hd head
size, L width of the convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.folder import Config
from plumbing.products import linear, widen


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
        down = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scale  # [..., rank]
        return y + F.linear(down, self.lora_B).to(y.dtype)


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
    """Angles of rotary position embedding (Su et al. 2021), cos and signed sin [N, T, 1, hd] for positions [N, T].

    Feature pair (i, i + hd/2) of a head turns by position * theta^(-2i/hd): (a, b) -> (a cos - b sin, b cos + a sin),
    so the sin of a pair's first feature has a minus. Angles are float32 (float64 for float64 models): in bf16 position
    1000 and 1001 would be one position.
    """
    exact = torch.promote_types(dtype, torch.float32)
    power = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # [hd/2]
    angle = positions[..., None].to(exact) / (theta ** power).to(exact)  # [N, T, hd/2]
    sin = angle.sin()  # [N, T, hd/2]
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-sin, sin], -1)  # [N, T, hd] each
    return cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)  # [N, T, 1, hd] each


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head of x [N, T, heads, hd] by its position's angles, in the rotate-half layout of Hugging Face."""
    cos, sin = rope  # [N, T, 1, hd] each
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # rolled by half, each feature meets the other of its pair


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, shared=None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v over a row's own tokens and, where there is one, its group's shared prompt.

    q [N, H, T, hd]; k, v [N, K, S, hd]; allowed [N or 1, 1, T, S] bool, None when every key may be seen;
    shared = (k [B, K, P, hd], v, mask [B, P] or None). Returns [N, H, T, hd].

    In training a row asks many questions, and PyTorch's fused attention never writes the scores [T, P+S] down: they
    would be larger than what it wants for that, a copy of the prompt's keys for each row, before the row's own.
    """
    if widen(q):
        shared = shared and (shared[0].float(), shared[1].float(), shared[2])
        return attend(q.float(), k.float(), v.float(), allowed, shared).to(q.dtype)
    (N, H, T, hd), (_, K, S, _) = q.shape, k.shape
    if shared is not None and T == 1:
        return attend_once(q, k, v, allowed, *shared)
    if shared is not None:
        (B, _, P, _), prompt_mask = shared[0].shape, shared[2]
        k, v = (torch.cat([p[:, None].expand(B, N // B, K, P, hd), own.reshape(B, N // B, K, S, hd)], 3).flatten(0, 1)
                for p, own in zip(shared, (k, v)))  # [N, K, P+S, hd] each
        allowed = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device) if allowed is None else allowed
        if prompt_mask is None:
            seen = allowed.new_ones(1, 1, T, P)
        else:
            seen = prompt_mask.repeat_interleave(N // B, 0)[:, None, None].expand(N, 1, T, P)
        n = max(len(seen), len(allowed))  # 1 where nothing is padded: then one mask serves all rows
        allowed = torch.cat([seen.expand(n, 1, T, P), allowed.expand(n, 1, T, S)], 3)  # [N or 1, 1, T, P+S]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=H != K)


def attend_once(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, pk: Tensor, pv: Tensor,
                pmask: Tensor | None) -> Tensor:
    """`attend` for one token of each row, as in sampling, where a copy of the prompt for each row would cost the most.

    q [N, H, 1, hd]; k, v [N, K, S, hd]; pk, pv [B, K, P, hd] and pmask [B, P] or None are the prompt's.
    The G rows of a group ask the same prompt keys, so their queries are laid side by side and meet one copy of them:
    [G*R, hd] x [hd, P] is one large product. Both kinds of scores then share one softmax, which makes this equal to
    plain attention over prompt + own tokens.
    """
    (N, H, _, hd), (_, K, S, _), (B, _, P, _) = q.shape, k.shape, pk.shape
    G, R = N // B, H // K
    q = q.view(N, K, R, hd) * hd ** -0.5  # [N, K, R, hd]
    own = q @ k.transpose(-1, -2)  # [N, K, R, S]
    if allowed is not None:
        own = own.masked_fill(~allowed, -torch.inf)  # allowed [N or 1, 1, 1, S]
    own = own.reshape(B, G, K, R, S).transpose(1, 2)  # [B, K, G, R, S]
    grouped = q.view(B, G, K, R, hd).transpose(1, 2).reshape(B, K, G * R, hd)  # [B, K, G*R, hd]
    prompt = grouped @ pk.transpose(-1, -2)  # [B, K, G*R, P]
    if pmask is not None:
        prompt = prompt.masked_fill(~pmask[:, None, None], -torch.inf)
    scores = torch.cat([prompt.view(B, K, G, R, P), own], -1)  # [B, K, G, R, P+S]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    wp, wo = weights.split([P, S], -1)  # [B, K, G, R, P], [B, K, G, R, S]
    out = (wp.reshape(B, K, G * R, P) @ pv).view(B, K, G, R, hd).transpose(1, 2).reshape(N, K, R, hd)  # [N, K, R, hd]
    return (out + wo.transpose(1, 2).reshape(N, K, R, S) @ v).reshape(N, H, 1, hd)


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
