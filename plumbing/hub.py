"""Data sets of the Hugging Face hub, without a package for them: pages of rows, or gzipped JSON lines that stream in.

What was fetched is kept as one .jsonl.gz file in CRISP_CACHE, $XDG_CACHE_HOME/crisp or ~/.cache/crisp, and never asked
for again; it is written beside its place and renamed, so that a file which is there is whole. Delete it to fetch anew.
"""

import gzip
import io
import json
import os
import re
import sys
import time
import uuid
import zlib
from collections.abc import Callable
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from urllib.parse import urlencode

from plumbing.folder import write_file

NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(/[\w.-]+)?(?<!\.jsonl)(?<!\.gz)")  # owner/name or owner/name/config
PAGE = 100  # rows; the most that one request may ask for
PIECE = 1 << 22  # bytes of a stream that one request asks for
WAITS = (1, 2, 4, 8, 16)  # seconds before each new try
VALIDATION = ("validation", "val", "valid", "dev")  # people write all of these and mean one

# --- your experiment starts here: a data set of gzipped JSON lines, file name and number of files of each split ---
STREAMS = {
    "allenai/c4/realnewslike": {"train": ("c4-train.{:05d}-of-00512.json.gz", 512),
                                "validation": ("c4-validation.{:05d}-of-00001.json.gz", 1)},
}


def spellings(split: str) -> list[str]:
    """The names under which a split may be found, the one that was asked for first.

    >>> spellings("val"), spellings("test")
    (['val', 'validation', 'valid', 'dev'], ['test'])
    """
    return [split, *(name for name in VALIDATION if split in VALIDATION and name != split)]


def fetch(source: str, split: str, limit: int, counts: Callable[[dict], bool], note: str = "") -> Path:
    """`owner/name` or `owner/name/config` -> the local .jsonl.gz with its rows, fetched where it is not there yet.

    limit: stop when so many rows count (0: the whole split). `counts(row)` says which do, and `note` says it in the
    file's name. Raises FileNotFoundError for a split that is not there, else OSError or ValueError, with a sentence.
    """
    folder = Path(os.environ.get("CRISP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "crisp"))
    folder = folder.expanduser()
    splits = STREAMS.get(source) or list_splits(source, folder / f"{source.replace('/', '--')}.json")
    found = next((name for name in spellings(split) if name in splits), None)
    if found is None:
        raise FileNotFoundError(f"{source} has no split '{split}': it has {', '.join(splits)}. Take one of "
                                f"those, or hold out other posts with --eval-data.")
    stem = f"{source}/{found}".replace("/", "--")
    path = folder / f"{stem}{f'-first-{limit}' if limit else ''}{note}.jsonl.gz"
    for kept in (folder / f"{stem}.jsonl.gz", path):  # the whole split serves every limit
        if kept.exists():
            return kept
    if source in STREAMS:
        rows = stream(source, *splits[found], limit, counts)
    else:
        rows = pages(source, splits[found], found, limit, counts, path.with_name(path.name + ".pages"))

    def write(part: Path) -> None:
        with gzip.open(part, "wt", encoding="utf-8", compresslevel=6) as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)

    place(path, write)
    path.with_name(path.name + ".pages").unlink(missing_ok=True)
    return path


def place(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a name of our own and rename: another run may be fetching the same."""
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    write_file(mine, write)
    os.replace(mine, path)


# --- pages of rows ----------------------------------------------------------------------------------------------------


def rows_api(source: str, endpoint: str, **query) -> dict:
    """One answer of the hub's rows API, https://huggingface.co/docs/dataset-viewer."""
    base = os.environ.get("CRISP_DATASETS_SERVER", "https://datasets-server.huggingface.co")
    answer = get(source, f"{base}/{endpoint}?{urlencode(query)}")
    try:
        value = answer.json()
    except ValueError as e:
        raise OSError(f"{base} answers for {source} with something that is not JSON ({e}): is a proxy or a login page "
                      f"in between?") from e
    if not isinstance(value, dict):
        raise OSError(f"{base} answers for {source} with {str(value)[:60]!r}, which is no answer: try again later.")
    return value


def list_splits(source: str, path: Path) -> dict[str, str]:
    """{split: config} of the config that `source` names, or of the only or default one; kept in `path`."""
    dataset, config = "/".join(source.split("/")[:2]), source.split("/")[2:]
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = [(s["config"], s["split"]) for s in rows_api(source, "splits", dataset=dataset).get("splits", [])]
    configs = list(dict.fromkeys(c for c, _ in found))
    config = config or [c for c in configs if len(configs) == 1 or c == "default"]
    if not config or config[0] not in configs:
        raise ValueError(f"{dataset} is {len(configs)} data sets: take one of "
                         f"{', '.join(f'{dataset}/{c}' for c in configs[:20]) or 'none, it has no rows'}.")
    splits = {split: c for c, split in found if c == config[0]}
    place(path, lambda part: part.write_text(json.dumps(splits), encoding="utf-8"))
    return splits


def pages(source: str, config: str, split: str, limit: int, counts, kept: Path) -> list[dict]:
    """The rows of a split from its first on, until `limit` of them count or it ends.

    Each page is a line of `kept`, so that a fetch which was broken off goes on where it stopped.
    """
    from tqdm import tqdm
    done, rows, n = read_pages(kept), [], 0
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(kept, "a", encoding="utf-8") as f, tqdm(desc=f"{source} {split}", unit=" posts", disable=None) as bar:
            while True:
                page = done.get(len(rows))
                if page is None:
                    page = read_page(source, config, split, len(rows))
                    f.write("\n" + json.dumps(page) + "\n")  # on a line of its own, even after one that was cut
                    f.flush()
                rows += page["rows"]
                n += sum(map(counts, page["rows"]))
                bar.total = limit or page["total"]
                bar.update(n - bar.n if limit else len(page["rows"]))
                if len(rows) >= page["total"] or limit and n >= limit:
                    return rows
    except OSError as e:
        if e.errno is None:  # the network's, and a sentence
            raise
        raise OSError(f"Could not write {kept} ({e.strerror}): free some space, or set CRISP_CACHE to a folder on a "
                      f"larger disk.") from e


def read_pages(kept: Path) -> dict[int, dict]:
    """Pages of an earlier fetch, by their first row; a line that a kill has cut is no page."""
    done = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []:
        try:
            page = json.loads(line)
            done[page["offset"]] = page
        except (ValueError, KeyError, TypeError):
            continue
    return done


def read_page(source: str, config: str, split: str, offset: int) -> dict:
    answer = rows_api(source, "rows", dataset="/".join(source.split("/")[:2]), config=config, split=split,
                      offset=offset, length=PAGE)
    rows, total = answer.get("rows"), answer.get("num_rows_total")
    if not isinstance(total, int) or not rows and total > offset or total == 0:
        raise OSError(f"The hub gives no rows of {source} {split} from row {offset} on: try again later.")
    cut = [row.get("row_idx") for row in rows if row.get("truncated_cells")]
    if cut:
        raise ValueError(f"The hub cuts row {cut[0]} of {source} {split} short: download the data set's own files and "
                         f"pass a .jsonl file.")
    return {"offset": offset, "total": total, "rows": [row["row"] for row in rows]}


# --- streams ----------------------------------------------------------------------------------------------------------


class Remote(io.RawIOBase):
    """A file of the hub, read from its beginning, a piece at a time: only what is read is downloaded, and a piece that
    breaks off is asked for again."""

    def __init__(self, source: str, url: str):
        self.source, self.url, self.at, self.size = source, url, 0, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self.at == self.size:
            return 0
        last = self.at + len(buffer) - 1
        answer = get(self.source, self.url, {"Range": f"bytes={self.at}-{last}", "Accept-Encoding": "identity"})
        piece, span = answer.content, re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not span or int(span[1]) != self.at or not 0 < len(piece) <= len(buffer):
            raise OSError(f"{self.url} does not come in pieces: is a proxy in between?")
        buffer[:len(piece)] = piece
        self.at, self.size = self.at + len(piece), int(span[2])
        return len(piece)


def stream(source: str, name: str, n_files: int, limit: int, counts) -> list[dict]:
    """Rows that count, file after file, until there are `limit` of them."""
    from tqdm import tqdm
    if not limit and n_files > 1:
        raise ValueError(f"{source} is {n_files} large files: say how many posts you want, such as --max-posts 1000.")
    dataset, config = source.rsplit("/", 1)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    rows: list[dict] = []
    with tqdm(desc=source, total=limit or None, unit=" posts", disable=None) as bar:
        for i in range(n_files):
            url = f"{endpoint}/datasets/{dataset}/resolve/main/{config}/{name.format(i)}"
            try:
                with gzip.open(io.BufferedReader(Remote(source, url), PIECE), "rt", encoding="utf-8") as lines:
                    for line in lines:
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError(f"a line of it is {line[:20]!r}")
                        if counts(row):
                            rows.append(row)
                            bar.update()
                        if limit and len(rows) == limit:
                            return rows
            except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as e:
                raise OSError(f"{url} is not whole ({e}): try again later.") from e
    return rows


# --- the network ------------------------------------------------------------------------------------------------------


def get(source: str, url: str, headers: dict | None = None):
    """The hub's answer to a GET. A busy hub (429, 5xx) and a dropped connection are asked again, as late as they say.

    The session is huggingface_hub's: its token, proxies, certificates and HF_HUB_OFFLINE hold here too.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, get_session
    dataset = "/".join(source.split("/")[:2])
    for wait in (*WAITS, None):
        try:
            answer = get_session().get(url, headers=build_hf_headers() | (headers or {}), timeout=30)
        except Exception as e:  # requests' or httpx's, whichever huggingface_hub has
            says = (str(e).strip() or type(e).__name__).splitlines()[0]
            if wait is None or wait > 4 or isinstance(e, OfflineModeIsEnabled):
                raise OSError(f"There is no file or folder {source}, and the hub cannot be reached for a data set of "
                              f"that name ({says}): check the connection, or pass a .jsonl file.") from e
        else:
            status = answer.status_code
            if status < 400:
                return answer
            says = f"it answers {status}"
            if status in (401, 403, 404):
                raise OSError(f"There is no file or folder {source}, and the hub shows you no such data set "
                              f"({status}): check the spelling; if it is gated or private, accept its terms at "
                              f"https://huggingface.co/datasets/{dataset} and log in with 'hf auth login' or HF_TOKEN.")
            asked = retry_after(answer.headers.get("Retry-After"))
            if wait is None or asked > 600 or status not in (408, 429, 500, 502, 503, 504):
                raise OSError(f"The hub does not give {source} ({says}: {' '.join(answer.text.split())[:120]}): try "
                              f"again later; what was fetched is kept.")
            wait = max(wait, asked)
        print(f"{source}: {says}; trying again in {wait:.0f} s.", file=sys.stderr, flush=True)
        time.sleep(wait)


def retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header asks for, given as seconds or as a date; 0 where it says nothing.

    >>> retry_after("7"), retry_after(None), retry_after("soon")
    (7.0, 0.0, 0.0)
    """
    try:
        return float(value or 0)
    except ValueError:
        pass
    date = parsedate_tz(value)
    return max(0.0, mktime_tz(date) - time.time()) if date else 0.0
