"""LoRA (Hu et al. 2021): small trainable matrices beside frozen ones, in memory and in PEFT's files.

A layer computes W x + alpha/rank B A x (`layers.Linear`); A is [rank, in], B [out, rank].
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layers import Linear
from plumbing.folder import read_json, write_files


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0) -> None:
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
def merge_lora(model: nn.Module) -> None:
    """Put W + alpha/rank B A where W was and drop the adapters: a plain model again, all of it trainable."""
    for m in model.modules():
        if isinstance(m, Linear):
            m.weight.copy_(effective_weight(m))
            m.lora_A = m.lora_B = None
    model.requires_grad_(True)


def save_adapters(model: nn.Module, path: str | Path, base: str = "") -> None:
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
    text = json.dumps(config, indent=2) + "\n"
    write_files({
        Path(path) / "adapter_model.safetensors": lambda part: save_file(state, part, metadata={"format": "pt"}),
        Path(path) / "adapter_config.json": lambda part: part.write_text(text, encoding="utf-8")})


def load_adapters(model: nn.Module, path: str | Path) -> None:
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
