"""The policy: a decoder-only transformer, read from and written to a Hugging Face folder.

One class serves every family: `qwen2`, `qwen3` and `llama` differ by three switches (a bias on q/k/v, a norm on q and
k, an explicit head size), and the switches are set by the folder's own `config.json`. `lfm2` has a short convolution in
place of attention on most layers, and other names. Module names are the names in the safetensors file, so that loading
is a dictionary and not a translation.

Read `layers.py` with it: this file says how layers make a model, and that one how a layer is made. What a reader may
skip at first stands elsewhere: a folder's config and download in `folder.py`, adapters in `lora.py`.

Shapes: N rows (= B prompts x G completions, or just rows), T tokens of this call, S tokens a row has read since its
prompt, P prompt tokens, V vocabulary, D hidden size, K key/value heads, hd head size, L width of LFM2's convolution.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import Layer, Lfm2Layer, Linear, RMSNorm, rope_table
from lora import add_lora, effective_weight, load_adapters, merge_lora, save_adapters
from plumbing.folder import SIDECARS, Config, find_folder, read_config, read_json, read_weights, write_files
from plumbing.products import linear, packed, to_logits, wide, widen

__all__ = ["Cache", "Config", "Transformer", "add_lora", "linear", "load", "load_adapters", "merge_lora", "pad",
           "read_config", "save", "save_adapters", "to_logits", "token_logprobs"]


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

    def packed(self, rows: int, times: int):
        """Inside, products with the model's large matrices are fast for few rows (`products.packed`)."""
        return packed((*(m.weight for m in self.modules() if isinstance(m, Linear)), self.head), rows, times)

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
        once, cache = cache is None, Cache() if cache is None else cache
        (N, T), device = tokens.shape, tokens.device
        read = cache.lengths  # a number, or [N, 1]
        if mask is None:
            positions = (torch.arange(T, device=device) + read).expand(N, T)  # [N, T]
            cache.lengths = read + T
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0) + read  # [N, T]
            cache.lengths = read + mask.sum(1, keepdim=True)
        done, S = cache.columns, cache.columns + T
        if mask is not None or cache.own_mask is not None:
            ones = torch.ones(N, 1, dtype=torch.bool, device=device)  # [N, 1]
            before = ones.expand(N, done) if cache.own_mask is None else cache.own_mask  # [N, done]
            now = ones.expand(N, T) if mask is None else mask.bool()  # [N, T]
            cache.own_mask = torch.cat([before, now], 1)  # [N, S]
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(done)  # [T, S]
        allowed = None if T == 1 else causal[None, None]  # [1, 1, T, S]
        if cache.own_mask is not None:
            # A padded query would see no key at all, and a softmax over nothing is NaN: let it see itself.
            itself = torch.eye(T, S, dtype=torch.bool, device=device).roll(done, 1)  # [T, S]
            allowed = (causal & cache.own_mask[:, None] | itself)[:, None]  # [N, 1, T, S]
        x = self.embed_tokens(tokens)  # [N, T, D]
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)  # 2 x [N, T, 1, hd]
        if self.checkpointing and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # with a frozen embedding nothing else tells `checkpoint` that a gradient is wanted
        own, prompt_mask = [], cache.shared_mask  # `run` must not hold the cache: a circle that is never collected
        for i, layer in enumerate(self.layers):
            prompt = cache.shared[i] if cache.shared else ()  # (k, v) or (last values,), the same for `past`
            past, n = cache.own[i] if cache.own else (), len(prompt)

            def run(x, *read, layer=layer, n=n):
                shared = (*read[:n], prompt_mask) if n else None
                x, kv = layer(x, rope, allowed, mask, shared, read[n:] or None)
                return x, *kv

            if self.checkpointing and torch.is_grad_enabled():
                # Reentrant: it keeps nothing of the layer, where the other kind keeps the graph's nodes, thousands of
                # crumbs between the large blocks that come and go, and glibc's heap then grows by half of the weights.
                x, *kv = checkpoint(run, x, *prompt, *past, use_reentrant=True, preserve_rng_state=False)
            else:
                x, *kv = run(x, *prompt, *past)
            own.append(() if once else tuple(kv))  # nobody will ask for them: with many layers they would be much
        cache.own, cache.columns = own, S
        return getattr(self, self.last_norm)(x)


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [n_i] -> (padded on the right with 0, mask), both [len(rows), max n_i]."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(r) for r in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


# --- log-probabilities without the [T, V] tensor ----------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) for each of M positions, a slice of the vocabulary at a time, and again in backward.

    With z = W h^T / temperature and p = softmax(z): d logp / dz = onehot(target) - p, so backward needs p, which is as
    large as z. Recomputing it costs one more product with W; keeping it would cost 0.6 GB for 16 completions of 64
    tokens and Qwen's 151,936 words, and plain autograd keeps several such tensors. A slice stays in the cache between
    the product and what is done with it, and all positions together make the product large enough to be fast.
    """

    @staticmethod
    def slices(hidden, weight, targets, temperature, words):
        """-> (number of the first word, its part w of W [n, D], z [n, M] in float32 (float64 stays), where each target
        stands in there [1, M], whether it does [M])."""
        x = hidden.float() if widen(hidden) else hidden  # [M, D]
        for first, w in zip(range(0, len(weight), words), weight.split(words)):
            w = wide(w)
            z = w @ x.T  # [n, M]: the matrix on the left, which is faster for few rows
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            at = targets - first  # [M]
            here = (at >= 0) & (at < len(w))  # [M]
            yield first, w, z if temperature == 1 else z.div_(temperature), at.clamp(0, len(w) - 1)[None], here

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, words):
        # Made before the large blocks: what stays must not lie between those, or the heap grows with every slice.
        top, total, mean = hidden.new_empty(3, -(-len(weight) // words), len(hidden),
                                            dtype=torch.promote_types(hidden.dtype, torch.float32))  # [slices, M] each
        wanted = torch.zeros_like(top[0])  # [M]
        for first, _, z, at, here in _TokenLogprobs.slices(hidden, weight, targets, temperature, words):
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
    def backward(ctx, g_logp, _):
        hidden, weight, targets, norm = ctx.saved_tensors
        x = hidden.float() if widen(hidden) else hidden  # [M, D]
        g = g_logp / ctx.temperature  # [M]
        d_hidden = torch.zeros_like(x, dtype=norm.dtype)  # [M, D]
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]
        for first, w, z, at, here in _TokenLogprobs.slices(hidden, weight, targets, ctx.temperature, ctx.words):
            dz = z.sub_(norm).exp_().mul_(-g).scatter_add_(0, at, (g * here)[None]).to(w.dtype)  # [n, M]
            d_hidden += dz.T @ w
            if d_weight is not None:
                d_weight[first:first + len(w)] = dz @ x
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor, temperature: float = 1.0,
                   words: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [..., T, D], targets [..., T] -> (logp, entropy) in nats, each [..., T], float32.

    `hidden[..., t, :]` is the state that predicts `targets[..., t]`. The temperature is the sampler's: it divides the
    logits here as it did there, otherwise the policy that is trained is not the policy that acted. `entropy` is for
    looking at and carries no gradient. Only the logits of `words` words of the vocabulary exist at any time (0: so many
    that they, and their rows of the head, take 16 MiB at most).
    """
    if temperature <= 0:
        raise ValueError(f"token_logprobs needs a temperature above 0, not {temperature}: a greedy policy has no logp.")
    hidden, targets, shape = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), targets.shape  # [M, D], [M]
    words = words or max(1, 2 ** 22 // max(*hidden.shape, 1))
    logp, entropy = _TokenLogprobs.apply(hidden, model.head, targets, temperature, words)
    return logp.view(shape), entropy.view(shape)


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
    want = {name: p.shape for name, p in model.named_parameters()}
    state = read_weights(folder, config, want, device, dtype or torch.float32)
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
