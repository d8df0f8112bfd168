"""The experiment: which rewards, and in which order? Every set of quality rewards, jointly with length or in stages.

    python -m studies.rewards_grid --fast             # one seed
    python -m studies.rewards_grid                    # three seeds; runs that are finished are not run again
    python -m studies.rewards_grid --name t20 --target 20 --only "rouge_l$"        # some of them, for another target

Each configuration is a `train.py` run of its own, runs/exp-NAME-SEED. All of them start from the same model and learn
from the same posts for the same number of steps. A run's greedy summaries of the test posts are kept in its test.json.
One table, runs/exp.md, compares all runs:

    95% intervals   a bootstrap over seeds and posts: both are drawn again with replacement, and every seed gets the
                    same posts.
    p               a sign-flip permutation test, paired by post, of the mean over seeds against that of "length only",
                    with Holm's correction over all comparisons of the table. It is about these trained models and other
                    posts. What other seeds would change shows in the intervals.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from config import Config
from eval import evaluate
from metrics import own_shares
from model import load
from plumbing.folder import read_json, write_text
from plumbing.log import read_lines
from plumbing.posts import TINY, load_posts
from plumbing.significance import holm, interval, sign_flip
from plumbing.words import find_wordnet
from task import within

QUALITIES = ("rouge_l", "meteor", "bleu", "rouge_l+meteor", "rouge_l+bleu", "meteor+bleu", "rouge_l+meteor+bleu")


# --- your experiment starts here ---
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


# --- runs -------------------------------------------------------------------------------------------------------------


def run_folder(experiment: str, name: str, seed: int) -> Path:
    return Path("runs") / f"{experiment}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def train(folder: Path, stages: list[str], target: int, seed: int, threads: int) -> None:
    """Train one configuration, or go on with it, or leave it alone if it is finished. What it prints goes to log.txt.
    Raises ValueError if the folder holds another run, RuntimeError if the run does not reach its end."""
    if (folder / "test.json").exists():
        return
    flags = ["--run", folder.name]
    if (folder / "config.json").exists():
        saved = read_json(folder / "config.json")
        if (saved["stages"], saved["target"]) != (stages, target):
            raise ValueError(f"{folder} was begun with other stages or another target: take another --name.")
        flags += ["--resume"]
    else:
        flags += ["--stages", *stages, "--seed", str(seed), "--target", str(target), "--eval-posts", "32"]
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        command = [sys.executable, Path(__file__).resolve().parents[1] / "train.py", *flags]
        settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
        code = subprocess.run(command, stdout=log, stderr=log, env=settings).returncode
    if code != 0:
        last = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
        raise RuntimeError(f"{folder.name} ended with an error: {last}")
    if {row["stage"] for row in read_lines(folder / "eval.jsonl")} != set(range(len(stages) + 1)):
        raise RuntimeError(f"{folder.name} was stopped before its end: the same command goes on with it.")
    print(f"  {folder.name}: {time.time() - begun:.0f} s", flush=True)


def test(folder: Path, model_folder: Path, n: int, target: int) -> dict:
    """Greedy summaries of the first n test posts, made once and kept: {"target", "kl", "summaries"}.

    "kl" is the mean of the last ten steps, in nats a token, or None for a model that was not trained.
    """
    if not (folder / "test.json").exists():
        r = evaluate(*load(model_folder), load_posts("tiny", "test")[:n], Config(target=target))
        kl = [row["kl"] for row in read_lines(folder / "metrics.jsonl")[-10:] if row["kl"] is not None]
        text = json.dumps({"target": target, "kl": fmean(kl) if kl else None, "summaries": r["summaries"]})
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "test.json", text)
    r = read_json(folder / "test.json")
    if len(r["summaries"]) < n or r["target"] != target:
        raise ValueError(f"{folder}/test.json is of {len(r['summaries'])} posts and target {r['target']}: delete it.")
    return r | {"summaries": r["summaries"][:n]}


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = ("within_2", "within_10pct", "length", "spread", "rouge_l", "meteor", "bleu", "distinct", "kl")
TITLES = ("±2", "±10%", "length", "spread", "ROUGE-L", "METEOR", "BLEU", "distinct", "KL")
TESTED = ("within_2", "within_10pct", "rouge_l", "meteor", "bleu", "distinct")


def measure(runs: list[dict]) -> dict[str, np.ndarray]:
    """The S runs of one configuration, one a seed, on P posts -> {column: values [S, P]}; "kl" has [S, 1]."""
    values: dict[str, list] = {name: [] for name in COLUMNS if name != "spread"}
    for r in runs:
        rows = r["summaries"]
        texts = tuple(row["summary"] for row in rows)
        for name in ("length", "rouge_l", "meteor", "bleu"):
            values[name].append([row[name] for row in rows])
        for name in ("within_2", "within_10pct"):
            values[name].append([within([row["length"]], [r["target"]])[name] for row in rows])
        values["distinct"].append(own_shares(texts))
        values["kl"].append([np.nan if r["kl"] is None else r["kl"]])
    return {name: np.array(v, dtype=float) for name, v in values.items()}


def table(results: dict[str, list[dict]], baseline: str) -> str:
    """Markdown with a row for each configuration: means and their 95% intervals, and a † where the configuration
    differs from the baseline with a p (Holm's) below 0.05."""
    measured = {name: measure(runs) for name, runs in results.items()}
    others = [name for name in results if name not in (baseline, "untrained")]
    pairs = [(name, column) for name in others for column in TESTED]
    p = dict(zip(pairs, holm([sign_flip((measured[name][column] - measured[baseline][column]).mean(0))
                              for name, column in pairs])))
    lines = [f"| | {' | '.join(TITLES)} |", "| --- " * (len(TITLES) + 1) + "|"]
    for name, values in measured.items():
        stars = {column: p.get((name, column), 1.0) < 0.05 for column in COLUMNS}
        lines.append(f"| {name} | {' | '.join(cell(values, column, stars[column]) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def cell(values: dict[str, np.ndarray], column: str, mark: bool) -> str:
    """"0.456† (0.44..0.47)": mean, mark, interval."""
    data, statistic = values.get(column, values["length"]), np.mean
    if column == "spread":  # of the lengths within a seed
        statistic = lambda v: v.std(1).mean()  # noqa: E731
    if np.isnan(data).any():
        return "-"
    form = "{:.0%}" if column.startswith("within") else "{:.1f}" if column in ("length", "spread") else "{:.3f}"
    mean, low, high = (form.format(x) for x in (statistic(data), *interval(data, statistic)))
    return f"{mean}{'†' if mark else ''} ({low.removesuffix('%')}..{high.removesuffix('%')})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m studies.rewards_grid", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one seed; the intervals are then over posts alone")
    parser.add_argument("--name", default="exp", help="the table's name, and what its runs' names begin with")
    parser.add_argument("--only", default="", help="a regular expression: what to run besides 'length only'")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0..N-1 of every configuration")
    parser.add_argument("--steps", type=int, default=100, help="training steps of a run")
    parser.add_argument("--first", type=int, default=40, help="how many of them a staged run gives to the length alone")
    parser.add_argument("--target", type=int, default=30, help="wanted length in tokens")
    parser.add_argument("--posts", type=int, default=300, help="test posts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # as in train.py
    configs = {name: stages for name, stages in configurations(args.first, args.steps).items()
               if name == "length only" or re.search(args.only, name)}
    jobs = [(name, seed) for seed in range(1 if args.fast else args.seeds) for name in configs]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    torch.set_num_threads(threads)
    begun = time.time()

    def job(name_and_seed: tuple[str, int]) -> dict:
        name, seed = name_and_seed
        folder = run_folder(args.name, name, seed)
        train(folder, configs[name], args.target, seed, threads)
        return test(folder, folder / "model", args.posts, args.target)

    print(f"{len(jobs)} runs of {args.steps} steps, {args.jobs} at a time, {threads} threads each", flush=True)
    try:
        results = {"untrained": [test(Path("runs") / f"{args.name}-untrained", TINY, args.posts, args.target)]}
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                for (name, _), result in zip(jobs, pool.map(job, jobs)):
                    results.setdefault(name, []).append(result)
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing new is begun
    except (ValueError, OSError, RuntimeError) as e:
        print(f"rewards_grid: {e}", file=sys.stderr)
        return 1
    text = table(results, "length only")
    write_text(Path("runs") / f"{args.name}.md", text)
    print(f"\n{text}\n{args.posts} test posts, greedy, target {args.target} tokens; †: Holm's p below 0.05."
          f"\nWordNet: {find_wordnet() or 'none'}. {(time.time() - begun) / 60:.0f} minutes. In runs/{args.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
