"""A fleet on paper: what a run costs on one machine and on many, before anybody buys one.

    python -m studies.fleet                                    # the tables of docs/machines.md
    python -m studies.fleet --write                            # into that page
    python -m studies.fleet --machine h100-0.5b --samplers 3 --prompts 12    # a fleet and a batch of your own
    python -m studies.fleet measure 0.5b --name h100-0.5b      # this machine's pieces: a minute on a GPU, 15 on a core
    python -m studies.fleet check                              # the simulation beside runs of this machine: two minutes

A run is made of pieces: to read a prompt, to draw a token, to learn from one, to write weights and to load them.
`measure` times each of them with crisp's own code, at two sizes, so that a piece is a fixed part and a part for each
unit. The simulation puts them together again. Samplers, the machines that learn, and the network between them each do
one thing at a time. Completions have different lengths, so some machines wait for others: that is what one wants to
know, and what no formula says.

A Mac was not at hand. Its pieces are an estimate by a rule: to draw a token, a machine reads all weights once; all else
is bound by multiplications. The same rule is tried on the machines that were measured, and its error stands beside it.

Shapes: B prompts a step, G completions each, N = B*G rows, P prompt tokens, T completion tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from plumbing.folder import read_json, write_text
from plumbing.groups import steps_to_keep

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results" / "fleet"
PAGE = ROOT / "docs" / "machines.md"
# The TL;DR recipe of docs/real-models.md. Of its prompts and completions only the lengths matter here.
RECIPE = {"target": 64, "prompts": 2, "group": 8, "lr": 2e-6, "beta": 1e-4, "kl": "k3", "weight_decay": 0.1,
          "max_prompt": 512, "checkpointing": True, "stages": ("rouge_l+length:1",)}
Affine = tuple[float, float]  # seconds: a fixed part, and one for each unit


@dataclass(frozen=True)
class Pieces:
    """What one machine takes for each part of a step, in seconds, unless a unit is named."""

    machine: str
    read: Affine = (0, 0)  # prompts, all at once; for each prompt token
    draw: Affine = (0, 0)  # one more token for every row; for each row
    compare: Affine = (0, 0)  # a server's log-probabilities with ours, one group; for each token of it
    score: Affine = (0, 0)  # all completions; for each one
    learn: Affine = (0, 0)  # a step of the optimizer; for each token learnt from, P + G*T a prompt
    write: Affine = (0, 0)  # weights into files; for each byte
    load: Affine = (0, 0)  # and back into a model
    weights: float = 0  # how many
    saved: float = 0  # bytes of all weights in files, as the run writes them
    adapters: float = 0  # bytes of adapters of rank 16
    width: float = 4  # bytes of a weight
    bandwidth: float = 0  # bytes a second, read from memory
    products: float = 0  # additions and multiplications a second in large products
    lengths: Affine = (0, 0)  # tokens of a completion: mean and standard deviation; (0, 0): not measured
    prompt: Affine = (0, 0)  # tokens of a prompt, likewise
    request: float = 0  # a server that takes this long for each prompt, one after another, whatever is in it


def cost(piece: Affine, units: float) -> float:
    return piece[0] + piece[1] * units


# --- the simulation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What every step samples and learns from."""

    prompts: int = 2
    group: int = 8
    prompt: Affine = (300, 100)  # tokens of a prompt: mean and standard deviation
    most_prompt: int = 512
    length: Affine = (64, 20)  # tokens of a completion, the stop token included, likewise
    most: int = 128  # where a completion is cut
    steps: int = 200

    def batch(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of step n -> tokens of its prompts [B], and of its completions [B, G]; no fleet changes them."""
        rng = np.random.default_rng([seed, n])
        P = rng.normal(*self.prompt, self.prompts).round().clip(1, self.most_prompt)  # [B]
        return P, rng.normal(*self.length, (self.prompts, self.group)).round().clip(1, self.most)  # [B], [B, G]


@dataclass(frozen=True)
class Fleet:
    """Who does what. Without samplers, those that learn sample, each its own prompts."""

    sampler: Pieces
    learner: Pieces
    samplers: int = 0
    learners: int = 1  # ranks of torchrun: each learns from its share of the prompts, and they add up their gradients
    ahead: bool = False  # batch n+1 is sampled while batch n is learnt from
    every: int = 1  # steps between new weights for the samplers
    sync: float = 0  # bytes of the weights that they get
    network: float = 0  # bytes a second out of the learner, and between ranks; 0: no limit


class Machine:
    """Does one thing at a time. `spans` are the times in which it does one, in their order."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []

    def work(self, ready: float, seconds: float) -> float:
        """Begin once it is `ready` and nothing else is going on -> when it is done."""
        begin = max(ready, self.spans[-1][1] if self.spans else 0.0)
        self.spans.append((begin, begin + seconds))
        return begin + seconds

    @property
    def busy(self) -> float:
        return sum(end - begin for begin, end in self.spans)

    def idle(self, end: float) -> float:
        """Seconds before `end` in which it waits."""
        ends = [0.0, *(end for _, end in self.spans)]
        return sum(begin - last for (begin, _), last in zip(self.spans, ends)) + end - ends[-1]


@dataclass
class Outcome:
    """A simulated run. Seconds of its machines are sums over the run."""

    seconds: float
    steps: int
    tokens: float  # sampled
    age: float  # how many updates the weights that sampled lay back when their samples were learnt from, mean
    samplers: list[Machine]
    learners: list[Machine]
    network: Machine = field(default_factory=Machine)

    @property
    def step(self) -> float:
        return self.seconds / self.steps

    def waits(self, machines: Sequence[Machine]) -> float:
        """Seconds a step in which a machine has nothing to do, mean."""
        return fmean(machine.idle(self.seconds) for machine in machines) / self.steps


def sampling(p: Pieces, P: np.ndarray, T: np.ndarray) -> float:
    """Seconds in which a machine answers b prompts of P [b] tokens with completions of T [b, G] tokens.

    As rollout.py does it: all prompts at once, then a token for every row at a time. What is left of the batch stays a
    rectangle, prompts with a living row times the most of them in a prompt.
    """
    if p.request:
        return p.request * len(P)
    living = (T[:, :, None] > np.arange(1, int(T.max()))).sum(1)  # [b, T-1] rows of each prompt that are not done
    rows = (living > 0).sum(0) * living.max(0, initial=0)  # [T-1]
    return cost(p.read, P.sum()) + p.draw[0] * len(rows) + p.draw[1] * rows.sum()


def simulate(job: Job, fleet: Fleet, seed: int = 0) -> Outcome:
    """All steps of a run, as a serial loop or with the next batch sampled ahead."""
    learners = [Machine() for _ in range(fleet.learners)]
    samplers = [Machine() for _ in range(fleet.samplers)] or learners
    network, sampler, learner = Machine(), fleet.sampler, fleet.learner
    ages, versions, tokens = [], {0: 0}, 0.0
    known = 0  # which weights the samplers have: those after so many updates

    def ask(n: int, ready: float, updates: int) -> tuple[float, float]:
        """Have batch n sampled from the weights after so many updates -> when they are out, when the batch is here."""
        nonlocal known
        if fleet.samplers and updates >= known + fleet.every:
            written = learners[0].work(ready, cost(learner.write, fleet.sync))
            there = [network.work(written, fleet.sync / fleet.network if fleet.network else 0.0) for _ in samplers]
            ready = max(s.work(at, cost(sampler.load, fleet.sync)) for s, at in zip(samplers, there))
            known = updates
        versions[n] = known if fleet.samplers else updates
        P, T = job.batch(n, seed)
        own = [slice(k, None, len(samplers)) for k in range(min(len(samplers), job.prompts))]
        return ready, max(s.work(ready, sampling(sampler, P[at], T[at])) for s, at in zip(samplers, own))

    def compare(n: int, ready: float) -> float:
        """Compare one group of each server with what the weights say themselves -> when that is done."""
        P, T = job.batch(n, seed)
        seconds = sum(cost(learner.compare, p + t.sum()) for p, t in zip(P[:fleet.samplers], T))
        return learners[0].work(ready, seconds) if fleet.samplers else ready

    def learn(n: int, ready: float) -> float:
        """Score batch n and learn from it -> when the new weights are there."""
        P, T = job.batch(n, seed)
        shares = [(P[k::len(learners)], T[k::len(learners)]) for k in range(len(learners))]
        ends = []
        for machine, (p, t) in zip(learners, shares):
            seconds = cost(learner.score, t.size) + cost(learner.learn, p.sum() + t.sum())
            ends.append(machine.work(ready, seconds))
        if len(learners) == 1:
            return ends[0]
        # A ring: each rank sends and gets every gradient nearly twice, but for its own share of them.
        size = 2 * (len(learners) - 1) / len(learners) * 4 * learner.weights
        return max(m.work(max(ends), size / fleet.network if fleet.network else 0.0) for m in learners)

    _, here = ask(0, 0.0, 0)
    for n in range(job.steps):
        more, begin = n + 1 < job.steps, compare(n, here)
        if more and fleet.ahead and fleet.samplers:
            begin, following = ask(n + 1, begin, n)  # from the weights of before this update
        done = learn(n, begin)
        if more:
            here = max(done, following) if fleet.ahead and fleet.samplers else ask(n + 1, done, n + 1)[1]
        ages.append(n - versions[n])
        tokens += job.batch(n, seed)[1].sum()
    return Outcome(seconds=done, steps=job.steps, tokens=tokens, age=fmean(ages), samplers=samplers, learners=learners,
                   network=network)


# --- the pieces, measured ---------------------------------------------------------------------------------------------


def typical(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call after one that warms up, the mean: means of pieces add up to the mean of a step, medians do
    not. At least three calls and a second and a half, but no more of them after 20 seconds."""
    times: list[float] = []
    while (len(times) < 4 or sum(times) < 1.5) and sum(times) < 20:
        begun = clock()
        call()
        times.append(clock() - begun)
    return fmean(times[1:] or times)


def line(x: Sequence[float], y: Sequence[float]) -> Affine:
    """The line through two points; through the origin where the points say that more costs nothing, or less.

    >>> line((10, 20), (3, 5))
    (1.0, 0.2)
    """
    slope = (y[1] - y[0]) / (x[1] - x[0])
    fixed = y[0] - slope * x[0]
    if slope < 0:
        return fmean(y), 0.0
    return (fixed, slope) if fixed >= 0 else (0.0, sum(y) / sum(x))


def measure(shape: str, lean: bool = False, lora: int = 0) -> Pieces:
    """Time the pieces of a run of the recipe on this machine, on random weights of a shape of tests/bench.py.

    "tiny" is the embedded model with the default settings; it tells how long its prompts and completions are, too.
    """
    import torch

    import task
    import train
    from config import Config, parse_stages
    from tests.bench import DEVICE, arithmetic, bandwidth, write_model

    dtype = torch.bfloat16 if lean else torch.float32
    label = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU with {torch.get_num_threads()} thread"
    label += "s" * (DEVICE == "cpu" and torch.get_num_threads() > 1) + ", --lean" * lean + ", --lora" * bool(lora)
    with tempfile.TemporaryDirectory() as folder:
        config, most, tokens = Config(lean=lean, lora=lora, eval_posts=1), (2, 4), (20, 60)
        if shape != "tiny":
            write_model(f"{folder}/model", shape, dtype)
            config, most, tokens = replace(config, model=f"{folder}/model", **RECIPE), (1, 2), (32, 96)
        model, tokenizer = train.load_policy(config)
        posts, _, _ = train.choose_posts(config, parse_stages(config.stages), model, tokenizer)
        config.max_new_tokens = config.max_new_tokens or 2 * config.target
        weights = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
        tasks = task.tasks_of(posts, 0, replace(config, prompts=most[-1]), tokenizer)
        batches = [tasks[:b] for b in most]
        sizes = sizes_of_texts(config, model, tokenizer, posts) if shape == "tiny" else {}
        return Pieces(machine=label, **of_sampling(config, model, tokenizer, batches, tokens),
                      **of_learning(config, model, tokenizer, batches, tokens[1]),
                      **of_files(config, model, tokenizer, Path(folder)), **sizes, weights=weights,
                      width=dtype.itemsize, bandwidth=bandwidth() * 2 ** 30, products=arithmetic(dtype))


def write_batch(config, model, tokenizer, batch: Sequence, tokens: int, seed: int = 0, stop_ids=()) -> list:
    """The groups of a batch of tasks; without `stop_ids` every completion has all its tokens."""
    from rollout import sample
    return sample(model, [each.prompt for each in batch], config.group, tokens, tokenizer=tokenizer, seed=seed,
                  stop_ids=stop_ids)


def of_sampling(config, model, tokenizer, batches: Sequence, tokens: Sequence[int]) -> dict:
    """Two batches, each with short and with long completions -> what a prompt takes, and what one more token takes."""
    from tests.bench import clock
    seconds = [[typical(lambda b=b, t=t: write_batch(config, model, tokenizer, b, t), clock) for t in tokens]
               for b in batches]
    draws = [(long - short) / (tokens[1] - tokens[0]) for short, long in seconds]
    reads = [short - (tokens[0] - 1) * draw for (short, _), draw in zip(seconds, draws)]  # the first token included
    return {"read": line([sum(len(each.prompt) for each in batch) for batch in batches], reads),
            "draw": line([config.group * len(batch) for batch in batches], draws)}


def of_learning(config, model, tokenizer, batches: Sequence, tokens: int) -> dict:
    """Two batches, scored and learnt from. Texts are new each time, for what was stemmed or aligned is remembered."""
    import grpo
    import task
    import train
    from config import parse_stages
    from plumbing.groups import logprobs
    from tests.bench import clock
    stages = parse_stages(config.stages)
    ref_model, _ = train.frozen_models(config, stages, model, tokenizer)
    train.make_fast_or_small(config, model, ref_model)
    optimizer = train.make_optimizer(config, model)
    scores, learns, counts = [], [], []
    for batch in batches:
        times = []
        for seed in (1, 2, 3):
            groups = write_batch(config, model, tokenizer, batch, tokens, seed)
            begun = clock()
            task.score(groups, batch, stages[0].reward, config, tokenizer)
            times.append(clock() - begun)
        scores.append(fmean(times))
        for group in groups:
            group.rewards = [float(g) for g in range(config.group)]  # a flat group would not be learnt from
        counts.append(sum(len(group.prompt) + group.mask.sum().item() for group in groups))
        learns.append(typical(lambda g=groups: grpo.update(model, ref_model, g, optimizer, config), clock))
    short, = write_batch(config, model, tokenizer, batches[0][:1], tokens // 3)
    pair = short, groups[0]
    compares = [typical(lambda g=group: logprobs(model, g, config, grpo), clock) for group in pair]
    return {"score": line([config.group * len(batch) for batch in batches], scores), "learn": line(counts, learns),
            "compare": line([len(g.prompt) + g.mask.sum().item() for g in pair], compares)}


def of_files(config, model, tokenizer, folder: Path) -> dict:
    """Adapters and all weights, written and loaded, as --rollouts has it done."""
    from lora import add_lora, load_adapters, save_adapters
    from model import load, save
    from tests.bench import clock
    small, whole = folder / "small", folder / "whole"
    writes = [0.0, typical(lambda: save(model, tokenizer, whole), clock)]
    loads = [0.0, typical(lambda: load(whole), clock)]
    if not config.lora:
        add_lora(model, 16, 32.0)
    writes[0] = typical(lambda: save_adapters(model, small), clock)
    bare, _ = load(whole)
    begun = clock()
    load_adapters(bare, small)
    loads[0] = clock() - begun
    sizes = [(small / "adapter_model.safetensors").stat().st_size, (whole / "model.safetensors").stat().st_size]
    return {"write": line(sizes, writes), "load": line(sizes, loads), "adapters": sizes[0], "saved": sizes[1]}


def sizes_of_texts(config, model, tokenizer, posts: Sequence) -> dict:
    """How long prompts are, and what the model writes before it has learnt anything: mean and standard deviation."""
    import task
    batches = [task.tasks_of(posts, n, config, tokenizer) for n in range(8)]
    groups = [group for batch in batches for group in
              write_batch(config, model, tokenizer, batch, config.max_new_tokens, stop_ids=None)]
    lengths = np.concatenate([group.mask.sum(1).cpu() for group in groups])
    prompts = np.array([len(group.prompt) for group in groups])
    return {"lengths": (float(lengths.mean()), float(lengths.std())),
            "prompt": (float(prompts.mean()), float(prompts.std()))}


# --- the estimate of a machine that is not at hand --------------------------------------------------------------------

# Apple's page of the Mac mini of 2024 (M4): 120 GB/s, Gigabit Ethernet (https://support.apple.com/en-us/121555).
# Products: what Huebner et al. 2025 measured on an M4's GPU, float32 (https://arxiv.org/abs/2502.05317).
MAC = {"bandwidth": 120e9, "products": 2.9e12}
ETHERNET, NVLINK = 125e6, 450e9  # bytes a second: a gigabit; one direction of an H100's links, by NVIDIA's data sheet


def by_rule(p: Pieces, machine: str, bandwidth: float, products: float, width: float = 2) -> Pieces:
    """What the model of `p` takes on a machine of which two numbers are known: bytes a second out of memory, and
    operations a second. Each token meets each weight with one multiplication and one addition.

    To draw a token for all rows reads all weights once. To learn from a token goes forward, forward again
    (--checkpointing), forward in the reference model, and backward, which is twice as much. AdamW reads weight,
    gradient and two moments, and writes three of them. The rest (scores, files) is as in `p`.
    """
    token, touch = 2 * p.weights / products, p.weights * width / bandwidth
    return replace(p, machine=machine, bandwidth=bandwidth, products=products, width=width, saved=p.weights * width,
                   read=(0, token), draw=(touch, token), compare=(0, token), learn=(7 * touch, 5 * token))


def off(p: Pieces, job: Job) -> dict[str, float]:
    """How many times longer than by the rule each piece takes on a machine that was measured."""
    rule = by_rule(p, p.machine, p.bandwidth, p.products, p.width)
    read, rows = job.prompts * job.prompt[0], job.prompts * job.group
    units = {"read": read, "draw": rows, "learn": read + rows * job.length[0]}
    return {name: cost(getattr(p, name), n) / cost(getattr(rule, name), n) for name, n in units.items()}


def slower(p: Pieces, times: dict[str, float]) -> Pieces:
    """The same machine, were the rule as wrong there. To compare is to read."""
    times = {**times, "compare": times["read"]}
    return replace(p, machine=f"{p.machine}, slower", **{
        name: (getattr(p, name)[0] * x, getattr(p, name)[1] * x) for name, x in times.items()})


# --- the tables -------------------------------------------------------------------------------------------------------


def pieces_of(name: str) -> Pieces:
    """What was measured under this name; "mac" is the estimate."""
    if name == "mac":
        return by_rule(pieces_of("cpu-0.5b"), "Mac mini", **MAC)
    found = read_json(RESULTS / f"{name}.json")
    return Pieces(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def fleets(measured: dict[str, Pieces]) -> dict[str, list[Fleet]]:
    """The rows of the table: Macs by the rule, and, were it as wrong there as on the CPU; others as they were measured.
    """
    mac, job = pieces_of("mac"), Job()
    macs = [mac, slower(mac, off(measured["cpu-0.5b"], job))]
    three = [Fleet(p, p, samplers=2, sync=mac.saved, network=ETHERNET) for p in macs]
    ahead = [replace(each, ahead=True) for each in three]
    found = {"one Mac mini": [Fleet(p, p) for p in macs], "three: two sample, one learns": three,
             "three, ahead": ahead, "three, ahead, new weights every 5 steps": [replace(f, every=5) for f in ahead],
             "three, ahead, adapters of rank 16": [replace(f, sync=mac.adapters) for f in ahead],
             "three, each samples and learns": [Fleet(p, p, learners=3, network=ETHERNET) for p in macs]}
    for name, p in measured.items():
        found[f"one {p.machine}"] = [Fleet(p, p)]
        if not name.startswith("cpu"):
            eight = Fleet(p, p, samplers=7, sync=p.saved)
            found |= {f"eight {p.machine}: seven sample, one learns": [eight],
                      f"eight {p.machine}, ahead": [replace(eight, ahead=True)],
                      f"eight {p.machine}, each samples and learns": [Fleet(p, p, learners=8, network=NVLINK)]}
    return found


def in_bytes(n: float) -> str:
    return "-" if not n else f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.0f} MB"


def table(job: Job, rows: dict[str, list[Fleet]]) -> str:
    lines = ["| | seconds a step | tokens a second | bytes of a sync | a sampler waits | the learner waits | age |",
             "| --- " * 7 + "|"]
    for name, alike in rows.items():
        if alike[0].learners > job.prompts:
            continue  # a rank without a post is refused
        outs = [simulate(job, fleet) for fleet in alike]
        columns = [[f"{out.step:.3g}" if out.step < 100 else f"{out.step:,.0f}" for out in outs],
                   [f"{out.tokens / out.seconds:,.0f}" for out in outs],
                   [in_bytes(alike[0].sync)], [f"{out.waits(out.samplers) / out.step:.0%}" for out in outs],
                   [f"{out.waits(out.learners) / out.step:.0%}" for out in outs], [f"{outs[0].age:.1f}"]]
        cells = [first + "".join(f" ({other})" for other in others) for first, *others in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rule_table(measured: dict[str, Pieces]) -> str:
    lines = ["| | two prompts | a token for 16 rows | learning |", "| --- " * 4 + "|"]
    for p in measured.values():
        lines.append(f"| {p.machine} | " + " | ".join(f"{x:.1f}" for x in off(p, Job()).values()) + " |")
    return "\n".join(lines) + "\n"


def enough(job: Job, fleet: Fleet) -> int:
    """From how many samplers on a step takes as long as with twice as many, to a twentieth; at most one a prompt."""
    def step(n: int) -> float:
        return simulate(replace(job, steps=20), replace(fleet, samplers=n, ahead=True)).step

    return next(n for n in range(1, job.prompts + 1) if step(n) <= 1.05 * step(2 * n))


# --- the simulation beside real runs ----------------------------------------------------------------------------------


def real_run(name: str, folder: Path, steps: int, *flags: str) -> float:
    """Seconds a step of a run of the embedded default, the mean. Steps that keep groups for the report are left out:
    they do more than sample and learn."""
    command = [sys.executable, str(ROOT / "train.py"), "--run", name, "--stages", f"length:{steps}", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode or "dropped" in done.stdout:
        sys.exit(done.stdout + done.stderr)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = steps_to_keep(steps)
    return fmean(row["seconds"] for row in map(json.loads, lines) if row["step"] not in kept)


def slow_server(seconds: float):
    """A server by crisp's own sampler that takes as long for each prompt, one after another: tests/loopback_vllm.py."""
    from tests.loopback_vllm import Vllm

    class Slow(Vllm):
        turn = threading.Lock()

        def complete(self, body):
            with self.turn:
                begun = time.perf_counter()
                answer = super().complete(body)
                time.sleep(max(0.0, seconds - time.perf_counter() + begun))
                return answer

    return Slow()


def check(steps: int, seconds: float) -> dict[str, tuple[float, float]]:
    """{run: (seconds a step by the simulation, by the run itself)}. Pieces are measured before and after each run, for
    other programs may want the machine too: the simulated number is the mean of both."""
    runs = {"one machine": (0, False), "one server": (1, False), "two servers": (2, False),
            "two servers, ahead": (2, True)}
    found, before = {}, measure("tiny")
    with tempfile.TemporaryDirectory() as folder:
        for name, (servers, ahead) in runs.items():
            up = [slow_server(seconds) for _ in range(servers)]
            flags = ["--rollouts", *(server.url for server in up)] if servers else []
            flags += ["--ahead", "1"] if ahead else []
            try:
                real = real_run(f"run-{len(found)}", Path(folder), steps, *flags)
            finally:
                for server in up:
                    server.close()
            after = measure("tiny")
            found[name] = fmean(simulated(p, servers, ahead, seconds) for p in (before, after)), real
            before = after
    return found


def simulated(p: Pieces, servers: int, ahead: bool, seconds: float) -> float:
    """Seconds a step of the embedded default on this machine, with so many slow servers."""
    job = Job(prompts=4, group=8, prompt=p.prompt, most_prompt=512, length=p.lengths, most=80)
    sampler = replace(p, request=seconds) if servers else p
    return simulate(job, Fleet(sampler, p, samplers=servers, ahead=ahead, sync=p.saved)).step


def check_table(found: dict[str, tuple[float, float]]) -> str:
    lines = ["| the embedded default | simulated, s a step | measured | error |", "| --- " * 4 + "|"]
    for name, (guess, real) in found.items():
        lines.append(f"| {name} | {guess:.2f} | {real:.2f} | {guess / real - 1:+.0%} |")
    return "\n".join(lines) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def tables(batches: Sequence[int], job: Job) -> dict[str, str]:
    """All that docs/machines.md shows, by the name of its place there."""
    measured = {path.stem: pieces_of(path.stem) for path in sorted(RESULTS.glob("*-0.5b*.json"))}
    found = {f"{n} prompts": table(replace(job, prompts=n), fleets(measured)) for n in batches}
    return {**found, "rule": rule_table(measured), "check": check_table(read_json(RESULTS / "check.json"))}


def filled(page: str, found: dict[str, str]) -> str:
    """The page with each table in its place: <!-- fleet: NAME -->, the table, <!-- end -->."""
    for name, text in found.items():
        before, mark, rest = page.partition(f"<!-- fleet: {name} -->\n")
        if mark:
            page = before + mark + text + "<!-- end -->" + rest.partition("<!-- end -->")[2]
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", default="tables", choices=("tables", "measure", "check"))
    parser.add_argument("shape", nargs="?", default="0.5b", help="of measure: 0.5b, small, ... (tests/bench.py), tiny")
    parser.add_argument("--write", action="store_true", help="of tables: put them into docs/machines.md, too")
    parser.add_argument("--name", default="", help="of measure: keep the pieces as studies/results/fleet/NAME.json")
    parser.add_argument("--lean", action="store_true", help="of measure: as train.py's")
    parser.add_argument("--lora", type=int, default=0, help="of measure: as train.py's")
    parser.add_argument("--prompts", type=int, default=2, help="of a fleet of your own: posts in a batch (B)")
    parser.add_argument("--group", type=int, default=8, help="completions of each (G)")
    parser.add_argument("--prompt-tokens", type=float, nargs=2, default=(300, 100), help="mean, standard deviation")
    parser.add_argument("--tokens", type=float, nargs=2, default=(64, 20), help="of a completion: the same")
    parser.add_argument("--machine", default="", help="a fleet of your own: the pieces of this NAME, or mac")
    parser.add_argument("--pieces", type=json.loads, default={}, help="some in their place, as JSON")
    parser.add_argument("--samplers", type=int, default=1, help="of a fleet of your own: machines that sample")
    parser.add_argument("--every", type=int, default=1, help="of a fleet of your own: steps between new weights")
    parser.add_argument("--network", type=float, default=0, help="of a fleet of your own: bytes a second; 0: no limit")
    args = parser.parse_args(argv)
    job = Job(prompts=args.prompts, group=args.group, prompt=tuple(args.prompt_tokens), length=tuple(args.tokens),
              most=int(2 * args.tokens[0]))
    if args.action == "measure":
        pieces = json.dumps(asdict(measure(args.shape, args.lean, args.lora)))
        print(pieces)
        if args.name:
            write_text(RESULTS / f"{args.name}.json", pieces + "\n")
    elif args.action == "check":
        found = check(24, 0.4)
        write_text(RESULTS / "check.json", json.dumps(found) + "\n")
        print(check_table(found))
    elif args.machine:
        p = replace(pieces_of(args.machine), **args.pieces)
        own = Fleet(p, p, samplers=args.samplers, every=args.every, sync=p.saved, network=args.network)
        ahead = replace(own, ahead=True)
        print(table(job, {"one": [Fleet(p, p)], f"{args.samplers} sample, one learns": [own],
                          "the same, ahead": [ahead],
                          "the same, ahead, adapters of rank 16": [replace(ahead, sync=p.adapters)]}))
        print(f"Ahead with adapters, twice as many make no step faster than "
              f"{enough(job, replace(own, sync=p.adapters))} that sample.")
    else:
        found = tables([2, 28], job)
        if args.write:
            write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), found))
        print("\n".join(f"{name}\n\n{text}" for name, text in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
