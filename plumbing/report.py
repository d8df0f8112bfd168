"""report.html: one page about a run, made of its own files, that needs no network.

It is written anew at every evaluation and whenever a group has been kept, so it can be reloaded while the run goes on;
and once more when the run ends, is stopped or dies. The page itself is plumbing/report.html. All that is in it of a run
goes in as JSON: no text of a model or of a post is ever read as HTML.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from plumbing.folder import read_json, write_text
from plumbing.log import ANY_LENGTH, describe, few, moment, read_rows, say

PAGE = Path(__file__).with_name("report.html")
READ_YOUR_RUN = Path(__file__).parent.parent / "docs" / "read-your-run.md"
FILES = ("metrics", "eval", "samples", "groups")
# What bounds the page: about 2 MB, whatever the run.
POINTS, CHARS, EVALUATIONS = 1000, 4000, 6


def write_report(folder: Path, end: str = "") -> Path | None:
    """A run's files -> its report.html; `end` says how the run ended. None where there is nothing to tell.

    Hours of training do not fail because a page does: then a sentence says so.
    """
    try:
        logs = {name: read_rows(folder / f"{name}.jsonl") for name in FILES}
        if not logs["metrics"][0] and not logs["eval"][0]:
            return None
        # Inside a script element, only "</script" and "<!--" mean anything to HTML.
        data = as_json(report(folder, logs, end)).replace("<", "\\u003c")
        page = PAGE.read_text(encoding="utf-8").replace("@DATA@", data)
        write_text(folder / "report.html", page.encode("utf-8", "replace").decode("utf-8"))
        return folder / "report.html"
    except Exception as e:  # logs of any age and damage, a full disk: it can fail in many ways
        say(f"report.html could not be written ({(str(e) or type(e).__name__).splitlines()[0]}); all else is in "
            f"{folder}.")
        return None


@contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """Around a run: its report, however it ends. A run that was refused, and so wrote nothing, leaves none."""
    def state():
        return [path.stat().st_mtime_ns if path.exists() else None for path in paths]

    paths = [folder / "config.json", *(folder / f"{name}.jsonl" for name in FILES)]
    before, end = state(), ""
    try:
        yield
    except BaseException as e:  # also the second Ctrl-C
        end = f"{type(e).__name__}: {e}"[:CHARS]
        raise
    finally:
        if state() != before:
            write_report(folder, end)


# --- what the page gets -----------------------------------------------------------------------------------------------


def report(folder: Path, logs: dict[str, tuple[list[dict], list[int]]], end: str) -> dict:
    """All that the page shows, as plain values."""
    rows, evals, samples, groups = (logs[name][0] for name in FILES)
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # the logs say the rest
        config = {}
    rows = list({row["step"]: row for row in sorted(rows, key=lambda row: row["step"])}.values())
    sections, notes = read_notes()
    every, steps, curves = thin(rows)
    known = [name for names in sections.values() for name in names]
    own = [name for name in curves if kind_of(name) not in known]  # of a forker's log
    chosen = {title: [name for note in names for name in curves if kind_of(name) == note]
              for title, names in sections.items()} | ({"Other numbers": own} if own else {})
    stages = stages_of(config)
    total = stages[-1]["end"] if stages else None
    last = max((row["step"] for row in (*rows, *evals)), default=0)
    return {
        "name": folder.name, "config": config, "stages": stages, "total": total, "last": last, "end": end,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "damage": [f"{name}.jsonl: {few('line', broken)} could not be read" for name, (_, broken) in logs.items()
                   if broken],
        "target": None if any("@" in name for row in evals for name in row) else config.get("target"),
        "every": every, "steps": steps, "curves": curves, "sections": chosen, "notes": notes,
        "healthy": read_list("In one minute"),
        "evaluations": [{**row, "moment": moment(row["stage"])} for row in ends(evals)],
        "sentences": [sentence(row, config) for row in ends(evals)],
        "samples": samples_of(samples), "groups": groups[-24:]}


def kind_of(name: str) -> str:
    return "reward/NAME" if name.startswith("reward/") else name


def stages_of(config: dict) -> list[dict]:
    """The stages with their first step, counted from 1, and their last. None of what cannot be read."""
    found, first = [], 1
    for number, text in enumerate(config.get("stages", []), 1):
        expression, _, steps = str(text).rpartition(":")
        if not steps.isdigit():
            return []
        found.append({"number": number, "reward": expression, "first": first, "end": first + int(steps) - 1})
        first += int(steps)
    return found


def sentence(row: dict, config: dict) -> str:
    """An evaluation as the screen says it; nothing where a line lacks its numbers."""
    paid = {name.partition("@")[0].removeprefix("reward/") for name in row if name.startswith("reward/")}
    try:
        return f"{moment(row['stage'])}: {describe(row, sized=bool(paid - ANY_LENGTH))}"
    except (KeyError, TypeError, ValueError):
        return ""


def thin(rows: list[dict]) -> tuple[int, list[int], dict[str, list]]:
    """-> (how many steps a point stands for, the last step of each, {name: a value for each}).

    A point is the mean over its steps; of the largest gap, the largest. What a step did not log is None.
    """
    every = max(1, math.ceil(len(rows) / POINTS))
    parts = [rows[i:i + every] for i in range(0, len(rows), every)]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "stage", "seconds"))
    curves = {name: [mean([row.get(name) for row in part], name) for part in parts] for name in names}
    curves = {name: values for name, values in curves.items() if any(value is not None for value in values)}
    return every, [part[-1]["step"] for part in parts], curves


def mean(values: list, name: str) -> float | None:
    values = [value for value in values if is_number(value)]
    value = (max(values) if name == "logp_gap" else sum(values) / len(values)) if values else None
    return value if value is None else float(f"{value:.4g}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ends(rows: list) -> list:
    """The first of many and the last ones."""
    return rows if len(rows) <= EVALUATIONS else [rows[0], *rows[1 - EVALUATIONS:]]


def samples_of(samples: list[dict]) -> list[dict]:
    """[{document, reference, summaries: [{moment, summary, scores}]}], by post."""
    posts: dict[tuple, dict] = {}
    for row in samples:
        key = (row.get("id"), row.get("document"), row.get("budget"))
        post = posts.setdefault(key, {"document": cut(row.get("document")), "reference": cut(row.get("reference")),
                                      "budget": row.get("budget"), "summaries": []})
        scores = {name: value for name, value in row.items()
                  if is_number(value) and name not in ("step", "stage", "id", "budget")}
        post["summaries"].append({"moment": moment(row["stage"]), "summary": cut(row.get("summary")),
                                  "scores": scores, "length": row.get("length")})
    for post in posts.values():
        post["summaries"] = ends(post["summaries"])
    return list(posts.values())[:10]


def cut(text: object) -> str:
    text = str(text or "")
    return text if len(text) <= CHARS else text[:CHARS] + " [..]"


def as_json(value: object) -> str:
    def finite(value):
        if isinstance(value, dict):
            return {name: finite(one) for name, one in value.items()}
        if isinstance(value, list):
            return list(map(finite, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    settings: dict = {"ensure_ascii": False, "separators": (",", ":")}
    try:
        return json.dumps(value, allow_nan=False, **settings)
    except ValueError:  # NaN and infinity, which JSON does not know
        return json.dumps(finite(value), **settings)


# --- what docs/read-your-run.md says ----------------------------------------------------------------------------------


def read_notes() -> tuple[dict[str, list[str]], dict[str, dict]]:
    """-> ({heading: names of numbers}, {name: {"what", "healthy", "sick", "do"}}), from the page's own tables.

    One truth: the report says to each curve what the page says. It says nothing where the page is not there.
    """
    sections: dict[str, list[str]] = {}
    notes: dict[str, dict] = {}
    for file in ("metrics.jsonl", "eval.jsonl"):
        for part in re.split(r"^### ", section_of(file), flags=re.M):
            heading = part.partition("\n")[0]
            for row in re.findall(r"^\| (`.*) \|$", part, re.M):
                cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]
                names = [name for name in re.findall(r"`([^`]+)`", cells[0]) if name not in ("step", "stage", "n")]
                for name in names:
                    notes.setdefault(name, dict(zip(("what", "healthy", "sick", "do"), map(plain, cells[1:]))))
                if file == "metrics.jsonl":
                    sections.setdefault(heading, []).extend(names)
    return {title: names for title, names in sections.items() if names}, notes


def read_list(title: str) -> list[str]:
    return [plain(" ".join(item.split())) for item in re.findall(r"^- (.*(?:\n  .*)*)", section_of(title), re.M)]


def section_of(title: str) -> str:
    text = READ_YOUR_RUN.read_text(encoding="utf-8") if READ_YOUR_RUN.exists() else ""
    return next((part for part in re.split(r"^## ", text, flags=re.M) if part.startswith(f"{title}\n")), "")


def plain(text: str) -> str:
    """Markdown without its links; the page sets what stands between backticks as code."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
