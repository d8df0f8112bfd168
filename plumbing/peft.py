"""PEFT's adapter folders: what adapter_config.json may ask for, and which projections it means.

Each key of adapter_config.json is used, or known to change nothing in what is computed, or refused by its name when it
is set. So is what PEFT may invent tomorrow.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mode

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from plumbing.folder import find_folder, read_json

FACTORS = ("lora_A", "lora_B")
USED = {"peft_type", "bias", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern"}
# Who made it, how it was begun or trained, or settings of something that another key would have to switch on.
CHANGE_NOTHING = {"task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping",
                  "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
                  "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"}
# How the adapters were begun. Others (pissa, olora, corda, loftq, lora_ga) change the base as well: PEFT takes the
# first product away from W whenever it loads such a folder, so the adapters do not fit the plain base.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_adapters(path: str | Path, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[float, Tensor, Tensor]]:
    """-> {projection: (alpha/rank, A, B)} of a PEFT folder, for a model with projections name -> [out, in].

    All is checked here, so that a refused adapter leaves the model as it was. Raises ValueError or FileNotFoundError,
    with the file and the tensor.
    """
    said, file = Path(path) / "adapter_config.json", Path(path) / "adapter_model.safetensors"
    raw = read_json(said)
    begun = raw.get("init_lora_weights")
    begun = begun.lower() if isinstance(begun, str) else begun
    wrong = [key for key, value in raw.items() if value and key not in USED | CHANGE_NOTHING]
    wrong += [f"init_lora_weights '{begun}'"] if begun not in BEGINNINGS else []
    if raw.get("peft_type") != "LORA" or raw.get("bias", "none") != "none" or wrong:
        raise ValueError(f"{said} asks for {', '.join(wrong) or 'another method than plain LoRA'}, which crisp does "
                         f"not compute. PEFT's merge_and_unload makes a plain model of most such adapters.")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: a PEFT folder needs it beside adapter_config.json.")
    try:
        state = load_file(file)
    except SafetensorError as e:
        raise ValueError(f"{file} is not a whole safetensors file ({e}): copy it again.") from e
    keys = {}  # (projection, factor) -> key in the file
    for full in state:
        name = full.removeprefix("base_model.model.").removeprefix("model.").removesuffix(".weight")
        keys[name.rpartition(".")[::2]] = full
    found: dict[str, tuple[float, Tensor, Tensor]] = {}
    for name, (out, size) in shapes.items():
        # The tensors say which projections have adapters; one that is asked for and not there is a damaged file.
        if not targeted(name, raw, said) and all((name, factor) not in keys for factor in FACTORS):
            continue
        rank, alpha = size_of(name, raw, said)
        factors = []
        for factor, shape in zip(FACTORS, ((rank, size), (out, rank))):
            key = keys.pop((name, factor), None)
            if key is None:
                raise ValueError(f"{file} lacks {name}.{factor}: is it made for this model?")
            if state[key].shape != shape:
                raise ValueError(f"{file} has another shape, {list(state[key].shape)}, for {name}.{factor}: "
                                 f"is it made for this model?")
            factors.append(state[key])
        found[name] = (alpha / rank, factors[0], factors[1])
    if keys or not found:
        raise ValueError(f"{file} holds '{next(iter(keys.values()), 'no tensor')}', which the model has no place for.")
    return found


def size_of(name: str, raw: dict, said: Path) -> tuple[int, float]:
    """(rank, alpha) of a projection: those of all, or its own where a pattern is the end of its name, the first that
    is. EVA gives each projection a rank of its own."""
    def of(key: str, pattern_key: str):
        patterns = raw.get(pattern_key) or {}
        try:
            return next((value for pattern, value in patterns.items()
                         if re.match(rf"(.*\.)?({pattern})$", f"model.{name}")), raw.get(key, 0))
        except (re.error, AttributeError) as e:
            raise ValueError(f"{said} has a {pattern_key} that cannot be read, {patterns!r} ({e}).") from e

    rank, alpha = of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"{said}: 'r' and 'lora_alpha' should be numbers above 0, not {rank!r} and {alpha!r}.")
    return rank, alpha


def sizes_of(layers: Mapping) -> dict:
    """Ranks and alphas of projections with adapters, as adapter_config.json says them: the commonest, and the others
    by full name."""
    ranks = {name: len(m.lora_A) for name, m in layers.items()}
    alphas = {name: round(m.lora_scale * len(m.lora_A), 9) for name, m in layers.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return {"r": rank, "rank_pattern": {f"model.{name}": r for name, r in ranks.items() if r != rank},
            "lora_alpha": alpha, "alpha_pattern": {f"model.{name}": a for name, a in alphas.items() if a != alpha}}


def targeted(name: str, raw: dict, said: Path) -> bool:
    """Whether adapter_config.json asks for an adapter on `layers.0.self_attn.q_proj`, as PEFT reads it: a string is a
    pattern for the whole name, a list holds ends of names; `layers_to_transform` is for lists only."""
    wanted, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if wanted == "all-linear" or not wanted:
        return False  # short for what the tensors say

    def fits(target, full: str) -> bool:
        if isinstance(target, str):
            try:
                return re.fullmatch(target, full) is not None
            except re.error as e:
                raise ValueError(f"{said} has a pattern that cannot be read, '{target}' ({e}).") from e
        return any(f".{full}".endswith(f".{end}") for end in target)

    full = f"model.{name}"
    if raw.get("exclude_modules") and fits(raw["exclude_modules"], full):
        return False
    inside = not layers or isinstance(wanted, str) or full in wanted or int(name.split(".")[1]) in layers
    return inside and fits(wanted, full)


def base_of(name: str | Path) -> str:
    """How PEFT finds a base from anywhere: a folder's whole path (of a run, its model's), a hub name as it is."""
    return str(find_folder(name).resolve()) if str(name) and Path(name).expanduser().exists() else str(name)
