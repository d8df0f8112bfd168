"""Attention of rows that share prompts, without a copy of the prompt for each row where that would cost much.

Skip it on a first reading: the docstring of `model.Attention` shows the plain lines that it equals.

Shapes: N = B*G rows, G after G of them on each of B prompts; T tokens of this call, S own tokens of a row, P prompt
tokens; H query heads, K key/value heads, hd head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.products import is_slow_bf16


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, prompt: Sequence[Tensor] = (),
           prompt_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v over a row's own tokens and, where there is one, its group's prompt.

    q [N, H, T, hd]; k, v [N, K, S, hd]; allowed [N or 1, 1, T, S] bool, None when every own key may be seen; prompt is
    () or (k, v) [B, K, P, hd]; prompt_mask [B, P] bool, or None. Returns [N, H, T, hd].

    In training a row asks many questions, and PyTorch's fused attention never writes the scores [T, P+S] down. They
    would be larger than what it needs instead: a copy of the prompt's keys for each row, before the row's own. In
    sampling a row asks one question, and the copies would be the larger part: see `attend_once`.
    """
    if is_slow_bf16(q):
        prompt = [p.float() for p in prompt]  # [B, K, P, hd] each
        return attend(q.float(), k.float(), v.float(), allowed, prompt, prompt_mask).to(q.dtype)
    (N, H, T, hd), (_, K, S, _) = q.shape, k.shape
    if prompt and T == 1:
        return attend_once(q, k, v, allowed, prompt[0], prompt[1], prompt_mask)
    if prompt:
        B, _, P, _ = prompt[0].shape
        k, v = (torch.cat([p[:, None].expand(B, N // B, K, P, hd), own.reshape(B, N // B, K, S, hd)], 3).flatten(0, 1)
                for p, own in zip(prompt, (k, v)))  # [N, K, P+S, hd] each
        if allowed is None:
            allowed = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device)  # [1, 1, T, S]
        if prompt_mask is None:
            seen = allowed.new_ones(1, 1, T, P)  # [1, 1, T, P]
        else:
            seen = prompt_mask.repeat_interleave(N // B, 0)[:, None, None].expand(N, 1, T, P)  # [N, 1, T, P]
        n = max(len(seen), len(allowed))  # 1 where nothing is padded: then one mask serves all rows
        allowed = torch.cat([seen.expand(n, 1, T, P), allowed.expand(n, 1, T, S)], 3)  # [N or 1, 1, T, P+S]
    if q.device.type == "mps":  # whose kernels have read strided tensors as if they were not
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=H != K)


def attend_once(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, prompt_k: Tensor, prompt_v: Tensor,
                prompt_mask: Tensor | None) -> Tensor:
    """`attend` for one token of each row, without a copy of the prompt for each row, which would cost the most.

    q [N, H, 1, hd]; k, v [N, K, S, hd]; allowed [N or 1, 1, 1, S] bool or None; of the prompt, k and v [B, K, P, hd]
    and the mask [B, P] bool or None. Returns [N, H, 1, hd].

    The G rows of a group ask the same prompt keys. So their queries are laid side by side and meet one copy of the
    keys: [G*R, hd] x [hd, P] is one large product, R = H / K. The scores of the prompt and those of the own tokens then
    share one softmax, which makes this equal to plain attention over prompt + own tokens.
    """
    (N, H, _, hd), (_, K, S, _), (B, _, P, _) = q.shape, k.shape, prompt_k.shape
    G, R = N // B, H // K
    q = q.view(N, K, R, hd) * hd ** -0.5  # [N, K, R, hd]
    own = q @ k.transpose(-1, -2)  # [N, K, R, S]
    if allowed is not None:
        own = own.masked_fill(~allowed, -torch.inf)  # [N, K, R, S]
    own = own.reshape(B, G, K, R, S).transpose(1, 2)  # [B, K, G, R, S]
    grouped = q.view(B, G, K, R, hd).transpose(1, 2).reshape(B, K, G * R, hd)  # [B, K, G*R, hd]
    prompt = grouped @ prompt_k.transpose(-1, -2)  # [B, K, G*R, P]
    if prompt_mask is not None:
        prompt = prompt.masked_fill(~prompt_mask[:, None, None], -torch.inf)  # [B, K, G*R, P]
    scores = torch.cat([prompt.view(B, K, G, R, P), own], -1)  # [B, K, G, R, P+S]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)  # [B, K, G, R, P+S]
    of_prompt, of_own = weights.split([P, S], -1)  # [B, K, G, R, P], [B, K, G, R, S]
    out = (of_prompt.reshape(B, K, G * R, P) @ prompt_v).view(B, K, G, R, hd)  # [B, K, G, R, hd]
    out = out.transpose(1, 2).reshape(N, K, R, hd)  # [N, K, R, hd]
    return (out + of_own.transpose(1, 2).reshape(N, K, R, S) @ v).reshape(N, H, 1, hd)
