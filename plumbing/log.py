"""What a run tells: the lines on the screen, and the files that they are read back from.

metrics.jsonl has a line a step, eval.jsonl one an evaluation, samples.jsonl the first summaries of each to read. Every
number in them is explained in README.md.
"""

import dataclasses
import json
from pathlib import Path
from statistics import fmean

from eval import describe, draw_curves, evaluate, evaluate_squish, read_lines
from plumbing.folder import write_text
from plumbing.words import find_wordnet, how_to_get_wordnet

PENALTIES = {"length": "length_penalty", "repetition": "repetition_penalty"}  # rewards logged under another name
# The progress line: key of metrics.jsonl, title, width, format.
COLUMNS = (("reward", "reward", 7, "{:.3f}"), ("length", "length", 6, "{:.1f}"), ("within_2", "±2", 5, "{:.0%}"),
           ("within_10pct", "±10%", 5, "{:.0%}"), ("over", "over", 5, "{:.0%}"), ("missing", "none", 5, "{:.0%}"),
           ("kl", "kl", 6, "{:.3f}"), ("entropy", "entropy", 7, "{:.2f}"),
           ("distinct", "distinct", 8, "{:.2f}"), ("templated", "templ", 5, "{:.0%}"),
           ("clip_frac", "clip", 5, "{:.0%}"), ("flat_groups", "flat", 5, "{:.0%}"), ("grad_norm", "grad", 5, "{:.2f}"),
           ("logp_gap", "gap", 6, "{:.0e}"), ("tokens_per_s", "tok/s", 6, "{:.0f}"))


class Log:
    """The run's files and the lines on the screen."""

    def __init__(self, folder: Path, config, stages: list, step: int):
        self.folder, self.config, self.stages, self.total = folder, config, stages, stages[-1].end
        self.by_model = any(stage.by_model for stage in stages)
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
        c, n = self.config, sum(p.numel() for p in model.parameters())
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) if c.lora else 0
        self.say(f"{c.model}: {n - adapters:,} parameters" + (f" and {adapters:,} in adapters" if c.lora else "")
                 + f", {model.config.model_type}. {len(posts):,} posts to train on, "
                 f"{len(held_out)} held out. {self.total} steps of {c.prompts} posts x {c.group} completions, "
                 + (f"budgets {c.budgets} {c.budget_unit}" if self.by_model else f"target {c.target} tokens")
                 + f". Everything goes to {self.folder}.")
        if find_wordnet() is None and not self.by_model:
            self.say(f"There is no WordNet on this machine ({how_to_get_wordnet()}; or WNSEARCHDIR names its folder): "
                     f"METEOR matches equal words and stems, no synonyms.")
        if self.first:
            self.say(f"Resumed after step {self.first}.")

    def evaluation(self, step: int, stage: int, model, tokenizer, held_out: list, judges: list) -> None:
        """Evaluate once per (step, stage), even when the run was killed right after."""
        if (step, stage) not in self.evaluated:
            r = evaluate_squish(model, tokenizer, held_out, self.config, judges) if judges else \
                evaluate(model, tokenizer, held_out, self.config)
            summaries = r.pop("summaries")
            for post, row in zip(held_out[:5], summaries):
                self.append("samples", {"step": step, "stage": stage, "document": post.document,
                                        "reference": post.reference, **row})
            self.append("eval", {"step": step, "stage": stage, **r})
        self.say(f"  held out, greedy, {'before training' if stage == 0 else f'after stage {stage}'}: "
                 + describe(read_lines(self.folder / "eval.jsonl")[-1]))
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
        parts = [PENALTIES.get(n, n) for n in stage.reward.names if n != "length"]
        columns = [COLUMNS[0], *((n, n, max(7, len(n)), "{:.3f}") for n in parts), *COLUMNS[1:]]
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

    def grade(self, row: dict) -> str:
        if "squish" not in row:
            return f"{row['length']} tokens"
        return f"SQUISH@{row['budget']} {row['squish']:.3f}, {row['used']:.0%} of the budget"

    def finish(self, seconds: float, peak: float | None) -> None:
        """Curves, and what the run did to the first held-out posts."""
        evals, samples = read_lines(self.folder / "eval.jsonl"), read_lines(self.folder / "samples.jsonl")
        draw_curves(self.folder, self.config, [stage.end for stage in self.stages])
        first = [row for row in samples if row["stage"] == 0]
        last = [row for row in samples if row["stage"] == evals[-1]["stage"]]
        for before, after in list(zip(first, last))[:3]:
            self.say(f"\n  post       {before['document']}\n  reference  {before['reference']}\n"
                     f"  before     {before['summary']} [{self.grade(before)}]\n"
                     f"  after      {after['summary']} [{self.grade(after)}]")
        goal = "" if "squish" in last[0] else f", target {self.config.target} tokens"
        self.say(f"\nheld-out greedy summaries{goal}"
                 f"\n  before  {describe(evals[0])}\n  after   {describe(evals[-1])}"
                 f"\nDone in {int(seconds // 60)}:{int(seconds % 60):02d}"
                 + ("" if peak is None else f", with at most {peak:.1f} GiB of memory")
                 + f". Look at {self.folder / 'curves.png'}; the model is in {self.folder / 'model'}.")
