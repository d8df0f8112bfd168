"""Learning curves of a run, from its own logs: runs/NAME/curves.png."""

import os
from pathlib import Path

import numpy as np

from plumbing.command import to_resume
from plumbing.folder import write_file
from plumbing.log import read_lines, say

# Panels after the reward and its parts: key of metrics.jsonl, title. A key that the run does not log has no panel.
PANELS = (("length", "length in tokens"), ("within_10pct", "share within ±10% of the target"),
          ("over", "share over budget"), ("kl", "KL to the reference model (nats a token)"),
          ("entropy", "entropy (nats a token)"))


def draw_curves(folder: Path, target: int, stage_ends: list[int]) -> None:
    """metrics.jsonl and eval.jsonl -> curves.png. Hours of training do not fail because a picture does."""
    try:
        draw(folder, target, stage_ends)
    except Exception as e:  # no matplotlib, a broken one, no room: a picture can fail in many ways
        why = (str(e) or type(e).__name__).splitlines()[0]
        say(f"The curves could not be drawn ({why}); all else is in {folder}. Once that is mended, "
            f"{to_resume(folder)} draws them.")


def new_figure(n_rows: int):
    """A figure that is a file and no window, and its axes, n_rows x 3."""
    chosen = os.environ.pop("MPLBACKEND", None)  # a notebook's: matplotlib would look for it, and it may not be here
    try:
        from matplotlib.figure import Figure
    finally:
        os.environ |= {"MPLBACKEND": chosen} if chosen is not None else {}
    figure = Figure(figsize=(13, 3.25 * n_rows), layout="constrained")
    return figure, figure.subplots(n_rows, 3, squeeze=False)


def draw(folder: Path, target: int, stage_ends: list[int]) -> None:
    """Faint lines are steps, thick ones means over nine, dots evaluations.

    A panel for the reward, for each of its parts, and for what PANELS names.
    """
    rows, evals = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")
    logged = list(dict.fromkeys(name for row in rows for name in row))
    parts = [name for name in logged if name.startswith("reward/") and name != "reward/length"]
    panels = [("reward", "reward"), *((name, name.removeprefix("reward/")) for name in parts),
              *(panel for panel in PANELS if panel[0] in logged)]
    n_rows = -(-len(panels) // 3)
    figure, axes = new_figure(n_rows)
    for ax, (name, title) in zip(axes.flat, panels):
        draw_panel(ax, name, rows, evals)
        ax.set_title(title, fontsize=10)
        if name == "length" and "within_10pct" in logged:
            ax.set_title(f"{title} (target {target})", fontsize=10)
            ax.axhspan(0.9 * target, 1.1 * target, color="C2", alpha=0.2)
        ax.set_xlabel("step", fontsize=8)
        ax.set_xlim(0, stage_ends[-1])
        ax.grid(alpha=0.2)
        for end in stage_ends[:-1]:
            ax.axvline(end, color="grey", lw=0.8, ls=":")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    write_file(folder / "curves.png", lambda part: figure.savefig(part, dpi=110, format="png"))


def draw_panel(ax, name: str, rows: list[dict], evals: list[dict]) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        x, y = zip(*points)
        k = min(9, len(y))
        ax.plot(x, y, lw=0.7, alpha=0.35, color="C0")
        ax.plot(x[k - 1:], np.convolve(y, np.ones(k) / k, "valid"), lw=1.8, color="C0")
    known = dict.fromkeys(key for row in evals for key in row)
    budgets = [key for key in known if key.startswith(name + "@")]
    for i, key in enumerate(budgets or [name] * (name in known)):
        label = "held out, greedy" + (f", budget {key.partition('@')[2]}" if budgets else "")
        some = [e for e in evals if key in e]
        ax.plot([e["step"] for e in some], [e[key] for e in some], "o", color=f"C{3 + i}", label=label)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8)
