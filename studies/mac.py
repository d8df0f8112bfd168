"""Does --backend mlx do on this machine what it does in the tests, and how fast? A report to paste into an issue.

    python -m studies.mac             # on Apple silicon: some minutes, and about 8 GiB
    python -m studies.mac --small     # a small model in place of Qwen3-0.6B's shape: runs anywhere

Three parts: the machine; the same few steps of the embedded model with torch and with MLX, number by number; and a
step of LoRA at the shape of Qwen3-0.6B, of random bfloat16 weights: what others publish of their MLX trainers.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

import mlx_grpo
import mlx_model
from grpo import group_logprobs
from lora import add_lora
from model import Transformer, load, read_config
from plumbing.mlx_arrays import mx
from plumbing.posts import TINY
from rollout import sample

ROOT = Path(__file__).resolve().parents[1]
QWEN3_06B = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
             "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
             "eos_token_id": 151_645}
SMALL = QWEN3_06B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500, "eos_token_id": 2}
# A step: one prompt of P tokens, G completions of T, a KL to the base.
P, G, T = 256, 4, 256
UPDATE = {"loss": "grpo", "advantage": "group", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.04, "kl": "k3_ratio",
          "updates": 1, "temperature": 1.0, "grad_clip": 1.0, "micro_tokens": 16_384, "max_new_tokens": T}


def say_machine() -> None:
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}, "
          f"{psutil.virtual_memory().total / 2 ** 30:.0f} GiB")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, MLX {mx.__version__} on "
          f"{mx.default_device()}")
    wired = mx.device_info().get("max_recommended_working_set_size")  # what the system lets the GPU have at once
    print(f"The GPU may have {wired / 2 ** 30:.1f} GiB at once" if wired else "No Metal: MLX computes on the CPU")


def same_logprobs() -> None:
    """What both trainers say of four completions of the embedded model, in float32."""
    (model, tokenizer), (in_mlx, _) = load(TINY, "cpu"), mlx_model.load(TINY)
    prompt = tokenizer.encode("Somebody has lost a shoe on the way home, and asks who has found it.").ids
    group, = sample(model, [prompt], G, 32, stop_ids=[])
    with torch.no_grad():
        ours, _ = group_logprobs(model, [group.prompt], group.tokens[None], group.mask[None])  # [1, G, T]
    tokens, mask = (mx.array(x[None].numpy()) for x in (group.tokens, group.mask))  # [1, G, T] each
    theirs, _ = mlx_grpo.group_logprobs(in_mlx, [prompt], tokens, mask)  # [1, G, T]
    apart = (ours - mlx_model.to_torch(theirs)).abs().max().item()
    print(f"Log-probabilities of {group.tokens.numel()} tokens, torch's against MLX's: at most {apart:.1e} apart")


def the_same_steps(steps: int) -> None:
    """A run of the embedded model with each backend; the largest difference of what they log."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("torch", "mlx"):
            command = [sys.executable, str(ROOT / "train.py"), "--backend", backend, "--run", backend, "--stages",
                       f"rouge_l+length:{steps}", "--eval-posts", "4"]
            done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
            if done.returncode:
                print(f"  {backend} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
                return
            text = (Path(folder) / "runs" / backend / "metrics.jsonl").read_text(encoding="utf-8")
            rows[backend] = [json.loads(line) for line in text.splitlines()]
    for backend, lines in rows.items():
        print(f"  {backend}: {statistics.median(row['seconds'] for row in lines):.2f} s a step")
    for name in ("reward", "length", "kl", "entropy", "grad_norm", "logp_gap"):
        apart = max(abs(a[name] - b[name]) for a, b in zip(*rows.values()))
        print(f"  {name:10} torch {rows['torch'][-1][name]:9.5f}   mlx {rows['mlx'][-1][name]:9.5f}   "
              f"at most {apart:.1e} apart")


def step_of(raw: dict, rounds: int = 3) -> None:
    """Seconds of sampling and of learning, and the most memory that MLX held."""
    torch.manual_seed(0)
    model = Transformer(read_config(raw, "studies/mac.py")).to(torch.bfloat16)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    add_lora(model, 16, 32.0)
    model.checkpointing = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, (0.9, 0.99))
    prompt = torch.randint(0, raw["vocab_size"], (P,)).tolist()  # P ids
    act, learn = mlx_grpo.take_over(model, optimizer, prompt[:8])
    mx.reset_peak_memory()
    for n in range(rounds):
        begun = time.perf_counter()
        groups = act(model, [prompt], G=G, max_new_tokens=T, stop_ids=[], seed=n)
        sampled = time.perf_counter()
        groups[0].rewards = [float(i) for i in range(G)]
        metrics = learn(model, model, groups, optimizer, SimpleNamespace(**UPDATE))
        learnt = time.perf_counter()
        print(f"  step {n + 1}: {learnt - begun:.2f} s, of them {sampled - begun:.2f} s sampling "
              f"({G * T / (sampled - begun):.0f} tokens/s); logp_gap {metrics['logp_gap']:.1e}, "
              f"kl {metrics['kl']:.1e}")
    print(f"  {mx.get_peak_memory() / 2 ** 30:.2f} GiB at most")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model in place of Qwen3-0.6B's shape")
    small = parser.parse_args(argv).small
    say_machine()
    same_logprobs()
    print("The embedded model, the same steps:")
    the_same_steps(2 if small else 10)
    print(f"{'A small model' if small else 'The shape of Qwen3-0.6B'}, bfloat16, LoRA 16, checkpointing, KL: a prompt "
          f"of {P} tokens, {G} completions of {T}")
    step_of(SMALL if small else QWEN3_06B, 2 if small else 3)


if __name__ == "__main__":
    main()
