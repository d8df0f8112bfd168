"""Stale samples: runs that learn from what the weights of 0, 1, 4 or 16 steps ago wrote, corrected and uncorrected.

    python -m studies.staleness                  # all runs; what is done is not done again, then the table
    python -m studies.staleness run --jobs 14 --only "16 steps, tokens"
    python -m studies.staleness tables           # into docs/machines.md, from studies/results/staleness/ alone
    python -m studies.staleness figures          # figures/staleness.png, likewise

Every run is the embedded default with the reward of its second stage, 100 steps, and the default's learning rate; some
of them without a KL, which hides what happens. In the process of a run the sampler is exchanged for one that keeps old
weights (`behind`); the files stay as they are. A run takes about a minute of one core. One that was cut off is begun
anew: its old weights are gone.

What is kept of a run, one small file, has no texts: settings, curves, and the evaluations before and after.
"""

import json
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import train
from config import Config
from plumbing.cli import read_arguments
from plumbing.curves import new_figure
from plumbing.folder import write_file, write_text
from plumbing.once import arguments, as_json, embedded, kept, short_run, spread, the_rest
from plumbing.staleness import weights_of_now, with_weights

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "staleness"
PAGE, HEADING = ROOT / "docs" / "machines.md", "### By age and correction\n\n"
STEPS, LAST, SEEDS = 100, 10, 3  # of a run; of its end, over which a number is a mean
REWARD = "rouge_l+4*length-3*invented-2*twice"  # of the default's second stage
AGES = (0, 1, 4, 16)
CORRECTIONS = {"none": (), "tokens": ("--tis", "2"), "sequences": ("--tis", "3", "--tis-mode", "sequence_mask")}
BETAS = (0.1, 0.0)  # the default's, and no KL
CURVES = ("reward", "length", "within_10pct", "kl", "entropy", "grad_norm", "logp_gap", "age", "tis_mean", "tis_max",
          "tis_ess", "invented", "distinct")


class Run(NamedTuple):
    age: int  # steps between the weights that write and those that learn
    correction: str
    beta: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.age} steps, {self.correction}, beta {self.beta:g}"

    @property
    def slug(self) -> str:
        return f"{self.age}-{self.correction}-{'kl' if self.beta else 'free'}-{self.seed}"

    @property
    def flags(self) -> list[str]:
        return ["--stages", f"{REWARD}:{STEPS}", "--eval-posts", "50", "--print-every", "20", "--seed", str(self.seed),
                "--beta", str(self.beta), *CORRECTIONS[self.correction]]

    @property
    def config(self) -> Config:
        return read_arguments(Config, self.flags, "")[0]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.slug}.json"

    @property
    def folder(self) -> Path:
        return Path("runs") / f"stale-{self.slug}"


def all_runs(seeds: int = SEEDS) -> list[Run]:
    """Seed by seed. Weights of completions, the second choice, are tried with the KL only."""
    return [Run(age, correction, beta, seed) for seed in range(seeds) for beta in BETAS for age in AGES
            for correction in CORRECTIONS if beta or correction != "sequences"]


# --- runs -------------------------------------------------------------------------------------------------------------


@contextmanager
def behind(age: int) -> Iterator[None]:
    """Inside, the completions of a step are written by the weights of `age` steps before; held-out summaries are not.

    In the first steps there are none that old, and the first weights write.
    """
    own, kept, steps = train.sample, deque(maxlen=age + 1), 0

    def sample(model, prompts: Sequence, **settings) -> list:
        nonlocal steps
        if settings["temperature"] == 0:
            return own(model, prompts, **settings)
        kept.append(weights_of_now(model))
        steps += 1
        with with_weights(model, kept[0]):
            groups = own(model, prompts, **settings)
        for group in groups:
            group.version = steps - len(kept)
        return groups

    train.sample = sample
    try:
        yield
    finally:
        train.sample = own


def result_of(run: Run) -> dict | None:
    """What was kept of a run, if it was one of these settings and this model."""
    return kept(run.result, run.config, Config(), age=run.age, model=embedded("train", "val"))


def train_stale(run: Run) -> int:
    """The run itself, in a process of its own -> train.py's exit code."""
    with behind(run.age):
        return train.main([*run.flags, "--run", run.folder.name])


def do(run: Run, threads: int) -> dict:
    """Train and keep the result. RuntimeError if the run neither reaches its end nor explodes."""
    shutil.rmtree(run.folder, ignore_errors=True)
    command = [sys.executable, "-m", "studies.staleness", "one", "--only", run.slug]
    result = {"config": as_json(run.config), "age": run.age, "model": embedded("train", "val"),
              **short_run(command, run.folder, ROOT, threads, CURVES)}
    write_text(run.result, json.dumps(result) + "\n")
    return result


# --- what is to be seen -----------------------------------------------------------------------------------------------


def at_the_end(result: dict, name: str) -> float | None:
    """The mean of the last steps, or what the last evaluation says. None where there is none."""
    if name.startswith("held out, "):
        return None if result["ended"] else result["val"][-1][name.removeprefix("held out, ")]
    values = [value for value in result["curves"].get(name, ())[-LAST:] if value is not None]
    return fmean(values) if values else None


COLUMNS = (("reward", "reward", "{:.2f}"), ("within 10%", "within_10pct", "{:.0%}"),
           ("held out: reward", "held out, reward", "{:.2f}"),
           ("held out: within 10%", "held out, within_10pct", "{:.0%}"),
           ("KL", "kl", "{:.2f}"), ("gap", "logp_gap", "{:.2g}"), ("mean weight", "tis_mean", "{:.3f}"),
           ("largest", "tis_max", "{:.2f}"), ("effective", "tis_ess", "{:.0%}"))


def results(age: int, correction: str, beta: float) -> list[dict]:
    """What there is of a setting, one a seed."""
    return [r for seed in range(SEEDS) if (r := result_of(Run(age, correction, beta, seed)))]


def make_table() -> str:
    """A row a setting: the mean over seeds, and the least and the largest of them."""
    lines = [f"| `--beta` | age | correction | seeds | {' | '.join(title for title, *_ in COLUMNS)} |",
             "| --- " * (len(COLUMNS) + 4) + "|"]
    for age, correction, beta, _ in all_runs(1):
        there = results(age, correction, beta)
        if there:
            cells = [spread([at_the_end(r, name) for r in there], form.format) for _, name, form in COLUMNS]
            ended = "".join(f"; {r['ended']}" for r in there if r["ended"])
            lines.append(f"| {beta:g} | {age} | {correction} | {len(there)}{ended} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str) -> str:
    """The page with this table under the heading, in place of the one that stands there."""
    head, heading, rest = text.partition(HEADING)
    if not heading:
        raise ValueError(f"{PAGE} has no heading {HEADING.strip()!r} to put the table under.")
    return head + heading + table + re.sub(r"\A(\|.*\n)*", "", rest)


PANELS = ((0.1, "reward", "reward, --beta 0.1"), (0.1, "kl", "KL to the reference model, --beta 0.1"),
          (0.1, "tis_ess", "effective sample size, --beta 0.1"), (0.0, "reward", "reward, --beta 0"),
          (0.0, "entropy", "entropy, --beta 0"), (0.0, "tis_ess", "effective sample size, --beta 0"))


def draw(path: Path) -> None:
    """A color an age; dashed with --tis 2. Means over the seeds, and over ten steps."""
    if not any(result_of(run) for run in all_runs()):
        raise ValueError("There is no result to draw yet: python -m studies.staleness run.")
    panels = [panel for panel in PANELS if any(result_of(run) for run in all_runs() if run.beta == panel[0])]
    figure, axes = new_figure(-(-len(panels) // 3))
    for ax, (beta, name, title) in zip(axes.flat, panels):
        for i, age in enumerate(AGES):
            for correction, style in (("none", "-"), ("tokens", "--")):
                found = [r["curves"][name] for r in results(age, correction, beta) if name in r["curves"]]
                mean = [fmean(values) for values in zip(*found)]
                smooth = [fmean(mean[max(0, n - LAST):n]) for n in range(1, len(mean) + 1)]
                label = f"age {age}{', --tis 2' if style == '--' else ''}"
                ax.plot(range(1, len(mean) + 1), smooth, style, lw=1.4, color=f"C{i}", label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.2)
        if name == "kl":
            ax.set_yscale("symlog", linthresh=0.1)
    axes.flat[0].legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    write_file(path, lambda part: figure.savefig(part, dpi=100, format="png"))


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = arguments("staleness", __doc__, ("run", "tables", "figures", "one"),
                     'runs such as "16 steps, tokens, beta 0.1"').parse_args(argv)
    if args.action == "one":
        return train_stale(next(run for run in all_runs() if run.slug == args.only))
    try:
        if args.action == "run":
            the_rest([run for run in all_runs(args.seeds) if re.search(args.only, run.name)], result_of, do, args.jobs)
        if args.action in ("run", "tables"):
            write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), make_table()))
            print(f"{sum(bool(result_of(run)) for run in all_runs())} of {len(all_runs())} runs are in {PAGE}.")
        else:
            draw(ROOT / "figures" / "staleness.png")
    except (ValueError, OSError, RuntimeError) as e:
        print(f"staleness: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
