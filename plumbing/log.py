"""What a run tells: the lines on the screen, and the files that they are read back from.

metrics.jsonl has a line a step, eval.jsonl one an evaluation, samples.jsonl the first summaries of each to read. Every
number in them is explained in docs/read-your-run.md.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from plumbing.folder import write_text
from plumbing.scripts import without_rouge
from plumbing.words import find_wordnet, how_to_get_wordnet

# The progress line: key of metrics.jsonl, title, width, format.
COLUMNS = (("reward", "reward", 7, "{:.3f}"), ("length", "length", 6, "{:.1f}"), ("within_2", "±2", 5, "{:.0%}"),
           ("within_10pct", "±10%", 5, "{:.0%}"), ("over", "over", 5, "{:.0%}"), ("missing", "none", 5, "{:.0%}"),
           ("kl", "kl", 6, "{:.3f}"), ("entropy", "entropy", 7, "{:.2f}"),
           ("distinct", "distinct", 8, "{:.2f}"), ("templated", "templ", 5, "{:.0%}"),
           ("clip_frac", "clip", 5, "{:.0%}"), ("flat_groups", "flat", 5, "{:.0%}"), ("grad_norm", "grad", 5, "{:.2f}"),
           ("logp_gap", "gap", 6, "{:.0e}"), ("tokens_per_s", "tok/s", 6, "{:.0f}"))


# These pay for no length. What a forker's reward pays for, nobody knows.
ANY_LENGTH = {"rouge_l", "bleu", "char_bleu", "meteor", "embedding", "squish", "cost", "copy_rate", "repetition",
              "distinct", "format"}


class Log:
    """The run's files and the lines on the screen."""

    def __init__(self, folder: Path, config, stages: list, step: int, goal: str):
        """`goal`: the task in a few words."""
        self.folder, self.config, self.stages, self.total = folder, config, stages, stages[-1].end
        self.goal = goal
        self.sized = any(name not in ANY_LENGTH for stage in stages for name in stage.reward.names)
        self.recent: list[dict] = []
        self.shown = 0
        self.first = self.last = step
        if not (folder / "config.json").exists():
            # METEOR's values depend on whether there are synonyms, so a run says where it got them.
            text = json.dumps(dataclasses.asdict(config) | {"wordnet": str(find_wordnet() or "")}, indent=2) + "\n"
            write_text(folder / "config.json", text)
        # What was logged after the checkpoint is about to happen again, and so is an evaluation that was not finished.
        kept = {name: [row for row in read_lines(folder / f"{name}.jsonl") if row["step"] <= step]
                for name in ("metrics", "eval", "samples")}
        self.rows, self.warned = kept["metrics"], False
        self.evaluated = {(row["step"], row["stage"]) for row in kept["eval"]}
        kept["samples"] = [row for row in kept["samples"] if (row["step"], row["stage"]) in self.evaluated]
        for name, rows in kept.items():
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def append(self, name: str, row: dict) -> None:
        path = self.folder / f"{name}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"Could not write {path} ({e.strerror}): the last checkpoint is good. Free some space, then "
                          f"go on with --resume.") from e

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

    def evaluation(self, step: int, stage: int, evaluate: Callable[[], dict], held_out: list) -> None:
        """Evaluate once per (step, stage), even when the run was killed right after."""
        if (step, stage) not in self.evaluated:
            r = evaluate()
            summaries = r.pop("summaries")
            for post, row in zip(held_out[:5], summaries):
                self.append("samples", {"step": step, "stage": stage, "document": post.document,
                                        "reference": post.reference, **row})
            self.append("eval", {"step": step, "stage": stage, **r})
        self.say(f"  held out, greedy, {'before training' if stage == 0 else f'after stage {stage}'}: "
                 + describe(read_lines(self.folder / "eval.jsonl")[-1], self.sized))
        self.shown = 0

    def step(self, step: int, stage, line: dict, seconds: float) -> None:
        """One line in metrics.jsonl for every step; one on the screen for every few, their mean."""
        row = {"step": step, "stage": stage.number, **line, "kl": line.get("kl"),
               "tokens_per_s": line["n_tokens"] / seconds, "seconds": seconds}
        del row["n_tokens"]
        self.append("metrics", row)
        self.recent.append(row)
        self.rows.append(row)
        self.last = step
        self.watch()
        if step % self.config.print_every and step != stage.end and step != self.first + 1:
            return
        parts = [(f"reward/{n}", n, max(7, len(n)), "{:.3f}") for n in stage.reward.names]
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
        evals, samples = read_lines(self.folder / "eval.jsonl"), read_lines(self.folder / "samples.jsonl")
        first = [row for row in samples if row["stage"] == 0]
        last = [row for row in samples if row["stage"] == evals[-1]["stage"]]
        for before, after in list(zip(first, last))[:3]:
            self.say(f"\n  post       {before['document']}\n  reference  {before['reference']}\n"
                     f"  before     {before['summary']} [{grade(before)}]\n"
                     f"  after      {after['summary']} [{grade(after)}]")
        goal = f", {self.goal}" if self.sized or "within_2" not in evals[-1] else ""
        self.say(f"\nheld-out greedy summaries{goal}"
                 f"\n  before  {describe(evals[0], self.sized)}\n  after   {describe(evals[-1], self.sized)}"
                 f"\nDone in {int(seconds // 60)}:{int(seconds % 60):02d}"
                 + ("" if peak is None else f", with at most {peak:.1f} GiB of memory")
                 + f". Look at {self.folder / 'curves.png'}; the model is in {self.folder / 'model'}.")


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
        said.append(f"ROUGE-L {r['rouge_l']:.3f}, METEOR {r['meteor']:.3f}, BLEU {r['bleu']:.3f}")
    return "; ".join([*said, f"distinct {r['distinct']:.2f}"])


def paid(r: dict, ending: str = "") -> str:
    """"reward 0.52 (rouge_l 0.74, length -0.07)", of the keys with this ending: "" or "@BUDGET"."""
    parts = {name.partition("@")[0].removeprefix("reward/"): value for name, value in r.items()
             if name.startswith("reward/") and name.partition("@")[2] == ending.removeprefix("@")}
    listed = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
    return f"reward {r['reward' + ending]:.3f}" + (f" ({listed})" if len(parts) > 1 else "")


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a JSONL file; a last one cut by a kill is no line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
