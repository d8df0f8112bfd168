"""Are two runs different? Their settings, their curves in one picture, and paired tests over the posts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from plumbing.curves import PANELS, new_figure
from plumbing.folder import write_text
from plumbing.log import read_lines
from plumbing.results import by_post, figures_of, in_columns, in_markdown, order, write_picture
from plumbing.significance import holm, interval, sign_flip

NO_SETTINGS = {"run", "made_of"}  # of config.json: two runs differ in these by being two


def refuse_unlike(found: dict[str, tuple[Sequence, str]]) -> None:
    """{model: (posts, tokenizer)} -> ValueError where they cannot be compared post by post."""
    (first, (posts, tokenizer)), *others = found.items()
    for name, (other_posts, other_tokenizer) in others:
        if list(posts) != list(other_posts):
            at = next((i for i, (a, b) in enumerate(zip(posts, other_posts), 1) if a != b), None)
            where = f"the first that differs is number {at}" if at else "one has more than the other"
            raise ValueError(f"{first} and {name} are measured on different posts ({len(posts)} and "
                             f"{len(other_posts)}; {where}), and a paired test needs the same: name them with --data "
                             f"and --split.")
        if tokenizer != other_tokenizer:
            raise ValueError(f"{first} and {name} have different tokenizers, so a length in tokens is not the same "
                             f"length: measure them side by side with python eval.py {first} {name}.")


def say_comparison(found: dict, runs: dict[str, dict], out: Path,
                   duel: Callable[[list[tuple[str, str, str]]], list[dict]] | None) -> None:
    """Settings, tests and curves on the screen and in `out`. `found`: {model: what eval.py measured of it}.

    `runs`: {model: its config.json, {} where it is no run}. `duel`: asks a judge for the better of two summaries.
    """
    refuse_unlike({name: (one.posts, "") for name, one in found.items()})  # as they were cut for each
    skip, notes = not_comparable(found)
    tests = paired(found, skip)
    parts = [("Settings that differ", settings(runs)), ("Paired tests over the posts", lines_of(tests, len(found) > 2))]
    if tests:
        first, *others = found
        notes.append(f"First: {first}. Other: {', '.join(others)}. The difference is other - first, a mean over posts "
                     f"with its 95% bootstrap interval. p is that of a permutation test, which turns the signs of the "
                     f"posts' differences. Holm: corrected for the {len(tests)} tests of this table; * below 0.05. "
                     f"What is equal on every post is not tested. The tests speak about other posts, not about other "
                     f"seeds.")
    if duel:
        parts.append(("The better of two summaries, says the judge", duels(found, duel)))
    drawn = draw([name for name in found if read_lines(Path(name) / "metrics.jsonl")], out / "curves.png")
    for kind in (in_columns, in_markdown):
        mark = "## " if kind is in_markdown else ""
        said = [f"{mark}{title}\n\n{kind(lines) if len(lines) > 1 else 'None.'}" for title, lines in parts]
        if kind is in_markdown:
            write_text(out / "compare.md", "\n\n".join([*said, *notes]) + "\n")
        else:
            print("\n" + "\n\n".join([*said, *notes]))
    print(f"\nThe comparison is in {out / 'compare.md'}"
          + (f", the curves are in {out / 'curves.png'}." if drawn else "; there are no curves to draw."))


def settings(runs: dict[str, dict]) -> list[list[str]]:
    """The settings in which config.json differs, a line each; those of a model that is no run are unknown."""
    names = [name for name in dict.fromkeys(key for run in runs.values() for key in run) if name not in NO_SETTINGS]

    def said(run: dict, name: str) -> str:
        value = run.get(name, "-")
        return " ".join(map(str, value)) if isinstance(value, list) else str(value) if value != "" else "(empty)"

    lines = [[name, *(said(run, name) for run in runs.values())] for name in names]
    return [["", *runs], *(line for line in lines if len(set(line[1:])) > 1)]


def not_comparable(found: dict) -> tuple[set[str], list[str]]:
    """-> (beginnings of the titles that mean something else in each run; why, in sentences)."""
    skip, notes = set(), []
    sums = {name: one.config.stages[-1].rpartition(":")[0].replace(" ", "") for name, one in found.items()}
    if len(set(sums.values())) > 1:
        skip.add("reward")
        notes.append("The rewards of " + ", ".join(f"{name} ({text})" for name, text in sums.items())
                     + " are different sums: they are not compared, and their parts are.")
    if len({one.config.target for one in found.values()}) > 1:
        notes.append("The targets differ: what is on target is so by each run's own.")
    rows = {name: [row for r in one.results.values() for row in r["summaries"]] for name, one in found.items()}
    how = {name: sorted({text for row in mine if "judge" in row for text in row["judge"]["how"]})
           for name, mine in rows.items()}
    if len({tuple(ways) for ways in how.values()}) > 1:
        skip.add("judge")
        notes.append("The judge's scores were made in different ways, and are not compared: " + "; ".join(
            f"{name} {' and '.join(ways) or 'none'}" for name, ways in how.items()) + ".")
    return skip, notes


def paired(found: dict, skip: set[str]) -> list[dict]:
    """A test of each figure, between the first model and each other: over the posts for which both have it."""
    (first, base), *others = found.items()
    tests = []
    for name, other in others:
        for kind, r in other.results.items():
            ours, theirs = base.results[kind]["summaries"], r["summaries"]
            for title, what, form in figures_of([*ours, *theirs]):
                a, b = (by_post(rows, what, len(base.posts)) for rows in (ours, theirs))  # [P], [P]
                there = ~np.isnan(a) & ~np.isnan(b)  # [P]
                difference = (b - a)[there]
                if title in skip or title.startswith("judge") and "judge" in skip or not difference.any():
                    continue
                low, high = interval(difference[None])
                tests.append({"title": title + kind, "name": name, "form": form, "first": a[there].mean(),
                              "other": b[there].mean(), "difference": difference.mean(), "low": low, "high": high,
                              "p": sign_flip(difference), "n": len(difference)})
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["holm"] = p
    return tests


def lines_of(tests: Sequence[dict], named: bool) -> list[list[str]]:
    """Tests as lines of a table; `named`: each says which model is the other."""
    lines = [["", "first", "other", "difference (95%)", "p", "Holm", "posts"]]
    for test in tests:
        plus = test["form"].replace("{:", "{:+").format
        lines.append([test["title"] + (f": {test['name']}" if named else ""), test["form"].format(test["first"]),
                      test["form"].format(test["other"]),
                      f"{plus(test['difference'])} ({plus(test['low'])}..{plus(test['high'])})",
                      f"{test['p']:.4f}", f"{test['holm']:.4f}" + "*" * (test["holm"] < 0.05), str(test["n"])])
    return lines


def duels(found: dict, duel: Callable[[list[tuple[str, str, str]]], list[dict]]) -> list[list[str]]:
    """How often the judge prefers the other's greedy summary to the first's, a verdict that the swap turns being half.

    And the share of verdicts that it turns: with a half of them turned, the judge looks at the place."""
    (first, base), *others = found.items()
    lines = [["", f"wins against {first} (95%)", "turned by the swap", "without a verdict"]]
    ours = base.results[""]["summaries"]
    documents = [base.posts[at].document for at in order(ours, len(base.posts))]
    for name, other in others:
        rows = duel([(document, b["summary"], a["summary"])
                     for document, a, b in zip(documents, ours, other.results[""]["summaries"])])
        wins = np.array([row["wins"] for row in rows if row["wins"] is not None])
        turned = [row["turned"] for row in rows if row["turned"] is not None]
        low, high = interval(wins[None]) if len(wins) else (np.nan, np.nan)
        lines.append([name, f"{wins.mean():.1%} ({low:.1%}..{high:.1%})" if len(wins) else "-",
                      f"{np.mean(turned):.1%}" if turned else "-", str(len(rows) - len(wins))])
    return lines


def draw(names: Sequence[str], path: Path) -> bool:
    """The runs' curves over one another. Lines are means over nine steps of a stage, dots are evaluations.

    False: there are none."""
    rows, evals = ({name: read_lines(Path(name) / f"{kind}.jsonl") for name in names} for kind in ("metrics", "eval"))
    logged = list(dict.fromkeys(key for mine in rows.values() for row in mine for key in row))
    parts = [(key, key.removeprefix("reward/")) for key in logged if key.startswith("reward/")]
    panels = [("reward", "reward"), *parts, *(panel for panel in PANELS if panel[0] in logged)]
    if not logged:
        return False
    figure, axes = new_figure(-(-len(panels) // 3))
    for ax, (key, title) in zip(axes.flat, panels):
        for i, name in enumerate(names):
            for stage in dict.fromkeys(row["stage"] for row in rows[name]):  # a stage's reward is another sum
                points = [(row["step"], row[key]) for row in rows[name]
                          if row.get(key) is not None and row["stage"] == stage]
                x, y = zip(*points) if points else ((), ())
                k = min(9, len(y))
                if k:
                    ax.plot(x[k - 1:], np.convolve(y, np.ones(k) / k, "valid"), color=f"C{i}", lw=1.5,
                            label=name if stage == rows[name][0]["stage"] else None)
            some = [(row["step"], row[key]) for row in evals[name] if row.get(key) is not None]
            if some:
                ax.plot(*zip(*some), "o", color=f"C{i}", ms=4)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.2)
    axes.flat[0].legend(fontsize=8)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    write_picture(path, figure)
    return True
