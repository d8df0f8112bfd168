"""The experiment: which rewards, and in which order? And all that is said of the default and of SQUISH, over seeds.

    python -m studies.rewards_grid tune               # first: each family's learning rate and KL, chosen on val
    python -m studies.rewards_grid                    # then all sets; what is done is not done again
    python -m studies.rewards_grid run --sets grid t20 --only "rouge_l$" --seeds 1        # some of it
    python -m studies.rewards_grid tables             # from studies/results/ alone, without a run

Each run is a `train.py` of its own in runs/. What is kept of it, one small file in studies/results/SET/, has no texts:
the settings, a hash of the embedded model and its posts, the last line of eval.jsonl (greedy, on val posts) and the
scores of each test post. So the experiment goes on where it stopped, on any machine, and anybody can make the tables
and their tests anew (plumbing/tables.py). A result of other settings or of another model is not used.

Test posts decide nothing: the learning rate, the KL's weight and what gdpo is tried on are chosen on val posts, by
`worth`. On two cores two runs at a time with one thread each are fastest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from config import Config
from eval import evaluate, scorers_of
from metrics import own_shares, twice
from model import load
from plumbing.cli import read_arguments
from plumbing.folder import write_text
from plumbing.log import read_lines
from plumbing.once import embedded, kept, run_folder, side_by_side, slug
from plumbing.posts import TINY, load_posts
from plumbing.tables import Column, table
from plumbing.words import find_wordnet
from task import within

RESULTS = Path(__file__).parent / "results"
SPLITS = ("train", "val", "test")
QUALITIES = ("rouge_l", "meteor", "bleu", "rouge_l+meteor", "rouge_l+bleu", "meteor+bleu", "rouge_l+meteor+bleu")
RATES, BETAS, TUNING_SEED = (3e-4, 6e-4, 1.2e-3), (0.05, 0.1, 0.2), 9  # a seed that no table has


class Run(NamedTuple):
    """One `train.py`, or, where the name is "untrained", the model that all of them begin with."""

    set: str
    name: str
    seed: int
    flags: tuple[str, ...]

    @property
    def config(self) -> Config:
        return read_arguments(Config, [*self.flags, "--seed", str(self.seed)], "")[0]

    @property
    def result(self) -> Path:
        return RESULTS / self.set / f"{slug(self.name, self.seed)}.json"

    @property
    def folder(self) -> Path:
        decides = json.dumps(asdict(self.config)) + embedded(*SPLITS)
        return run_folder(f"{self.set}-{slug(self.name, self.seed)}", decides)


# --- your experiment starts here --------------------------------------------------------------------------------------


def configurations(first: int, steps: int) -> dict[str, list[str]]:
    """{name: stages}. A staged run gives the `first` of its `steps` to the length alone.

    The 22 configurations of the published grid, and four in which the length weighs three times as much.
    """
    then = steps - first
    return {
        "length only": [f"length:{steps}"],
        **{f"joint {q}": [f"length+{q}:{steps}"] for q in QUALITIES},
        **{f"staged, length off, {q}": [f"length:{first}", f"{q}:{then}"] for q in QUALITIES},
        **{f"staged, length on, {q}": [f"length:{first}", f"length+{q}:{then}"] for q in QUALITIES},
        **{f"joint, 3 x length, {q}": [f"3*length+{q}:{steps}"] for q in (QUALITIES[0], QUALITIES[-1])},
        **{f"staged, 3 x length on, {q}": [f"length:{first}", f"3*length+{q}:{then}"]
           for q in (QUALITIES[0], QUALITIES[-1])},
    }


# What is tuned together: {beginning of the names: the configuration that it is tuned on}.
FAMILIES = {"length only": "length only", "joint": "joint rouge_l+meteor",
            **{f"staged, length {o}": f"staged, length {o}, rouge_l+meteor" for o in ("off", "on")},
            **{name: f"{name}, rouge_l" for name in ("joint, 3 x length", "staged, 3 x length on")},
            "gdpo": "joint rouge_l+meteor"}
SQUISH = ("--lora", "16", "--lr", "1e-3")
PUBLISHED = ("--loss", "dapo", "--advantage", "mean", "--clip-high", "0.3", "--updates", "4", "--beta", "0",
             "--missing", "penalty")


def sets(first: int, steps: int) -> dict[str, list[Run]]:
    """All runs, set by set, as far as what they depend on is known: the grid waits for `tune`, gdpo for the grid.

    Five seeds for the default, "length only" and the twelve published configurations (six qualities, joint and with the
    length switched off), three for the rest.
    """
    configs, squish = configurations(first, steps), f"squish:{steps}"

    def runs(set_name: str, name: str, seeds: int, *flags: str) -> list[Run]:
        return [Run(set_name, name, seed, flags) for seed in range(seeds)]

    def of_grid(set_name: str, name: str, seeds: int, *more: str) -> list[Run]:
        found = chosen("gdpo" if set_name == "gdpo" else family(name), first, steps)
        return runs(set_name, name, seeds, "--stages", *configs[name], *found, *more) if found else []

    published = {f"{how} {q}" for how in ("joint", "staged, length off,") for q in QUALITIES[:-1]} | {"length only"}
    found = {
        "default": [*runs("default", "untrained", 1), *runs("default", "default", 5),
                    *runs("default", "lean", 3, "--lean")],
        "grid": [*runs("grid", "untrained", 1),
                 *(run for name in configs for run in of_grid("grid", name, 5 if name in published else 3))],
        "t20": [*runs("t20", "untrained", 1, "--target", "20"),
                *(run for name in configs if name == "length only" or re.search(r"[ ]rouge_l$", name)
                  for run in of_grid("t20", name, 5, "--target", "20"))],
        "squish": [run for name, stage, more in (
            ("untrained", squish, ()), ("squish", squish, ()), ("penalty", squish, PUBLISHED[-2:]),
            ("notes", squish, ("--template", "notes", *PUBLISHED[-2:])),
            ("squish - cost", f"squish - cost:{steps}", ()), ("squish - 0.25 cost", f"squish - 0.25*cost:{steps}", ()),
            ("published recipe", squish, PUBLISHED), ("3 x KL, 2 x lr", squish, ("--lr", "2e-3", "--beta", "0.15")),
        ) for run in runs("squish", name, 1 if name == "untrained" else 3, "--stages", stage, *SQUISH, *more)],
    }
    found["gdpo"] = [run for name in best(found["grid"])
                     for run in of_grid("gdpo", name, 5 if name in published else 3, "--advantage", "gdpo")]
    return found


def family(name: str) -> str:
    """The family whose name begins the configuration's: the longest one."""
    return max((f for f in FAMILIES if name.startswith(f)), key=len)


def tuning(first: int, steps: int) -> dict[str, list[Run]]:
    """{family: its runs}, one for each learning rate and weight of the KL."""
    configs = configurations(first, steps)
    return {f: [Run("tune", f"{f}, lr {lr}, beta {beta}", TUNING_SEED,
                    ("--stages", *configs[name], "--lr", str(lr), "--beta", str(beta),
                     *(("--advantage", "gdpo") if f == "gdpo" else ())))
                for lr in RATES for beta in BETAS] for f, name in FAMILIES.items()}


def worth(result: dict) -> float:
    """What is wanted of a run, whatever paid it: near the target, near the reference, nothing invented. On val posts.

    Not the run's own reward: without a KL that is always the highest, and such a run cheats.
    """
    return result["val"]["within_10pct"] + result["val"]["rouge_l"] - result["val"]["invented"]


def chosen(name: str, first: int, steps: int) -> tuple[str, ...]:
    """The flags of a family's best learning rate and weight of the KL; () where not all of them have been tried."""
    results = [(result_of(run), run) for run in tuning(first, steps)[name]]
    if not all(result for result, _ in results):
        return ()
    config = max(results, key=lambda pair: worth(pair[0]))[1].config
    return "--lr", str(config.lr), "--beta", str(config.beta)


def at_edge(flags: Sequence[str]) -> str:
    """Words for a value that is the lowest or the highest of those tried: a still better one may lie beyond it."""
    tried = {"--lr": RATES, "--beta": BETAS}
    names = [name for name, value in zip(flags[::2], flags[1::2]) if float(value) in (min(tried[name]),
                                                                                     max(tried[name]))]
    return f" ({' and '.join(names)} at the edge of what was tried)" if names else ""


def best(grid: list[Run], n: int = 4) -> list[str]:
    """The n configurations of the grid with a sum to take apart that are worth most, once all runs are done."""
    worths: dict[str, list[float]] = {}
    for run in grid:
        if not (result := result_of(run)):
            return []
        if "+" in run.config.stages[-1] and run.name != "untrained":
            worths.setdefault(run.name, []).append(worth(result))
    return sorted(worths, key=lambda name: -fmean(worths[name]))[:n]


# --- runs -------------------------------------------------------------------------------------------------------------


def result_of(run: Run) -> dict | None:
    """What was kept of a run, if it was one of these settings and of this model."""
    return kept(run.result, run.config, Config(), model=embedded(*SPLITS))


def train(run: Run, threads: int) -> None:
    """Train, or go on. What it prints goes to log.txt. RuntimeError if the run does not reach its end."""
    flags = ["--run", run.folder.name]
    flags += ["--resume"] if (run.folder / "config.json").exists() else [*run.flags, "--seed", str(run.seed)]
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        command = [sys.executable, Path(__file__).resolve().parents[1] / "train.py", *flags]
        settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
        code = subprocess.run(command, stdout=log, stderr=log, env=settings).returncode
    if code != 0:
        last = (run.folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
        raise RuntimeError(f"{run.folder.name} ended with an error: {last}")
    if {row["stage"] for row in read_lines(run.folder / "eval.jsonl")} != set(range(len(run.config.stages) + 1)):
        raise RuntimeError(f"{run.folder.name} was stopped before its end: the same command goes on with it.")


def keep(run: Run, n: int) -> dict:
    """Measure a finished run on the first n test posts, write its result and give it back."""
    rows = read_lines(run.folder / "metrics.jsonl")
    kl = [row["kl"] for row in rows[-10:] if row["kl"] is not None]
    result = {"config": asdict(run.config), "model": embedded(*SPLITS), "wordnet": bool(find_wordnet()), "posts": n,
              "kl": fmean(kl) if kl else None, "seconds": round(sum(row["seconds"] for row in rows)),
              "val": (read_lines(run.folder / "eval.jsonl") or [{}])[-1]}
    if run.set != "tune":
        folder = TINY if run.name == "untrained" else run.folder / "model"
        r = evaluate(*load(folder), load_posts("tiny", "test")[:n], run.config, scorers_of(run.config))
        result["scores"] = scores(r["summaries"])
    write_text(run.result, json.dumps(result) + "\n")
    return result


def scores(rows: list[dict]) -> dict[str, list]:
    """The numbers of summaries that a table shows, one list each, without the texts."""
    texts = [row["summary"] for row in rows]
    shown = {"budget", *(column.partition("@")[0] for columns in (LENGTHS, BUDGETS) for column in columns)}
    found = {name: [round(float(row[name]), 4) for row in rows] for name in rows[0] if name in shown}
    return found | {"distinct": [round(x, 4) for x in own_shares(texts)], "twice": list(map(twice, texts))}


# --- tables -----------------------------------------------------------------------------------------------------------

LENGTHS = {
    "within_2": Column("±2", "{:.0%}"), "within_10pct": Column("±10%", "{:.0%}"),
    "length": Column("length", "{:.1f}", tested=False),
    "length spread": Column("spread", "{:.1f}", tested=False, spread=True),
    "rouge_l": Column("ROUGE-L"), "meteor": Column("METEOR"), "bleu": Column("BLEU"),
    "invented": Column("invented", "{:.1%}"), "nothing_invented": Column("nothing invented", "{:.0%}"),
    "names": Column("names", "{:.1f}"), "twice": Column("twice", "{:.0%}"), "distinct": Column("distinct"),
    "kl": Column("KL", tested=False)}
BUDGETS = {
    **{f"{name}@{budget}": Column(f"{title}@{budget:.0%}", form) for budget in (0.1, 0.2)
       for name, title, form in (("reward/squish", "SQUISH", "{:.3f}"), ("over", "over", "{:.0%}"),
                                 ("used", "used", "{:.0%}"))},
    "missing": Column("missing", "{:.1%}"), **{name: LENGTHS[name] for name in ("invented", "names", "distinct", "kl")}}
# Each table: the sets whose runs it shows, its columns, and the configuration that all others are tested against.
TABLES = {"default": (("default",), LENGTHS, "default"), "grid": (("grid", "gdpo"), LENGTHS, "length only"),
          "t20": (("t20",), LENGTHS, "length only"), "squish": (("squish",), BUDGETS, "squish")}


def measure(results: list[dict]) -> dict[str, np.ndarray]:
    """The S runs of one configuration, one a seed, on P posts -> {column: values [S, P]}; "kl" has [S, 1].

    With budgets, NAME is the mean over a post's budgets and NAME@BUDGET the value of one.
    """
    values: dict[str, list] = {}
    for r in results:
        columns = {name: np.array(column, dtype=float) for name, column in r["scores"].items()}  # [budgets * P] each
        columns["nothing_invented"] = (columns["invented"] == 0).astype(float)
        for name in ("within_2", "within_10pct"):
            columns[name] = np.array([within([n], [r["config"]["target"]])[name] for n in columns["length"]])
        budget = columns.pop("budget", np.zeros(r["posts"]))
        for name, column in columns.items():
            each = {b: column[budget == b] for b in dict.fromkeys(budget.tolist())}  # [P] each, posts in order
            values.setdefault(name, []).append(sum(each.values()) / len(each))
            if len(each) > 1:
                for b, own in each.items():
                    values.setdefault(f"{name}@{b}", []).append(own)
        values.setdefault("kl", []).append([np.nan if r["kl"] is None else r["kl"]])
    return {name: np.array(v, dtype=float) for name, v in values.items()}


def make_tables(all_sets: dict[str, list[Run]], names: list[str]) -> str:
    """The tables of the sets that are asked for, as far as there are results."""
    text = ""
    for title, (shown, columns, baseline) in TABLES.items():
        found: dict[str, list[dict]] = {}
        runs = [run for name in shown if name in names for run in all_sets[name]]
        if title == "grid" and runs:  # the default stands beside what it is made of
            runs += [run for run in all_sets["default"] if run.name == "default"]
        for run in runs:
            if result := result_of(run):
                found.setdefault(f"gdpo, {run.name}" if run.set == "gdpo" else run.name, []).append(result)
        if len({result["posts"] for results in found.values() for result in results}) > 1:
            raise ValueError(f"The results of {title} are of different numbers of test posts: run it with one --posts.")
        if baseline in found:
            text += f"\n## {title}\n\n" + table({name: measure(r) for name, r in found.items()}, columns, baseline)
            text += f"\n{sum(map(len, found.values()))} of {len(runs)} runs. †: differs from \"{baseline}\".\n"
    return text or "There is no result yet: python -m studies.rewards_grid tune, then without a word.\n"


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m studies.rewards_grid", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", default="run", choices=("tune", "run", "tables"), help="default: run")
    parser.add_argument("--sets", nargs="+", default=["default", "grid", "t20", "squish", "gdpo"],
                        choices=("default", "grid", "t20", "squish", "gdpo"), help="default: all of them")
    parser.add_argument("--only", default="", help="a regular expression: configurations to run; baselines always are")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many seeds of each configuration")
    parser.add_argument("--steps", type=int, default=100, help="training steps of a run (not of the default's)")
    parser.add_argument("--first", type=int, default=40, help="how many of them a staged run gives to the length alone")
    parser.add_argument("--posts", type=int, default=300, help="test posts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # as in train.py
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    torch.set_num_threads(threads)
    try:
        if args.action == "tune":
            tried = tuning(args.first, args.steps)
            do([run for runs in tried.values() for run in runs if re.search(args.only, run.name)], args, threads)
            for name in tried:
                flags = chosen(name, args.first, args.steps)
                print(f"{name}: {' '.join(flags) or 'not all runs are done'}{at_edge(flags)}")
            return 0
        for name in args.sets if args.action == "run" else ():
            runs = sets(args.first, args.steps)[name]  # anew each time: gdpo depends on the grid
            if not any(run.name != "untrained" for run in runs):
                print(f"{name} waits for {'the grid' if name == 'gdpo' else 'python -m studies.rewards_grid tune'}.")
            baseline = ("untrained", TABLES[name][2]) if name in TABLES else ()
            do([run for run in runs if run.seed < args.seeds and (
                run.name in baseline or re.search(args.only, run.name))], args, threads)
        print(make_tables(sets(args.first, args.steps), args.sets))
    except (ValueError, OSError, RuntimeError) as e:
        print(f"rewards_grid: {e}", file=sys.stderr)
        return 1
    return 0


def do(runs: list[Run], args: argparse.Namespace, threads: int) -> None:
    """What has no result yet, `args.jobs` runs at a time."""
    def job(run: Run) -> None:
        begun = time.time()
        if run.name != "untrained":
            train(run, threads)
        keep(run, args.posts)
        print(f"  {run.set}: {run.name}, seed {run.seed}: {time.time() - begun:.0f} s", flush=True)

    left = [run for run in runs if (result_of(run) or {"posts": None})["posts"] != args.posts]
    if runs:
        print(f"{runs[0].set}: {len(left)} of {len(runs)} runs to do, {args.jobs} at a time, {threads} threads each",
              flush=True)
    side_by_side(job, left, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
