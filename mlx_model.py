"""The policy in MLX, Apple's library for its own chips: `model.py` and `rollout.sample` once more.

Read it beside them, for order and names are theirs. Comments here say where MLX differs, and why. Shared are the
folder's config, names and files, and of the sampler all that sees no model: random numbers, the draw, the groups. So
each backend reads the folders of the other, and one seed gives the same tokens in both.

MLX in four sentences. A line only notes what is to be computed: `mx.eval`, or looking at a number, computes it. Arrays
cannot be read through a mask of bools, and an index out of bounds goes unnoticed, so whatever decides shapes (masks,
lengths, indices) is numpy here. Nothing carries a gradient unless `mx.value_and_grad` asks for one. CPU and GPU share
their memory: there is no device to name. (Shapes: `model.py`'s; R = H / K query heads read one key/value head.)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from tokenizers import Tokenizer

from plumbing.folder import ModelConfig
from plumbing.mlx_arrays import attend, mx, nn, put, read_model, recomputed, to_mlx, to_torch, tree_flatten, write_model
from plumbing.prompts import spelt as _spelt
from rollout import Group, check_request, draw, drop_finished, random_numbers, split

__all__ = ["Cache", "Context", "Transformer", "load", "pad", "sample", "save", "to_logits", "to_mlx", "to_torch"]


@dataclass
class Context:
    """What a layer is told beside its input x [N, T, D]: see `model.Context`."""

    periods: mx.array  # [hd/2] of the rotary embedding
    offset: int | mx.array  # [N]: the position of the first token of this call
    allowed: mx.array | str | None  # [N or 1, 1, T, S] bool; "causal": all before and itself; None: all of them
    mask: np.ndarray | None  # [N, T] bool: False on padding; None: no padding in this call
    prompt_mask: np.ndarray | None  # [B, P] bool, likewise of the prompts
    columns: int  # S - T: columns of `past` that hold something; behind them is room
    prompt: tuple[mx.array, ...] = ()  # of the B prompts: k, v [B, K, P, hd], or g [B, L-1, D]
    past: tuple[mx.array, ...] = ()  # of the rows' tokens before this call: k, v [N, K, >= S-T, hd], or g [N, L-1, D]


class Linear(nn.Linear):
    """y = W x + b, and with an adapter y = W x + b + alpha/rank B A x. Every array in a module is a parameter of it."""

    def __init__(self, size_in: int, size_out: int, bias: bool):
        super().__init__(size_in, size_out, bias)
        self.lora_A = self.lora_B = None  # [rank, in], [out, rank]: parameters once they are arrays
        self.lora_scale, self.lora_on = 0.0, True  # alpha / rank; whether the adapter is used

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)  # [..., out]
        if self.lora_A is None or not self.lora_on:
            return y
        down = x.astype(self.lora_A.dtype) @ self.lora_A.T * self.lora_scale  # [..., rank], float32 over bf16 weights
        return y + (down @ self.lora_B.T).astype(y.dtype)

    def merged(self) -> mx.array:
        """W + alpha/rank B A [out, in], in the adapter's float32; without an adapter, W."""
        if self.lora_A is None:
            return self.weight
        return self.weight.astype(self.lora_A.dtype) + self.lora_scale * self.lora_B @ self.lora_A


RMSNorm = nn.RMSNorm  # one kernel, which squares and adds in float32 whatever x is


def rope_table(head_dim: int, theta: float) -> mx.array:
    """The periods theta^(2i/hd) [hd/2] that positions are divided by. `mx.fast.rope` would make them itself, but twice
    as far from the exact angles at position 30,000."""
    return mx.array(np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim))  # [hd/2]


def rotate(x: mx.array, context: Context) -> mx.array:
    """Turn every head of x [N, heads, T, hd] by its position's angles, with one kernel. It counts positions from each
    row's offset on, which is enough for padding on the left or on the right."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=context.offset,
                        freqs=context.periods)


class Attention(nn.Module):
    """Grouped-query attention: H query heads read K key/value heads."""

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

    def __call__(self, x: mx.array, context: Context) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """x [N, T, D] -> ([N, T, D], (k, v) of all the row's own tokens [N, K, >= S, hd], room behind them)."""
        N, T, _ = x.shape
        q = self.q_proj(x).reshape(N, T, -1, self.head_dim)  # [N, T, H, hd]
        k = self.k_proj(x).reshape(N, T, -1, self.head_dim)  # [N, T, K, hd]
        v = self.v_proj(x).reshape(N, T, -1, self.head_dim).swapaxes(1, 2)  # [N, K, T, hd]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.swapaxes(1, 2), context)  # [N, H, T, hd]
        k = rotate(k.swapaxes(1, 2), context)  # [N, K, T, hd]
        S, past = context.columns + T, (k, v)
        if context.past:
            past = tuple(put(old, new, context.columns) for old, new in zip(context.past, past))
            k, v = (x[:, :, :S] for x in past)  # [N, K, S, hd] each
        read = attend(q, k, v, allowed=context.allowed, prompt=context.prompt,
                      prompt_mask=context.prompt_mask)  # [N, H, T, hd]
        return self.o_proj(read.swapaxes(1, 2).reshape(N, T, -1)), past


class ShortConv(nn.Module):
    """LFM2's other operator: b, c, u = in_proj(x); g = b u; out_proj(c conv(g)). It remembers the last L-1 of g."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        D = c.hidden_size
        self.in_proj = Linear(D, 3 * D, bias=c.conv_bias)
        self.conv = nn.Module()  # weight [D, 1, L] as in files, where MLX's own layer would have [D, L, 1]
        self.conv.weight = mx.zeros((D, 1, c.conv_L_cache))  # [D, 1, L]
        if c.conv_bias:
            self.conv.bias = mx.zeros(D)  # [D]
        self.out_proj = Linear(D, D, bias=c.conv_bias)

    def __call__(self, x: mx.array, context: Context) -> tuple[mx.array, tuple[mx.array]]:
        """x [N, T, D] -> ([N, T, D], (the last L-1 real values of g [N, L-1, D],)). The convolution sees real tokens
        side by side: they are moved to the row's front, and back to their places afterwards."""
        (N, T, D), L, mask = x.shape, self.conv.weight.shape[-1], context.mask
        b, c, u = mx.split(self.in_proj(x), 3, -1)  # [N, T, D] each
        g = b * u  # [N, T, D]
        if mask is not None:
            order = np.argsort(~mask, axis=1, kind="stable")  # [N, T]
            g = mx.take_along_axis(g, mx.array(order)[..., None], 1)  # [N, T, D]
        if context.past:
            before = context.past[0]  # [N, L-1, D]
        elif context.prompt:
            before = mx.repeat(context.prompt[0], N // len(context.prompt[0]), 0)  # [N, L-1, D]
        else:
            before = mx.zeros((N, L - 1, D), g.dtype)  # [N, L-1, D]
        g = mx.concatenate([before, g], 1)  # [N, L-1+T, D]
        y = sum(self.conv.weight[:, 0, j] * g[:, j:j + T] for j in range(L))  # [N, T, D]
        if "bias" in self.conv:
            y = y + self.conv.bias  # [N, T, D]
        if mask is None:
            last = g[:, T:]  # [N, L-1, D]
        else:
            y = mx.take_along_axis(y, mx.array(np.argsort(order, axis=1))[..., None], 1)  # [N, T, D], back in place
            at = mask.sum(1, keepdims=True) + np.arange(L - 1)  # [N, L-1]
            last = mx.take_along_axis(g, mx.array(at)[..., None], 1)  # [N, L-1, D]
        return self.out_proj(c * y), (last,)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)  # [N, T, intermediate]
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))  # nn.silu: g++ at run time on Linux


class Layer(nn.Module):
    """x += operator(norm(x)); x += mlp(norm(x))."""

    def __init__(self, c: ModelConfig, kind: str):
        super().__init__()
        self.operator_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.operator = ShortConv(c) if kind == "conv" else Attention(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x: mx.array, context: Context) -> tuple[mx.array, tuple[mx.array, ...]]:
        """x [N, T, D] -> ([N, T, D], what the operator will remember of these rows)."""
        read, past = self.operator(self.operator_norm(x), context)
        x = x + read  # [N, T, D]
        return x + self.mlp(self.mlp_norm(x)), past


# --- the model and its memory -----------------------------------------------------------------------------------------


class Cache:
    """What a decoder remembers, per layer: of `shared` prompts, and of each row's `own` tokens since, with room behind.
    Masks and lengths are numpy."""

    def __init__(self):
        self.shared = self.own = None  # lists of (k, v) or (g,), one a layer
        self.shared_mask = self.own_mask = None  # [B, P], [N, S] bool; None: no padding in there
        self.lengths = 0  # real tokens that each row has read: a number, or [N]
        self.columns = 0  # S, padding included

    def share(self, G: int) -> "Cache":
        """The B rows read so far become prompts; the next call brings B*G rows, G after G."""
        if self.shared is not None:
            raise ValueError("This cache has been shared before: its prompt would be lost. Start from a new Cache.")
        self.shared = [tuple(x[:, :, :self.columns] if x.ndim == 4 else x for x in layer) for layer in self.own]
        self.own, self.columns = None, 0
        self.shared_mask, self.own_mask = self.own_mask, None
        if not isinstance(self.lengths, int):
            self.lengths = self.lengths.repeat(G)  # [N]
        return self

    def keep(self, prompts: np.ndarray | torch.Tensor, rows: np.ndarray | torch.Tensor) -> None:
        """Drop what is finished: keep these prompts [B'] and these rows [N'] (B' groups of equal size, in order)."""
        def pick(layer, index):
            return tuple(mx.take(x, mx.array(index), 0) for x in layer)

        prompts, rows = np.asarray(prompts), np.asarray(rows)
        if len(prompts) < len(self.shared[0][0]):
            self.shared = [pick(layer, prompts) for layer in self.shared]
            self.shared_mask = self.shared_mask if self.shared_mask is None else self.shared_mask[prompts]  # [B', P]
        if self.own is not None:
            self.own = [pick(layer, rows) for layer in self.own]
        self.own_mask = self.own_mask if self.own_mask is None else self.own_mask[rows]  # [N', S]
        self.lengths = self.lengths if isinstance(self.lengths, int) else self.lengths[rows]  # [N']

    def offset(self, T: int, mask: np.ndarray | None) -> int | mx.array:
        """Where the next T tokens begin in their rows: a number, or [N]. Only real ones count, and now they are read.
        A row that is padded on the left begins as much earlier, even below 0, so that its real tokens stand right."""
        read = self.lengths
        if mask is None:
            self.lengths = read + T
        else:
            if (mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)).max() > 1:  # real tokens begin more than once
                raise ValueError("MLX counts positions by itself: pad on the left or on the right, not in the middle.")
            self.lengths = read + mask.sum(1)  # [N]
            read = read - mask.argmax(1)  # [N]
        return read if isinstance(read, int) else mx.array(read.astype(np.int32))

    def allowed(self, N: int, T: int, mask: np.ndarray | None) -> mx.array | str | None:
        """Which of their row's own tokens the next T tokens may see -> [N or 1, 1, T, S] bool, None: all of them.
        "causal" where nothing is padded or shared: MLX has a kernel for it, and no mask is made."""
        before = self.columns
        self.columns = S = before + T
        if mask is not None or self.own_mask is not None:
            real = np.ones((N, S), dtype=bool)  # [N, S]
            old = real[:, :before] if self.own_mask is None else self.own_mask  # [N, S-T]
            new = real[:, before:] if mask is None else mask  # [N, T]
            self.own_mask = np.concatenate([old, new], 1)  # [N, S]
        if self.own_mask is None and (T == 1 or self.shared is None):
            return None if T == 1 else "causal"
        causal = np.tri(T, S, before, dtype=bool)  # [T, S]
        if self.own_mask is None:
            return mx.array(causal[None, None])
        itself = np.eye(T, S, before, dtype=bool)  # [T, S], or padding would see no key at all
        return mx.array((causal & self.own_mask[:, None] | itself)[:, None])


class Transformer(nn.Module):
    """Token ids in, logits out. Its parameters have the names and shapes of `model.Transformer`'s."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.raw_config: Mapping = MappingProxyType({})  # read only: a plain dict would count as parameters
        self.sidecars: Mapping[str, bytes] = MappingProxyType({})
        self.checkpointing = False  # compute each layer again in backward; set it where there is one, and only there
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, kind) for kind in config.layer_types]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> mx.array:
        """The output matrix [V, D]; the embedding itself when the two are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def __call__(self, tokens, mask: np.ndarray | None = None) -> mx.array:
        """tokens [N, T] (mask [N, T]: True where a token is real) -> logits [N, T, V]."""
        return self.hidden(tokens, mask=mask) @ self.head.T

    def hidden(self, tokens, cache: Cache | None = None, mask: np.ndarray | None = None) -> mx.array:
        """tokens [N, T] (numpy or MLX) -> final hidden states [N, T, D]; with a cache they continue what it has read.
        mask [N, T] bool, numpy, is False on padding, left or right. Hidden states of padding are meaningless."""
        remember, cache = cache is not None, Cache() if cache is None else cache
        mask = mask if mask is None else np.asarray(mask, dtype=bool)  # [N, T]
        (N, T), before = tokens.shape, cache.columns
        x = self.embed_tokens(mx.array(tokens))  # [N, T, D]
        same = Context(periods=rope_table(self.config.head_dim, self.config.rope_theta), offset=cache.offset(T, mask),
                       allowed=cache.allowed(N, T, mask), mask=mask, prompt_mask=cache.shared_mask, columns=before)
        memory = []
        for i, layer in enumerate(self.layers):
            context = replace(same, prompt=cache.shared[i] if cache.shared else (),
                              past=cache.own[i] if cache.own else ())
            x, own = recomputed(layer, x, context) if self.checkpointing else layer(x, context)  # x [N, T, D]
            memory.append(own if remember else ())
        cache.own = memory
        return self.norm(x)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is its own base, bit for bit. What is computed must be evaluated, or noted, inside."""
        before = [(m, m.lora_on) for m in self.modules() if isinstance(m, Linear)]
        try:
            for m, _ in before:
                m.lora_on = False
            yield
        finally:
            for m, on in before:
                m.lora_on = on

    def merged_parameters(self) -> Iterator[tuple[str, mx.array]]:
        """(name, array) of every parameter as a plain model has it: adapters are in the weights that they change."""
        linears = {f"{name}.weight": m for name, m in self.named_modules() if isinstance(m, Linear)}
        for name, p in tree_flatten(self.parameters()):
            if not name.endswith(("lora_A", "lora_B")):
                yield name, linears[name].merged() if name in linears else p


def to_logits(h: mx.array, head: mx.array) -> mx.array:
    """States [n, D] and output matrix [V, D] -> logits [n, V], float32 products even of bf16: rounded to 8 bits, two
    words of a vocabulary would often be one."""
    return h.astype(mx.float32) @ head.astype(mx.float32).T


def pad(rows: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [n_i] -> (padded on the right with 0, mask), both numpy [len(rows), max n_i]."""
    mask = np.arange(max(len(r) for r in rows)) < np.array([len(r) for r in rows])[:, None]  # [rows, max n_i]
    padded = np.zeros(mask.shape, dtype=np.int32)  # [rows, max n_i]
    padded[mask] = np.concatenate([np.asarray(r) for r in rows])
    return padded, mask


def load(name_or_path: str | Path, dtype: mx.Dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    """A local Hugging Face folder, a run's folder, or a hub name -> (model, tokenizer); as `model.load`. `dtype` None:
    float32 whatever the file holds; or mx.bfloat16. Raises ValueError or OSError with a sentence that names file and
    tensor."""
    return read_model(Transformer, name_or_path, dtype)


def save(model: Transformer, tokenizer: Tokenizer | None, path: str | Path, dtype: mx.Dtype | None = None) -> None:
    """Write a folder that torch's `model.load`, transformers and mlx-lm load as it is; `dtype` None: the widest of the
    parameters'. Adapters are added to the weights that are written. Raises OSError; old files then stay whole."""
    write_model(model, tokenizer, path, dtype)


# --- rollout.py: prompts in, groups of completions out ----------------------------------------------------------------


def sample(model: Transformer, prompts: Sequence, G: int, max_new_tokens: int, temperature: float = 1.0,
           top_p: float = 1.0, top_k: int = 0, stop_ids: Sequence[int] | None = None, seed: int = 0,
           tokenizer: Tokenizer | None = None, stop_text: str = "") -> list[Group]:
    """B prompts (sequences of token ids, any lengths) -> B groups of G completions: arguments and promises as in
    `rollout.sample`, and the same tokens from the same seed, in float32 and but for a rare tie.

    MLX computes the logits. The rest is rollout's own, on the CPU: a token must get there anyway, to be looked at, and
    the draw adds in float64, which Apple's GPU lacks. So groups are torch's, and tasks and rewards see no difference.
    """
    prompts = [torch.as_tensor(p, dtype=torch.long).cpu() for p in prompts]  # B x [P_b]
    check_request(prompts, model.config, G, max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    if stop_text and tokenizer is None:
        raise ValueError("A stop text is looked for in decoded text: pass the tokenizer.")
    B, N = len(prompts), len(prompts) * G
    stop = torch.tensor(sorted(model.config.eos_token_ids if stop_ids is None else stop_ids))  # [stops]
    noise = random_numbers(prompts, G, max_new_tokens, seed, torch.device("cpu"))  # [N, T]
    head = model.head.astype(mx.float32)  # [V, D], widened once and not at every token

    cache = Cache()  # each prompt is read once; then its keys and values serve G rows
    logits = to_torch(read_prompts(model, prompts, cache, head)).repeat_interleave(G, 0)  # [N, V]
    cache.share(G)

    tokens = torch.zeros(N, max_new_tokens, dtype=torch.long)  # [N, T]
    mask = torch.zeros(N, max_new_tokens, dtype=torch.bool)  # [N, T]
    logp = torch.zeros(N, max_new_tokens)  # [N, T] float32
    stopped = torch.zeros(N, dtype=torch.bool)  # [N]
    ending = torch.zeros(N, dtype=torch.long)  # [N] tokens that spell the stop text
    rows = torch.arange(N)  # [n] which of the N rows each row of the batch is
    alive = torch.ones(B, G, dtype=torch.bool)  # [b, g] True: still writing; False: finished, a filler
    for t in range(max_new_tokens):
        token, token_logp = draw(logits, noise[rows, t], temperature, top_k, top_p)  # [n], [n]
        live = alive.flatten()  # [n]
        tokens[rows, t] = token * live
        logp[rows, t] = token_logp.where(live, 0.0)
        mask[rows, t] = live
        ends = live & torch.isin(token, stop)  # [n]
        if stop_text and tokenizer is not None:
            spelt = torch.tensor(_spelt(tokenizer, stop_text, tokens[rows, :t + 1])).where(live & ~ends, 0)  # [n]
            ending[rows] += spelt
            ends |= spelt > 0
        stopped[rows] |= ends
        alive &= ~ends.view_as(alive)
        left = alive.sum(1).tolist()  # rows of each prompt
        if not any(left) or t + 1 == max_new_tokens:
            break
        alive, rows, token = drop_finished(cache, alive, left, rows, token)  # [b, g], [n], [n]
        logits = to_logits(model.hidden(token[:, None].numpy(), cache)[:, 0], head)  # [n, V]
        mx.eval(logits, cache.own)  # the memory too: what is not computed keeps alive all that it would be made of
        logits = to_torch(logits)  # [n, V]
    mx.clear_cache()  # MLX keeps freed memory by its size, and these sizes come once

    return split(prompts, G, tokenizer, tokens=tokens, mask=mask, logp=logp, stopped=stopped,
                 ending=ending if stop_text else None)


def read_prompts(model: Transformer, prompts: Sequence, cache: Cache, head: mx.array) -> mx.array:
    """B prompts of [P_b] tokens into the cache, each of them once -> the logits of what comes next [B, V]."""
    padded, mask = pad(prompts)  # [B, P], [B, P]
    hidden = model.hidden(padded, cache, None if mask.all() else mask)  # [B, P, D]
    last = hidden[mx.arange(len(prompts)), mx.array(mask.sum(1) - 1)]  # [B, D]
    return to_logits(last, head)

# Next: mlx_grpo.py, the update once more
