"""Data sets over the `datasets` package, which is imported only for names of the hub, .csv, .parquet and .json files.

What was streamed from the hub is kept as one .jsonl.gz file in CRISP_CACHE, $XDG_CACHE_HOME/crisp or ~/.cache/crisp and
never asked for again: a run resumes with the same posts, without a connection and whatever the hub holds by then. It is
written beside its place and renamed, so that a file which is there is whole. Delete it to fetch anew.
"""

import errno
import gzip
import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from plumbing.folder import write_file

# owner/name or owner/name/config, but not a file that is missing
NAME = re.compile(r"(?!\.)(?!.*\.(?:jsonl?|csv|parquet|gz|zst)$)([\w.-]+/[\w.-]+)(?:/([\w.+-]+))?")
MIXED = re.compile(r"Column\(/(.*?)\) changed from (\w+) to (\w+) in row (\d+)")  # Arrow says so
VALIDATION = ("validation", "val", "valid", "dev")  # people write all of these and mean one
MANY_FILES = 20  # of up to half a gigabyte each: so large a split is not read whole


def spellings(split: str) -> list[str]:
    """The names under which a split may be found, the one that was asked for first.

    >>> spellings("val"), spellings("test")
    (['val', 'validation', 'valid', 'dev'], ['test'])
    """
    return [split, *(name for name in VALIDATION if split in VALIDATION and name != split)]


def fetch(source: str, split: str, limit: int, counts: Callable[[dict], bool | None], note: str = "",
          advice: str = "") -> Path:
    """`owner/name` or `owner/name/config` -> the local .jsonl.gz with its rows that count, streamed if it is not there.

    limit: stop when there are so many (0: the whole split). `counts(row)` says which count (None: does not, but is
    kept), and `note` says it in the
    file's name. Raises FileNotFoundError for a split that is not there, with `advice`, else OSError or ValueError.
    """
    folder = Path(os.environ.get("CRISP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "crisp"))
    stem = str(folder.expanduser() / source.replace("/", "--"))
    known, splits = Path(f"{stem}.json"), None
    if not known.exists():  # kept too: without a connection as well it is known that there is no "val"
        splits = open_splits(source)
        place(known, json.dumps(list(splits)).encode())
    names = list(json.loads(known.read_text(encoding="utf-8")))
    found = next((name for name in spellings(split) if name in names), None)
    if found is None:
        raise FileNotFoundError(f"{source} has no split '{split}', it has {', '.join(names)}: {advice}.")
    path = Path(f"{stem}--{found}{f'-first-{limit}' if limit else ''}{note.replace('/', '-')}.jsonl.gz")
    for kept in (Path(f"{stem}--{found}.jsonl.gz"), path):  # the whole split serves every limit
        if kept.exists():
            return kept
    rows = stream(source, splits or open_splits(source), found, limit, counts)
    place(path, gzip.compress("".join(json.dumps(row, default=str) + "\n" for row in rows).encode(), 6))
    return path


def place(path: Path, content: bytes) -> None:
    """Write under a name of our own and rename: another run may be fetching the same."""
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    write_file(mine, lambda part: part.write_bytes(content), everywhere=True)
    os.replace(mine, path)


def open_splits(source: str) -> dict:
    """-> {split: stream of rows}. The library asks a busy hub again for what comes later, but not for all of this."""
    found, waits = NAME.fullmatch(source), iter((1, 4, 16))  # seconds
    name, config = found.groups() if found else (source, None)
    with calm(source) as datasets:
        while True:
            try:
                return datasets.load_dataset(name, config, streaming=True)
            except Exception as e:  # of many types, as versions go
                status = getattr(getattr(e, "response", None), "status_code", 0)
                busy = status in (408, 429) or status >= 500 or type(e).__module__.startswith("httpx")
                if not busy or not (wait := next(waits, None)):
                    raise
                print(f"{source}: {says(e)}; trying again in {wait} s.", file=sys.stderr, flush=True)
                time.sleep(wait)


def stream(source: str, splits: dict, split: str, limit: int, counts: Callable[[dict], bool | None]) -> list[dict]:
    """The rows that count, up to `limit` of them. Each has an id: its own, or its number in the split.

    Those between them that do not count but are kept (None) are there too.
    """
    from tqdm import tqdm
    files = splits[split].num_shards if split in splits else 0
    if files > MANY_FILES and not limit:
        raise ValueError(f"{source} {split} is {files} large files: say how many posts you want, --max-posts 1000 "
                         f"(in eval.py --n 1000).")
    with calm(source):
        kept = []

        def wanted():
            for number, row in enumerate(splits[split], 1):
                if (verdict := counts(row)) is not False:
                    kept.append(row if row.get("id") is not None else {**row, "id": number})
                if verdict:
                    yield number

        for _ in tqdm(islice(wanted(), limit or None), f"{source} {split}", limit or None, unit=" posts", disable=None):
            pass
        return kept


@contextmanager
def calm(source: str) -> Iterator[Any]:
    """`datasets`, without its bars and logs; what it raises in here becomes a sentence."""
    try:
        import datasets
    except ImportError as e:
        raise ValueError(f"{source} is read with the package datasets, which cannot be imported ({says(e)}): "
                         f"pip install datasets, or pass a .jsonl file.") from e
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Exception as e:
        raise explain(e, source) from e
    finally:
        if shown:  # a model may still be downloaded
            enable_progress_bars()


def mixes_types() -> bool:
    """Whether `datasets` is so new that it can write a column of texts and numbers as JSON, "5" and "\\"a text\\""."""
    from datasets.packaged_modules.json.json import JsonConfig
    return hasattr(JsonConfig, "on_mixed_types")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what raised it, what had raised that."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: Exception, source: str) -> Exception:
    """What was raised on the way to a file or a data set of the hub -> an error whose message is a sentence."""
    from datasets import config, exceptions, get_dataset_config_names
    from huggingface_hub.errors import RepositoryNotFoundError
    if not (named := NAME.fullmatch(source)):
        advice = "mend it, or write a .jsonl file"
        if mixed := MIXED.search(" ".join(map(str, causes(error)))):
            column, one, other, row = mixed.groups()
            return ValueError(f"{source} cannot be read: '{column}' is a {one} at first and a {other} in record "
                              f"{int(row) + 1}. Write one kind in all of them.")
        if source.endswith(".zst") and "zst" in says(error):
            advice = "pip install zstandard, or unpack it with 'zstd -d'"
        if isinstance(error, UnicodeDecodeError) or "codec can't decode" in says(error):
            advice = "save it as UTF-8"
        return ValueError(f"{source} cannot be read ({says(error)}): {advice}.")
    name, part = named.groups()
    if isinstance(error, ValueError):
        with suppress(Exception):  # we were only asking
            parts = get_dataset_config_names(name)
            if part not in parts and (part or len(parts) > 1):
                return ValueError(f"{name} holds {len(parts)} data sets{part and f', none called {part}' or ''}: take "
                                  f"one of {', '.join(f'{name}/{p}' for p in parts[:20])}.")
    missing = f"There is no file or folder {source}, and the hub"
    if isinstance(error, exceptions.DatasetNotFoundError | RepositoryNotFoundError):  # gated ones too
        return OSError(f"{missing} shows you no such data set: check the spelling; if gated or private, accept its "
                       f"terms at https://huggingface.co/datasets/{name} and log in with 'hf auth login' or HF_TOKEN.")
    if isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx"):
        why = "HF_HUB_OFFLINE is set" if config.HF_HUB_OFFLINE else says(error)
        return OSError(f"{missing} cannot be reached for a data set of that name ({why}): check the connection, or "
                       f"pass a .jsonl file.")
    advice = "try again later, or download its files and pass those"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in ("ENOSPC", "EDQUOT", "EFBIG"):
        advice = "free some space, or set HF_HOME to a folder on a larger disk"
    return OSError(f"The hub's {source} cannot be read ({says(error)}): {advice}.")


def says(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:200]
