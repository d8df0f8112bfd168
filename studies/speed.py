"""Speed and memory beside the libraries', in pairs on one machine. Prints tables.

    pip install -r tests/requirements.txt
    python -m studies.speed rewards             # a minute
    python -m studies.speed squish 4 1000       # a model of 4 layers, a document of 1,000 tokens: some minutes
    python -m studies.speed squish 4 500 bfloat16    # in the type that the model is published in
    python -m studies.speed squish 28 2000 ours # all 28 layers, without the peer, which does not fit into 24 GiB
    python -m studies.speed sampling small      # 8 x 64 tokens after a prompt of 384, in seconds
    python -m studies.speed sampling 0.5b "ours, float32" "transformers, float32"     # these two rows only
    python -m studies.speed step small          # a whole GRPO step against trl's
    python -m studies.speed step 0.5b "ours, float32" "trl, float32:1"    # these two rows, a single step of trl's
    python -m studies.speed scaling small       # how time and memory grow with G, prompt and completion
    python -m studies.speed curves lean.png runs/seed-0 runs/seed-1 runs/lean-0 runs/lean-1
    python -m studies.speed real                # the commands for real models, with random weights: half an hour
"""

import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

import squish as sq
from config import Config
from lora import add_lora
from metrics import bleu, meteor, rouge_l, words_13a
from model import Transformer, load, read_config, save
from plumbing import memory
from plumbing.posts import TINY
from plumbing.words import find_wordnet
from tests.bench import DEVICE, QWEN3_1_7B, SHAPES, arithmetic, bandwidth, clock, write_model
from tests.helpers import byte_bpe, nltk_wordnet

ROOT = Path(__file__).resolve().parents[1]

GROUPS, G, WORDS, ROUNDS = 8, 8, 55, 15  # 64 completions of 55 words: about 64 tokens


def batches() -> list[list[tuple[str, str]]]:
    """ROUNDS batches of (completion, reference) pairs that share about half of their words.

    As in training, a group has one reference and no other text comes twice, so remembering texts saves little time.
    """
    rng = random.Random(0)
    lines = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["document"].split() for line in lines]
    rounds = []
    for _ in range(ROUNDS):
        batch = []
        for _ in range(GROUPS):
            reference = (rng.choice(texts) + rng.choice(texts))[:WORDS]
            for _ in range(G):
                other = rng.choice(texts)
                batch.append((" ".join(word if rng.random() < 0.5 else rng.choice(other) for word in reference),
                              " ".join(reference)))
        rounds.append(batch)
    return rounds


class NoSynonyms:
    def synsets(self, word):
        return []


def rewards_against_libraries() -> None:
    rouge, sacre = RougeScorer(["rougeL"], use_stemmer=True), BLEU(effective_order=True)
    wordnet = nltk_wordnet() if find_wordnet() else NoSynonyms()
    pairs = {
        "ROUGE-L": (rouge_l, "rouge_score", lambda c, r: rouge.score(r, c)["rougeL"].fmeasure),
        "BLEU": (bleu, "sacreBLEU", lambda c, r: sacre.sentence_score(c, [r]).score / 100),
        "METEOR": (meteor, "nltk", lambda c, r: meteor_score([words_13a(r)], words_13a(c), wordnet=wordnet)),
    }
    print(f"rewards: {GROUPS} groups of {G} completions of {WORDS} words; median of {ROUNDS} rounds, ms a round. "
          f"WordNet: {find_wordnet() or 'none'}")
    print(f"{'':10} {'ours':>8} {'library':>9} {'ratio':>7}")
    rounds, total = batches(), 0.0
    # Every word is met once before the clock runs, as in the first steps of a run. Backwards, because sacreBLEU
    # remembers the texts that it has seen.
    for pair in itertools.chain.from_iterable(rounds):
        backwards = [" ".join(reversed(text.split())) for text in pair]
        for ours, _, theirs in pairs.values():
            ours(*backwards), theirs(*backwards)
    for name, (ours, library, theirs) in pairs.items():
        seconds = []
        for i, batch in enumerate(rounds):
            row = {}
            for who in ((ours, theirs), (theirs, ours))[i % 2]:  # in turns: neither is always the first
                begun = time.perf_counter()
                for candidate, reference in batch:
                    who(candidate, reference)
                row[who] = time.perf_counter() - begun
            seconds.append((row[ours], row[theirs], row[theirs] / row[ours]))
        a, b, ratio = (statistics.median(column) for column in zip(*seconds))
        total += a
        print(f"{name:10} {1e3 * a:8.2f} {1e3 * b:9.2f} {ratio:6.1f}x  {library}", flush=True)
    print(f"{'all three':10} {1e3 * total:8.2f}")


def in_a_process(job, *args):
    """job(*args) in a process of its own -> (its result, seconds, the process's peak in GiB), or None if the machine
    has too little memory for it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(timed, job, *args).result()
        except BrokenProcessPool:
            return None


def timed(job, *args):
    call = job(*args)  # loads what it needs and is not timed; the function that it returns is
    begun = clock()
    result = call()
    return result, clock() - begun, memory.peak(DEVICE)


def squish_ours(folder, document, summaries, dtype):
    model, tokenizer = load(folder, dtype=dtype)
    return lambda: sq.squish(model, tokenizer, document, summaries, 1.0)


def squish_obvious(folder, document, summaries, dtype):
    """What one would write with transformers: all rows in one padded batch, all logits, log_softmax, gather, mask."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    tokenizer = load_tokenizer(folder)
    first, middle = sq.TEMPLATE.removesuffix("{document}").split("{summary}")
    text = tokenizer.encode(document).ids
    contexts = [[0], *([0] + tokenizer.encode(first).ids + tokenizer.encode(s).ids + tokenizer.encode(middle).ids
                       for s in summaries)]

    @torch.no_grad()
    def call():
        longest = max(map(len, contexts)) + len(text)
        rows = [c + text for c in contexts]
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=DEVICE)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=DEVICE)
        is_document = torch.tensor([[0] * len(c) + [1] * len(text) + [0] * (longest - len(c) - len(text))
                                    for c in contexts], device=DEVICE).bool()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        bits = -(logp * is_document[:, 1:]).sum(1) / math.log(2)
        return ((bits[0] - bits[1:]) / bits[0]).tolist()

    return call


def load_tokenizer(folder):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def squish_against_transformers(layers: int, document_tokens: int, *flags: str, G: int = 8) -> None:
    """`flags`: "bfloat16", the type that the model is published in; "ours" or "transformers" to run only that one."""
    dtype = torch.bfloat16 if "bfloat16" in flags else torch.float32
    raw = QWEN3_1_7B | {"num_hidden_layers": layers}
    tokenizer, rng = byte_bpe(), random.Random(0)
    words = ["lost", "a", "shoe", "in", "the", "post", "and", "found", "other", "one", "about", "tokens"]
    document = " ".join(rng.choice(words) for _ in range(3 * document_tokens))
    document = sq.cut(tokenizer, document, document_tokens)
    summaries = [sq.cut(tokenizer, " ".join(rng.choice(words) for _ in range(300)), rng.randrange(50, 100))
                 for _ in range(G)]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = Transformer(read_config(raw, "speed"))
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.uniform_(p.data, -0.03, 0.03)
        model.raw_config = raw
        save(model, tokenizer, folder, dtype)
        weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize / 2 ** 30
        asked = (G + 1) * document_tokens  # tokens whose bits are wanted: only these need the head
        read = asked + sum(len(tokenizer.encode(sq.TEMPLATE.format(summary=s, document="")).ids) for s in summaries)
        work = 2 * (read * sum(p.numel() for p in model.layers.parameters()) + asked * model.head.numel())
        del model
        speed = arithmetic(dtype)
        print(f"SQUISH of {G} summaries of a document of {document_tokens} tokens (and of it alone), Qwen3-1.7B's "
              f"shape with {layers} of 28 layers, {dtype}: {weights:.1f} GiB of weights. Products alone, at the "
              f"{speed / 1e9:.0f} GFLOP/s of a large one here, take {work / speed:.0f} s")
        print(f"{'':14} {'seconds':>8} {'peak GiB':>9} {'without weights':>16}")
        rows = {}
        for name, job in (("ours", squish_ours), ("transformers", squish_obvious)):
            if name not in flags and {"ours", "transformers"} & set(flags):
                continue
            rows[name] = in_a_process(job, folder, document, summaries, dtype)
            if rows[name] is None:
                return print(f"{name:14} does not fit into this machine's memory")
            print(f"{name:14} {rows[name][1]:8.1f} {rows[name][2]:9.2f} {rows[name][2] - weights:16.2f}", flush=True)
        if len(rows) < 2:
            return
        (a, ours, mine), (b, theirs, peak) = rows.values()
        print(f"ratio          {ours / theirs:8.2f} {mine / peak:9.2f} {(mine - weights) / (peak - weights):16.2f}    "
              f"largest difference {max(abs(x - y) for x, y in zip(a, b)):.1e}")


PROMPT, NEW, STEPS = 384, 64, 3
WARM = 16  # tokens of a call that is not timed: memory is slow when the system hands it out for the first time


def prompt_ids(n: int) -> list[list[int]]:
    """n prompts of PROMPT tokens each."""
    rng = random.Random(0)
    return [[rng.randrange(20, 250) for _ in range(PROMPT)] for _ in range(n)]


def sampling_ours(folder, dtype):
    from rollout import sample
    model, _ = load(folder, dtype=dtype)
    prompts = prompt_ids(1)
    sample(model, prompts, 8, WARM, stop_ids=[])

    def call():
        begun = clock()
        sample(model, prompts, 8, 1, stop_ids=[])
        first = clock()
        sample(model, prompts, 8, NEW, stop_ids=[])
        return clock() - first, first - begun

    return call


def sampling_transformers(folder, dtype):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    ids = torch.tensor(prompt_ids(1), device=DEVICE).expand(8, -1)

    def generate(n):
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=n, min_new_tokens=n,
                           temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)

    generate(WARM)

    def call():
        begun = clock()
        generate(1)
        first = clock()
        generate(NEW)
        return clock() - first, first - begun

    return call


def sampling_against_transformers(shape: str, only: Sequence[str] = ()) -> None:
    """`only`: which of "ours, float32", "transformers, float32", "ours, bfloat16", "transformers, bfloat16"."""
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(folder, shape)
        speed = bandwidth()
        print(f"sampling 8 x {NEW} tokens after a prompt of {PROMPT}, {shape} shape, {weights:.2f} GiB of weights in "
              f"float32; memory is read at {speed:.1f} GiB/s: no step is faster than {1e3 * weights / speed:.0f} ms "
              f"in float32, half of it in bfloat16")
        # Each of the 8 rows multiplies and adds every weight once: two operations.
        least = 2 * 8 * weights * 2 ** 28 / arithmetic(torch.bfloat16)
        print(f"a step's products alone, at the speed of large ones: {1e3 * least:.0f} ms")
        print(f"{'':24} {'seconds':>8} {'of them prompt':>15} {'tokens/s':>9} {'ms a step':>10} {'of the floor':>13}")
        rows = {}
        for dtype in (torch.float32, torch.bfloat16):
            for who, job in (("ours", sampling_ours), ("transformers", sampling_transformers)):
                name = f"{who}, {str(dtype).removeprefix('torch.')}"
                if only and name not in only:
                    continue
                (total, first), _, _ = in_a_process(job, folder, dtype)
                step = (total - first) / (NEW - 1)
                rows[name] = total
                read = weights * dtype.itemsize / 4
                print(f"{name:24} {total:8.2f} {first:15.2f} {8 * NEW / total:9.0f} {1e3 * step:10.1f} "
                      f"{read / speed / step:13.0%}", flush=True)
        for name in ("float32", "bfloat16"):
            ours, theirs = (rows.get(f"{who}, {name}") for who in ("ours", "transformers"))
            if ours and theirs:
                print(f"{name}: transformers takes {theirs / ours:.1f} times as long")


def step_ours(folder, groups, how, steps):
    import copy

    import grpo
    from plumbing.adamw import AdamW
    from rollout import sample
    model, tokenizer = load(folder, dtype=torch.bfloat16 if "lean" in how else torch.float32)
    model.checkpointing = "checkpointing" in how
    if model.checkpointing:
        memory.tidy(model)  # as train.py does
    if "LoRA" in how:
        add_lora(model, 16, 32.0)
    ref_model = model if "LoRA" in how else copy.deepcopy(model).requires_grad_(False)
    if "compile" in how:
        for layer in {*model.layers, *ref_model.layers}:  # as train.py does
            layer.compile(dynamic=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    lean = "lean" in how and "LoRA" not in how
    optimizer = AdamW(trained, 1e-6) if lean else torch.optim.AdamW(trained, 1e-6, fused=True)
    config = Config(beta=0.05)

    def call():
        times = []
        for i in range(steps):
            begun = clock()
            batch = sample(model, prompt_ids(groups), 8, NEW, stop_ids=[], seed=i, tokenizer=tokenizer)
            sampled = clock()
            for group in batch:
                group.rewards = torch.arange(8.0)
            grpo.update(model, ref_model, batch, optimizer, config)
            times.append((clock() - begun, sampled - begun))
        return times[1:] if "compile" in how else times  # the first step compiles

    return call


def step_trl(folder, groups, how, steps):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.decode(ids) for ids in prompt_ids(groups)]
    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(clock())

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float(i % 8) for i in range(len(completions))],
        train_dataset=Dataset.from_dict({"prompt": prompts * (steps + 1)}), processing_class=tokenizer,
        callbacks=[Clock()],
        args=GRPOConfig(output_dir=folder + "/trl", per_device_train_batch_size=8 * groups, num_generations=8,
                        max_completion_length=NEW, max_steps=steps, beta=0.05, learning_rate=1e-6, temperature=1.0,
                        loss_type="grpo", gradient_checkpointing="checkpointing" in how, use_cpu=DEVICE == "cpu",
                        report_to=[], bf16="bfloat16" in how, generation_kwargs={"min_new_tokens": NEW},
                        save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused"))

    def call():
        begun = clock()
        trainer.train()
        return [(b - a, float("nan")) for a, b in zip([begun, *marks], marks)]

    return call


STEP_ROWS = ("ours, float32", "ours, float32, checkpointing", "ours, float32, compile", "ours, lean",
             "ours, lean, checkpointing", "ours, LoRA, float32", "ours, LoRA, lean", "trl, float32",
             "trl, float32, checkpointing", *(["trl, bfloat16"] if DEVICE == "cuda" else []))


def step_against_trl(shape: str, only: Sequence[str] = (), groups: int = 2) -> None:
    """`only`: which of STEP_ROWS; "ours, lean:1" makes one step of it instead of STEPS."""
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(folder + "/float32", shape)
        write_model(folder + "/bfloat16", shape, torch.bfloat16)
        print(f"one GRPO step of {groups} prompts x 8 completions, {PROMPT} + {NEW} tokens, {shape} shape "
              f"({weights:.2f} GiB in float32), with a KL; median of {STEPS} steps or as many as it says")
        # A token goes forward three times, for sampling, ref_model and learning. It goes backward once, which costs as
        # much as going forward twice. Each of these five multiplies and adds every weight. Only completions need the
        # head.
        head = SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"]
        products = 5 * 2 * groups * ((weights * 2 ** 28 - head) * (PROMPT + 8 * NEW) + head * 8 * NEW)
        print(f"its products alone, at the speed of large ones: {products / arithmetic(torch.bfloat16):.2f} seconds")
        print(f"{'':32} {'seconds':>8} {'sampling':>9} {'peak GiB':>9}")
        rows = {}
        for row in only or STEP_ROWS:
            name, _, steps = row.partition(":")
            job = step_trl if name.startswith("trl") else step_ours
            file = folder + ("/bfloat16" if "lean" in name else "/float32")
            done = in_a_process(job, file, groups, name, int(steps or STEPS))
            if done is None:
                print(f"{row:32} does not fit into this machine's memory", flush=True)
                continue
            times, _, peak = done
            rows[name] = statistics.median(t for t, _ in times)
            print(f"{row:32} {rows[name]:8.2f} {statistics.median(s for _, s in times):9.2f} {peak:9.2f}", flush=True)
        ours, trl = ([t for n, t in rows.items() if n.startswith(who)] for who in ("ours", "trl"))
        if ours and trl:
            print(f"trl's fastest takes {min(trl) / min(ours):.1f} times as long as our fastest")


def one_step(folder, G, P, T):
    from grpo import group_logprobs
    from rollout import sample
    model, _ = load(folder)
    rng = random.Random(0)
    prompt = [rng.randrange(20, 250) for _ in range(P)]

    def call():
        best = [math.inf, math.inf]
        for _ in range(3):
            begun = clock()
            group, = sample(model, [prompt], G, T, stop_ids=[])
            sampled = clock()
            group_logprobs(model, [group.prompt], group.tokens[None], group.mask[None])[0].sum().backward()
            model.zero_grad(set_to_none=True)
            best = [min(best[0], sampled - begun), min(best[1], clock() - sampled)]
        return best

    return call


def scaling(shape: str) -> None:
    """What a group costs as one of its sizes grows; the others stay at G 8, prompt 256, completion 64."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, shape)
        print(f"scaling, {shape} shape, float32, one prompt: best of three. It learns from P + G T tokens "
              f"and samples G T.")
        print(f"{'G':>4} {'prompt':>7} {'new':>5} {'sampling s':>11} {'us a token':>11} {'learning s':>11} "
              f"{'us a token':>11} {'peak GiB':>9}")
        for G, P, T in (*((G, 256, 64) for G in (1, 2, 4, 8, 16, 32, 64)), *((8, P, 64) for P in (64, 128, 512, 1024,
                        2048)), *((8, 256, T) for T in (16, 32, 128, 256, 512))):
            (sampling, learning), _, peak = in_a_process(one_step, folder, G, P, T)
            print(f"{G:4} {P:7} {T:5} {sampling:11.3f} {1e6 * sampling / G / T:11.0f} {learning:11.3f} "
                  f"{1e6 * learning / (P + G * T):11.0f} {peak:9.2f}", flush=True)


# The commands for real models, with fewer steps. Random weights never stop, so every completion has its full length.
TLDR = "--target 64 --prompts 2 --group 8 --lr 2e-6 --beta 1e-4 --kl k3 --weight-decay 0.1 --max-prompt 512 " \
       "--checkpointing --stages length:2"
SQUISH = "--stages squish:1 --budgets 0.1 --lora 32 --lora-alpha 64 --lean --prompts 1 --group 4 --updates 4 " \
         "--lr 1e-5 --lr-end 1 --clip-high 0.3 --advantage mean --loss dapo --beta 0 --missing penalty " \
         "--max-new-tokens 48 --checkpointing"
REAL = {"Qwen2.5-0.5B": ("0.5b", f"{TLDR} rouge_l+length:1"), "LFM2.5-350M": ("lfm2", f"{TLDR} meteor+length:1"),
        "Qwen3-1.7B SQUISH": ("1.7b", SQUISH)}


def real_runs(only: Sequence[str] = ()) -> None:
    """Each command in a process of its own, on the embedded posts. Their prompts are long, for the tokenizer knows few
    words."""
    print(f"{'':20} {'steps':>6} {'seconds each':>13} {'all in':>8} {'peak GiB':>9}")
    for name, (shape, flags) in REAL.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_model(folder + "/model", shape, torch.bfloat16)
            begun = time.perf_counter()
            command = [sys.executable, str(ROOT / "train.py"), "--model", folder + "/model", "--run", "real",
                       "--eval-posts", "1", *flags.split()]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            seconds = time.perf_counter() - begun
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            steps = [json.loads(line)["seconds"]
                     for line in open(folder + "/runs/real/metrics.jsonl", encoding="utf-8")]
            peak = float(re.search(r"at most ([\d.]+) GiB", done.stdout)[1])
            print(f"{name:20} {len(steps):6} {statistics.median(steps):13.1f} {seconds:8.0f} {peak:9.1f}", flush=True)


def curves(picture: str, runs: Sequence[str]) -> None:
    """Learning curves of finished runs in one picture, means over 15 steps. Runs whose names differ only in the number
    at the end have one colour."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    kinds = list(dict.fromkeys(Path(run).name.rpartition("-")[0] for run in runs))
    for run in runs:
        kind = Path(run).name.rpartition("-")[0]
        rows = [json.loads(line) for line in open(Path(run) / "metrics.jsonl", encoding="utf-8")]
        for ax, name in zip(axes, ("reward", "within_10pct", "reward/rouge_l", "kl")):
            steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
            means = [statistics.fmean(values[max(0, i - 15):i]) for i in range(1, len(values) + 1)]
            ax.plot(steps, means, color=f"C{kinds.index(kind)}", lw=1.2,
                    label=kind if kind not in ax.get_legend_handles_labels()[1] else None)
            ax.set_title(name, fontsize=10)
            ax.set_xlabel("step", fontsize=8)
            ax.grid(alpha=0.2)
    axes[0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["squish", layers, tokens, *flags]:
            squish_against_transformers(int(layers), int(tokens), *flags)
        case ["sampling", shape, *only]:
            sampling_against_transformers(shape, only)
        case ["step", shape, *only]:
            step_against_trl(shape, only)
        case ["scaling", shape]:
            scaling(shape)
        case ["real", *only]:
            real_runs(only)
        case ["curves", picture, *runs]:
            curves(picture, runs)
        case ["rewards"]:
            rewards_against_libraries()
        case _:
            sys.exit(__doc__)
