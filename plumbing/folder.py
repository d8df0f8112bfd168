"""A Hugging Face folder: its config, its weights and their names, and how files are written whole or not at all."""

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from plumbing.download import download
from plumbing.weights import write_tensors

FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")
# Files beside the weights that say how to tokenise, chat and stop: kept in memory by `load`, written again by `save`.
SIDECARS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
            "added_tokens.json", "vocab.json", "merges.txt")
FILES = ("config.json", "tokenizer.json", *SIDECARS, "model.safetensors", "model.safetensors.index.json",
         "model-*.safetensors")  # all that `read_model` reads

# A module of `model.py` -> its name in folders of qwen2, qwen3 and llama, and of lfm2. Others are called the same.
NAMES = {
    "operator_norm": ("input_layernorm", "operator_norm"),
    "operator.q_proj": ("self_attn.q_proj", "self_attn.q_proj"),
    "operator.k_proj": ("self_attn.k_proj", "self_attn.k_proj"),
    "operator.v_proj": ("self_attn.v_proj", "self_attn.v_proj"),
    "operator.o_proj": ("self_attn.o_proj", "self_attn.out_proj"),
    "operator.q_norm": ("self_attn.q_norm", "self_attn.q_layernorm"),
    "operator.k_norm": ("self_attn.k_norm", "self_attn.k_layernorm"),
    "operator.in_proj": ("", "conv.in_proj"),  # the short convolution, which only lfm2 has
    "operator.conv": ("", "conv.conv"),
    "operator.out_proj": ("", "conv.out_proj"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp.gate_proj": ("mlp.gate_proj", "feed_forward.w1"),
    "mlp.up_proj": ("mlp.up_proj", "feed_forward.w3"),
    "mlp.down_proj": ("mlp.down_proj", "feed_forward.w2"),
    "norm": ("norm", "embedding_norm"),
}


def file_name(name: str, family: str) -> str:
    """What a module or parameter of the model is called in files, and by who trains it (`--lora-targets w1`).

    >>> file_name("layers.0.mlp.gate_proj.weight", "lfm2")
    'layers.0.feed_forward.w1.weight'
    """
    layer, path = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups("")
    for module in (path, path.rpartition(".")[0]):
        if module in NAMES:
            return layer + NAMES[module][family == "lfm2"] + path.removeprefix(module)
    return name


def file_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters, in its own order, by their names in files."""
    return {file_name(name, model.config.model_type): p for name, p in model.named_parameters()}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of `config.json` that change the computation, with one spelling for each."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_types: tuple[str, ...]  # "full_attention" or "conv", one a layer
    conv_L_cache: int  # width of LFM2's convolution, as transformers calls it
    conv_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_config(raw: dict, where: str, generation: dict | None = None) -> ModelConfig:
    """`config.json` as a dict (and `generation_config.json`, which may name further stop tokens) -> ModelConfig.

    A family or feature that this file does not compute is refused here: a model that loads but computes something
    slightly different would train, and teach nothing.
    """
    def size(key, default=None):
        n = default if raw.get(key) is None else raw[key]
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{where}: '{key}' should be a whole number above 0, not {n!r}. Is it the config of a "
                             f"causal language model?")
        return n

    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where} says model_type '{family}': crisp knows {', '.join(FAMILIES)}.")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # new spelling, old spelling
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    lfm2 = family == "lfm2"
    theta = rope.get("rope_theta") or raw.get("rope_theta") or (1e6 if lfm2 else 1e4)
    heads, D, n_layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", D // heads)
    eos = [(source or {}).get("eos_token_id") for source in (raw, generation)]
    eos = [i for ids in eos if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    kinds, attends = raw.get("layer_types"), raw.get("full_attn_idxs") if lfm2 else None
    if kinds is None and isinstance(attends, list | None):  # the older LFM2 configs list only which layers attend
        kinds = ["full_attention" if attends is None or i in attends else "conv" for i in range(n_layers)]
    factor = raw.get("block_ffn_dim_multiplier", 1.0)
    known = isinstance(kinds, list) and all(k == "full_attention" or lfm2 and k == "conv" for k in kinds)
    for refused, says in ((rope_type != "default", f"rope type '{rope_type}'"),
                          (not isinstance(theta, int | float), f"a rope_theta of {theta!r}"),
                          (raw.get("use_sliding_window"), "sliding-window attention"),
                          (raw.get("hidden_act", "silu") != "silu", f"activation '{raw.get('hidden_act')}'"),
                          (heads % kv_heads, f"{heads} query heads on {kv_heads} key/value heads"),
                          (head_dim % 2, f"rotary embedding of an odd head_dim, {head_dim}"),
                          (not isinstance(factor, int | float), f"a block_ffn_dim_multiplier of {factor!r}"),
                          (not known, f"layer_types or full_attn_idxs {str(kinds or attends)[:80]}"),
                          (known and len(kinds) != n_layers, f"{n_layers} layers, but has other layer_types"),
                          (not all(isinstance(i, int) for i in eos), f"the stop tokens {eos}")):
        if refused:
            raise ValueError(f"{where} asks for {says}, which crisp does not compute.")
    bias = not lfm2 and bool(raw.get("attention_bias", False))
    return ModelConfig(
        model_type=family, vocab_size=size("vocab_size"), hidden_size=D,
        intermediate_size=lfm2_width(raw, size) if lfm2 else size("intermediate_size"),
        num_hidden_layers=n_layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=raw.get("norm_eps", 1e-5) if lfm2 else raw.get("rms_norm_eps", 1e-6), rope_theta=float(theta),
        max_position_embeddings=size("max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_embedding", raw.get("tie_word_embeddings", lfm2))),
        qkv_bias=family == "qwen2" or bias, o_bias=family != "qwen2" and bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)), qk_norm=family in ("qwen3", "lfm2"),
        layer_types=tuple(kinds), conv_L_cache=size("conv_L_cache", 3), conv_bias=bool(raw.get("conv_bias", False)),
        bos_token_id=raw.get("bos_token_id"), eos_token_ids=tuple(dict.fromkeys(eos)))


def lfm2_width(raw: dict, size: Callable[..., int]) -> int:
    """The feed-forward width of LFM2. Its configured one is meant for two matrices; three of 2/3 of it weigh the same:
    6656 -> 4437 -> 4608, the next multiple of 256."""
    width = size("intermediate_size" if raw.get("block_ff_dim") is None else "block_ff_dim")  # new spelling, old one
    if raw.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        step = size("block_multiple_of", 256)
        width = -(-int(raw.get("block_ffn_dim_multiplier", 1.0) * width) // step) * step
    return width


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
    return download(name, FILES)


def read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a model folder needs config.json and *.safetensors.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}): copy or download it again.") from e
    if not isinstance(value, dict):  # a broken file, not a wrong type in the program
        raise ValueError(f"{path} holds a {type(value).__name__} where an object was expected.")
    return value


def read_weights(folder: Path, config: ModelConfig, want: dict[str, torch.Size], device: str,
                 dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters that are wanted, name -> shape, from the folder's safetensors, single or sharded; exactly those,
    in those shapes."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():  # the single file wins, as it does in transformers
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no 'weight_map': copy or download it again.")
        names = sorted(set(weight_map.values()))
    state: dict[str, Tensor] = {}
    for file in (folder / n for n in names):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: the folder's weights are not complete.")
        try:
            # safetensors before 0.8 takes "mps" for a device, and "mps:0" for none.
            with safe_open(file, framework="pt", device="mps" if str(device).startswith("mps") else str(device)) as f:
                for key in f.keys():
                    name = key.removeprefix("model.")
                    if name.endswith("rotary_emb.inv_freq"):  # old files store this table; it is recomputed
                        continue
                    if config.tie_word_embeddings and name == "lm_head.weight":
                        name = "embed_tokens.weight"  # a tied matrix may be stored under either name, or both
                        if name in state:
                            continue
                    if name not in want:
                        raise ValueError(f"{file} holds '{key}', which {config.model_type} has no place for.")
                    tensor = f.get_tensor(key)
                    if tensor.shape != want[name]:
                        raise ValueError(f"{file}: '{key}' has shape {list(tensor.shape)}, "
                                         f"config.json asks for {list(want[name])}.")
                    state[name] = tensor.to(dtype)
        except SafetensorError as e:
            raise ValueError(f"{file} is not a whole safetensors file ({e}): copy or download it again.") from e
    missing = sorted(want.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, "
                         f"the first is '{missing[0]}'.")
    return state


def read_model(model_class: Callable[[ModelConfig], nn.Module], name_or_path: str | Path, device: str | None,
               dtype: torch.dtype | None) -> tuple[nn.Module, Tokenizer | None]:
    """What `model.load` promises, with `model_class(config)` to be filled."""
    folder = find_folder(name_or_path)
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    generation = read_json(generation) if generation.exists() else None
    config = read_config(raw, str(folder / "config.json"), generation)
    with torch.device("meta"):  # shapes only: no time spent on random numbers that the file replaces
        model = model_class(config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"There is no device '{device}' here: take cpu, cuda or mps.") from e
    want = {name: p.shape for name, p in file_parameters(model).items()}
    state = read_weights(folder, config, want, device, dtype or torch.float32)
    model.load_state_dict({name: state[file_name(name, config.model_type)] for name, _ in model.named_parameters()},
                          assign=True)
    model.raw_config = raw
    model.sidecars = {n: (folder / n).read_bytes() for n in ("tokenizer.json", *SIDECARS) if (folder / n).exists()}
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({e}): copy or download it again.") from e
        tokenizer.no_truncation()  # a tokenizer saved by a training run may cut or pad silently
        tokenizer.no_padding()
    return model, tokenizer


def write_model(model: nn.Module, tokenizer: Tokenizer | None, path: str | Path, dtype: torch.dtype | None) -> None:
    """What `model.save` promises.

    Adapters are float32. With them all is stored as float32 unless `dtype` says otherwise: rounded to bfloat16, W + BA
    would forget most of what was learnt.
    """
    folder, family, sidecars = Path(path), model.config.model_type, dict(model.sidecars)
    dtype = dtype or functools.reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    raw = {key: value for key, value in model.raw_config.items() if key != "quantization_config"}  # not quantized now
    for key in {"dtype", "torch_dtype"} & raw.keys() or {"torch_dtype"}:
        raw[key] = str(dtype).removeprefix("torch.")
    names = {name: file_name(name, family) for name, _ in model.named_parameters()}
    shapes = {name if name.startswith("lm_head") else f"model.{name}": p.shape for name, p in zip(
        names.values(), model.parameters(), strict=True) if not name.endswith(("lora_A", "lora_B"))}
    weights = (tensor for _, tensor in model.merged_parameters())
    read = sidecars.pop("tokenizer.json", b"")  # as it was when the model was loaded
    files = {"config.json": json.dumps(raw, indent=2).encode() + b"\n", **sidecars}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer_text(tokenizer, read)
    write_files({folder / "model.safetensors": lambda part: write_tensors(part, shapes, weights, dtype),
                 **{folder / name: lambda part, content=content: part.write_bytes(content)
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


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    write_files({path: write})


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_files(files: dict[Path, Callable[[Path], object]]) -> None:
    """Each `write(part)` beside its path, then all renamed: a full disk or a kill while writing leaves the old ones."""
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
