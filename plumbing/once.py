"""What studies share that train many models: each run is done once, and its result counts for its settings only."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path


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
