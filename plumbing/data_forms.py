"""Files of posts that are not what their name or their fields say: what they are, and what to do."""

import re
from pathlib import Path
from typing import NoReturn

from plumbing.command import python, quoted

FORMS = {  # what other files begin with
    b"\xff\xfe": "it is UTF-16: save it as UTF-8", b"\xfe\xff": "it is UTF-16: save it as UTF-8",
    b"PAR1": "it is Parquet: call it .parquet", b"\x28\xb5\x2f\xfd": "it is zst: call it .jsonl.zst",
    b"\x1f\x8b": "it is gzip: call it .jsonl.gz", b"PK": "it is a zip or a spreadsheet: unpack it, or save it as .csv",
    b"version https://git-lfs": "it is a Git LFS pointer, and not the file: fetch that with 'git lfs pull'",
    b"<!DOCTYPE": "it is a web page: download the file itself", b"<html": "it is a web page: download the file itself"}
INDEX = "__index_level_0__"  # where pandas puts the first column of a table with more columns than names


def refuse_shape(path: Path, holds: str, code: str) -> NoReturn:
    """ValueError: what the file holds, and the line of Python that makes posts of it (which reads plain .json only)."""
    if path.suffix != ".json":
        raise ValueError(f"{path} holds {holds}: unpack it, and you are told the command.")
    raise ValueError(f'{path} holds {holds}: {quoted([python()])} -c "import {code}" makes {path.stem}-posts.json, '
                     f'which is read.')


def other_form(path: Path) -> str:
    """What a file is that begins like no file of its name, and what to do; "" where it may be what its name says."""
    with open(path, "rb") as file:
        start = file.read(40)
    if not start:
        return "it is empty: copy it again"
    if path.suffix == ".gz" and not start.startswith(b"\x1f\x8b") and b"git-lfs" not in start:
        return f"it is not gzip: call it {path.stem}"
    return next((advice for mark, advice in FORMS.items() if start.startswith(mark)
                 and not path.name.endswith((advice.split()[-1], ".gz" if "gzip" in advice else ".zst"))), "")


def looks_like(path: Path) -> str:
    """What a file that is no JSON lines seems to be, and what to do; "" where nothing is known."""
    if (other := other_form(path)) or path.suffix == ".gz":
        return other
    with open(path, "rb") as file:
        start = file.read(4000)
    lines = [line.strip() for line in start.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if lines and lines[0].startswith(b"["):
        return "it looks like a JSON array, which is read from a file that is called .json"
    if lines and lines[0].startswith(b"{") and lines[0].endswith(b","):
        return "there is a comma after the object: delete it at the end of each line"
    if lines and lines[0] == b"{":
        return "it looks like JSON over several lines, which is read from a file that is called .json"
    if lines and not lines[0].startswith(b"{") and b"\t" in lines[0]:
        return "it looks like a table with tabs: save it as a .csv with commas"
    if lines and not lines[0].startswith(b"{") and b"," in lines[0]:
        return "it looks like CSV, which is read from a file that is called .csv"
    return ""


def check_columns(row: dict, where: str) -> None:
    """Refuse a row of a table whose texts have commas, but no quotes around them: its columns would be shifted.

    R leaves the column of its row numbers without a name, and they are no text."""
    first = row.pop(INDEX, None)
    if first is not None and not first.strip().isdigit() and not parted_by(row):
        raise ValueError(f"{where} has more columns than the first line has names: put a text with commas in it into "
                         f"quotes, \"Tom, in Leeds\", or write a .jsonl file.")


def parted_by(row: dict) -> str:
    """What parts the columns of a table that seems to have one; "" where nothing else than commas does."""
    apart = re.search(r"[;\t|]", "".join(row)) if len(row) == 1 else None
    return apart[0] if apart else ""
