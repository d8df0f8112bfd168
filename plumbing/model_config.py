"""`config.json` -> the numbers that change what is computed, each taken from where transformers takes it.

Every key of the file is used, known to change nothing, or refused because it changes what is computed. One that is
none of these is named in a line of warning: a model that loads but computes something slightly different would train,
and teach nothing.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")
# What transformers takes where the file has no such key. (A key that says null is another matter.)
DEFAULTS: dict[str, dict] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "llama": {"max_position_embeddings": 2048},
    "lfm2": {"num_key_value_heads": 8, "max_position_embeddings": 128_000, "rms_norm_eps": 1e-5},
}
ACTIVATIONS = ("silu", "swish")  # two names of one function
# How weights were packed. `read_weights` refuses packed ones; beside plain weights this is a leftover of a merge.
QUANTIZED = ("quantization_config", "quantization", "compression_config")
# Switches that would change what is computed, and the value of each that asks for nothing.
ONLY = {"is_causal": True, "partial_rotary_factor": 1, "rope_interleaved": False, "add_cross_attention": False,
        "is_encoder_decoder": False, "block_use_swiglu": True, "use_pos_enc": True}
USED = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
        "max_position_embeddings", "tie_word_embeddings", "tie_embedding", "attention_bias", "mlp_bias", "layer_types",
        "full_attn_idxs", "conv_L_cache", "conv_bias", "block_ff_dim", "block_auto_adjust_ff_dim", "block_multiple_of",
        "block_ffn_dim_multiplier", "hidden_act", "use_sliding_window", "sliding_window", "max_window_layers",
        "bos_token_id", "eos_token_id", *QUANTIZED, *ONLY}
# Where a file came from, how weights were first drawn, what a call returns, how samples were drawn: none of it changes
# the function that the weights are. Dropout is one of them, since crisp trains without it.
HARMLESS = set("""_name_or_path architectures torch_dtype dtype transformers_version unsloth_version unsloth_fixed
    pad_token_id sep_token_id decoder_start_token_id use_cache initializer_range pretraining_tp attention_dropout
    hidden_dropout resid_pdrop embd_pdrop classifier_dropout label_smoothing is_llama_config is_decoder
    tie_encoder_decoder cross_attention_hidden_size output_attentions output_hidden_states return_dict
    return_dict_in_generate use_return_dict torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward pruned_heads
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix bad_words_ids
    do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences diversity_penalty
    early_stopping length_penalty max_length min_length max_new_tokens no_repeat_ngram_size repetition_penalty
    encoder_no_repeat_ngram_size exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id remove_invalid_values output_scores attn_implementation
    _attn_implementation _attn_implementation_autoset disable_flash_attention torch_compile use_mamba_kernels
    model_max_length block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_xavier_init conv_dim
    conv_dim_out conv_use_xavier_init num_heads theta""".split())


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
    """`config.json` as a dict, and `generation_config.json` if there is one -> ModelConfig.

    Raises ValueError, with the file `where` and the key, for a family or a feature that crisp does not compute.
    """
    size, number, flag = readers(raw, where)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where} says model_type '{family}': crisp knows {', '.join(FAMILIES)}.")
    lfm2, default = family == "lfm2", DEFAULTS[family]
    heads, D = size("num_attention_heads"), size("hidden_size")
    # Absent is the family's number, null is one key head for each query head.
    kv_heads = size("num_key_value_heads", heads if "num_key_value_heads" in raw else
                    default.get("num_key_value_heads", heads))
    head_dim = size("head_dim", default.get("head_dim", D // heads))
    for refused, says in ((str(raw.get("hidden_act", "silu")) not in ACTIVATIONS,
                           f"activation '{raw.get('hidden_act')}'"),
                          (heads % kv_heads, f"{heads} query heads on {kv_heads} key/value heads"),
                          (head_dim % 2, f"rotary embedding of an odd head_dim, {head_dim}"),
                          *((raw.get(key, only) not in (only, None), f"{key} {raw.get(key)!r}")
                            for key, only in ONLY.items())):
        if refused:
            raise ValueError(f"{where} asks for {says}, which crisp does not compute.")
    unknown = sorted(raw.keys() - USED - HARMLESS)
    if unknown:
        warn(f"{where} has keys that crisp does not know and passes over: {', '.join(unknown)[:300]}. If they change "
             f"what the model computes, its results are not those of transformers.")
    positions = size("max_position_embeddings", default["max_position_embeddings"])
    bias = not lfm2 and flag("attention_bias", False)
    bos, eos = special_ids(raw, where, generation)
    return ModelConfig(
        model_type=family, vocab_size=size("vocab_size"), hidden_size=D,
        intermediate_size=lfm2_width(size, number, flag, raw) if lfm2 else size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"), num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, rope_theta=rope_theta(raw, where), max_position_embeddings=positions,
        rms_norm_eps=number("norm_eps" if lfm2 else "rms_norm_eps", default.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=flag("tie_embedding" if lfm2 and "tie_embedding" in raw else "tie_word_embeddings", lfm2),
        qkv_bias=family == "qwen2" or bias, o_bias=family != "qwen2" and bias,
        mlp_bias=flag("mlp_bias", False) and family == "llama", qk_norm=family in ("qwen3", "lfm2"),
        layer_types=layer_kinds(raw, where, positions), conv_L_cache=size("conv_L_cache", 3),
        conv_bias=flag("conv_bias", False), bos_token_id=bos, eos_token_ids=eos)


def readers(raw: dict, where: str) -> tuple[Callable[..., int], Callable[..., float], Callable[..., bool]]:
    """Three functions (key, what it is where the file does not say): a size, a number, a switch. All refuse the rest:
    "false" is a text, and Python would take it for true."""
    def size(key, default=None):
        n = default if raw.get(key) is None else raw[key]
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{where}: '{key}' should be a whole number above 0, not {n!r}. Is it the config of a "
                             f"causal language model?")
        return n

    def number(key, default):
        n = raw.get(key, default)
        if isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n < math.inf:
            raise ValueError(f"{where}: '{key}' should be a number of at least 0, not {n!r}: see the config.json that "
                             f"the model was published with.")
        return float(n)

    def flag(key, default):
        value = default if raw.get(key) is None else raw[key]
        if not isinstance(value, bool):
            raise ValueError(f"{where}: '{key}' should be true or false, not {value!r}.")
        return value

    return size, number, flag


def rope_theta(raw: dict, where: str) -> float:
    """The base of the rotary angles. Only the plain kind is computed.

    transformers 4 wrote `rope_theta` and `rope_scaling`, 5 writes both into `rope_parameters`. Where a file has two of
    them, `rope_scaling` is obeyed and `rope_parameters` is not read at all, its base included.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", 1)
    for refused, says in ((kind != "default", f"rope type '{kind}' ({key})"),
                          (part != 1, f"rotation of {part} of a head"),
                          (any(isinstance(v, dict) for v in rope.values()), f"{key} of different layers")):
        if refused:
            raise ValueError(f"{where} asks for {says}, which crisp does not compute.")
    theta = rope.get("rope_theta", raw.get("rope_theta", 1e6 if raw["model_type"] == "lfm2" else 1e4))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(f"{where} asks for a rope_theta of {theta!r}, which crisp does not compute.")
    return float(theta)


def layer_kinds(raw: dict, where: str, positions: int) -> tuple[str, ...]:
    """What each layer mixes tokens with. A window as wide as the context, or one that no layer uses, is none."""
    size, _, flag = readers(raw, where)
    lfm2, n_layers = raw["model_type"] == "lfm2", size("num_hidden_layers")
    qwen = raw["model_type"].startswith("qwen")
    kinds, attends = raw.get("layer_types"), raw.get("full_attn_idxs") if lfm2 else None
    if not isinstance(attends, list | None):
        raise ValueError(f"{where}: 'full_attn_idxs' should be a list of layers, not {attends!r}.")
    # Qwen's windows are off unless they are switched on. In other files a window is Mistral's, and is on.
    slides = flag("use_sliding_window", not qwen) and raw.get("sliding_window") is not None
    narrow = slides and size("sliding_window") < positions
    if kinds is None and qwen:
        first = size("max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
        kinds = ["sliding_attention" if narrow and i >= first else "full_attention" for i in range(n_layers)]
    elif kinds is None and all(isinstance(i, int) for i in attends or ()):  # older LFM2 configs list who attends
        kinds = ["full_attention" if attends is None or i in attends else "conv" for i in range(n_layers)]
    elif isinstance(kinds, list) and slides and not narrow:
        kinds = ["full_attention" if kind == "sliding_attention" else kind for kind in kinds]
    known = isinstance(kinds, list) and all(k == "full_attention" or lfm2 and k == "conv" for k in kinds)
    windows = narrow and (not qwen or isinstance(kinds, list) and "sliding_attention" in kinds)
    for refused, says in ((windows, f"sliding-window attention, {raw.get('sliding_window')} tokens wide"),
                          (not known, f"layer_types or full_attn_idxs {str(kinds or attends)[:80]}"),
                          (isinstance(kinds, list) and len(kinds) != n_layers,
                           f"{n_layers} layers, but has other layer_types")):
        if refused:
            raise ValueError(f"{where} asks for {says}, which crisp does not compute.")
    return tuple(kinds or ())


def special_ids(raw: dict, where: str, generation: dict | None) -> tuple[int | None, tuple[int, ...]]:
    """(bos, stop tokens). `generation_config.json` replaces what `config.json` says of them: it is not added to it."""
    said = raw if generation is None else generation
    bos, eos = said.get("bos_token_id"), said.get("eos_token_id")
    bos = raw.get("bos_token_id") if bos is None else bos  # only what ends a text is replaced by nothing
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for key, ids in (("eos_token_id", eos), ("bos_token_id", [] if bos is None else [bos])):
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if wrong:
            raise ValueError(f"{where}, or generation_config.json beside it, says {key} {wrong[0]!r}: it should be the "
                             f"number of a token.")
    return bos, tuple(dict.fromkeys(eos))


def lfm2_width(size: Callable[..., int], number: Callable[..., float], flag: Callable[..., bool], raw: dict) -> int:
    """The feed-forward width of LFM2. Its configured one is meant for two matrices; three of 2/3 of it weigh the same:
    6656 -> 4437 -> 4608, the next multiple of 256."""
    width = size("intermediate_size" if raw.get("block_ff_dim") is None else "block_ff_dim")  # new spelling, old one
    if flag("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        step = size("block_multiple_of", 256)
        width = -(-int(number("block_ffn_dim_multiplier", 1.0) * width) // step) * step
    return width


@functools.cache  # the policy, its frozen copy and its judges may come from one folder: once is enough
def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
