"""Will it fit? What a run takes in memory, before anything is downloaded or bought.

    python -m studies.plan --memory 16 --model Qwen/Qwen3-0.6B --lean --lora 16 --prompts 1 --group 4
    python -m studies.plan --memory 16 --model Qwen/Qwen2.5-0.5B-Instruct --target 64 --max-prompt 512 --checkpointing
    python -m studies.plan --memory 16 --backend mlx --model a/folder/with/config.json --lora 16 --lean

    python -m studies.plan check                 # what is counted, beside what real steps take: some minutes

`--memory` is the machine's, in GiB; all other flags are train.py's. Of the model only config.json is read, or fetched.
Prompts have --max-prompt tokens, or 512; completions --max-new-tokens, or twice the --target.

How it counts: the run's own code does its largest step on "fake" tensors, which have a shape, a type and a size, but no
memory behind them (torch's FakeTensorMode). A storage counts from the operation that makes it until nobody holds it. So
there is no formula to go wrong when the model changes. Not counted are what a kernel takes for itself while it runs,
and the holes that an allocator leaves; a third is added for both. Kernels are the CPU's, whatever --device says:
those of other devices keep about the same for the backward pass. MLX has no fake arrays: it is counted as torch, with
an attention that keeps what MLX's keeps (`written_down`).

Shapes: B prompts of P tokens, G completions of T tokens each; N = B*G rows; V vocabulary, D hidden size.
"""

import argparse
import subprocess
import sys
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
import train  # whoever runs train.py has in memory what it imports
from config import Config, check, parse_stages, reward_names
from grpo import micro_batches, update
from lora import add_lora
from model import Cache, Linear, Transformer, load, read_config, save, to_logits, token_logprobs
from plumbing import memory, products
from plumbing.cli import read_arguments
from plumbing.download import fetch
from plumbing.folder import find_folder, read_json
from plumbing.model_config import ModelConfig
from plumbing.posts import TINY
from plumbing.teacher import load_teacher
from rewards import NEED_MODEL
from rollout import Group, draw, sample

ROOT = Path(__file__).resolve().parents[1]
GIB = 2 ** 30
PROMPT = 512  # tokens of a prompt where no --max-prompt bounds them
ROOM = 0.8  # of the memory: the rest is for the system, texts and holes, as in plumbing/memory.py
HOLES = 1 / 3  # of what comes and goes, lost between it: fitted to glibc and eight runs (docs/real-models.md)
WIRED = 2 / 3  # of a Mac's memory may be the GPU's, by default and about: `mx.device_info` says how much


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that somebody holds: `now`, and `peak` since it was last set."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@contextmanager
def without_memory():
    """Inside, every tensor is fake; yields the count."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    products._SCRATCH.clear()
    try:
        with FakeTensorMode(), Alive() as alive:
            yield alive
    finally:
        products._SCRATCH.clear()  # fakes are of no use outside


def read_only_config(name: str) -> ModelConfig:
    """The numbers of a model: a folder's, of which nothing but config.json need be there, or the hub's."""
    if name == "tiny":
        folder = TINY
    elif name.count("/") == 1 and not Path(name).expanduser().exists() and not name.startswith((".", "~")):
        folder = fetch(name, ["config.json"])
    else:
        folder = find_folder(name)
    return read_config(read_json(folder / "config.json"), str(folder / "config.json"))


def fake_model(c: ModelConfig, config: Config) -> Transformer:
    """Inside `without_memory`: what train.py's load_policy returns."""
    model = Transformer(c)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16 if config.lean else torch.float32)
    if config.lora:
        targets = [name for name in config.lora_targets.split(",") if name]
        add_lora(model, config.lora, config.lora_alpha or 2.0 * config.lora, targets, config.seed)
    model.checkpointing = config.checkpointing
    return model


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept(cache: Cache) -> int:
    """Bytes of what a cache remembers."""
    return size(t for layers in (cache.shared, cache.own) for layer in layers or () for t in layer)


# --- the parts of a step, in the order of train.py --------------------------------------------------------------------


def read(model: Transformer, cache: Cache, B: int, P: int) -> Tensor:
    """B prompts of P tokens into the cache -> their last states [B, D]. Prompts of different lengths need a mask."""
    mask = torch.ones(B, P, dtype=torch.bool) if B > 1 else None  # [B, P]
    return model.hidden(torch.zeros(B, P, dtype=torch.long), cache, mask)[torch.arange(B), torch.full((B,), P - 1)]


@torch.no_grad()
def sampling(model: Transformer, B: int, G: int, P: int, T: int) -> int:
    """The prompts, then the last token of N rows that have said all others -> bytes of the cache by then."""
    N, cache = B * G, Cache()
    logits = to_logits(read(model, cache, B, P), model.head).repeat_interleave(G, 0)  # [N, V]
    cache.share(G)
    if T > 1:
        cache.own = [tuple(torch.empty(N, *x.shape[1:-2], T - 1 if x.ndim == 4 else x.shape[1], x.shape[-1],
                                       dtype=x.dtype) for x in layer) for layer in cache.shared]
        cache.columns = T - 1
    noise = torch.zeros(N, dtype=torch.float64)  # [N]
    token, _ = draw(logits, noise, 1.0, 0, 1.0)  # [N]
    logits = to_logits(model.hidden(token[:, None], cache)[:, 0], model.head)  # [N, V]
    return kept(cache)


def logprobs(model: Transformer, b: int, g: int, P: int, T: int) -> Tensor:
    """`grpo.group_logprobs` where nothing may depend on a number: all completions have T tokens."""
    cache = Cache()
    states = read(model, cache, b, P)[:, None, None].expand(b, g, 1, -1)  # [b, g, 1, D]
    if T > 1:
        cache.share(g)
        rest = model.hidden(torch.zeros(b * g, T - 1, dtype=torch.long), cache)  # [b*g, T-1, D]
        states = torch.cat([states, rest.view(b, g, T - 1, -1)], 2)  # [b, g, T, D]
    states = states.flatten(0, 2)[torch.arange(b * g * T)]  # [b*g*T, D], a copy as `states[mask]` is
    return token_logprobs(model, states, torch.zeros(b * g * T, dtype=torch.long))[0]


def learning(model: Transformer, frozen: list[Transformer], pieces: list[tuple[int, int]], P: int, T: int) -> None:
    """Forward and backward of (b, g) completions, piece after piece: the gradients of the first stay for the second."""
    for b, g in pieces:
        logp = logprobs(model, b, g, P, T)  # [b*g*T]
        for other in frozen:
            with torch.no_grad(), other.adapters_off():
                logprobs(other, b, g, P, T)
        logp.sum().backward()


def pieces_of(config: Config, P: int, T: int) -> list[tuple[int, int]]:
    """The micro-batches (b, g) of a step in which everything has its full length."""
    tokens = torch.zeros(config.group, T, dtype=torch.long)  # [G, T]
    group = Group(prompt=tokens.new_zeros(P), tokens=tokens, mask=tokens.bool(), logp=tokens.float(),
                  stopped=tokens[:, 0].bool(), texts=[])
    micros = micro_batches([group] * config.prompts, torch.zeros(config.prompts, config.group), config.micro_tokens)
    return [tuple(m.tokens.shape[:2]) for m in micros]


def packs(config: Config, T: int) -> bool:
    """Whether the sampler will read copies of the large matrices (`products.packed`): not all machines can."""
    dtype, rows = torch.bfloat16 if config.lean else torch.float32, config.prompts * config.group
    return T >= 16 and rows <= 128 and bool(products._packed(torch.zeros(8, 8, dtype=dtype), rows))


def written_down(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, prompt=(), prompt_mask=None) -> Tensor:
    """`plumbing/mlx_arrays.attend` in torch's operations: q [N, H, T, hd] -> [N, H, T, hd]. MLX has no attention that
    a gradient goes through without the scores [T, P+S], so this is what its memory is counted with. (Masks are small.)
    """
    (N, H, T, hd), K = q.shape, k.shape[1]
    q = q.reshape(N, K, -1, hd)  # [N, K, R*T, hd]
    scores = q @ k.mT  # [N, K, R*T, S]
    if not prompt:
        return (scores.softmax(-1) @ v).reshape(N, H, T, hd)
    B, P = len(prompt[0]), prompt[0].shape[2]
    grouped = q.reshape(B, -1, *q.shape[1:]).transpose(1, 2)  # [B, K, G, R*T, hd]
    shared = grouped.flatten(2, 3) @ prompt[0].mT  # [B, K, G*R*T, P]
    shared = shared.reshape(*grouped.shape[:-1], P).transpose(1, 2).flatten(0, 1)  # [N, K, R*T, P]
    weights = torch.cat([shared, scores], -1).softmax(-1)  # [N, K, R*T, P+S]
    of_prompt = weights[..., :P].reshape(B, -1, *weights.shape[1:-1], P).transpose(1, 2)  # [B, K, G, R*T, P]
    read = (of_prompt.flatten(2, 3) @ prompt[1]).view_as(grouped).transpose(1, 2).flatten(0, 1)  # [N, K, R*T, hd]
    return (read + weights[..., P:] @ v).reshape(N, H, T, hd)


# --- the sum ----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Bytes of each part. What a run `holds` is there all the time, the rest while it samples or learns."""

    base: int  # Python and its libraries
    holds: dict[str, int]
    sampling: dict[str, int]
    learning: dict[str, int]
    weights: int  # how many the model has
    trained: int

    holes: float  # the share of what comes and goes that is lost between it

    @property
    def lost(self) -> int:
        return int(self.holes * max(sum(self.sampling.values()), sum(self.learning.values())))

    @property
    def peak(self) -> int:
        return (self.base + sum(self.holds.values()) + self.lost
                + max(sum(self.sampling.values()), sum(self.learning.values())))


def plan(c: ModelConfig, config: Config, P: int, T: int) -> Plan:
    """What train.py would take with this config, after prompts of P tokens and with completions of T tokens."""
    B, G, mlx = config.prompts, config.group, config.backend == "mlx"
    stages = parse_stages(config.stages)
    measured = not NEED_MODEL.isdisjoint(reward_names(stages))
    scorers = [name for name in config.references.split(",") if name and measured]
    copies = not mlx and packs(config, T)
    base = libraries(config.backend)
    with without_memory() as alive, patch.object(model_file, "attend", written_down if mlx else model_file.attend):
        model = fake_model(c, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        another = config.beta > 0 or measured and not scorers  # as in train.py's frozen_models
        start = None if not another else model if config.lora else fake_model(c, config).requires_grad_(False)
        holds = {"weights": size(model.parameters()),
                 "reference model": size(start.parameters()) if another and not config.lora else 0,
                 "AdamW's moments": 2 * size(trained)}
        if config.stage_ref == "previous" and config.lora and config.beta and len(stages) > 1:
            holds["reference model"] += holds["weights"]  # that of an earlier stage, with its adapters merged
        for name in scorers:
            other = Transformer(read_only_config(name))
            holds[f"scorer {name}"] = sum(p.numel() for p in other.parameters()) * model.head.element_size()
        frozen = [start] if config.beta else []
        if config.teacher:
            frozen.append(fake_model(read_only_config(config.teacher), replace(config, lora=0)).requires_grad_(False))
            holds[f"teacher {config.teacher}"] = size(frozen[-1].parameters())

        before = alive.peak = alive.now
        remembered = sampling(model, B, G, P, T)
        step = max(0, alive.peak - before - remembered)
        matrices = {*(m.weight for m in model.modules() if isinstance(m, Linear)), model.head}
        packed = size(w for w in matrices if w.numel() > 2 ** 18) if copies else 0
        if mlx and config.lean:
            packed = 4 * model.head.numel()  # the head, widened (mlx_model.sample)

        before = alive.peak = alive.now
        pieces = pieces_of(config, P, T)
        learning(model, frozen, pieces[:2], P, T)
        b, g = pieces[0]
        return Plan(base, holds, {"copies of weights": packed, "cache": remembered, "the step itself": step},
                    {"gradients": size(trained),
                     f"{b} x {g} completions at a time": alive.peak - before - size(trained)},
                    weights=sum(p.numel() for p in model.parameters()), trained=sum(p.numel() for p in trained),
                    holes=0 if config.checkpointing and not mlx else HOLES)  # `memory.tidy` gives holes back


@cache
def libraries(backend: str) -> int:
    """Bytes of this process after steps of next to nothing: libraries load much of their code when it is first used."""
    take_steps(Config(prompts=1, group=2, backend=backend), 20, 20)
    return psutil.Process().memory_info().rss


def take_steps(config: Config, P: int, T: int) -> None:
    """Two real steps of a run, with the largest batch."""
    model, tokenizer = train.load_policy(config)
    ref_model, _ = train.frozen_models(config, parse_stages(config.stages), model, tokenizer)
    teacher = load_teacher(config, model, tokenizer, train.load_with_tokenizer)
    train.make_fast_or_small(config, model, ref_model)
    optimizer = train.make_optimizer(config, model)
    act, learn = sample, partial(update, teacher=teacher)
    if config.backend == "mlx":
        act, learn = import_module("mlx_grpo").take_over(model, optimizer, [20, 21, 22])
    for step in range(2):
        prompts = [torch.arange(b, P + b - bool(b)) % 200 + 20 for b in range(config.prompts)]  # B x [P or P-1]
        groups = act(model, prompts, G=config.group, max_new_tokens=T, stop_ids=[], seed=step, tokenizer=tokenizer)
        for group in groups:
            group.rewards = [float(i) for i in range(config.group)]
        learn(model, ref_model, groups, optimizer, config)


def advice(c: ModelConfig, config: Config, P: int, T: int, room: float) -> str:
    """What makes a plan fit that does not. Each number that is named has been counted."""
    for checkpointing in sorted({config.checkpointing, True}):
        with_it = replace(config, checkpointing=checkpointing)
        flag = " --checkpointing" if checkpointing > config.checkpointing else ""
        if plan(c, replace(with_it, micro_tokens=P + T), P, T).peak > room:
            continue  # not even one completion at a time
        micro = config.micro_tokens
        while micro > P + T and plan(c, replace(with_it, micro_tokens=micro), P, T).peak > room:
            micro = max(micro // 2, P + T)
        return f"It does with --micro-tokens {micro}{flag}."
    less = [flag for flag, has in (("--lean", config.lean), ("--lora 16", config.lora), ("--beta 0", not config.beta))
            if not has]
    return f"No --micro-tokens helps: {memory.helps(*less, 'fewer --prompts or --group', 'a smaller model')}."


def table(name: str, plan: Plan, P: int, T: int) -> str:
    rows = [("Python and its libraries", plan.base), *plan.holds.items(), ("while sampling", None),
            *plan.sampling.items(), ("while learning", None), *plan.learning.items(),
            ("holes between what comes and goes", plan.lost), ("at most", plan.peak)]
    return "\n".join([f"{name}: {plan.weights / 1e6:,.1f} million weights, {plan.trained / 1e6:,.1f} million of them "
                      f"trained; prompts of {P} tokens, completions of {T}",
                      *(f"{label:34}" + ("" if n is None else f"{n / GIB:8.2f} GiB") for label, n in rows)])


# --- the check --------------------------------------------------------------------------------------------------------


def count(config: Config, P: int, T: int) -> None:
    """Prints what is counted, in bytes."""
    print(plan(read_only_config(config.model), config, P, T).peak)


def measure(config: Config, P: int, T: int) -> None:
    """Prints the most that this process holds while it takes real steps, in bytes."""
    take_steps(config, P, T)
    print(memory.peak("cpu") * GIB)


MID = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 32000, "hidden_size": 512,
       "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
       "max_position_embeddings": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
       "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 2}


def check_against_real_runs(settings: list[str]) -> None:
    """Two shapes, four settings: what was counted beside the peak of a process that did it."""
    settings = settings or ["", "--lean", "--lora 16", "--checkpointing"]
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(read_config(MID, "plan"))
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.uniform_(p.data, -0.03, 0.03)
        model.raw_config = MID
        save(model, load(TINY)[1], folder)
        for name, shape, P, T in ((folder, "--prompts 2 --group 8", 384, 64),
                                  ("tiny", "--prompts 16 --group 16", 100, 60)):
            for setting in settings:
                flags = f"{shape} {setting}".split()
                config, _, _ = read_arguments(Config, ["--model", name, *flags], "")
                counted, real = (float(subprocess.run(
                    [sys.executable, "-c", f"from studies.plan import *; {job}({config!r}, {P}, {T})"], check=True,
                    stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout) for job in ("count", "measure"))
                print(f"{'8 x 512' if name == folder else name:10} {' '.join(flags):45} {counted / GIB:6.2f} GiB "
                      f"counted, {real / GIB:6.2f} measured, {counted / real - 1:+.0%}", flush=True)


def main(argv: list[str]) -> int:
    if argv[:1] == ["check"]:
        return check_against_real_runs(argv[1:]) or 0
    parser = argparse.ArgumentParser(prog="python -m studies.plan", description=__doc__.partition("\nShapes")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--memory", type=float, required=True, metavar="GIB", help="the machine's memory, in GiB")
    own, rest = parser.parse_known_args(argv)
    config, _, _ = read_arguments(Config, rest, "")
    try:
        check(config)
        c = read_only_config(config.model)
        P, T = config.max_prompt or PROMPT, config.max_new_tokens or 2 * config.target
        found = plan(c, config, P, T)
        print(table(config.model, found, P, T))
        room = own.memory * (WIRED if config.backend == "mlx" else ROOM) * GIB
        whose = "what a Mac gives its GPU" if config.backend == "mlx" else "a fifth stays free"
        fits = found.peak <= room
        print(f"{'Fits' if fits else 'Does not fit'} into {own.memory:g} GiB, of which {room / GIB:.1f} count "
              f"({whose})." + ("" if fits else " " + advice(c, config, P, T, room)))
    except (ValueError, OSError) as e:
        print(f"plan: {e}", file=sys.stderr)
        return 1
    return 0 if fits else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
