"""LoRA (Hu et al. 2021): small trainable matrices beside frozen ones, in memory and in PEFT's files.

    y = W x + alpha/rank B A x          A [rank, in], B [out, rank]

W is frozen, so neither a gradient nor moments of it take memory. Qwen2.5-0.5B has 494 million weights, and adapters of
rank 16 on all its projections have 8.8 million. Without the second term the model is its own base
(`model.adapters_off`): the KL's `ref_model` costs nothing.

With g = dL/d(W + alpha/rank B A) [out, in], the adapters' gradients are

    dL/dA = alpha/rank B^T g            zero at the first step, since B starts as zero
    dL/dB = alpha/rank g A^T            so B moves first, and A from the second step on

alpha is divided by the rank so that another rank hardly asks for another learning rate.

The arithmetic is in `model.Linear`; here adapters are made, merged, written and read. Projections are called what the
model's folder calls them: q_proj, and for lfm2 w1 where the others say gate_proj.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from model import Linear, Transformer
from plumbing.folder import file_name, write_files
from plumbing.peft import FACTORS, base_of, read_adapters, sizes_of


def projections(model: Transformer) -> dict[str, Linear]:
    """All that may have an adapter, in the model's order: `layers.0.self_attn.q_proj` -> module, names as in files."""
    family = model.config.model_type
    return {file_name(name, family): m for name, m in model.named_modules() if isinstance(m, Linear)}


def last_part(name: str) -> str:
    """What a target calls a projection: `layers.0.self_attn.q_proj` -> `q_proj`."""
    return name.rpartition(".")[2]


def add_lora(model: Transformer, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0) -> None:
    """Freeze the model and give every projection named in `targets` (none: all) an adapter; `v_proj` is that of every
    layer, `layers.0.self_attn.v_proj` one.

    A is drawn as in PEFT, uniform in +-1/sqrt(in), and B is zero: the first step begins at the base. Adapters are
    float32 whatever the weights are. They are parameters called lora_A and lora_B; an optimizer takes those that
    require a gradient. Raises ValueError for a bad rank, alpha or target, and where there are adapters already.
    """
    layers = projections(model)
    known = dict.fromkeys(last_part(name) for name in layers)
    targets = targets or list(known)
    unknown = [t for t in targets if t not in known and t not in layers]
    if rank < 1 or not alpha > 0 or unknown:
        raise ValueError(f"LoRA needs a rank of at least 1, an alpha above 0 and projections among {', '.join(known)}; "
                         f"got rank {rank}, alpha {alpha} and {', '.join(unknown or targets)}.")
    if any(m.lora_A is not None for m in layers.values()):
        raise ValueError("This model has adapters already: merge_lora them first.")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed % 2 ** 63)  # one for all adapters, drawn in the model's order
    for name, m in layers.items():
        if last_part(name) in targets or name in targets:
            (out, size), device = m.weight.shape, m.weight.device
            A = (torch.rand(rank, size, generator=generator) * 2 - 1) / math.sqrt(size)  # [rank, in]
            m.lora_A = nn.Parameter(A.to(device))
            m.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))  # [out, rank]
            m.lora_scale = alpha / rank


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Put W + alpha/rank B A where W was and drop the adapters: a plain model again, all of it trainable.

    In bf16 the sum is rounded to W's 8 bits, which may lose most of what was learnt; `save` does not.
    """
    for m in projections(model).values():
        m.weight.copy_(m.merged())
        m.lora_A = m.lora_B = None
    model.requires_grad_(True)


def save_adapters(model: Transformer, path: str | Path, base: str | Path = "") -> None:
    """Write the adapters alone, in PEFT's format; `base` is the hub name or folder of the model that they belong to.

    adapter_config.json says how to compute them, adapter_model.safetensors holds A and B of each projection. Raises
    ValueError where there are none, OSError where they cannot be written; old files then stay whole.
    """
    layers = {name: m for name, m in projections(model).items() if m.lora_A is not None}
    if not layers:
        raise ValueError("There are no adapters to save: add_lora first.")
    # A projection is named once for all layers, or with its layer where not all have an adapter.
    partly = {last_part(name) for name, m in projections(model).items() if m.lora_A is None}
    targets = {name if last_part(name) in partly else last_part(name) for name in layers}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_of(base),
              **sizes_of(layers), "target_modules": sorted(targets),
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    state = {}
    for name, m in layers.items():
        for factor in FACTORS:
            tensor = getattr(m, factor).detach().cpu().contiguous()  # [rank, in] or [out, rank]
            state[f"base_model.model.model.{name}.{factor}.weight"] = tensor
    text = json.dumps(config, indent=2) + "\n"
    write_files({
        Path(path) / "adapter_model.safetensors": lambda part: save_file(state, part, metadata={"format": "pt"}),
        Path(path) / "adapter_config.json": lambda part: part.write_text(text, encoding="utf-8")})


@torch.no_grad()
def load_adapters(model: Transformer, path: str | Path) -> None:
    """Give the model the adapters of a PEFT folder, ready to be trained further; the rest of it is frozen.

    Raises ValueError or FileNotFoundError, with the file and the tensor, where the adapters are not for this model or
    ask for more than plain LoRA. The model is then as it was.
    """
    layers = projections(model)
    found = read_adapters(path, {name: m.weight.shape for name, m in layers.items()})
    add_lora(model, 1, 1.0, list(found))
    for name, (scale, A, B) in found.items():  # A [rank, in], B [out, rank]; each projection may have a rank of its own
        m = layers[name]
        m.lora_scale = scale
        m.lora_A, m.lora_B = (nn.Parameter(factor.to(m.weight.device, torch.float32)) for factor in (A, B))

# Next: squish.py, a reward without references
