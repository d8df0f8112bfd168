"""The policy: a decoder-only transformer that reads and writes Hugging Face folders.

    x = E[tokens]                                      embedding                     [N, T, D]
    x = x + operator(norm(x));  x = x + mlp(norm(x))   once a layer                  [N, T, D]
    logits = norm(x) E^T                               or a head in place of E       [N, T, V]

One class serves four families. `qwen2`, `qwen3` and `llama` differ by three switches (a bias on q, k and v; a norm on
q and k; an explicit head size) that the folder's `config.json` sets. `lfm2` has a short convolution in place of
attention on most layers. Modules have the same names for all; a table in `plumbing/folder.py` translates them into the
files' names. What changes only speed or memory stands in `plumbing/` too. Adapters (LoRA) are made in `lora.py`.

Shapes: N rows (= B prompts x G completions, or just rows), T tokens of this call, S tokens a row has read since its
prompt (those of this call included), P prompt tokens, V vocabulary, D hidden size, H query heads, K key/value heads,
hd head size, L width of LFM2's convolution.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from plumbing.attention import attend
from plumbing.folder import ModelConfig, read_config, read_model, write_model
from plumbing.logprobs import sliced_logprobs
from plumbing.products import linear, packed, to_logits
from plumbing.recompute import recomputed

__all__ = ["Cache", "Context", "ModelConfig", "Transformer", "load", "pad", "read_config", "save", "to_logits",
           "token_logprobs"]


@dataclass
class Context:
    """What a layer is told beside its input x [N, T, D].

    The first four fields are the same for all layers. The last two are what this very layer remembers: (k, v) for
    attention, (last values of g,) for a convolution, and () where there is nothing to remember.
    """

    rope: tuple[Tensor, Tensor]  # cos and signed sin of every token's position, [N, T, 1, hd] each
    allowed: Tensor | None  # [N or 1, 1, T, S] bool: which of the row's own tokens a token may see; None: all of them
    mask: Tensor | None  # [N, T] bool: False on padding; None: no padding in this call
    prompt_mask: Tensor | None  # [B, P] bool, likewise of the prompts
    prompt: tuple[Tensor, ...] = ()  # of the B prompts: k, v [B, K, P, hd], or g [B, L-1, D]
    past: tuple[Tensor, ...] = ()  # of the rows' tokens before this call: k, v [N, K, S-T, hd], or g [N, L-1, D]


class Linear(nn.Linear):
    """y = W x + b, and with an adapter (`lora.add_lora`) y = W x + b + alpha/rank B A x."""

    def __init__(self, size_in: int, size_out: int, bias: bool):
        super().__init__(size_in, size_out, bias)
        self.lora_A: nn.Parameter | None = None  # [rank, in] once there is an adapter
        self.lora_B: nn.Parameter | None = None  # [out, rank]
        self.lora_scale, self.lora_on = 0.0, True  # alpha / rank; whether the adapter is used

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)  # [..., out]: F.linear, or what this machine does faster
        if self.lora_A is None or self.lora_B is None or not self.lora_on:
            return y
        # In the adapter's own precision: it is float32 over bf16 weights, or small updates would be rounded away.
        down = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.lora_scale  # [..., rank]
        return y + F.linear(down, self.lora_B).to(y.dtype)

    def merged(self) -> Tensor:
        """W + alpha/rank B A [out, in], in the adapter's float32, for bf16 would lose it; without an adapter, W."""
        if self.lora_A is None or self.lora_B is None:
            return self.weight
        return self.weight.to(self.lora_A.dtype) + self.lora_scale * self.lora_B @ self.lora_A


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019). In float32: bf16 squares lose the small features."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))  # [size]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.dtype == torch.float64 else x.float()  # [..., size]
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)  # [..., size]
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


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads read K key/value heads, H / K to each.

    `attend` gives softmax(q k^T / sqrt(hd)) v. Where G rows share each prompt it is faster than these lines, and equal:

        k, v = (torch.cat([p.repeat_interleave(G, 0), x], 2) for p, x in zip(prompt, (k, v)))  # [N, K, P+S, hd] each
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))  # [N, H, P+S, hd] each
        seen = prompt_mask.repeat_interleave(G, 0)[:, None, None].expand(N, 1, T, P)  # [N, 1, T, P]
        allowed = torch.cat([seen, allowed.expand(N, 1, T, S)], -1)  # [N, 1, T, P+S]
        read = (q @ k.mT / hd ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v  # [N, H, T, hd]
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.qk_norm = c.qk_norm  # Qwen3 and LFM2: over each head's features, before the rotation
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [N, T, D] -> ([N, T, D], (k, v) of all the row's own tokens [N, K, S, hd])."""
        N, T, _ = x.shape
        q = self.q_proj(x).view(N, T, -1, self.head_dim)  # [N, T, H, hd]
        k = self.k_proj(x).view(N, T, -1, self.head_dim)  # [N, T, K, hd]
        v = self.v_proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)  # [N, K, T, hd]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, context.rope).transpose(1, 2).contiguous()  # [N, H, T, hd]
        k = rotate(k, context.rope).transpose(1, 2)  # [N, K, T, hd]
        if context.past:
            k, v = (torch.cat([old, new], 2) for old, new in zip(context.past, (k, v)))  # [N, K, S, hd] each
        read = attend(q, k, v, allowed=context.allowed, prompt=context.prompt,
                      prompt_mask=context.prompt_mask)  # [N, H, T, hd]
        return self.o_proj(read.transpose(1, 2).reshape(N, T, -1)), (k, v)


class ShortConv(nn.Module):
    """LFM2's other operator (Liquid AI 2025): b, c, u = in_proj(x); g = b u; out_proj(c conv(g)).

    conv is depthwise and causal, conv(g)_t = sum_j w_j g_(t-L+1+j). So it remembers a row's last L - 1 values of g.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        D = c.hidden_size
        self.in_proj = Linear(D, 3 * D, bias=c.conv_bias)
        self.conv = nn.Conv1d(D, D, c.conv_L_cache, groups=D, bias=c.conv_bias)  # weight [D, 1, L]
        self.out_proj = Linear(D, D, bias=c.conv_bias)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, tuple[Tensor]]:
        """x [N, T, D] -> ([N, T, D], (the last L-1 real values of g [N, L-1, D],)).

        The convolution must see a row's real tokens side by side, whatever padding stands between them. So they are
        moved to the row's front, behind what the row (or its prompt) remembers, and back to their places afterwards.
        """
        (N, T, D), L, mask = x.shape, self.conv.kernel_size[0], context.mask
        b, c, u = self.in_proj(x).chunk(3, -1)  # [N, T, D] each
        g = b * u  # [N, T, D]
        if mask is not None:
            order = mask.long().argsort(dim=1, descending=True, stable=True)[..., None].expand(N, T, D)  # [N, T, D]
            g = g.gather(1, order)  # [N, T, D]
        if context.past:
            before = context.past[0]  # [N, L-1, D]
        elif context.prompt:
            before = context.prompt[0].repeat_interleave(N // len(context.prompt[0]), 0)  # [N, L-1, D]
        else:
            before = g.new_zeros(N, L - 1, D)  # [N, L-1, D]
        g = torch.cat([before, g], 1)  # [N, L-1+T, D]
        # L products instead of conv1d: as fast in float32, and several times faster in bf16 on a CPU.
        y = sum(self.conv.weight[:, 0, j] * g[:, j:j + T] for j in range(L))  # [N, T, D]
        if self.conv.bias is not None:
            y = y + self.conv.bias  # [N, T, D]
        if mask is None:
            last = g[:, T:]  # [N, L-1, D]
        else:
            y = g.new_zeros(N, T, D).scatter(1, order, y)  # [N, T, D], back to where the tokens stand
            at = mask.sum(1, keepdim=True) + torch.arange(L - 1, device=x.device)  # [N, L-1]
            last = g.gather(1, at[..., None].expand(N, L - 1, D))  # [N, L-1, D]
        return self.out_proj(c * y), (last,)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x += operator(norm(x)); x += mlp(norm(x)). The operator mixes tokens, the feed-forward network features."""

    def __init__(self, c: ModelConfig, kind: str):
        super().__init__()
        self.operator_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.operator = ShortConv(c) if kind == "conv" else Attention(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [N, T, D] -> ([N, T, D], what the operator will remember of these rows)."""
        read, past = self.operator(self.operator_norm(x), context)
        x = x + read  # [N, T, D]
        return x + self.mlp(self.mlp_norm(x)), past


# --- the model and its memory -----------------------------------------------------------------------------------------


class Cache:
    """What a decoder remembers, per layer: of `shared` prompts, and of each row's `own` tokens since.

    Attention remembers keys and values, [B, K, P, hd] and [N, K, S, hd]. A convolution remembers its last values of g,
    [B, L-1, D] and [N, L-1, D]; a row's own ones reach back into its prompt once the row has read a token.

    Fill it by passing it to `model.hidden`; `share(G)` turns everything read so far into a prompt for G rows each.
    Nothing is written in place, so gradients flow through it: training runs a prompt once for a whole group.
    """

    def __init__(self):
        self.shared = self.own = None  # lists of (k, v) or (g,), one a layer
        self.shared_mask = self.own_mask = None  # [B, P], [N, S] bool; None: no padding in there
        self.lengths = 0  # real tokens that each row has read: a number, or [N, 1]
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
        def pick(layer, index):
            return tuple(t.index_select(0, index) for t in layer)

        if len(prompts) < len(self.shared[0][0]):  # prompts are the large half: copied only when a whole group is done
            self.shared = [pick(layer, prompts) for layer in self.shared]
            self.shared_mask = self.shared_mask if self.shared_mask is None else self.shared_mask[prompts]  # [B', P]
        if self.own is not None:
            self.own = [pick(layer, rows) for layer in self.own]
        self.own_mask = self.own_mask if self.own_mask is None else self.own_mask[rows]  # [N', S]
        self.lengths = self.lengths[rows] if torch.is_tensor(self.lengths) else self.lengths

    def positions(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Where the next tokens [N, T] stand in their rows -> [N, T]. Padding takes no place. They are read now."""
        (N, T), read = tokens.shape, self.lengths
        if mask is None:
            self.lengths = read + T
            return (torch.arange(T, device=tokens.device) + read).expand(N, T)
        self.lengths = read + mask.sum(1, keepdim=True)  # [N, 1]
        return (mask.cumsum(1) - 1).clamp(min=0) + read

    def allowed(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which of their row's own tokens the next tokens [N, T] may see -> [N or 1, 1, T, S] bool, None: all of them.

        A token sees itself and what came before it, padding left out. From now on they count among the own tokens.
        """
        (N, T), device, before = tokens.shape, tokens.device, self.columns
        self.columns = S = before + T
        if mask is not None or self.own_mask is not None:
            real = torch.ones(N, S, dtype=torch.bool, device=device)  # [N, S]
            old = real[:, :before] if self.own_mask is None else self.own_mask  # [N, S-T]
            new = real[:, before:] if mask is None else mask.bool()  # [N, T]
            self.own_mask = torch.cat([old, new], 1)  # [N, S]
        if T == 1 and self.own_mask is None:
            return None
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(before)  # [T, S]
        if self.own_mask is None:
            return causal[None, None]
        # A padded query would see no key at all, and a softmax over nothing is NaN: let it see itself.
        itself = torch.eye(T, S, dtype=torch.bool, device=device).roll(before, 1)  # [T, S]
        return (causal & self.own_mask[:, None] | itself)[:, None]


class Transformer(nn.Module):
    """Token ids in, logits out; `hidden` stops before the logits, which would be the largest tensor by far."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.raw_config: dict = {}  # config.json as it was read, for `save`
        self.sidecars: dict[str, bytes] = {}  # files of the folder that pass through unchanged
        self.checkpointing = False  # compute each layer again in backward: less memory, about a third more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]; the embedding itself when the two are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens [N, T] (mask [N, T]: True where a token is real) -> logits [N, T, V]."""
        return linear(self.hidden(tokens, mask=mask), self.head)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """tokens [N, T] -> final hidden states [N, T, D]; with a cache, tokens continue what it has read.

        mask [N, T] bool is False on padding, left or right: nobody attends to it and it takes no position. Its own
        hidden states are meaningless.
        """
        remember, cache = cache is not None, Cache() if cache is None else cache
        x = self.embed_tokens(tokens)  # [N, T, D]
        rope = rope_table(cache.positions(tokens, mask), self.config.head_dim, self.config.rope_theta, x.dtype)
        allowed = cache.allowed(tokens, mask)  # [N or 1, 1, T, S] or None
        recompute = self.checkpointing and torch.is_grad_enabled()
        memory = []
        for i, layer in enumerate(self.layers):
            prompt = cache.shared[i] if cache.shared else ()
            past = cache.own[i] if cache.own else ()
            context = Context(rope=rope, allowed=allowed, mask=mask, prompt_mask=cache.shared_mask,
                              prompt=prompt, past=past)
            x, own = recomputed(layer, x, context) if recompute else layer(x, context)  # x [N, T, D]
            memory.append(own if remember else ())  # without a cache nobody will ask for a layer's keys: let them go
        cache.own = memory
        return self.norm(x)

    def packed(self, rows: int, times: int) -> AbstractContextManager[None]:
        """Inside, x W^T with the model's large matrices reads copies that are fast for few rows (`products.packed`)."""
        return packed((*(m.weight for m in self.modules() if isinstance(m, Linear)), self.head), rows, times)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is its own base, bit for bit: the KL's `ref_model` for free. No change without adapters.
        A backward pass under `checkpointing` runs layers again, so it belongs inside as well."""
        before = {m: m.lora_on for m in self.modules() if isinstance(m, Linear)}
        try:
            for m in before:
                m.lora_on = False
            yield
        finally:
            for m, on in before.items():
                m.lora_on = on

    def merged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter as a plain model has it: adapters are in the weights that they change."""
        linears = {f"{name}.weight": m for name, m in self.named_modules() if isinstance(m, Linear)}
        for name, p in self.named_parameters():
            if not name.endswith(("lora_A", "lora_B")):
                yield name, linears[name].merged() if name in linears else p


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [n_i] -> (padded on the right with 0, mask), both [len(rows), max n_i]."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # [rows, max n_i]
    lengths = torch.tensor([len(r) for r in rows], device=padded.device)  # [rows]
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor, temperature: float = 1.0,
                   words: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [..., T, D], targets [..., T] -> (logp, entropy) in nats, each [..., T], float32. It equals

        log_p = (hidden @ model.head.T / temperature).log_softmax(-1)       # [..., T, V]
        logp = log_p.gather(-1, targets[..., None]).squeeze(-1)             # [..., T]
        entropy = -(log_p.exp() * log_p).sum(-1).detach()                   # [..., T]

    but [..., T, V], the largest tensor of a step, never exists. Only the logits of `words` words of the vocabulary do
    (0: so many that they, and their rows of the head, take 16 MiB at most); `plumbing/logprobs.py` shows how.

    `hidden[..., t, :]` is the state that predicts `targets[..., t]`. The temperature is the sampler's: it divides the
    logits here as it did there, otherwise the policy that is trained is not the policy that acted. `entropy` is for
    looking at and carries no gradient. Raises ValueError for a temperature of 0: a greedy policy has no logp.
    """
    if temperature <= 0:
        raise ValueError(f"token_logprobs needs a temperature above 0, not {temperature}: a greedy policy has no logp.")
    rows = hidden.reshape(-1, hidden.shape[-1])  # [M, D]
    words = words or max(1, 2 ** 22 // max(*rows.shape, 1))
    logp, entropy = sliced_logprobs(rows, model.head, targets.reshape(-1), temperature=temperature, words=words)
    return logp.view(targets.shape), entropy.view(targets.shape)


def load(name_or_path: str | Path, device: str | None = None,
         dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    """A local Hugging Face folder, a run's folder, or a hub name that is downloaded once -> (model, tokenizer).
    `device`: cuda where there is one, else the CPU. `dtype`: float32 whatever the file holds, because small updates
    vanish in bf16 weights; pass torch.bfloat16 for a frozen model. `tokenizer` is a `tokenizers.Tokenizer`, or None
    when the folder has no tokenizer.json. Raises ValueError or OSError with a sentence that names file and tensor.
    """
    return read_model(Transformer, name_or_path, device, dtype)


def save(model: Transformer, tokenizer: Tokenizer | None, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that transformers, vllm and mlx-lm load as it is; `dtype` None: the widest of the parameters'.

    Adapters are added to the weights that are written; the model keeps them. Raises OSError; old files then stay whole.
    """
    write_model(model, tokenizer, path, dtype)

# Next: config.py, every knob and why it has its value
