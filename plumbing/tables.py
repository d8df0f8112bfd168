"""Tables of an experiment: means over seeds and posts, their intervals, and daggers where a configuration differs.

    95% intervals   a bootstrap over seeds and posts: both are drawn again with replacement, and every seed gets the
                    same posts.
    †               a sign-flip permutation test, paired by post, of the mean over seeds against that of the baseline,
                    with Holm's correction over all comparisons of the table, is below 0.05.

The test is about these trained models and other posts. What other seeds would change shows in the intervals. A test
over five seeds alone could show nothing at 0.05: all five on one side has p = 2/32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from plumbing.significance import holm, interval, sign_flip


class Column(NamedTuple):
    """A column of a table: which values it shows, and how."""

    title: str
    form: str = "{:.3f}"
    tested: bool = True  # against the baseline
    spread: bool = False  # the standard deviation over posts, within a seed, in place of the mean


def table(measured: dict[str, dict[str, np.ndarray]], columns: dict[str, Column], baseline: str,
          untested: Sequence[str] = ("untrained",)) -> str:
    """Markdown, a row a configuration: {configuration: {column: values [S seeds, P posts]}}, best with equal posts.

    A column that a configuration lacks, or that is NaN, is a dash. `spread` columns are "NAME spread" for "NAME".
    """
    pairs = [(name, column) for name in measured if name not in (baseline, *untested)
             for column, how in columns.items() if how.tested and column in measured[name]]
    p = holm([sign_flip(measured[name][column].mean(0) - measured[baseline][column].mean(0)) for name, column in pairs])
    marked = {pair for pair, value in zip(pairs, p) if value < 0.05}
    lines = [f"| | seeds | {' | '.join(how.title for how in columns.values())} |", "| --- " * (len(columns) + 2) + "|"]
    for name, values in measured.items():
        cells = [cell(values.get(column.removesuffix(" spread")), how, (name, column) in marked)
                 for column, how in columns.items()]
        lines.append(f"| {name} | {max(map(len, values.values()))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(values: np.ndarray | None, how: Column, mark: bool) -> str:
    """"0.456† (0.44..0.47)": mean, mark, interval."""
    if values is None or np.isnan(values).any():
        return "-"

    def statistic(v: np.ndarray) -> float:
        return v.std(1).mean() if how.spread else v.mean()

    mean, low, high = (how.form.format(x) for x in (statistic(values), *interval(values, statistic)))
    return f"{mean}{'†' if mark else ''} ({low.removesuffix('%')}..{high.removesuffix('%')})"
