"""The command line of eval.py, and what it prints and writes."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plumbing.command import to_resume
from plumbing.folder import read_json, write_text
from plumbing.posts import TINY
from plumbing.results import figures, file_name, histogram, order, table, write_rows


def prices(text: str) -> tuple[float, float]:
    """"0.15,0.6" -> dollars for a million tokens, in and out."""
    for_input, _, for_output = text.partition(",")
    return float(for_input), float(for_output)


# The command's row of a model: key of the result, title, width, format.
COLUMNS = (("n", "n", 5, "{}"), ("length", "length", 6, "{:.1f}"), ("length_std", "±", 5, "{:.1f}"),
           ("within_2", "±2", 6, "{:.1%}"), ("within_10pct", "±10%", 6, "{:.1%}"), ("rouge_l", "ROUGE-L", 8, "{:.3f}"),
           ("meteor", "METEOR", 7, "{:.3f}"), ("bleu", "BLEU", 6, "{:.3f}"), ("distinct", "distinct", 8, "{:.3f}"),
           ("copy_rate", "copied", 7, "{:.1%}"), ("invented", "invented", 8, "{:.1%}"), ("names", "names", 5, "{:.1f}"),
           ("stopped", "stopped", 8, "{:.1%}"), ("over", "over", 6, "{:.1%}"),
           ("missing", "missing", 7, "{:.1%}"), ("reward", "reward", 7, "{:.3f}"))
# Settings of a run that the command may say anew: {field of Config: what its flag means}.
OWN = {"max_new_tokens": "where a summary is cut; 0: twice the target", "template": "prompt template",
       "document_field": "field that holds the text", "summary_field": "field that holds the summary",
       "min_chars": "leave out posts of fewer characters; from 1 on also rows without a text",
       "max_document": "cut documents to this many tokens", "max_prompt": "leave out posts of longer prompts"}
FLAGS: dict[str, tuple[Callable, Any, str]] = {  # of the command itself: type, default, help
    "data": (str, None, "posts: tiny, a folder, a file or a hub data set (default: the run's own, or tiny)"),
    "split": (str, None, "which split of a folder or hub data set (default: test, or what the run held out where there "
                         "is none)"),
    "target": (int, None, "wanted length in tokens (default: the run's own, or 40)"),
    "n": (int, None, "only the first N posts"),
    "samples": (int, 0, "also draw this many summaries of each post at the run's temperature: what GRPO trains"),
    "seed": (int, 0, "decides what is drawn"),
    "squish": (str, "", "also measure SQUISH at these budgets, such as 0.1,0.2, whatever the run was paid for"),
    "show": (int, 0, "print this many summaries of each model"),
    "judge": (str, "", "URL#MODEL: let that model score every summary (OPENAI_API_KEY is its key)"),
    "duels": (int, 0, "1: compare asks the judge for the better of two summaries as well, in both orders"),
    "judge_replies": (int, 8, "answers that are averaged where the judge's server tells no probabilities"),
    "judge_tokens": (int, 2048, "where the judge's answer is cut; one that thinks needs more"),
    "judge_seconds": (int, 300, "how long one answer may take"),
    "judge_prices": (prices, None, "dollars for a million tokens in and out, such as 0.15,0.6: what it cost is said"),
    "jobs": (int, 8, "questions to the judge at a time"),
    "cache": (str, "runs/judge.sqlite", "what the judge has answered"),
    "out": (str, "runs/eval", "folder of the table and of a .jsonl with every summary"),
}


def find_model(name: str) -> tuple[str | Path, dict]:
    """A run's folder -> (its model folder, its config); anything else -> (itself, {})."""
    path = Path(name)
    if name == "tiny":
        return TINY, {}
    if not (path / "metrics.jsonl").exists():
        return name, {}
    if not (path / "model").is_dir():
        command = to_resume(path, read_json(path / "config.json").get("ranks", 1))
        raise FileNotFoundError(f"{path} has no model yet: the run was not finished. {command} goes on with it.")
    return path / "model", read_json(path / "config.json")


def read_flags(argv: list[str] | None, about: str, types: dict[str, type]) -> argparse.Namespace:
    """The command's flags. None: as the run had it. `types`: of the fields in OWN."""
    parser = argparse.ArgumentParser(prog="eval.py", description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL",
                        help="runs, model folders, hub names, or 'tiny'; the word 'compare' before them compares")
    for name, (kind, default, what) in FLAGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=what)
    for name, what in OWN.items():
        parser.add_argument("--" + name.replace("_", "-"), type=types[name], help=f"{what} (default: the run's own)")
    args = parser.parse_args(argv)
    args.comparing = args.models[0] == "compare"
    args.models = list(dict.fromkeys(args.models[args.comparing:]))
    if len(args.models) < 1 + args.comparing:
        parser.error("compare takes two runs or more")
    if any(value is not None and value < 1 for value in (
            args.n, args.target, args.jobs, args.judge_replies, args.judge_tokens, args.judge_seconds)):
        parser.error("--n, --target, --jobs and the judge's numbers must be at least 1")
    if any(isinstance(value, int) and value < 0 for value in vars(args).values()):
        parser.error("no number can be negative")
    if args.duels and not (args.judge and args.comparing):
        parser.error("--duels belongs to compare and needs a --judge")
    return args


def say_head() -> None:
    print(f"{'model':32}" + "".join(f"{title:>{width + 1}}" for _, title, width, _ in COLUMNS))


def say_row(name: str, r: dict, posts: Sequence, n_shown: int) -> None:
    """A row of the table, and the first summaries."""
    cells = [form.format(r[key]) if key in r else "-" for key, _, _, form in COLUMNS]
    print(f"{name:32}" + "".join(f"{cell:>{w + 1}}" for cell, (_, _, w, _) in zip(cells, COLUMNS)), flush=True)
    for row, at in list(zip(r["summaries"], order(r["summaries"], len(posts))))[:n_shown]:
        print(f"    {row['id']}: {row['summary']!r} ({row['length']} tokens)")
        if posts[at].reference:  # posts need not have one
            print(f"    for {posts[at].reference!r}")


def say_figures(results: dict[str, dict], posts: dict[str, Sequence], out: Path) -> None:
    """All numbers with their intervals, what lengths there are, what a judge was asked; and the files of it all.

    `results`: {model, and how its summaries were made: what `evaluate` says}; `posts`: those of each.
    """
    columns = {name: figures(r) for name, r in results.items()}
    print(f"\nMeans, with 95% bootstrap intervals over posts\n{table(columns)}")
    notes = []
    for name, r in results.items():
        print(f"\n{name}: how long the summaries are, in tokens that were sampled\n{histogram(r['summaries'])}")
        rows = [{"model": name, **row, "document": posts[name][at].document, "reference": posts[name][at].reference}
                for row, at in zip(r["summaries"], order(r["summaries"], len(posts[name])))]
        write_rows(out / f"{file_name(name)}.jsonl", rows)
        notes += [f"{name}: {say_judge(r['judge'])}"] if "judge" in r else []
    for note in notes:
        print("\n" + note)
    write_text(out / "table.md", "\n\n".join([table(columns, markdown=True), *notes]) + "\n")
    print(f"\nThe table and every summary are in {out}.")


def say_judge(found: dict) -> str:
    """By whom, by which prompts and how the scores were made, and how many there are not."""
    ways = ", ".join(f"{how} ({n} summaries)" for how, n in found["how"].items())
    said = [f"judged by {found['name']}, prompts {found['prompts']}: {ways or 'nothing to judge'}"]
    if found["mass"] is not None:
        said.append(f"the five digits cover {found['mass']:.1%} of the probability")
    said.append(f"{found['missing']} scores are missing" + (
        f", and the summaries that lack one are left out of composite and pass ({found['n']} have all four)"
        if found["missing"] else ""))
    said.append(f"{found['on_target']} summaries are within 10% of the target")
    used = found["used"]
    said.append(f"asked now: {used.get('answers', 0)} answers of {used.get('prompt_tokens', 0):,} tokens in and "
                f"{used.get('completion_tokens', 0):,} out"
                + (f", {used['dollars']:.2f} dollars" if "dollars" in used else "") + "; the rest was kept from before")
    if any("temperature None" in how for how in found["how"]):
        said.append("the server takes no temperature, so it was the server's own")
    return "; ".join(said) + "."
