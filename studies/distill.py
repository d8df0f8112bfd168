"""On-policy distillation: how soon is a fresh policy as good as its teacher, and how soon was the teacher itself?

    python -m studies.distill                     # all runs, then the tables; what is done is not done again
    python -m studies.distill run --jobs 14       # the same, so many runs at a time
    python -m studies.distill tables              # the tables of docs/distill.md from studies/results/distill/ alone

GRPO makes a teacher of the embedded model: the default run. This one then teaches the embedded model as it was, by
`--teacher`. All runs are evaluated on the way, on test posts, by the default's last reward. For that their stages are
cut into pieces with the same reward, which changes no bit of a run. Nothing was chosen on these posts: the learning
rate comes from another seed and from val posts.

What is kept of a run, one small file in studies/results/distill/, has no texts: settings, a hash of the embedded model
and its posts, evaluations and the mean teacher_kl between them.
"""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from config import Config
from plumbing.cli import read_arguments
from plumbing.folder import write_text
from plumbing.log import read_lines
from plumbing.once import arguments, as_json, embedded, kept, run_folder, slug, spread, the_rest, to_its_end

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "distill"
PAGE = ROOT / "docs" / "distill.md"
SEEDS, SPLITS = 3, ("train", "test")
LENGTH, REWARD = (text.rpartition(":")[0] for text in Config().stages)
FIRST, TOTAL = 40, 220  # the default's steps for the length alone, and all of them
SHOWN = (0, 5, 10, 20, 40, 80, 120, 160, 220)  # steps of the table
LONG = (5, 10, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220)  # where a run is evaluated, and before the first step
SHORT = (5, 10, 20, 40, 60, 80, 100, 120)
SHARES = (0.5, 0.8, 0.9, 0.95)  # of what the teacher gained: where a run is called half as good, or as good
KEPT = ("step", "reward", "length", "within_10pct", "rouge_l", "invented")

# --- your experiment starts here: {name: (is there a teacher, steps of the evaluations, flags)} ---
ARMS: dict[str, tuple[bool, tuple[int, ...], tuple[str, ...]]] = {
    "GRPO, the teacher": (False, LONG, ()),
    "GRPO, as short": (False, SHORT, ()),
    "distilled": (True, SHORT, ("--beta", "0", "--lr", "1.2e-3")),
    "half distilled": (True, SHORT, ("--beta", "0", "--lr", "1.2e-3", "--teacher-weight", "0.5")),
}
TEACHER = "GRPO, the teacher"


class Run(NamedTuple):
    name: str
    seed: int

    @property
    def teacher(self) -> "Run | None":
        return Run(TEACHER, self.seed) if ARMS[self.name][0] else None

    @property
    def flags(self) -> list[str]:
        """A student has another seed than its teacher, so it meets other posts."""
        _, ends, own = ARMS[self.name]
        taught = ["--teacher", f"runs/{self.teacher.folder.name}"] if self.teacher else []
        return ["--stages", *pieces(ends, self.name == TEACHER), "--eval-data", "tiny/test.jsonl", *taught, *own,
                "--seed", str(self.seed + (0 if self.name == TEACHER else 100))]

    @property
    def config(self) -> Config:
        return read_arguments(Config, self.flags, "")[0]

    @property
    def result(self) -> Path:
        return RESULTS / f"{slug(self.name, self.seed)}.json"

    @property
    def folder(self) -> Path:
        return run_folder(f"distill-{slug(self.name, self.seed)}", json.dumps(as_json(self.config)) + embedded(*SPLITS))


def pieces(ends: tuple[int, ...], by_length_first: bool) -> list[str]:
    """Stages that end where a run is to be evaluated.

    >>> pieces((20, 60), False) == [f"{REWARD}:20", f"{REWARD}:40"]
    True
    """
    return [f"{LENGTH if by_length_first and end <= FIRST else REWARD}:{end - begin}"
            for begin, end in pairwise((0, *ends))]


# --- runs -------------------------------------------------------------------------------------------------------------


def result_of(run: Run) -> dict | None:
    """What was kept of a run, if it was one of these settings and of this model."""
    return kept(run.result, run.config, Config(), model=embedded(*SPLITS))


def do(run: Run, threads: int) -> dict:
    """Train, or go on, and keep the result. RuntimeError if the run does not reach its end."""
    flags = ["--resume"] if (run.folder / "config.json").exists() else run.flags
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--run", run.folder.name]
    if ended := to_its_end(command, run.folder, ROOT, threads, lines=len(run.config.stages) + 1):
        raise RuntimeError(f"{run.folder}: {ended}.")
    evaluations, rows = (read_lines(run.folder / name) for name in ("eval.jsonl", "metrics.jsonl"))
    result = {"config": as_json(run.config), "model": embedded(*SPLITS), "ended": "",
              "evaluations": [{name: row[name] for name in KEPT} for row in evaluations],
              "seconds": round(sum(row["seconds"] for row in rows))}
    if run.teacher:
        result["teacher_kl"] = [round(fmean(row["teacher_kl"] for row in rows if begin < row["step"] <= end), 4)
                                for begin, end in pairwise(row["step"] for row in evaluations)]
    write_text(run.result, json.dumps(result) + "\n")
    return result


def run_all(names: list[str], seeds: int, jobs: int) -> None:
    """What has no result yet, and the teachers that such runs need: first without a teacher, then with one."""
    wanted = [Run(name, seed) for seed in range(seeds) for name in names]
    students = [run for run in wanted if run.teacher]
    needed = {run.teacher for run in students if not result_of(run)}  # of these, the weights are needed as well

    def result_and_weights(run: Run) -> dict | None:
        return result_of(run) if run not in needed or (run.folder / "model").is_dir() else None

    the_rest(list(dict.fromkeys([run for run in wanted if not run.teacher] + [run for run in needed if run])),
             result_and_weights, do, jobs)
    the_rest(students, result_of, do, jobs)


# --- tables -----------------------------------------------------------------------------------------------------------


def steps_until(curve: dict[int, float], level: float) -> float:
    """The step at which a curve {step: value} first is at the level: on the line between two evaluations.

    >>> steps_until({0: 0.0, 10: 0.4, 20: 0.6}, 0.5), steps_until({0: 0.0, 10: 0.4}, 0.5)
    (15.0, inf)
    """
    for (a, low), (b, high) in pairwise(curve.items()):
        if high >= level:
            return float(a) if low >= level else a + (b - a) * (level - low) / (high - low)
    return float("inf")


def curve_of(result: dict) -> dict[int, float]:
    return {row["step"]: row["reward"] for row in result["evaluations"]}


def found(name: str) -> dict[int, dict]:
    """{seed: result} of a run's seeds whose teacher has a result, too."""
    return {seed: result for seed in range(SEEDS)
            if (result := result_of(Run(name, seed))) and result_of(Run(TEACHER, seed))}


def cell(values: list[float], form: str = "{:.2f}") -> str:
    """Mean (least..most) over the seeds."""
    never = sum(value == float("inf") for value in values)
    return f"never in {never} of {len(values)}" if never else spread(values, form.format)


def make_tables() -> str:
    """The reward on the way, and how long it took to come near the teacher."""
    there = {name: results for name in ARMS if (results := found(name))}
    if not there:
        return "There is no result yet: `python -m studies.distill`.\n"
    text = (f"| held-out reward after so many steps | {' | '.join(map(str, SHOWN))} |\n"
            f"| --- {'| --- ' * len(SHOWN)}|\n")
    for name, results in there.items():
        curves = [curve_of(result) for result in results.values()]
        text += f"| {name} | {' | '.join(cell([c[s] for c in curves if s in c]) for s in SHOWN)} |\n"
    text += (f"\n| steps until this much of the teacher's gain | {' | '.join(f'{share:.0%}' for share in SHARES)} | "
             f"±10% | ROUGE-L | invented | seeds |\n| --- {'| --- ' * (len(SHARES) + 4)}|\n")
    for name, results in there.items():
        last = [result["evaluations"][-1] for result in results.values()]
        cells = [cell([until(seed, result, share) for seed, result in results.items()], "{:.0f}") for share in SHARES]
        for what, form in (("within_10pct", "{:.0%}"), ("rouge_l", "{:.3f}"), ("invented", "{:.1%}")):
            cells.append(cell([row[what] for row in last], form))
        text += f"| {name} | {' | '.join(cells)} | {len(results)} |\n"
    gaps = [result["teacher_kl"] for result in there.get("distilled", {}).values()]
    if gaps:
        text += (f"\n`teacher_kl` of *distilled*, steps 1 to {SHORT[0]}: {cell([gap[0] for gap in gaps])}; steps "
                 f"{SHORT[-2] + 1} to {SHORT[-1]}: {cell([gap[-1] for gap in gaps], '{:.3f}')}.\n")
    return text


def until(seed: int, result: dict, share: float) -> float:
    """Steps until a run has so much of what its teacher gained, from the same beginning to its end."""
    teacher = curve_of(result_of(Run(TEACHER, seed)))
    return steps_until(curve_of(result), teacher[0] + share * (teacher[TOTAL] - teacher[0]))


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = arguments("distill", __doc__, ("run", "tables"), "the runs to do, and their teachers").parse_args(argv)
    try:
        if args.action == "run":
            run_all([name for name in ARMS if re.search(args.only, name)], args.seeds, args.jobs)
        head, heading, _ = PAGE.read_text(encoding="utf-8").partition("## The numbers\n\n")
        write_text(PAGE, head + heading + make_tables())
        print(f"{sum(len(found(name)) for name in ARMS)} of {SEEDS * len(ARMS)} runs are in {PAGE}.")
    except (ValueError, OSError, RuntimeError) as e:
        print(f"distill: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
