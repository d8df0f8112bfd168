"""What studies share that train many models: each run is done once, and its result counts for its settings only."""

import argparse
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from plumbing.folder import read_json
from plumbing.log import read_lines
from plumbing.posts import TINY


@lru_cache
def embedded(*splits: str) -> str:
    """A short hash of the embedded model and of these of its posts."""
    names = "model.safetensors", "tokenizer.json", *(f"{split}.jsonl" for split in splits)
    return hashlib.sha256(b"".join((TINY / name).read_bytes() for name in names)).hexdigest()[:12]


def slug(name: str, seed: int) -> str:
    """A run's name and seed as the name of a file.

    >>> slug("four updates, clipped", 0)
    'four-updates-clipped-0'
    """
    return re.sub(r"[^\w.+-]+", "-", f"{name}-{seed}")


def run_folder(name: str, decides: str) -> Path:
    """runs/NAME-HASH: named by all that decides a run, so that one with something else has another folder."""
    return Path("runs") / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:6]}"


def as_json(config) -> dict:
    """A dataclass as a file has it: lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def same_settings(had: dict, config, default) -> bool:
    """Whether what is kept of a run's settings is `config`. A setting that is newer than the run had its default."""
    defaults = as_json(default)
    return all(had.get(name, defaults[name]) == value for name, value in as_json(config).items())


def side_by_side(work: Callable, jobs: Iterable, at_once: int) -> None:
    """work(job) of each, so many at a time. After an error, or Ctrl-C, no other is begun: `map` cancels them."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, jobs))


def spread(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """Mean (least..most) of those that are there.

    >>> spread([0.25, 0.75, None], "{:.2f}".format), spread([0.5], "{:.0%}".format), spread([None], "{:.2f}".format)
    ('0.50 (0.25..0.75)', '50%', '-')
    """
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    return form(fmean(there)) + (f" ({form(min(there))}..{form(max(there))})" if len(there) > 1 else "")


def arguments(study: str, about: str | None, actions: Sequence[str], only: str) -> argparse.ArgumentParser:
    """What all of these commands take. The first of the actions is the default; `only` says what is chosen among."""
    parser = argparse.ArgumentParser(f"python -m studies.{study}", description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    own = " and ".join(action for action in actions if action in ("one", "place"))
    parser.add_argument("action", nargs="?", default=actions[0], choices=actions, help=f"default: {actions[0]}" + (
        f"; {own}: a part of it, which it begins in a process of its own" if own else ""))
    parser.add_argument("--only", default="", help=f"a regular expression: {only}")
    parser.add_argument("--seeds", type=int, default=3, help="so many seeds of each" + (
        " (for one: the seed)" if "one" in actions else ""))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    return parser


# --- short runs of train.py, of which curves are kept -----------------------------------------------------------------


def kept(path: Path, config, default, **same) -> dict | None:
    """What is kept of a run, if it was one of these settings, and if all else that decides it is the same."""
    if not path.exists():
        return None
    result = read_json(path)
    return result if same_settings(result["config"], config, default) and all(
        result[name] == value for name, value in same.items()) else None


def short_run(command: list[str], folder: Path, root: Path, threads: int, names: Iterable[str]) -> dict:
    """Train in a process of its own -> what is kept of it: how it ended, these curves, its evaluations, its seconds."""
    begun = time.monotonic()
    ended = to_its_end(command, folder, root, threads)
    return {"ended": ended, "curves": curves(folder, names), "val": evaluations(folder),
            "seconds": round(time.monotonic() - begun)}


def to_its_end(command: list[str], folder: Path, root: Path, threads: int, lines: int = 2) -> str:
    """Train in a process of its own -> "", or the sentence with which the run exploded.

    What it prints goes to log.txt. RuntimeError if the run neither reaches its end, where eval.jsonl has so many lines,
    nor explodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(root)}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=settings).returncode
    last = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
    exploded = re.search(r"train.py: (.* in step \d+)", last)
    if not exploded and (code or len(read_lines(folder / "eval.jsonl")) < lines):
        raise RuntimeError(f"{folder} did not reach its end: {last}. The same command goes on with it.")
    return exploded[1] if exploded else ""


def curves(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """Columns of metrics.jsonl, to four digits: these, as far as they are there, and each reward of the sums."""
    rows = read_lines(folder / "metrics.jsonl")
    there = {**rows[0], **rows[-1]}  # a stage may have other rewards than the one before
    names = [*(name for name in names if name in there), *(name for name in there if name.startswith("reward/"))]
    return {name: [None if row.get(name) is None else float(f"{row[name]:.4g}") for row in rows] for name in names}


def evaluations(folder: Path) -> list[dict]:
    """The lines of eval.jsonl: before the first stage, and after each. They hold no texts."""
    return [{name: value for name, value in row.items() if name != "lengths"}
            for row in read_lines(folder / "eval.jsonl")]


def the_rest(runs: Sequence, result_of: Callable, do: Callable, at_once: int) -> None:
    """do(run, threads) -> its result, for each run that has none yet, and a line on the screen when it is done."""
    left = [run for run in runs if not result_of(run)]
    threads = max(1, (os.cpu_count() or 1) // at_once)
    print(f"{len(left)} of {len(runs)} runs to do, {at_once} at a time, {threads} threads each", flush=True)

    def job(run) -> None:
        result = do(run, threads)
        print(f"  {run.name}, seed {run.seed}: {result['seconds']} s{' ' * bool(result['ended'])}{result['ended']}",
              flush=True)

    side_by_side(job, left, at_once)
