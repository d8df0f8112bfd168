"""What the studies that measure time share: shapes of models, random weights, a clock, the speed of the machine."""

import json
import math
import os
import time

import torch

from model import Transformer, read_config, save
from tests.helpers import byte_bpe

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))  # tests/helpers.py has set it to 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of all models, ours and the peers'

QWEN3_1_7B = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
              "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
              "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
              "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0,
              "torch_dtype": "float32"}
LFM2_350M = {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "vocab_size": 65536, "hidden_size": 1024,
             "intermediate_size": 6656, "block_auto_adjust_ff_dim": True, "num_hidden_layers": 16,
             "full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_attention_heads": 16, "num_key_value_heads": 8,
             "conv_L_cache": 3, "norm_eps": 1e-5}
SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "lfm2": LFM2_350M,
    "1.7b": QWEN3_1_7B,
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 4096},
}


def clock() -> float:
    """Seconds, once the GPU has done what it was told to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def write_model(folder: str, shape: str, dtype: torch.dtype = torch.float32) -> float:
    """Write a model of random weights, with a tokenizer of few words; it is a Qwen2.5 unless its shape says otherwise.
    -> GiB of its weights in float32, whatever the file's `dtype`. A file counts as memory while it is read, so a run in
    bfloat16 should get one in bfloat16."""
    raw = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6, "rms_norm_eps": 1e-6,
           "max_position_embeddings": 32768, "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 0,
           "eos_token_id": 2, "torch_dtype": "float32"} | SHAPES[shape]
    torch.manual_seed(0)
    model = Transformer(read_config(raw, "speed"))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.uniform_(p.data, -0.03, 0.03)
    model.raw_config = raw
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    model.sidecars = {"tokenizer_config.json": json.dumps(words).encode()}
    save(model, byte_bpe(), folder, dtype)
    return sum(p.numel() for p in model.parameters()) * 4 / 2 ** 30


def bandwidth() -> float:
    """How many GiB of memory this machine reads in a second: it sums up 512 MiB, best of five."""
    x, best = torch.ones(2 ** 27, device=DEVICE), math.inf
    for _ in range(5):
        begun = clock()
        x.sum()
        best = min(best, clock() - begun)
    return 0.5 / best


def arithmetic(dtype: torch.dtype) -> float:
    """Operations a second in a large product, in `dtype` or float32, whichever is faster here; best of five."""
    best = math.inf
    for kind in {dtype, torch.float32}:
        x, W = torch.randn(1024, 2048, dtype=kind, device=DEVICE), torch.randn(6144, 2048, dtype=kind, device=DEVICE)
        for _ in range(5):
            begun = clock()
            x @ W.T
            best = min(best, clock() - begun)
    return 2 * x.numel() * len(W) / best
