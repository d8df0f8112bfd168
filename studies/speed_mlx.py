"""The MLX path beside its peers, in pairs on one machine. Prints tables. (studies/mac.py is the report from a Mac.)

    pip install -r tests/requirements.txt             # brings mlx and mlx-lm
    python -m studies.speed_mlx sampling              # beside mlx-lm's generate and its batch generation
    pip install mlx-lm-lora mlx-tune                  # best into an environment of its own: they want older packages
    python -m studies.speed_mlx step                  # a whole step beside these two
    python -m studies.speed_mlx step crisp mlx-lm-lora                   # these two rows only

All models have random weights. Each row is a process of its own. What the peers compute (read in mlx-lm-lora 5.10 and
mlx-tune 0.6):

mlx-lm-lora: GRPO with one update a batch: clipped ratio (1 by construction), k3 towards the reference, capped at a
log-ratio of 20, and the biased std. What it trains is softmax(logits) also where it samples at another temperature,
top-p or top-k (by default 0.8, 0.95 and 20). The prompt runs once while sampling, and once for each row while learning.

mlx-tune: not GRPO: the mean of -A times the sum (not the mean) of a row's log-probabilities. No ratio, no clip, no
reference model: its `beta` and `loss_type` are not read. It samples row after row at a temperature, and scores without.

Shapes: G completions of T tokens after one prompt of P tokens.
"""

import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import train
from config import Config, parse_stages
from grpo import update
from model import Transformer, load, read_config, save
from plumbing.posts import TINY
from rollout import sample

G, T, P, STEPS = 4, 64, 128, 3
SMALL = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 4096, "hidden_size": 256,
         "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 2}
PROMPT = [i % 200 + 20 for i in range(P)]


def write_model(folder: str, raw: dict, dtype: torch.dtype) -> None:
    """Random weights, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model = Transformer(read_config(raw, "speed_mlx")).to(dtype)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.uniform_(p.data, -0.03, 0.03)
    model.raw_config = raw
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    model.sidecars = {"tokenizer_config.json": json.dumps(words).encode()}
    save(model, load(TINY)[1], folder, dtype)


def in_a_process(job, *args):
    """job(*args) in a process of its own -> its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling_ours(folder: str) -> list[float]:
    import mlx_model
    model, _ = mlx_model.load(folder)
    return clocked(lambda: mlx_model.sample(model, [PROMPT], G, T, stop_ids=[]))


def sampling_generate(folder: str) -> list[float]:
    """What mlx-lm's `generate` loops over, a row after the other; it ends a row at no token."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_model
    model, _ = load_model(Path(folder))

    def rows():
        for _ in range(G):
            assert len(list(generate_step(mx.array(PROMPT), model, max_tokens=T, sampler=make_sampler(1.0)))) == T

    return clocked(rows)


def sampling_batch(folder: str) -> list[float]:
    """What mlx-lm's `batch_generate` is made of: all rows together, each with its own copy of the prompt."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_model
    model, _ = load_model(Path(folder))

    def batch():
        generator = BatchGenerator(model, sampler=make_sampler(1.0))
        generator.insert([PROMPT] * G, [T] * G)
        said = 0
        while responses := generator.next_generated():
            said += len(responses)
        generator.close()
        assert said == G * T, said

    return clocked(batch)


def clocked(job) -> list[float]:
    """Seconds of STEPS calls, after one that does not count."""
    seconds = []
    for _ in range(STEPS + 1):
        begun = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def beside(title: str, jobs: dict, folder: str) -> None:
    """A table: the first of the jobs {name: function of the folder} against each other one."""
    print(f"{title}, {SMALL['num_hidden_layers']} layers of {SMALL['hidden_size']}, float32; median of {STEPS}")
    ours = None
    for name, job in jobs.items():
        seconds = statistics.median(in_a_process(job, folder))
        ours = ours or seconds
        print(f"{name:28} {seconds:8.2f} s {seconds / ours:6.1f}x", flush=True)


# --- a step -----------------------------------------------------------------------------------------------------------


def step_ours(folder: str, backend: str = "mlx") -> list[float]:
    """Steps as train.py makes them, with a KL to the base. The first does not count."""
    config = Config(model=folder, backend=backend, lora=16, group=G, prompts=1, lr=1e-5, beta=0.05)
    model, tokenizer = train.load_policy(config)
    ref_model, _ = train.frozen_models(config, parse_stages(config.stages), model, tokenizer)
    optimizer = train.make_optimizer(config, model)
    act, learn = sample, update
    if backend == "mlx":
        import mlx_grpo
        act, learn = mlx_grpo.take_over(model, optimizer, PROMPT)

    def step():
        groups = act(model, [PROMPT], G=G, max_new_tokens=T, stop_ids=[], tokenizer=tokenizer)
        groups[0].rewards = [float(i) for i in range(G)]
        learn(model, ref_model, groups, optimizer, config)

    return clocked(step)


def step_torch(folder: str) -> list[float]:
    return step_ours(folder, "torch")


def step_mlx_lm_lora(folder: str) -> list[float]:
    import mlx.core as mx
    import mlx_lm
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, train_grpo
    (model, tokenizer), (ref_model, _) = mlx_lm.load(folder), mlx_lm.load(folder)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 16, "scale": 2.0, "dropout": 0.0})
    mx.eval(model.parameters())
    tokenizer.eos_token_ids = set()  # no row ends early
    marks = []

    class Clock:
        def on_train_loss_report(self, _):
            marks.append(time.perf_counter())

    def places(completions, **_):
        return [float(i) for i in range(len(completions))]

    args = GRPOTrainingArgs(
        batch_size=1, iters=STEPS + 1, group_size=G, beta=0.05, epsilon=0.2, max_completion_length=T, temperature=1.0,
        top_p=1.0, top_k=0, steps_per_report=1, steps_per_eval=10 ** 9, steps_per_save=10 ** 9,
        adapter_file=f"{folder}/adapters.safetensors")
    with contextlib.redirect_stdout(sys.stderr):
        train_grpo(model, ref_model, tokenizer, AdamW(1e-5), [(PROMPT, PROMPT, "", "")], reward_funcs=[places],
                   args=args, training_callback=Clock(), end_answer_token="")
    return [b - a for a, b in zip(marks, marks[1:])]


def step_mlx_tune(folder: str) -> list[float]:
    from mlx_tune import FastLanguageModel, GRPOConfig, GRPOTrainer
    marks = []

    def place(*_):
        marks.append(time.perf_counter())
        return float(len(marks) % G)

    with contextlib.redirect_stdout(sys.stderr):
        model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=P + T, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
        text = tokenizer.decode(PROMPT)
        GRPOTrainer(model, [{"prompt": text, "answer": ""}], tokenizer, place, GRPOConfig(
            num_generations=G, temperature=1.0, max_completion_length=T, learning_rate=1e-5, max_steps=STEPS + 2,
            output_dir=f"{folder}/mlx-tune", save_steps=10 ** 9)).train()
    ends = marks[G - 1::G]  # a step's last reward
    return [b - a for a, b in zip(ends, ends[1:])][1:]


def main(argv: list[str]) -> None:
    peers = {"sampling": {"crisp": sampling_ours, "mlx-lm, row after row": sampling_generate,
                          "mlx-lm, batch": sampling_batch},
             "step": {"crisp": step_ours, "mlx-lm-lora": step_mlx_lm_lora, "mlx-tune": step_mlx_tune,
                      "crisp, torch": step_torch}}
    what, *only = argv or [""]
    if what not in peers:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, SMALL, torch.float32)
        beside(f"{what}: {G} x {T} tokens after {P}", {name: job for name, job in peers[what].items()
                                                       if not only or name in only}, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
