"""The ladder: from REINFORCE to the losses of 2026, one change at a time, and what each of them buys here.

    python -m studies.ladder                          # all runs; what is done is not done again, then the page
    python -m studies.ladder run --seeds 1 --only "DPPO|SAPO"     # some of it
    python -m studies.ladder variance                 # how noisy the gradient of each rung is: about ten minutes
    python -m studies.ladder tables                   # docs/ladder.md, from studies/results/ladder/ alone

A rung is a command that one can type. Where the story has no flag for it, it is an edit of one or two lines of it, made
in the memory of the run's own process, or the fork of docs/fork.md: the files stay as they are. All runs begin at the
embedded model, are paid alike, and learn from the same posts in the same order. They have 50 batches: a rung with four
updates takes four steps on each. What is kept of a run, one small file, has no texts.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

import grpo
import rewards
import task
import train
from config import Config, parse_stages
from plumbing import once
from plumbing.cli import read_arguments
from plumbing.edits import Edit, edited, replaced
from plumbing.folder import write_text
from plumbing.noise import cosine, noise
from rollout import sample

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "ladder"
STEPS = 50  # batches that a run samples
PAID = "rouge_l + 4*length"
SHARED = ("--stages", f"{PAID}:{STEPS}")
CURVES = ("reward", "length", "within_10pct", "kl", "entropy", "clip_frac", "ratio", "grad_norm", "logp_gap")
SEEN = ("reward", "within_10pct", "rouge_l", "invented", "twice")  # columns of the table, held out


# --- the rungs --------------------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One way to learn from a batch, and the rung that it stands on."""

    flags: tuple[str, ...]
    beside: str  # what it is compared with: the same without what is new
    what: str
    paper: str
    trainers: str  # whether the large ones have it
    edits: tuple[Edit, ...] = ()
    fork: str = ""  # a heading of docs/fork.md
    first: str = ""  # the rung whose gradient is the same as long as the ratio is 1 (and there is no KL yet)


MEAN, STD, CLIPPED = "the group's mean", "divided by the std", "four updates, clipped"
FOUR = ("--beta", "0", "--updates", "4")
CENTRED = "(r - r.mean(1, keepdim=True)).masked_fill(flat, 0.0)"
STALE = Edit(train.run_stage, "act(model, [", "act(sampler := copy.deepcopy(model) if step % 10 == 0 else sampler, [")

RUNGS: dict[str, Rung] = {
    "no baseline": Rung(
        ("--beta", "0", "--advantage", "mean"), "",
        "REINFORCE: the advantage is the reward itself.", "[Williams 1992](https://doi.org/10.1007/BF00992696)",
        "", (Edit(grpo.advantages, CENTRED, "r"),)),
    "no baseline, 2 more for all": Rung(
        ("--beta", "0", "--advantage", "mean"), "no baseline",
        "The same, with 2 added to every reward. Nothing that counts has changed, and yet all are praised.", "", "",
        (Edit(grpo.advantages, CENTRED, "r"),
         Edit(rewards.Reward.__call__, "totals = [sum(", "totals = [2 + sum("))),
    "the batch's mean": Rung(
        ("--beta", "0", "--advantage", "mean"), "no baseline",
        "One baseline for all: the mean reward of the batch.", "[Williams 1992](https://doi.org/10.1007/BF00992696)",
        "", (Edit(grpo.advantages, CENTRED, "(r - r.mean())"),)),
    MEAN: Rung(
        ("--beta", "0", "--advantage", "mean"), "the batch's mean",
        "A baseline for each post: the mean reward of its group.",
        "[Kool et al. 2019](https://openreview.net/forum?id=r1lgTGL5DE), who leave out the completion itself (RLOO)",
        'trl 1.16: `scale_rewards="none"`; its `RLOOTrainer` leaves the completion itself out.'),
    STD: Rung(
        ("--beta", "0"), MEAN, "Each group's advantages divided by their std.",
        "[Shao et al. 2024](https://arxiv.org/abs/2402.03300)",
        "trl 1.16's default, `scale_rewards=\"group\"`."),
    "four updates": Rung(
        (*FOUR, "--clip-low", "0.9999", "--clip-high", "1e6"), STD,
        "Four optimizer steps on each batch, weighted by the ratio and not clipped.",
        "[Schulman et al. 2017](https://arxiv.org/abs/1707.06347), section 6.1", "", first=STD),
    CLIPPED: Rung(
        FOUR, "four updates", "The same, with PPO's clip.", "[Schulman et al. 2017](https://arxiv.org/abs/1707.06347)",
        "trl 1.16: `num_iterations`, 1 by default, and `epsilon`, 0.2. verl: `ppo_epochs` and "
        "`clip_ratio`, 0.2.", first=STD),
    "with a KL": Rung(
        ("--updates", "4", "--kl", "k3", "--beta", "0.04"), CLIPPED,
        "The KL to the first model, in the loss. With it, this is the paper's GRPO.",
        "[Shao et al. 2024](https://arxiv.org/abs/2402.03300)",
        "trl 1.16: `beta`, 0 by default. verl: `use_kl_loss`, off by default.", first=STD),
    "Dr. GRPO": Rung(
        ("--beta", "0", "--loss", "dr_grpo", "--advantage", "mean"), MEAN,
        "The sum over tokens divided by a constant, and no std.", "[Liu et al. 2025](https://arxiv.org/abs/2503.20783)",
        'trl 1.16: `loss_type="dr_grpo"` with `scale_rewards="none"`. verl: `seq-mean-token-sum-norm` '
        "with `norm_adv_by_std_in_grpo` off."),
    "DAPO": Rung(
        (*FOUR, "--loss", "dapo", "--clip-high", "0.28", "--overlong", "20"), CLIPPED,
        "Every token of the batch weighs the same, the clip leaves more room upwards, and what is nearly cut off is "
        "paid less.", "[Yu et al. 2025](https://arxiv.org/abs/2503.14476)",
        "trl 1.16's default is `loss_type=\"dapo\"`, with a clip of 0.2 on both sides; `token-mean` is "
        "verl's default."),
    "GSPO": Rung(
        (*FOUR, "--loss", "gspo", "--clip-low", "3e-4", "--clip-high", "4e-4"), CLIPPED,
        "One ratio for a completion, the geometric mean of its tokens', in a narrow clip.",
        "[Zheng et al. 2025](https://arxiv.org/abs/2507.18071)",
        'trl 1.16: `importance_sampling_level="sequence"`. verl: the loss `gspo`.', first=STD),
    "CISPO": Rung(
        (*FOUR, "--loss", "cispo", "--clip-high", "4"), CLIPPED,
        "What is clipped is the weight in front of grad log pi: no token loses its gradient.",
        "[MiniMax 2025](https://arxiv.org/abs/2506.13585)",
        'trl 1.16: `loss_type="cispo"`, whose `epsilon_high` is the whole cap (5 is recommended '
        "there). verl: the loss `cispo`."),
    "GDPO": Rung(
        ("--beta", "0", "--advantage", "gdpo"), STD,
        "Each reward of the sum divided by its own std, before they are added.",
        "[Liu et al. 2026](https://arxiv.org/abs/2601.05242)",
        'trl 1.16: `multi_objective_aggregation="normalize_then_sum"`. verl has it as well '
        "([#5503](https://github.com/verl-project/verl/pull/5503))."),
    "k3": Rung(
        ("--beta", "1", "--kl", "k3"), STD, "A strong KL, by the paper's estimator.",
        "[Schulman 2020](http://joschu.net/blog/kl-approx.html)",
        "verl: `low_var_kl`. trl 1.16: `use_bias_correction_kl=False`.", first=STD),
    "k3 times the ratio": Rung(
        ("--beta", "1"), "k3", "The same, with the ratio in front: its gradient is that of the KL which is meant.",
        "[DeepSeek-V3.2](https://arxiv.org/abs/2512.02556)",
        "trl 1.16's default ([#6503](https://github.com/huggingface/trl/pull/6503), July 2026). "
        "verl's `k3+` has k3's value and k2's gradient, which is that of the KL as well while the "
        "samples are new.", first=STD),
    "stale samples": Rung(
        ("--beta", "0"), STD, "The sampler gets new weights with every tenth batch only, and nobody corrects for it.",
        "", "", (STALE,), first=STD),
    "truncated importance weights": Rung(
        ("--beta", "0", "--tis", "2"), "stale samples",
        "The same samples, each token weighted by pi / pi_sampler, at most 2.",
        "[Yao et al. 2025](https://fengyao.notion.site/off-policy-rl)",
        'trl 1.16, for samples of vLLM: `vllm_importance_sampling_mode="token_truncate"`; its '
        'default, `"sequence_mask"`, drops whole completions whose ratio is above 3. verl: '
        "`rollout_is: token`, at most 2.", (STALE,), first=STD),
    "DPPO": Rung(
        FOUR, CLIPPED, "The trust region in probability: a token is dropped once its probability is 0.2 more than it "
        "was where A > 0, or 0.2 less where A < 0.", "[Qi et al. 2026](https://arxiv.org/abs/2602.04879)",
        "Unsettled. verl has it as `dppo_tv` "
        "([#5397](https://github.com/verl-project/verl/pull/5397)). trl had a trainer for it, and "
        "took it out in July 2026 because it was costly to keep and hardly used "
        "([#6402](https://github.com/huggingface/trl/pull/6402)); trl 1.16 has none.",
        (Edit(grpo.policy_loss, "high, low = ratio > 1 + clip_high, ratio < 1 - clip_low",
              "high, low = logp.exp() - old_logp.exp() > 0.2, logp.exp() - old_logp.exp() < -0.2"),
         Edit(grpo.policy_loss, "-torch.min(ratio * A, clipped * A)",
              "-(ratio * A * ~(high & (A > 0) | low & (A < 0)))")), first=STD),
    "SAPO": Rung(
        (*FOUR, "--loss", "sapo"), CLIPPED, "The clip as a slope: a token fades, and is never cut.",
        "[Gao et al. 2025](https://arxiv.org/abs/2511.20347)",
        'trl 1.16: `loss_type="sapo"`. verl: the loss `sapo`.', fork="A loss: SAPO", first=STD),
}
# What each was good for here. Written from the results, so look at these sentences when the results are made anew.
BOUGHT = {
    "no baseline":
        "It learns here, because the mean of this reward happens to lie near 0: the samples' goes from -0.6 to 0.3, "
        "that of greedy summaries from -0.1 to 0.4. Look at the next rung.",
    "no baseline, 2 more for all":
        "Little more than half of the gain is left, and seeds differ widely (0.04 to 0.33): a text becomes "
        "likelier for no other reason than that it was written.",
    "the batch's mean":
        "Where the reward's mean is 0 anyway it adds 0.015. What a baseline is for shows against the rung above: "
        "0.45 where it has 0.20.",
    MEAN: "No difference from the batch's mean that three seeds could show.",
    STD:
        "Nothing in the reward: all three seeds end within 0.003 of *the group's mean*. AdamW divides by the "
        "gradient's size anyway.",
    "four updates":
        "They ruin the language. 80% are near the length, which is paid most, at a ROUGE-L of 0.46 and with 43% "
        "of the names invented.",
    CLIPPED:
        "The clip is what makes several updates possible: +0.44. From the same texts as one update, 92% near the "
        "length where that has 71%. The price is that 5% say a sentence twice.",
    "with a KL":
        "+0.02 to +0.03 in each seed: the highest mean reward on this page (DAPO's seeds overlap it). On average less "
        "is invented and fewer say a sentence twice, but not in each seed.",
    "Dr. GRPO": "Nothing that counts: 0.01 less reward, 0.01 more ROUGE-L. Lengths soon agree here.",
    "DAPO":
        "Nearest to the length of all (96%), for 0.02 of ROUGE-L and more that say a sentence twice. In reward, "
        "no difference that three seeds could show.",
    "GSPO":
        "It moves less, since its band is narrow: 84% near the length where the clip of tokens has 92%, at a "
        "higher ROUGE-L and with fewer that say a sentence twice. In reward, no difference that shows.",
    "CISPO":
        "At four steps on the whole batch and this learning rate it collapses (ROUGE-L 0.34), as without a clip: "
        "no token ever stops. Its paper takes each step on another part of a large batch.",
    "GDPO": "0.02 less. The two rewards of this sum pull alike, and neither hides the other.",
    "k3":
        "So strong a KL, ten times the default's, holds the policy near its beginning: about half of the gain, "
        "and no more invented than before.",
    "k3 times the ratio":
        "The two have one value and two gradients: a token weighs 1 - e^x in k3's and -x in this one's, with x the log "
        "of ref / pi. k3's is the noisier one after 25 steps. In reward no difference shows (-0.03 to +0.09).",
    "stale samples": "Samples that are up to nine batches old cost a third of the gain.",
    "truncated importance weights":
        "Two thirds of that loss are won back on average, and some of it in every seed (+0.09 to +0.15), by one flag.",
    "DPPO":
        "It collapses, as without a clip (ROUGE-L 0.50). A rare word may become a hundred times likelier before "
        "0.2 of probability stops it, and four steps at this learning rate take it there.",
    "SAPO":
        "Four steps at this learning rate go far beyond where its slope fades (ROUGE-L 0.49, 22% invented). With two "
        "updates and the default's KL it learns as grpo does: [the fork](fork.md#a-loss-sapo).",
}


# --- runs -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str
    seed: int

    @property
    def rung(self) -> Rung:
        return RUNGS[self.name]

    @property
    def flags(self) -> list[str]:
        return [*SHARED, *self.rung.flags, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{once.slug(self.name, self.seed)}.json"

    @property
    def folder(self) -> Path:
        return Path("runs") / f"ladder-{once.slug(self.name, self.seed)}"

    @property
    def config(self) -> Config:
        return settings(self.flags)

    @property
    def decides(self) -> dict:
        """All that decides a run: where one of it is another, the run is done again."""
        return {"config": once.as_json(self.config), "edits": self.edits, "model": once.embedded("train", "val")}

    @property
    def edits(self) -> list[list[str]]:
        own = [[e.function.__qualname__, e.old, e.new] for e in self.rung.edits]
        return own + [[self.rung.fork, *hunk] for hunk in hunks(self.rung.fork)]


def settings(flags: Sequence[str]) -> Config:
    """The flags as train.py reads them, but for a loss that is a fork's."""
    config, _, _ = read_arguments(Config, ["grpo" if word == "sapo" else word for word in flags], "")
    return replace(config, loss="sapo") if "sapo" in flags else config


def hunks(heading: str) -> list[tuple[str, str, str]]:
    """A fork of docs/fork.md -> (file, what stands there, what stands there afterwards), for each place; "": none."""
    page = (ROOT / "docs" / "fork.md").read_text(encoding="utf-8")
    found: list[tuple[str, str, str]] = []
    if not heading:
        return found
    diff = page.partition(f"\n## {heading}\n")[2].partition("```diff\n")[2].partition("```")[0]
    for part in re.split(r"^--- .*\n\+\+\+ b/", diff, flags=re.M)[1:]:
        path, *places = re.split(r"^@@.*\n", part, flags=re.M)
        for place in places:
            old, new = ("".join(line[1:] or "\n" for line in place.splitlines(keepends=True) if line[0] != sign)
                        for sign in "+-")
            found.append((path.strip(), old, new))
    return found


def forked(heading: str) -> dict[str, str]:
    """The files that a fork changes, with the changes in them: {path: text}. ValueError where it does not fit."""
    files: dict[str, str] = {}
    for path, old, new in hunks(heading):
        files[path] = replaced(files.get(path) or (ROOT / path).read_text(encoding="utf-8"), old, new, path)
    return files


def result_of(run: Run) -> dict | None:
    """What was kept of a run, if it was one of these settings, these edits and this model."""
    return once.kept(run.result, run.config, Config(), edits=run.decides["edits"], model=run.decides["model"])


def do(run: Run, threads: int) -> dict:
    """Train and keep the result. RuntimeError if the run neither reaches its end nor explodes.

    A run takes a minute: one that was stopped is begun anew.
    """
    shutil.rmtree(run.folder, ignore_errors=True)
    command = [sys.executable, "-m", "studies.ladder", "one", "--only", run.name, "--seeds", str(run.seed)]
    if run.rung.fork:  # the fork's files come first, and all others are the project's own
        first = run.folder / "fork"
        for path, text in forked(run.rung.fork).items():
            write_text(first / path, text)
        command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import train; "
                   "sys.exit(train.main())", str(first.resolve()), *run.flags, "--run", run.folder.name]
    result = {**run.decides, **once.short_run(command, run.folder, ROOT, threads, CURVES)}
    write_text(run.result, json.dumps(result) + "\n")
    return result


def train_edited(run: Run) -> int:
    """The run itself, in a process of its own -> train.py's exit code."""
    with edited(run.rung.edits):
        return train.main([*run.flags, "--run", run.folder.name])


# --- the variance of the gradient -------------------------------------------------------------------------------------

BATCHES = 64  # independent ones: other posts, other completions
# {place: (steps of the default run whose weights are differentiated, steps of the one that sampled)}
PLACES = {"at the start": (0, 0), "after 25 steps": (25, 25), "after 25 steps, samples 3 steps old": (25, 22)}
FRESH, LATER, OLD = PLACES
# Whose mean gradient is that of the mean reward: a sum over tokens, each completion divided by the same constant.
DIRECTION = "Dr. GRPO"
BIASED = ("stale samples", "truncated importance weights")  # old samples are all that their first update sees


def measured(name: str, place: str) -> bool:
    """Whether a rung has a number of its own there. Else it is that of `first`, or there is none."""
    config = Run(name, 0).config
    if place == OLD:
        return config.updates > 1 or name in BIASED
    return not RUNGS[name].first or place == LATER and config.beta > 0


def noise_of(name: str, place: str) -> dict | None:
    """What was kept of a rung's gradient there, if it was this rung."""
    run = Run(name, 0)
    return once.kept(noise_file(name, place), run.config, Config(), edits=run.edits, model=run.decides["model"],
                     batches=BATCHES)


def noise_file(name: str, place: str) -> Path:
    return RESULTS / re.sub(r"[^\w.+-]+", "-", f"variance-{name}-{place}.json")


class Recorder:
    """Stands where the optimizer stands. Its step keeps the gradient, and brings the weights of the next update."""

    def __init__(self, model: torch.nn.Module, then: Sequence[dict]):
        self.model, self.then = model, list(then)
        self.gradient = torch.zeros(sum(p.numel() for p in model.parameters()))  # [W]; 0 where no step is taken

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none)

    def step(self) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])  # [W]
        if self.then:
            self.model.load_state_dict(self.then.pop(0))


def gradient(update, model, ref_model, groups: list, config: Config, weights: Sequence[dict]) -> Tensor:
    """The gradient [W] of the last update on a batch, of as many as there are `weights` to make them at: none learns.

    It is what the story's own update would hand to the optimizer, before it is shortened to --grad-clip.
    """
    recorder = Recorder(model, weights[1:])
    model.load_state_dict(weights[0])
    update(model, ref_model if config.beta else None, groups, recorder,
           replace(config, updates=len(weights), grad_clip=float("inf")))
    return recorder.gradient


@contextmanager
def update_of(rung: Rung) -> Iterator:
    """`grpo.update` as the rung has it: as it is, with the edits, or the fork's."""
    module = ModuleType("forked")
    for text in forked(rung.fork).values():  # of SAPO, grpo.py alone
        exec(compile(text, "grpo.py, forked", "exec"), module.__dict__)
    with edited(rung.edits):
        yield module.update if rung.fork else grpo.update


def weights_after(steps: int) -> Path | str:
    """The model of the default run after so many steps, trained where it is not there; "tiny" after none of them.

    The learning rate is kept, so a run of 22 steps is the beginning of one of 25. Its posts come in an order of their
    own (seed 100).
    """
    path = Path("runs") / f"ladder-weights-{steps}" / "model"
    if steps and not (path / "model.safetensors").exists():
        shutil.rmtree(path.parent, ignore_errors=True)
        flags = ["--stages", f"{PAID}:{steps}", "--lr-end", "1", "--seed", "100", "--eval-posts", "1"]
        if train.main([*flags, "--run", path.parent.name]):
            raise RuntimeError(f"{path.parent} did not reach its end.")
    return path if steps else "tiny"


class Scene(NamedTuple):
    """What all rungs are measured on."""

    model: torch.nn.Module  # whose weights come and go
    ref_model: torch.nn.Module
    tokenizer: Tokenizer
    older: dict  # the weights that sampled
    newer: dict  # those that are differentiated
    batches: list  # of (groups, tasks)
    config: Config  # with the template and the cut that the posts ask for


def scene(place: str) -> Scene:
    here, there = PLACES[place]
    (first, tokenizer), (newer, _), (older, _) = (train.load_policy(replace(Config(), model=str(weights_after(steps))))
                                                  for steps in (0, here, there))
    config = settings(SHARED)
    posts, _, _ = train.choose_posts(config, parse_stages(config.stages), older, tokenizer)
    batches = []
    for step in range(BATCHES):
        tasks = task.tasks_of(posts, step, config, tokenizer)
        batches.append((sample(older, [each.prompt for each in tasks], G=config.group, tokenizer=tokenizer,
                               max_new_tokens=config.max_new_tokens, seed=step), tasks))
    return Scene(model=copy.deepcopy(newer), ref_model=first.requires_grad_(False), tokenizer=tokenizer,
                 older=older.state_dict(), newer=newer.state_dict(), batches=batches, config=config)


def measure(name: str, place: str, at: Scene) -> Tensor:
    """The gradients of a rung [M, W], over the same posts and completions as those of all others."""
    run = Run(name, 0)
    config = replace(run.config, template=at.config.template, max_new_tokens=at.config.max_new_tokens)
    weights = (at.older, at.newer) if place == OLD and name not in BIASED else (at.newer,)
    rows = torch.empty(len(at.batches), sum(p.numel() for p in at.model.parameters()))  # [M, W]
    with update_of(run.rung) as update:
        for row, (groups, tasks) in zip(rows, at.batches):
            groups = [replace(group, parts={}, weights={}) for group in groups]  # --overlong adds a part
            task.score(groups, tasks, parse_stages(config.stages)[-1].reward, config, at.tokenizer)
            row.copy_(gradient(update, at.model, at.ref_model, groups, config, weights))
    return rows


def measure_all(place: str) -> None:
    """Measure and keep what is missing at a place."""
    names = [name for name in RUNGS if measured(name, place) and not noise_of(name, place)]
    if not names:
        return
    at = scene(place)
    own = LATER if place == OLD else place  # where samples are new, at the same weights
    direction = measure(DIRECTION, own, at if own == place else scene(own))  # [M, W]
    for name in names:
        rows = direction if (name, place) == (DIRECTION, own) else measure(name, place, at)  # [M, W]
        run, (cos, error) = Run(name, 0), cosine(rows, direction)
        found = {**noise(rows), "cosine": cos, "cosine_error": error}
        write_text(noise_file(name, place), json.dumps({**run.decides, "batches": BATCHES, **found}) + "\n")
        print(f"  {name}, {place}: {noise_cell(found)}", flush=True)


# --- what is to be seen -----------------------------------------------------------------------------------------------


def results(name: str) -> list[dict]:
    """What there is of a rung, one a seed."""
    return [r for seed in range(3) if (r := result_of(Run(name, seed)))]


def held_out(row: dict, what: str) -> float:
    """A column of a line of eval.jsonl. The reward is what all rungs are paid: without DAPO's soft zone, and so on."""
    return row["reward/rouge_l"] + 4 * row["reward/length"] if what == "reward" else row[what]


def cell(values: Sequence[float], what: str, form: str = "") -> str:
    """Mean (least..most) over the seeds, shares in per cent."""
    form += ".1%" if what in ("within_10pct", "invented", "twice") else ".3f"
    return once.spread(values, lambda x: format(x, form))


def anchor(name: str) -> str:
    return re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")


def held_out_table() -> str:
    """A row a rung: its last evaluations, and how much more reward it has than the rung that it stands on."""
    done = {name: found for name in RUNGS if (found := results(name))}
    text = ("| rung | seeds | reward | within 10% | ROUGE-L | invented | says a sentence twice | reward, against |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |\n")
    if done:
        row = next(iter(done.values()))[0]["val"][0]
        text += f"| before | | {' | '.join(cell([held_out(row, what)], what) for what in SEEN)} | |\n"
    for name, found in done.items():
        ends = [r["val"][-1] for r in found if not r["ended"]]
        cells = [cell([held_out(row, what) for row in ends], what) for what in SEEN]
        ended = "".join(f"; {r['ended']}" for r in found if r["ended"])
        text += f"| [{name}](#{anchor(name)}) | {len(found)}{ended} | {' | '.join(cells)} | {against(name)} |\n"
    return text


def against(name: str) -> str:
    """The difference in reward to the rung that a rung stands on, seed by seed."""
    beside = RUNGS[name].beside
    pairs = [(a, b) for seed in range(3) if beside and (a := result_of(Run(name, seed)))
             and (b := result_of(Run(beside, seed))) and not a["ended"] and not b["ended"]]
    differences = [held_out(a["val"][-1], "reward") - held_out(b["val"][-1], "reward") for a, b in pairs]
    return f"{cell(differences, 'reward', '+')}, *{beside}*" if differences else ""


def noise_table() -> str:
    """A row a rung: variance of the gradient over the squared length of its mean, at each place."""
    text = f"| rung | {' | '.join(PLACES)} |\n| --- {'| --- ' * len(PLACES)}|\n"
    for name, rung in RUNGS.items():
        cells = []
        for place in PLACES:
            found = noise_of(name, place) if measured(name, place) else None
            cells.append(noise_cell(found) if found else f"as *{rung.first}*" if rung.first and place != OLD else "")
        text += f"| [{name}](#{anchor(name)}) | {' | '.join(cells)} |\n"
    return text


def noise_cell(found: dict) -> str:
    """The noise, and the cosine to the gradient of the mean reward, both with their standard errors."""
    if found["signal"] <= 0:
        return "not seen above the noise"
    return f"{found['noise']:.2g} ± {found['error']:.2g}, cos {found['cosine']:.2f} ± {found['cosine_error']:.2f}"


def make_page() -> str:
    """The two tables, and a section for each rung."""
    text = f"## Held out\n\n{held_out_table()}\n## The variance of the gradient\n\n{noise_table()}\n## The rungs\n"
    for name, rung in RUNGS.items():
        about = [rung.what + (f" {rung.paper}." if rung.paper else ""), rung.trainers, BOUGHT[name]]
        text += f"\n### {name}\n\n" + "\n\n".join(textwrap.fill(each, 120, break_long_words=False,
                                                                break_on_hyphens=False) for each in about[:1] if each)
        text += f"\n\n{command(name)}" + "".join(f"\n{textwrap.fill(each, 120, break_on_hyphens=False)}\n"
                                                 for each in about[1:] if each)
    return text


def command(name: str) -> str:
    """What to type, and what is edited. A command of a fork is for a tree with the fork in it."""
    run = Run(name, 0)
    words = " ".join(f'"{word}"' if " " in word else word for word in run.flags[:-2])
    text = f"```{'sh' if run.rung.fork else 'bash'}\npython train.py {words}\n```\n"
    if run.rung.edits:
        text += f"```diff\n{''.join(edit.lines() for edit in run.rung.edits)}```\n"
    if run.rung.fork:
        text += f"\nWith [the fork](fork.md#{anchor(run.rung.fork)}) in the tree.\n"
    return text


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = once.arguments("ladder", __doc__, ("run", "variance", "tables", "one", "place"),
                          "rungs to run, and what stands beside them").parse_args(argv)
    if args.action == "one":
        return train_edited(Run(args.only, args.seeds))
    try:
        if args.action == "place":
            measure_all(args.only)
        elif args.action == "run":
            names = [name for name in RUNGS if re.search(args.only, name)]
            names = [name for name in RUNGS if name in names or name in [RUNGS[each].beside for each in names]]
            once.the_rest([Run(name, seed) for seed in range(args.seeds) for name in names], result_of, do, args.jobs)
        elif args.action == "variance":
            for steps in {steps for place in PLACES.values() for steps in place}:
                weights_after(steps)  # before two processes want them
            threads = max(1, (os.cpu_count() or 1) // args.jobs)
            once.side_by_side(partial(measure_apart, threads=threads), PLACES, args.jobs)
        if args.action != "place":
            page = ROOT / "docs" / "ladder.md"
            head, _, _ = page.read_text(encoding="utf-8").partition("## Held out\n\n")
            write_text(page, head + make_page())
            print(f"{sum(bool(results(name)) for name in RUNGS)} of {len(RUNGS)} rungs are in {page}.")
    except (ValueError, OSError, RuntimeError) as e:
        print(f"ladder: {e}", file=sys.stderr)
        return 1
    return 0


def measure_apart(place: str, threads: int) -> None:
    """What is missing at a place, in a process of its own. RuntimeError if it fails; what was measured is kept."""
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "studies.ladder", "place", "--only", place]
    if subprocess.run(command, env=settings).returncode:
        raise RuntimeError(f"The measurement {place} did not come to its end. The same command goes on with it.")


if __name__ == "__main__":
    sys.exit(main())
