"""Folders and files that are no model, or none that is read here: what they are, and what makes a model of them."""

import json
from pathlib import Path

import torch

from plumbing.command import to_resume


def refuse_pointer(path: Path) -> None:
    """What `git clone` leaves where git-lfs is not installed: three lines of text in place of the file."""
    if path.exists():
        with open(path, "rb") as f:
            if f.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a Git LFS pointer and not the file itself: run 'git lfs install' and "
                                 f"'git lfs pull' in {path.parent}, or download the model again.")


def read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a model folder needs config.json and *.safetensors.")
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        saved = isinstance(e, UnicodeDecodeError) or path.read_bytes().startswith(b"\xef\xbb\xbf")  # by some editor
        advice = "save it as UTF-8 without a BOM" if saved else "copy or download it again"
        raise ValueError(f"{path} is not valid JSON ({e}): {advice}.") from e
    if not isinstance(value, dict):  # a broken file, not a wrong type in the program
        raise ValueError(f"{path} holds a {type(value).__name__} where an object was expected.")
    return value


def refuse_other_folders(folder: Path) -> None:
    """One sentence for what is no model folder, or none that is read here: what it is, and what makes one of it."""
    def holds(*patterns):
        return any(next(folder.glob(pattern), None) for pattern in patterns)

    if holds("adapter_config.json") and not holds("config.json"):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if folder.name == "adapter" and (folder.parent / "model" / "config.json").exists():
            raise ValueError(f"{folder} holds an adapter of {base}, and no model: give {folder.parent / 'model'}, "
                             f"where it is merged.")
        raise ValueError(f"{folder} holds an adapter of {base}, and no model: merge it into that with peft "
                         f"(merge_and_unload, then save_pretrained), and give the merged folder.")
    if holds("model.safetensors", "model.safetensors.index.json"):
        return
    if holds("checkpoint/state.pt", "checkpoint/previous.pt", "metrics.jsonl"):
        raise ValueError(f"{folder} is a run that has not ended, and has no model yet: {to_resume(folder)} goes on "
                         f"with it, and writes {folder / 'model'} when it ends or is stopped.")
    inside = sorted(p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/config.json"))
    if inside and not holds("config.json"):
        raise ValueError(f"{folder} is no model folder, but there is one in it: give {inside[-1]}"
                         + (f", or another of its {len(inside)}." if len(inside) > 1 else "."))
    if holds("model-*-of-*.safetensors"):
        raise ValueError(f"{folder} has shards of a model, and no model.safetensors.index.json that says what is in "
                         f"which: copy or download that file too.")
    if holds("pytorch_model*.bin", "*.bin", "*.pth", "*.pt"):
        raise ValueError(f"{folder} has its weights in pickled files (.bin, .pth) only, which can run code when they "
                         f"are read: load it with transformers and save_pretrained it, which writes model.safetensors.")
    if holds("*.gguf"):
        raise ValueError(f"{folder} holds GGUF files, which are quantised: take the model's folder with "
                         f"model.safetensors.")


def wrapped(key: str, keys: list[str], want: dict[str, torch.Size]) -> str:
    """What to do about a tensor whose name is a wanted one behind a prefix that all have: of a wrapper of the model."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        rest = ".".join(parts[n:])
        if rest in want or rest.startswith("model.") and rest != "model.lm_head.weight" and rest[6:] in want:
            prefix = ".".join(parts[:n]) + "."
            if all(each.startswith(prefix) for each in keys):
                return (f" Its names begin with '{prefix}', of what was around the model when it was saved (DDP, "
                        f"torch.compile, PEFT): save the model inside, with its save_pretrained, or rename them.")
    return ""


def refuse_quantized(file: Path, kinds: dict[str, str]) -> None:
    """Packed weights (4 or 8 bits) are whole numbers or 8-bit floats, with scales beside them."""
    packed = [key for key, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")]
    if packed:
        raise ValueError(f"{file} holds '{packed[0]}' as {kinds[packed[0]]}, which is quantised: crisp trains plain "
                         f"weights only. Take the model as it was before, or dequantise it with transformers.")
