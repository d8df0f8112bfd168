"""Four rewards for a length, side by side: linear, binary, saturating, exponential. docs/rewards.md has the tables.

    python -m studies.lengths                         # all runs; what is done is not done again, then the tables
    python -m studies.lengths run --only "binary" --seeds 1       # some of it
    python -m studies.lengths tables                  # docs/rewards.md, from studies/results/lengths/ alone

Each run is paid `rouge_l + WEIGHT*REWARD` for 80 steps, with the default's other settings, at a target of 40 tokens or
of 20. So that no reward is merely the loudest, the weights are such that the weighted term has the same standard
deviation within the groups that the untrained model writes; the linear one has the default's weight of 4.

What is kept of a run, one small file, has no texts: the settings, the share of completions within 10% of the target
step by step, lengths and metrics of greedy summaries of test posts, and the lengths of groups that the model samples.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

import train
from config import Config
from eval import complete, evaluate
from model import load
from plumbing.cli import read_arguments
from plumbing.folder import write_text
from plumbing.log import read_lines
from plumbing.once import arguments, as_json, embedded, kept, run_folder, the_rest, to_its_end
from plumbing.posts import TINY, load_posts
from plumbing.tables import Column, table
from plumbing.words import find_wordnet
from rewards import REWARDS, Summary
from task import content_lengths, make_task, within

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "lengths"
PAGE, BEGIN, END = ROOT / "docs" / "rewards.md", "<!-- python -m studies.lengths tables -->\n", "<!-- until here -->\n"
FORMS = {"linear": "length", "binary": "length_binary", "saturating": "length_saturating", "exponential": "length_exp"}
TARGETS, SEEDS, STEPS, POSTS, GROUPS = (40, 20), 3, 80, 200, 64
SPLITS = ("train", "val", "test")
COLUMNS = {
    "flat before": Column("flat groups before", "{:.0%}", tested=False),
    "flat after": Column("after", "{:.0%}", tested=False), "half way": Column("half way, step", "{:.0f}", tested=False),
    "within_2": Column("±2", "{:.0%}"), "within_10pct": Column("±10%", "{:.0%}"),
    "length": Column("length", "{:.1f}", tested=False),
    "length spread": Column("spread", "{:.1f}", tested=False, spread=True),
    "rouge_l": Column("ROUGE-L"), "meteor": Column("METEOR"), "invented": Column("invented", "{:.1%}")}


class Run(NamedTuple):
    form: str  # of FORMS, or "untrained"
    target: int
    seed: int

    @property
    def flags(self) -> list[str]:
        weight, name = (1.0, "length") if self.form == "untrained" else (weights(self.target)[self.form],
                                                                         FORMS[self.form])
        return ["--stages", f"rouge_l + {weight:g}*{name}:{STEPS}", "--target", str(self.target), "--eval-posts", "20",
                "--seed", str(self.seed)]

    @property
    def config(self) -> Config:
        return read_arguments(Config, self.flags, "")[0]

    @property
    def name(self) -> str:
        return f"{self.form}, target {self.target}"

    @property
    def slug(self) -> str:
        return f"{self.form}-{self.target}-{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.slug}.json"

    @property
    def folder(self) -> Path:
        return run_folder(f"lengths-{self.slug}", json.dumps(as_json(self.config)) + embedded(*SPLITS))


def result_of(run: Run) -> dict | None:
    """What was kept of a run, if it was one of these settings and of this model."""
    if run.form != "untrained" and not result_of(Run("untrained", run.target, 0)):
        return None  # its weight is not known
    return kept(run.result, run.config, Config(), model=embedded(*SPLITS))


# --- the signal of a reward -------------------------------------------------------------------------------------------


def paid(form: str, lengths: Sequence[Sequence[int]], target: int) -> np.ndarray:
    """Lengths of groups [B, G] -> what each completion gets [B, G], without a weight."""
    return np.array([[REWARDS[FORMS[form]](Summary("", n, "", target, "")) for n in group] for group in lengths])


def weights(target: int) -> dict[str, float]:
    """{form: weight}, by equal standard deviation within the untrained model's groups, to two digits.

    The variance is the mean over the groups: a flat group counts as 0.
    """
    lengths = result_of(Run("untrained", target, 0))["sampled"]
    spread = {form: paid(form, lengths, target).var(axis=1, ddof=1).mean() ** 0.5 for form in FORMS}
    return {form: float(f"{4 * spread['linear'] / spread[form]:.2g}") for form in FORMS}


def flat(form: str, lengths: Sequence[Sequence[int]], target: int) -> np.ndarray:
    """Lengths of groups [B, G] -> 1 where the reward is the same for all of a group, and so says nothing [B]."""
    return (np.ptp(paid(form, lengths, target), axis=1) == 0).astype(float)


def half_way(curve: Sequence[float], begin: float) -> int:
    """The first step whose mean over five is half way from `begin` to 1, or the last step where none is.

    >>> half_way([0.2, 0.2, 0.2, 0.2, 0.2, 0.6, 1.0, 1.0, 1.0, 1.0], begin=0.2)  # the mean of 0.2, 0.2, 0.6, 1, 1 is .6
    8
    """
    for step in range(5, len(curve) + 1):
        if fmean(curve[step - 5:step]) >= (begin + 1) / 2:
            return step
    return len(curve)


# --- runs -------------------------------------------------------------------------------------------------------------


def do(run: Run, threads: int) -> dict:
    """Train, or go on, and measure, in a process of its own; keep the result. RuntimeError if it does not succeed."""
    if run.form == "untrained":
        return measure_and_keep(run)
    command = [sys.executable, "-m", "studies.lengths", "one", "--only", run.slug]
    if ended := to_its_end(command, run.folder, ROOT, threads):
        raise RuntimeError(f"{run.slug}: {ended}.")
    return result_of(run)


def train_and_measure(run: Run) -> int:
    """The process of one run -> its exit code."""
    more = ["--resume"] if (run.folder / "config.json").exists() else run.flags
    code = train.main([*more, "--run", run.folder.name])
    if not code and len(read_lines(run.folder / "eval.jsonl")) == 2:  # it was not stopped before its end
        measure_and_keep(run)
    return code


def measure_and_keep(run: Run) -> dict:
    """Measure a model that is trained, or the one that all begin with, and keep the result."""
    begun, trained = time.monotonic(), run.form != "untrained"
    model, tokenizer = load(run.folder / "model" if trained else TINY)
    rows = evaluate(model, tokenizer, load_posts("tiny", "test")[:POSTS], run.config)["summaries"]
    steps = read_lines(run.folder / "metrics.jsonl") if trained else []
    result = {"config": as_json(run.config), "model": embedded(*SPLITS), "wordnet": bool(find_wordnet()),
              "curve": [round(row["within_10pct"], 4) for row in steps],
              "sampled": sampled(model, tokenizer, run.config),
              "scores": {name: [round(float(row[name]), 4) for row in rows]
                         for name in ("length", "rouge_l", "meteor", "invented")}, "ended": "",
              "seconds": round(sum(row["seconds"] for row in steps) + time.monotonic() - begun)}
    write_text(run.result, json.dumps(result) + "\n")
    return result


def sampled(model, tokenizer, config: Config) -> list[list[int]]:
    """The lengths [B, G] of groups of completions, of posts from the training set, as in a step."""
    config.template = "chatml"
    prompts = [make_task(tokenizer, post, config).prompt for post in load_posts("tiny", "train")[:GROUPS]]
    groups = complete(model, tokenizer, prompts, max_new_tokens=2 * config.target, temperature=1.0, G=config.group)
    return [content_lengths(group) for group in groups]


def run_all(args: argparse.Namespace) -> None:
    """What has no result yet, `args.jobs` runs at a time: first the untrained model, which sets the weights."""
    the_rest([Run("untrained", target, 0) for target in TARGETS], result_of, do, at_once=1)
    the_rest([run for run in every(args.seeds) if re.search(args.only, run.slug)], result_of, do, args.jobs)


def every(seeds: int = SEEDS) -> list[Run]:
    return [Run(form, target, seed) for seed in range(seeds) for target in TARGETS for form in FORMS]


# --- tables -----------------------------------------------------------------------------------------------------------


def measure(form: str, results: Sequence[dict], untrained: dict, target: int) -> dict[str, np.ndarray]:
    """The S runs of one form, one a seed -> {column: values [S, P]}, of posts, groups or the run as a whole."""
    found = {name: np.array([r["scores"][name] for r in results]) for name in results[0]["scores"]}  # [S, P] each
    for name in ("within_2", "within_10pct"):
        found[name] = np.array([[within([n], [target])[name] for n in lengths] for lengths in found["length"]])
    if form != "untrained":
        begin = fmean(within(group, [target] * len(group))["within_10pct"] for group in untrained["sampled"])
        found["flat before"] = flat(form, untrained["sampled"], target)[None]  # [1, B]
        found["flat after"] = np.array([flat(form, r["sampled"], target) for r in results])  # [S, B]
        found["half way"] = np.array([[half_way(r["curve"], begin)] for r in results], dtype=float)  # [S, 1]
    return found


def make_tables() -> str:
    """A table for each target, as far as there are results."""
    text = ""
    for target in TARGETS:
        untrained, measured = result_of(Run("untrained", target, 0)), {}
        if untrained:
            measured["untrained"] = measure("untrained", [untrained], untrained, target)
            by_weight = weights(target)
        for form in FORMS if untrained else ():
            if results := [r for seed in range(SEEDS) if (r := result_of(Run(form, target, seed)))]:
                name = f"{form}, {by_weight[form]:g} x"
                measured[name] = measure(form, results, untrained, target)
        if first := next((name for name in measured if name.startswith("linear")), None):
            text += f"\nTarget {target}:\n\n{table(measured, COLUMNS, first)}"
    return text


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = arguments("lengths", __doc__, ("run", "tables", "one"), "runs such as binary-20-0").parse_args(argv)
    try:
        if args.action == "one":
            form, target, seed = args.only.rsplit("-", 2)
            return train_and_measure(Run(form, int(target), int(seed)))
        if args.action == "run":
            run_all(args)
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        write_text(PAGE, f"{head}{BEGIN}{make_tables()}\n{END}{rest.partition(END)[2]}")
        print(f"{sum(bool(result_of(run)) for run in every())} of {len(every())} runs are in {PAGE}.")
    except (ValueError, OSError, RuntimeError) as e:
        print(f"lengths: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
