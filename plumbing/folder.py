"""A Hugging Face folder: its config, its weights and their names, and how files are written whole or not at all."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from plumbing import ranks
from plumbing.download import download
from plumbing.foreign import read_json, refuse_other_folders, refuse_pointer, refuse_quantized, wrapped
from plumbing.model_config import QUANTIZED, ModelConfig, read_config, warn
from plumbing.weights import write_tensors

# Files beside the weights that say how to tokenise, chat and stop: kept in memory by `load`, written again by `save`.
SIDECARS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
            "added_tokens.json", "vocab.json", "merges.txt")
FILES = ("config.json", "tokenizer.json", *SIDECARS, "model.safetensors", "model.safetensors.index.json",
         "adapter_config.json")  # all that `read_model` reads, but for shards: the index says what they are called

# A module of `model.py` -> its name in folders of qwen2, qwen3 and llama. Others are called the same.
NAMES = {
    "operator_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "operator.q_proj": "self_attn.q_proj", "operator.k_proj": "self_attn.k_proj", "operator.v_proj": "self_attn.v_proj",
    "operator.o_proj": "self_attn.o_proj", "operator.q_norm": "self_attn.q_norm", "operator.k_norm": "self_attn.k_norm",
}
# What a family calls otherwise.
OWN_NAMES = {
    "lfm2": {
        "operator_norm": "operator_norm", "mlp_norm": "ffn_norm", "norm": "embedding_norm",
        "operator.o_proj": "self_attn.out_proj", "operator.q_norm": "self_attn.q_layernorm",
        "operator.k_norm": "self_attn.k_layernorm", "operator.in_proj": "conv.in_proj", "operator.conv": "conv.conv",
        "operator.out_proj": "conv.out_proj", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2"},
}


class HasConfig(Protocol):
    """A model of the story's, torch's or MLX's: plumbing does not import those."""

    config: ModelConfig


M = TypeVar("M", bound=HasConfig)


def file_name(name: str, family: str) -> str:
    """What a module or parameter of the model is called in files, and by who trains it (`--lora-targets w1`).

    >>> file_name("layers.0.mlp.gate_proj.weight", "lfm2")
    'layers.0.feed_forward.w1.weight'
    """
    found = re.match(r"layers\.\d+\.", name)
    layer = found[0] if found else ""
    path = name.removeprefix(layer)
    names = NAMES | OWN_NAMES.get(family, {})
    for module in (path, path.rpartition(".")[0]):
        if module in names:
            return layer + names[module] + path.removeprefix(module)
    return name


def file_parameters(model) -> dict[str, nn.Parameter]:
    """The model's parameters, in its own order, by their names in files."""
    return {file_name(name, model.config.model_type): p for name, p in model.named_parameters()}


def find_folder(name_or_path: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository `owner/name`."""
    path = Path(name_or_path).expanduser()
    if (path / "checkpoint").is_dir() and (path / "model").is_dir():
        return path / "model"  # a run of train.py
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise ValueError(f"{name} is a file: give the folder that holds config.json and model.safetensors.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {name}: give a Hugging Face folder, or a hub name 'owner/name'.")
    return download(name, FILES, weight_files)


def weight_files(folder: Path) -> list[str]:
    """The names of the weight files. The single file wins, as it does in transformers; else the index names shards."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names: list = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not weight_map or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} has no 'weight_map' from tensors to files: copy or download it again.")
    outside = [name for name in names if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts]
    if outside:  # PureWindowsPath: it knows both kinds of slashes
        raise ValueError(f"{index} names {outside[0]}, a file outside its folder: take the model from who made it.")
    return sorted(set(names))


def read_weights(folder: Path, config: ModelConfig, want: dict[str, torch.Size], device: str,
                 dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters that are wanted, name -> shape, from the folder's safetensors, single or sharded; exactly those,
    in those shapes."""
    state: dict[str, Tensor] = {}
    for file in (folder / n for n in weight_files(folder)):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: the folder's weights are not complete. Copy or download it "
                                    f"again.")
        refuse_pointer(file)
        try:
            # safetensors before 0.8 takes "mps" for a device, and "mps:0" for none.
            with safe_open(file, framework="pt", device="mps" if str(device).startswith("mps") else str(device)) as f:
                keys = list(f.keys())
                refuse_quantized(file, {key: f.get_slice(key).get_dtype() for key in keys})
                for key in keys:
                    name = key.removeprefix("model.")
                    if name.endswith("rotary_emb.inv_freq"):  # old files store this table; it is recomputed
                        continue
                    if config.tie_word_embeddings and name == "lm_head.weight":
                        name = "embed_tokens.weight"  # a tied matrix may be stored under either name, or both
                    if name not in want:
                        raise ValueError(f"{file} holds '{key}', which {config.model_type} has no place for."
                                         + wrapped(key, keys, want))
                    tensor = f.get_tensor(key)
                    if tensor.shape != want[name]:
                        raise ValueError(f"{file}: '{key}' has shape {list(tensor.shape)}, "
                                         f"config.json asks for {list(want[name])}. "
                                         + ("It was saved while its parts lay on several machines (ZeRO-3, FSDP): "
                                            "gather them, and save again." if not tensor.numel() else
                                            "Take both files from one save."))
                    tensor = tensor.to(dtype)
                    if not all(piece.isfinite().all() for piece in tensor.flatten().split(2 ** 22)):  # little memory
                        raise ValueError(f"{file}: '{key}' holds NaN or infinite numbers (read as "
                                         f"{str(dtype).removeprefix('torch.')}): copy or merge the model again.")
                    if name in state and not torch.equal(state[name], tensor):
                        raise ValueError(f"{folder}: config.json says that embedding and head are one matrix, and the "
                                         f"files hold two different ones: set tie_word_embeddings to false there to "
                                         f"keep both.")
                    state[name] = tensor
        except SafetensorError as e:
            raise ValueError(f"{file} is not a whole safetensors file ({e}): copy or download it again.") from e
    missing = sorted(want.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, "
                         f"the first is '{missing[0]}'.")
    return state


def open_folder(name_or_path: str | Path) -> tuple[Path, dict, ModelConfig, Tokenizer | None]:
    """All of a model's folder but its weights -> (the folder, config.json as it is, its numbers, the tokenizer)."""
    folder = find_folder(name_or_path)
    refuse_other_folders(folder)
    raw = read_json(folder / "config.json")
    said = folder / "generation_config.json"
    generation = read_json(said) if said.exists() else None
    config = read_config(raw, str(folder / "config.json"), generation)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        config = with_own_marks(config, tokenizer, folder)
    return folder, raw, config, tokenizer


def read_model(model_class: Callable[[ModelConfig], M], name_or_path: str | Path, device: str | None,
               dtype: torch.dtype | None) -> tuple[M, Tokenizer | None]:
    """What `model.load` promises, with `model_class(config)` to be filled."""
    folder, raw, config, tokenizer = open_folder(name_or_path)
    with torch.device("meta"):  # shapes only: no time spent on random numbers that the file replaces
        model: Any = model_class(config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"There is no device '{device}' here: take cpu, cuda or mps.") from e
    want = {name: p.shape for name, p in file_parameters(model).items()}
    state = read_weights(folder, config, want, device, dtype or torch.float32)
    model.load_state_dict({name: state[file_name(name, config.model_type)] for name, _ in model.named_parameters()},
                          assign=True)
    model.raw_config, model.sidecars = passed_through(folder, raw)
    return model, tokenizer


def passed_through(folder: Path, raw: dict) -> tuple[dict, dict[str, bytes]]:
    """What a saved model gets of the folder that it was read from: its config, and the files beside its weights."""
    left = [key for key in QUANTIZED if raw.get(key)]
    if left:
        warn(f"{folder / 'config.json'} has a {left[0]}, and the weights are plain: so they are used, and saved.")
    return ({key: value for key, value in raw.items() if key not in QUANTIZED},
            {n: (folder / n).read_bytes() for n in ("tokenizer.json", *SIDECARS) if (folder / n).exists()})


def read_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    refuse_pointer(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read ({e}): copy or download it again.") from e
    tokenizer.no_truncation()  # a tokenizer saved by a training run may cut or pad silently
    tokenizer.no_padding()
    return tokenizer


def with_own_marks(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> ModelConfig:
    """The config with what the tokenizer adds: its eos_token ends a text too (as in trl), and where no file names a
    bos, a text begins with its bos_token, or with <|endoftext|>, as Qwen's do."""
    def read(name):
        return read_json(folder / name) if (folder / name).exists() else {}

    words = read("tokenizer_config.json")
    if "added_tokens_decoder" not in words:  # an old folder: there the other file is obeyed
        words |= read("special_tokens_map.json")

    # A family's class has marks of its own, where no file names one; a key that says null is another matter.
    kind = str(words.get("tokenizer_class") or config.model_type).lower()
    if config.model_type == "qwen2" or kind.startswith(("qwen2tokenizer", "qwen3", "gpt2tokenizer")):
        words = {"eos_token": "<|endoftext|>", **words}

    def own(key):  # -> the number of the token, None where there is none
        token = words.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        return number if number is not None and number < config.vocab_size else None

    eos, bos = own("eos_token"), config.bos_token_id
    if bos is None or bos >= config.vocab_size:
        endoftext = tokenizer.token_to_id("<|endoftext|>")
        bos = next((i for i in (own("bos_token"), endoftext) if i is not None and i < config.vocab_size), None)
    stops = config.eos_token_ids if eos is None or eos in config.eos_token_ids else (*config.eos_token_ids, eos)
    return replace(config, bos_token_id=bos, eos_token_ids=stops)


def with_words(name: str | Path, model: M, tokenizer: Tokenizer | None) -> tuple[M, Tokenizer]:
    """(model, tokenizer) of a folder for whoever reads and writes text with them. ValueError where that cannot be."""
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer.json, so its tokens cannot be read: copy it there from the model "
                         f"that it was made of.")
    # Padding without a row does no harm: no prompt holds it.
    rows, special = model.config.vocab_size, {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    beyond = sorted((i, word) for word, i in tokenizer.get_vocab().items()
                    if i >= rows and not (i in special and "pad" in word.lower()))
    if beyond:
        raise ValueError(f"{name} has a tokenizer with {len(beyond)} words for which the model's {rows} embeddings "
                         f"have no row, the first is {beyond[0][1]!r}: take the tokenizer that it was trained with.")
    return model, tokenizer


def can_stop(name: str | Path, model: HasConfig) -> None:
    """ValueError where no token ends a completion: all would be cut, be equally long, and teach nothing."""
    stops, rows = model.config.eos_token_ids, model.config.vocab_size
    beyond = [i for i in stops if i >= rows]
    if beyond:
        raise ValueError(f"{name} ends a text with token {beyond[0]}, and the model knows 0 to {rows - 1}: correct "
                         f"eos_token_id in its generation_config.json (or config.json, where it has none).")
    if not stops:
        raise ValueError(f"{name} names no token that ends a text, so no completion would ever stop: set eos_token_id "
                         f"in its generation_config.json, or eos_token in its tokenizer_config.json.")


def write_model(model, tokenizer: Tokenizer | None, path: str | Path, dtype: torch.dtype | None) -> None:
    """What `model.save` promises.

    Adapters are float32. With them all is stored as float32 unless `dtype` says otherwise: rounded to bfloat16, W + BA
    would forget most of what was learnt.
    """
    dtype = dtype or functools.reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    shapes = {name: p.shape for name, p in model.named_parameters() if not name.endswith(("lora_A", "lora_B"))}
    write_folder(model, tokenizer, path, shapes, (tensor for _, tensor in model.merged_parameters()), dtype)


def write_folder(model, tokenizer: Tokenizer | None, path: str | Path, shapes: dict[str, torch.Size],
                 weights: Iterable[Tensor], dtype: torch.dtype) -> None:
    """A model's folder: its `config`, `raw_config` and `sidecars`, and weights of these shapes as they come."""
    folder, family, sidecars = Path(path), model.config.model_type, dict(model.sidecars)
    raw = {key: value for key, value in model.raw_config.items() if key != "quantization_config"}  # not quantized now
    for key in {"dtype", "torch_dtype"} & raw.keys() or {"torch_dtype"}:
        raw[key] = str(dtype).removeprefix("torch.")
    names = {name: file_name(name, family) for name in shapes}
    shapes = {file if file.startswith("lm_head") else f"model.{file}": shapes[name] for name, file in names.items()}
    read = sidecars.pop("tokenizer.json", b"")  # as it was when the model was loaded
    files = {"config.json": json.dumps(raw, indent=2).encode() + b"\n", **sidecars}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer_text(tokenizer, read)
    write_files({folder / "model.safetensors": lambda part: write_tensors(part, shapes, weights, dtype),
                 **{folder / name: functools.partial(Path.write_bytes, data=content)
                    for name, content in files.items()}})
    remove_shards(folder)


def tokenizer_text(tokenizer: Tokenizer, read: bytes) -> bytes:
    """tokenizer.json, its merges in the form that they were read in.

    Today's library writes each as a pair of words, ["a", "b"]. Older programs know "a b" only.
    """
    text = tokenizer.to_str(pretty=True)
    if re.search(rb'"merges":\s*\[\s*"', read):
        whole = json.loads(text)
        pairs = whole["model"].get("merges", [])
        if not any(" " in word for pair in pairs for word in pair):
            whole["model"]["merges"] = [" ".join(pair) for pair in pairs]
            text = json.dumps(whole, indent=2, ensure_ascii=False)
    return text.encode()


def remove_shards(folder: Path) -> None:
    """What one new file replaces: vllm and mlx-lm would read old shards instead of it, or beside it."""
    index = folder / "model.safetensors.index.json"
    old = {index, *(file for file in folder.glob("*.safetensors") if re.search(r"\d{5}-of-\d{5}", file.name))}
    try:
        old |= {folder / Path(name).name for name in read_json(index)["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # there is no index, or none that can be read
    for file in old - {folder / "model.safetensors"}:
        file.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[[Path], object], everywhere: bool = False) -> None:
    write_files({path: write}, everywhere)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_files(files: dict[Path, Callable[[Path], object]], everywhere: bool = False) -> None:
    """Each `write(part)` beside its path, then all renamed: a full disk or a kill while writing leaves the old ones.

    Of several ranks only the first writes, unless all should, `everywhere`.
    """
    if not (everywhere or ranks.first()):
        return
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files[path](part)
            with open(part, "rb+") as f:
                os.fsync(f.fileno())  # or a power cut could leave a renamed, empty file
            part.chmod(0o644)  # safetensors lets nobody else read what it writes
        for path, part in parts.items():
            os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch.save says RuntimeError when the disk is full
        for part in parts.values():
            if part.exists():
                part.unlink()
        raise OSError(f"Could not write {path} ({(str(e) or type(e).__name__).splitlines()[0]}): what was saved before "
                      f"is untouched. Free some space and try again.") from e
