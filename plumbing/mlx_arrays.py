"""MLX where a first reading skips it: shared prompts, room in a cache, recomputed layers, folders.

It is to `mlx_model.py` what `attention.py`, `recompute.py` and `folder.py` are to `model.py`.

Shapes: N = B*G rows, G after G of them on each of B prompts; T tokens of this call, S own tokens of a row, P prompt
tokens; H query heads, K key/value heads, R = H / K, hd head size.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from tokenizers import Tokenizer

from plumbing.folder import ModelConfig, file_name, open_folder, passed_through, read_weights, write_folder

try:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
except ImportError as e:  # on Linux `pip install mlx` succeeds too, and brings nothing that computes
    wanted = '"mlx[cpu]"' if sys.platform == "linux" else "mlx"
    raise ValueError(f"MLX cannot be imported ({str(e).splitlines()[0]}): pip install {wanted}.") from e

FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")  # those of mlx_model.py
BLOCK = 64  # a cache grows by room for so many tokens
DTYPES = {mx.float32: torch.float32, mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}


def attend(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | str | None, prompt: Sequence[mx.array] = (),
           prompt_mask: np.ndarray | None = None) -> mx.array:
    """softmax(q k^T / sqrt(hd)) v over a row's own tokens and, where there is one, its group's prompt: as in
    `plumbing/attention.py`, q [N, H, T, hd] -> [N, H, T, hd].

    No row gets a copy of its prompt's keys, in training either. In torch the copies buy the fused kernel, which never
    writes the scores [T, P+S] down. MLX has no such kernel for gradients: the scores are written down in any case.
    """
    (N, H, T, hd), (_, K, S, _) = q.shape, k.shape
    if not prompt:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=hd ** -0.5, mask=allowed)
    (B, _, P, _), R = prompt[0].shape, H // K
    G = N // B
    q = (q * hd ** -0.5).reshape(B, G, K, R * T, hd).swapaxes(1, 2)  # [B, K, G, R*T, hd]
    k, v = (x.reshape(B, G, K, S, hd).swapaxes(1, 2) for x in (k, v))  # [B, K, G, S, hd] each
    own = q @ k.swapaxes(-1, -2)  # [B, K, G, R*T, S]
    if isinstance(allowed, mx.array):  # "causal" goes without a prompt
        seen = allowed.reshape(-1, 1, G if len(allowed) > 1 else 1, 1, T, S)  # [B or 1, 1, G or 1, 1, T, S]
        own = mx.where(seen, own.reshape(B, K, G, R, T, S), -mx.inf).reshape(own.shape)  # [B, K, G, R*T, S]
    shared = q.reshape(B, K, G * R * T, hd) @ prompt[0].swapaxes(-1, -2)  # [B, K, G*R*T, P]
    if prompt_mask is not None:
        shared = mx.where(mx.array(prompt_mask[:, None, None]), shared, -mx.inf)  # [B, K, G*R*T, P]
    scores = mx.concatenate([shared.reshape(B, K, G, R * T, P), own], -1)  # [B, K, G, R*T, P+S]
    weights = mx.softmax(scores, -1, precise=True)  # [B, K, G, R*T, P+S], float32 inside
    out = (weights[..., :P].reshape(B, K, G * R * T, P) @ prompt[1]).reshape(B, K, G, R * T, hd)  # [B, K, G, R*T, hd]
    return (out + weights[..., P:] @ v).swapaxes(1, 2).reshape(N, H, T, hd)


def put(old: mx.array, new: mx.array, at: int) -> mx.array:
    """new [N, K, T, hd] behind the first `at` columns of old, in room that grows by blocks: to concatenate at every
    token would copy all that was said before. The update is made in place where nobody else holds the array."""
    N, K, T, hd = new.shape
    if at + T > old.shape[2]:
        room = mx.zeros((N, K, -(-T // BLOCK) * BLOCK, hd), new.dtype)  # [N, K, room, hd]
        old = mx.concatenate([old, room], 2)  # [N, K, >= at+T, hd]
    return mx.slice_update(old, new, mx.array([at]), axes=[2])  # [N, K, >= S, hd]


def recomputed(layer: nn.Module, x: mx.array, context) -> tuple[mx.array, tuple[mx.array, ...]]:
    """layer(x, context), computed again in backward. `mx.checkpoint` gives gradients to arguments only, so all that
    may have one is an argument: the layer's parameters, and what it remembers."""
    before = layer.trainable_parameters()

    def run(parameters, x, prompt, past):
        layer.update(parameters)
        out = layer(x, replace(context, prompt=prompt, past=past))  # [N, T, D], and what is remembered
        layer.update(before)  # or the layer would keep what this very pass was traced with
        return out

    return mx.checkpoint(run)(before, x, context.prompt, context.past)


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """A copy of a torch tensor on the CPU. bfloat16 goes over as 16 bits: numpy, which stands between, has none."""
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def to_torch(array: mx.array) -> torch.Tensor:
    """A copy of an MLX array, and the way back."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def check_family(config: ModelConfig) -> None:
    """A family that is new in model.py, and not in mlx_model.py, would be computed as if it were an old one."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"MLX computes {', '.join(FAMILIES)}, and not {config.model_type}: take --backend torch, or "
                         f"write it in mlx_model.py too and name it in plumbing/mlx_arrays.py.")


def read_model(model_class: Callable[[ModelConfig], nn.Module], name_or_path: str | Path,
               dtype: mx.Dtype | None) -> tuple[nn.Module, Tokenizer | None]:
    """What `mlx_model.load` promises, with `model_class(config)` to be filled. All that may be wrong with a folder is
    refused by the same lines as for torch, through which the weights go."""
    folder, raw, config, tokenizer = open_folder(name_or_path)
    check_family(config)
    dtype = dtype or mx.float32
    if dtype not in DTYPES:
        raise ValueError(f"MLX weights are mx.float32, mx.bfloat16 or mx.float16, not {dtype}.")
    model = model_class(config)  # its random weights are noted, and never computed
    shapes = {name: p.shape for name, p in tree_flatten(model.parameters())}
    files = {name: file_name(name, config.model_type) for name in shapes}
    want = {files[name]: torch.Size(shape) for name, shape in shapes.items()}
    state = read_weights(folder, config, want, device="cpu", dtype=DTYPES[dtype])
    for name, file in files.items():  # one at a time: little memory beside the model's own
        model.load_weights([(name, to_mlx(state.pop(file)))], strict=False)
    raw, sidecars = passed_through(folder, raw)
    model.raw_config, model.sidecars = MappingProxyType(raw), MappingProxyType(sidecars)
    return model, tokenizer


def write_model(model: nn.Module, tokenizer: Tokenizer | None, path: str | Path, dtype: mx.Dtype | None) -> None:
    """What `mlx_model.save` promises."""
    parameters = tree_flatten(model.parameters())
    kinds = {p.dtype for _, p in parameters}
    dtype = dtype or (kinds.pop() if len(kinds) == 1 else mx.float32)
    shapes = {name: torch.Size(p.shape) for name, p in parameters if not name.endswith(("lora_A", "lora_B"))}
    weights = (to_torch(p) for _, p in model.merged_parameters())
    write_folder(model, tokenizer, path, shapes=shapes, weights=weights, dtype=DTYPES[dtype])
