"""Learning curves of a run, from its own logs: runs/NAME/curves.png."""

from pathlib import Path

import numpy as np

from plumbing.folder import write_file
from plumbing.log import read_lines

# Panels after the reward and its parts: key of metrics.jsonl, title. A key that the run does not log has no panel.
PANELS = (("length", "length in tokens"), ("within_10pct", "share within ±10% of the target"),
          ("over", "share over budget"), ("kl", "KL to the reference model (nats a token)"),
          ("entropy", "entropy (nats a token)"))


def draw_curves(folder: Path, target: int, stage_ends: list[int]) -> None:
    """metrics.jsonl and eval.jsonl -> curves.png: faint lines are steps, thick ones means over nine, dots evaluations.

    A panel for the reward, for each of its parts, and for what PANELS names.
    """
    import matplotlib
    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt
    rows, evals = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")
    logged = list(dict.fromkeys(name for row in rows for name in row))
    parts = [name for name in logged if name.startswith("reward/") and name != "reward/length"]
    panels = [("reward", "reward"), *((name, name.removeprefix("reward/")) for name in parts),
              *(panel for panel in PANELS if panel[0] in logged)]
    n_rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(n_rows, 3, figsize=(13, 3.25 * n_rows), layout="constrained", squeeze=False)
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
    plt.close(figure)


def draw_panel(ax, name: str, rows: list[dict], evals: list[dict]) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        x, y = zip(*points)
        k = min(9, len(y))
        ax.plot(x, y, lw=0.7, alpha=0.35, color="C0")
        ax.plot(x[k - 1:], np.convolve(y, np.ones(k) / k, "valid"), lw=1.8, color="C0")
    budgets = [key for key in evals[0] if key.startswith(name + "@")]
    for i, key in enumerate(budgets or [name] * (name in evals[0])):
        label = "held out, greedy" + (f", budget {key.partition('@')[2]}" if budgets else "")
        ax.plot([e["step"] for e in evals], [e[key] for e in evals], "o", color=f"C{3 + i}", label=label)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8)
