"""What studies share that train many models: each run is done once, and its result counts for its settings only."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from plumbing.folder import read_json
from plumbing.log import read_lines


def digest(paths: Iterable[Path]) -> str:
    """A short hash of what stands in these files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


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


# --- short runs of train.py, of which curves are kept -----------------------------------------------------------------


def kept(path: Path, config, default, **same) -> dict | None:
    """What is kept of a run, if it was one of these settings, and if all else that decides it is the same."""
    if not path.exists():
        return None
    result = read_json(path)
    return result if same_settings(result["config"], config, default) and all(
        result[name] == value for name, value in same.items()) else None


def to_its_end(command: list[str], folder: Path, root: Path, threads: int) -> str:
    """Train in a process of its own -> "", or the sentence with which the run exploded.

    What it prints goes to log.txt. RuntimeError if the run neither reaches its end nor explodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(root)}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=settings).returncode
    last = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
    exploded = re.search(r"train.py: (.* in step \d+)", last)
    if not exploded and (code or len(read_lines(folder / "eval.jsonl")) < 2):
        raise RuntimeError(f"{folder} did not reach its end: {last}. The same command goes on with it.")
    return exploded[1] if exploded else ""


def curves(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """Columns of metrics.jsonl, to four digits: these, and each reward of the sum."""
    rows = read_lines(folder / "metrics.jsonl")
    names = [*names, *(name for name in rows[0] if name.startswith("reward/"))]
    return {name: [None if row[name] is None else float(f"{row[name]:.4g}") for row in rows] for name in names}


def evaluations(folder: Path) -> list[dict]:
    """The lines of eval.jsonl: before the first stage, and after each. They hold no texts."""
    return [{name: value for name, value in row.items() if name != "lengths"}
            for row in read_lines(folder / "eval.jsonl")]


def the_rest(runs: Sequence, result_of: Callable, do: Callable, at_once: int) -> None:
    """do(run, threads) for each that has no result yet, and a line on the screen for each that is done."""
    left = [run for run in runs if not result_of(run)]
    threads = max(1, (os.cpu_count() or 1) // at_once)
    print(f"{len(left)} of {len(runs)} runs to do, {at_once} at a time, {threads} threads each", flush=True)

    def job(run) -> None:
        result = do(run, threads)
        print(f"  {run.name}, seed {run.seed}: {result['seconds']} s{' ' * bool(result['ended'])}{result['ended']}",
              flush=True)

    side_by_side(job, left, at_once)
