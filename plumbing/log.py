"""What a run tells: the lines on the screen, and the files that they are read back from.

metrics.jsonl has a line a step, eval.jsonl one an evaluation, samples.jsonl the first summaries of each to read. Every
number in them is explained in docs/read-your-run.md.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TextIO

from plumbing import ranks
from plumbing.command import to_resume
from plumbing.folder import read_json, write_text
from plumbing.scripts import without_rouge
from plumbing.symptoms import symptoms
from plumbing.words import find_wordnet, how_to_get_wordnet

# The progress line: key of metrics.jsonl, title, width, format.
COLUMNS = (("reward", "reward", 7, "{:.3f}"), ("length", "length", 6, "{:.1f}"), ("within_2", "±2", 5, "{:.0%}"),
           ("within_10pct", "±10%", 5, "{:.0%}"), ("over", "over", 5, "{:.0%}"), ("missing", "none", 5, "{:.0%}"),
           ("kl", "kl", 6, "{:.3f}"), ("teacher_kl", "teacher", 7, "{:.3f}"), ("entropy", "entropy", 7, "{:.2f}"),
           ("distinct", "distinct", 8, "{:.2f}"), ("templated", "templ", 5, "{:.0%}"),
           ("invented", "invent", 6, "{:.0%}"),
           ("clip_frac", "clip", 5, "{:.0%}"), ("flat_groups", "flat", 5, "{:.0%}"), ("grad_norm", "grad", 5, "{:.2f}"),
           ("logp_gap", "gap", 6, "{:.0e}"), ("tis_ess", "ess", 5, "{:.0%}"), ("tokens_per_s", "tok/s", 6, "{:.0f}"))


# These pay for no length. What a forker's reward pays for, nobody knows.
ANY_LENGTH = {"rouge_l", "bleu", "char_bleu", "meteor", "embedding", "squish", "cost", "copy_rate", "repetition",
              "twice", "invented", "distinct", "format", "judge"}


class Log:
    """The run's files and the lines on the screen."""

    def __init__(self, folder: Path, config, stages: list, step: int, goal: str, made_of: dict | None = None):
        """`goal`: the task in a few words. `made_of`: what decides the result beside the settings."""
        self.folder, self.config, self.stages, self.total = folder, config, stages, stages[-1].end
        self.goal = goal
        self.sized = any(name not in ANY_LENGTH for stage in stages for name in stage.reward.names)
        self.recent: list[dict] = []
        self.shown = 0
        self.first = self.last = step
        ranks.agree("numbers of steps done", step,
                    "All machines need to see the run's folder, on a common disk or copied")
        # METEOR's values depend on whether there are synonyms, so a run says where it got them.
        saved = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        saved |= dataclasses.asdict(config) | {"wordnet": str(find_wordnet() or ""), "made_of": made_of or {}}
        if ranks.count() > 1 or "ranks" in saved:
            saved["ranks"] = ranks.count()
        write_text(folder / "config.json", json.dumps(saved, indent=2) + "\n")
        kept = self.take_up(step)
        self.rows, self.warned = kept["metrics"], False
        self.evaluated = {(row["step"], row["stage"]) for row in kept["eval"]}
        for name, rows in kept.items():
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def take_up(self, step: int) -> dict[str, list[dict]]:
        """The lines that are kept of each file when the run goes on after `step`. What is missing is said later.

        What was logged after the checkpoint is about to happen again, and so is an evaluation that was not finished.
        """
        kept, self.lost = {}, []
        for name in ("metrics", "eval", "samples", "groups"):
            rows, broken = read_rows(self.folder / f"{name}.jsonl")
            kept[name] = [row for row in rows if row["step"] <= step]
            if broken:
                self.lost.append(f"{name}.jsonl: {few('line', broken)} could not be read and {are(broken)} left out")
        if step and (gone := sorted(set(range(1, step + 1)) - {row["step"] for row in kept["metrics"]})):
            self.lost.append(f"metrics.jsonl has no line of {few('step', gone)}")
        shown = {(row["step"], row["stage"]) for row in kept["samples"]}
        # An evaluation of this very step is done again where its summaries are gone; one of an earlier step cannot be.
        kept["eval"] = [row for row in kept["eval"] if row["step"] < step or (row["step"], row["stage"]) in shown]
        evaluated = {(row["step"], row["stage"]) for row in kept["eval"]}
        kept["samples"] = [row for row in kept["samples"] if (row["step"], row["stage"]) in evaluated]
        for name, found in (("eval", evaluated), ("samples", shown)):
            gone = [n for n, at in enumerate((0, *(stage.end for stage in self.stages))) if at < step
                    and (at, n) not in found]
            if gone:
                self.lost.append(f"{name}.jsonl lacks the evaluation {' and '.join(map(moment, gone))}")
        return kept

    def say(self, text: str) -> None:
        say(text)

    @contextmanager
    def keeping(self, step: int, groups: Sequence) -> Iterator[None]:
        """Completions are dear: where the block fails, in a reward or in the update, failed.jsonl has them."""
        try:
            yield
        except Exception:
            path = self.folder / "failed.jsonl"
            with suppress(OSError):  # the first error is the one to be told
                write_text(path, "".join(json.dumps({"step": step, "completions": list(group.texts)}) + "\n"
                                         for group in groups))
                say(f"Step {step} failed. What had been written in it is in {path}.")
            raise

    def append(self, name: str, row: dict) -> None:
        if not ranks.first():
            return
        path = self.folder / f"{name}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"Could not write {path} ({e.strerror}): the last checkpoint is good. Free some space; then "
                          f"{to_resume(self.folder)} goes on from it.") from e

    def begin(self, model, posts: list, held_out: list) -> None:
        """What is about to happen."""
        c, n = self.config, sum(p.numel() for p in model.parameters())
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) if c.lora else 0
        self.say(f"{c.model}: {n - adapters:,} parameters" + (f" and {adapters:,} in adapters" if c.lora else "")
                 + f", {model.config.model_type}. {len(posts):,} posts to train on, {len(held_out)} held out. "
                 f"{self.total} steps of {c.prompts} posts x {c.group} completions, {self.goal}. "
                 f"Everything goes to {self.folder}.")
        if find_wordnet() is None and any(post.reference for post in held_out):
            self.say(f"There is no WordNet on this machine ({how_to_get_wordnet()}; or WNSEARCHDIR names its folder): "
                     f"METEOR matches equal words and stems, no synonyms.")
        rouge = without_rouge(post.reference for post in posts[:1000])
        if rouge:
            self.say(rouge)
        if self.first:
            self.say(f"Resumed after step {self.first}.")
        if self.lost:
            self.say("The log was damaged: " + "; ".join(self.lost) + ". All other lines are kept.")

    def evaluation(self, step: int, stage: int, evaluate: Callable[[], dict], held_out: list) -> None:
        """Evaluate once per (step, stage), even when the run was killed right after."""
        if ranks.exchange((step, stage) not in self.evaluated)[0]:
            try:
                r = evaluate()
            except ConnectionError as e:  # the reward's server is away; each stage ends with a checkpoint
                raise ConnectionError(f"{e} All {step} steps are kept: when the server is back, go on with: "
                                      f"{to_resume(self.folder)}" if step else str(e)) from e
            summaries = r.pop("summaries")
            r["lengths"] = [row["length"] for row in summaries]
            for post, row in zip(held_out[:5], summaries):
                self.append("samples", {"step": step, "stage": stage, "document": post.document,
                                        "reference": post.reference, **row})
            self.append("eval", {"step": step, "stage": stage, **r})
            from plumbing.report import write_report  # here, for it reads what this file writes
            write_report(self.folder)
        if not ranks.first():
            return
        self.say(f"  held out, greedy, {moment(stage)}: "
                 + describe(read_lines(self.folder / "eval.jsonl")[-1], self.sized))
        self.shown = 0

    def step(self, step: int, stage, line: dict, seconds: float) -> None:
        """One line in metrics.jsonl for every step; one on the screen for every few, their mean."""
        row = {"step": step, "stage": stage.number, **line, "kl": line.get("kl"),
               "tokens_per_s": line["n_tokens"] / max(seconds, 1e-9), "seconds": seconds}
        del row["n_tokens"]
        self.append("metrics", row)
        self.recent.append(row)
        self.rows.append(row)
        self.last = step
        self.watch()
        if step % self.config.print_every and step != stage.end and step != self.first + 1:
            return
        parts = [(f"reward/{n}", n, max(7, len(n)), "{:.3f}") for n in (*stage.reward.names, "overlong")]
        columns = [COLUMNS[0], *(part for part in parts if part[1] != "length"), *COLUMNS[1:]]  # a length of its own
        columns = [column for column in columns if column[0] in row]
        if self.shown % 20 == 0:
            head = "".join(f"{title:>{w + 1}}" for _, title, w, _ in columns)
            self.say(f"\nstage {stage.number}: {stage.reward.expression}\n  step{head}   left")
        self.shown += 1
        text = f"{step:6d}"
        for name, _, w, form in columns:
            values = [row[name] for row in self.recent if row[name] is not None]
            value = (max if name == "logp_gap" else fmean)(values) if values else None
            text += f"{'-' if value is None else form.format(value):>{w + 1}}"
        left = fmean(row["seconds"] for row in self.rows[-20:]) * (self.total - step)
        self.say(f"{text}  {int(left // 60):2d}:{int(left % 60):02d}")
        self.recent.clear()

    def watch(self) -> None:
        """Say it once when the completions become one or the same: a policy that games its reward begins with that."""
        if self.warned or len(self.rows) < 20:
            return
        names = ("distinct", "templated", "repetition", "entropy", "flat_groups")
        first, now = ({n: fmean(row[n] for row in rows) for n in names} for rows in (self.rows[:10], self.rows[-10:]))
        wrong = [text for text, is_so in (
            ("distinct word pairs in a group", now["distinct"] < 0.5 * first["distinct"]),
            ("phrases said of several posts", now["templated"] > first["templated"] + 0.15),
            ("phrases said twice in one summary", now["repetition"] > first["repetition"] + 0.05),
            ("entropy", now["entropy"] < 0.25 * first["entropy"]),
            ("groups whose rewards are all equal", now["flat_groups"] > first["flat_groups"] + 0.5)) if is_so]
        if wrong:
            self.warned = True
            self.say("  Completions become alike (" + ", ".join(wrong) + "). At first and now: "
                     + ", ".join(f"{n} {first[n]:.2f} and {now[n]:.2f}" for n in names)
                     + ". Read some; more --beta or --temperature, or 0.1*distinct in the reward, can help.")

    def finish(self, seconds: float, peak: float | None) -> None:
        """What the run did to the first held-out posts, and how it went."""
        if not ranks.first():
            return
        evals, samples = read_lines(self.folder / "eval.jsonl"), read_lines(self.folder / "samples.jsonl")
        first = [row for row in samples if row["stage"] == 0]
        last = [row for row in samples if row["stage"] == evals[-1]["stage"]]
        for before, after in list(zip(first, last))[:3]:
            self.say(f"\n  post       {before['document']}\n  reference  {before['reference']}\n"
                     f"  before     {before['summary']} [{grade(before)}]\n"
                     f"  after      {after['summary']} [{grade(after)}]")
        begun = "".join(f"\n  before  {describe(row, self.sized)}" for row in evals[:1] if row["stage"] == 0)
        pages = [path for name in ("report.html", "curves.png") if (path := self.folder / name).exists()]
        curves = f"Look at {' and '.join(map(str, pages))}; the" if pages else "The"
        goal = f", {self.goal}" if self.sized or "within_2" not in evals[-1] else ""
        self.say(f"\nheld-out greedy summaries{goal}{begun}\n  after   {describe(evals[-1], self.sized)}"
                 f"\nDone in {int(seconds // 60)}:{int(seconds % 60):02d}"
                 + ("" if peak is None else f", with at most {peak:.1f} GiB of memory")
                 + f". {curves} model is in {self.folder / 'model'}.")
        for line in symptoms(self.rows, self.config):
            self.say(f"What the curves say: {line}")


def grade(row: dict) -> str:
    """One summary of samples.jsonl, in a few words."""
    if "budget" in row:
        return f"reward {row['reward']:.3f}, {row['used']:.0%} of the budget of {row['budget']}"
    return f"{row['length']} tokens"


def describe(r: dict, sized: bool = True) -> str:
    """A line of eval.jsonl as a sentence: the run's own reward and its parts, how the size was kept to, the metrics.

    `sized`: some stage pays for the length. Else a share of those near a target praises or blames nothing."""
    budgets = [name.partition("@")[2] for name in r if name.startswith("reward@")]
    if budgets:
        said = [f"budget {b}: {paid(r, '@' + b)}, over {r[f'over@{b}']:.0%}, used {r[f'used@{b}']:.0%}"
                + (f", missing {r[f'missing@{b}']:.0%}" if f"missing@{b}" in r else "") for b in budgets]
    else:
        said = [paid(r), f"length {r['length']:.1f} ± {r['length_std']:.1f}"]
        if sized:
            said.insert(1, f"{r['within_10pct']:.0%} within ±10% of the target, {r['within_2']:.0%} within ±2 tokens")
    if "rouge_l" in r:
        some = f" of {r['compared']} posts with a reference" if r.get("compared", r["n"]) < r["n"] else ""
        said.append(f"ROUGE-L {r['rouge_l']:.3f}, METEOR {r['meteor']:.3f}, BLEU {r['bleu']:.3f}{some}")
    said.append(f"distinct {r['distinct']:.2f}")
    if "invented" in r:  # a log of older lines has none
        said.append(f"invented {r['invented']:.0%} of {r['names']:.1f} names and numbers a summary")
    return "; ".join(said)


def paid(r: dict, ending: str = "") -> str:
    """"reward 0.52 (rouge_l 0.74, length -0.07)", of the keys with this ending: "" or "@BUDGET"."""
    parts = {name.partition("@")[0].removeprefix("reward/"): value for name, value in r.items()
             if name.startswith("reward/") and name.partition("@")[2] == ending.removeprefix("@")}
    listed = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
    return f"reward {r['reward' + ending]:.3f}" + (f" ({listed})" if len(parts) > 1 else "")


def moment(stage: int) -> str:
    return "before training" if stage == 0 else f"after stage {stage}"


def few(what: str, numbers: list[int]) -> str:
    """Numbers in a sentence.

    >>> few("step", [3]), few("step", [7, 8, 9, 12])
    ('step 3', '4 steps (7 to 12)')
    """
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} {what}s ({numbers[0]} to {numbers[-1]})"


def are(numbers: list[int]) -> str:
    return "is" if len(numbers) == 1 else "are"


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a run's JSONL file; none where there is no file."""
    return read_rows(path)[0]


def read_rows(path: Path) -> tuple[list[dict], list[int]]:
    """-> (the whole lines, the numbers of those that cannot be read). A last one cut by a kill is no line."""
    rows, broken = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and "stage" in row):
                raise ValueError("no line of a log")
            rows.append(row)
        except (ValueError, RecursionError):  # also of bytes that are no UTF-8
            if line.strip() and number < len(lines):
                broken.append(number)
    return rows, broken


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line. Nobody may be there to read it: `| head` ends, a terminal is closed. The run goes on then."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except RuntimeError:  # a signal came while something was being printed: its line is not worth more
        pass
    except (OSError, ValueError):  # a pipe that broke, a file that was closed
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # so what is still in the buffer, and what comes, goes there
            os.close(nowhere)
