"""What an evaluation says, as tables: numbers with their intervals, a histogram of lengths, a line for every summary.

A row is one summary (`eval.row_of`). Rows come budget by budget, post by post, sample by sample.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from plumbing.folder import write_file, write_text
from plumbing.significance import interval


def near(row: dict, share: float) -> bool:
    """Whether a summary is so near to the wanted length, or to its budget."""
    if "budget" in row:
        return abs(row["used"] - 1) <= share
    return abs(row["length"] - row["target"]) <= share * row["target"]


def of_length(test: Callable[[int, int], bool]) -> Callable[[dict], bool | None]:
    """A test of a length and its target, which rows with a budget do not have."""
    return lambda row: None if "budget" in row else test(row["length"], row["target"])


# title, what it is of a row (a key or a function), how it is written
FIGURES: tuple = (
    ("reward", "reward", "{:.3f}"),
    ("length, tokens", "length", "{:.1f}"),
    ("on target", of_length(lambda n, target: n == target), "{:.1%}"),
    ("within 2 tokens", of_length(lambda n, target: abs(n - target) <= 2), "{:.1%}"),
    ("within 5%", lambda row: None if "budget" in row else near(row, 0.05), "{:.1%}"),
    ("within 10%", lambda row: None if "budget" in row else near(row, 0.1), "{:.1%}"),
    ("over the target", of_length(lambda n, target: n > target), "{:.1%}"),
    ("over budget", "over", "{:.1%}"),
    ("budget used", "used", "{:.1%}"),
    ("no summary", "missing", "{:.1%}"),
    ("ended by itself", "stopped", "{:.1%}"),
    ("ROUGE-L", "rouge_l", "{:.3f}"),
    ("METEOR", "meteor", "{:.3f}"),
    ("BLEU", "bleu", "{:.3f}"),
    ("invented", "invented", "{:.1%}"),
    ("names and numbers", "names", "{:.1f}"),
    ("copied", "copy_rate", "{:.1%}"),
    ("repeated", "repetition", "{:.1%}"),
    ("a sentence twice", "twice", "{:.1%}"),
    ("judge: faithfulness", "judge/faithfulness", "{:.3f}"),
    ("judge: coverage", "judge/coverage", "{:.3f}"),
    ("judge: conciseness", "judge/conciseness", "{:.3f}"),
    ("judge: clarity", "judge/clarity", "{:.3f}"),
    ("judge: composite", "judge/composite", "{:.3f}"),
    ("judge: composite within 10%", lambda row: row.get("judge/composite") if near(row, 0.1) else None, "{:.3f}"),
    ("judge: pass", "judge/pass", "{:.1%}"),
)
# Numbers of all summaries together: title, key of the result, how it is written.
OF_ALL = (("length, spread", "length_std", "{:.1f}"), ("distinct word pairs", "distinct", "{:.3f}"),
          ("templates", "templated", "{:.1%}"), ("summaries a second", "per_second", "{:.1f}"),
          ("summaries a watt-hour", "per_watt_hour", "{:.0f}"))


def figures_of(rows: Sequence[dict]) -> tuple:
    """FIGURES, and those of these rows' own: parts of the reward that are no metric anyway, and SQUISH@BUDGET."""
    known = {what for _, what, _ in FIGURES}
    own = [(key, key, "{:.3f}") for key in dict.fromkeys(key for row in rows for key in row)
           if key.startswith(("reward/", "SQUISH@")) and key.removeprefix("reward/") not in known - {"length"}]
    return (FIGURES[0], *own, *FIGURES[1:])


def order(rows: Sequence[dict], n_posts: int) -> list[int]:
    """Which post each row is about."""
    samples = sum(row.get("budget") == rows[0].get("budget") for row in rows) // n_posts
    return [i // samples % n_posts for i in range(len(rows))]


def by_post(rows: Sequence[dict], what: str | Callable, n_posts: int) -> np.ndarray:
    """What a figure is for each post, the mean over its budgets and samples: [P], NaN where it has none."""
    get = what if callable(what) else lambda row: row.get(what)
    found: list[list[float]] = [[] for _ in range(n_posts)]
    for row, at in zip(rows, order(rows, n_posts)):
        if (value := get(row)) is not None:
            found[at].append(float(value))
    return np.array([np.mean(values) if values else np.nan for values in found])  # [P]


def figures(result: dict) -> dict[str, tuple[str, str]]:
    """An evaluation -> {title: (number, 95% bootstrap interval over posts or "")}, as text.

    A post's samples count as one: they are no new posts.
    """
    rows, n, cells = result["summaries"], result["n"], {}
    for title, what, form in figures_of(rows):
        values = by_post(rows, what, n)
        values = values[~np.isnan(values)]
        if len(values):
            low, high = interval(values[None]) if len(values) > 1 else (None, None)
            cells[title] = form.format(values.mean()), "" if low is None else f"{form.format(low)}..{form.format(high)}"
        for other, key, form in OF_ALL[:1] if title == "length, tokens" else ():
            cells[other] = form.format(result[key]), ""
    for title, key, form in OF_ALL[1:]:
        if result.get(key) is not None:
            cells[title] = form.format(result[key]), ""
    return cells


def table(columns: dict[str, dict[str, tuple[str, str]]], markdown: bool = False) -> str:
    """{model: figures} -> a row for each figure, a column for each model: for a terminal, or in Markdown."""
    titles = list(dict.fromkeys(title for cells in columns.values() for title in cells))
    lines = [["", *columns]]
    for title in titles:
        found = [cells.get(title, ("-", "")) for cells in columns.values()]
        lines.append([title, *(f"{number} ({spread})" if spread else number for number, spread in found)])
    return in_markdown(lines) if markdown else in_columns(lines)


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, for a terminal: as wide as the widest of each column."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = [["" if cell is None else str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def histogram(rows: Sequence[dict], bars: int = 12, width: int = 40) -> str:
    """How long the summaries are, in the model's own sampled tokens: a bar for each range of lengths.

    >>> print(histogram([{"length": n, "target": 30} for n in (28, 30, 30, 31)], width=4))
        28 |##   1
        29 |     0
        30 |#### 2 <- target
        31 |##   1
    """
    lengths = [row["length"] for row in rows]
    step = -(-(max(lengths) - min(lengths) + 1) // bars)
    targets = {row["target"] for row in rows if "budget" not in row}
    starts = range(min(lengths), max(lengths) + 1, step)
    counts = [sum(start <= n < start + step for n in lengths) for start in starts]
    lines = []
    for start, count in zip(starts, counts):
        label = str(start) if step == 1 else f"{start}-{start + step - 1}"
        mark = " <- target" if any(start <= target < start + step for target in targets) else ""
        lines.append(f"{label:>6} |{'#' * round(width * count / max(counts)):{width}} {count}{mark}")
    return "\n".join(lines)


def file_name(model: str) -> str:
    """A model's name as that of a file.

    >>> file_name("runs/tiny-1"), file_name("../other/model/")
    ('runs_tiny-1', 'other_model')
    """
    return re.sub(r"[^\w.-]+", "_", model).strip("._") or "model"


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """A line of JSON for every summary."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_picture(path: Path, figure) -> None:
    write_file(path, lambda part: figure.savefig(part, dpi=110, format="png"))
