"""The SQUISH benchmark: how much do a model's summaries save of their documents, within a budget?

    python -m studies.squish_benchmark --models tiny runs/tiny-2 --budgets 0.1,0.2
    python -m studies.squish_benchmark --models "http://localhost:11434/v1#qwen3:1.7b" \\
        --references Qwen/Qwen3-1.7B-Base --data news.jsonl --max-document 4096

A model is a run, a model folder, a hub name, or URL#NAME, which is NAME behind any OpenAI-compatible server (with
$OPENAI_API_KEY). Beside them stand four that no model wrote: the document's first characters, its reference summary,
another document's, each cut to the budget, and none at all.

A failed summary counts 0 in the mean, and so does one over budget; neither is left out. A server that gives no answer
at all, or goes away, is not measured: the table says why, and the command fails. What was written or measured once is
kept on disk, by everything that it depends on, and not asked for again.
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from config import Config, parse_budgets
from eval import complete, find_model
from model import load
from plumbing.folder import find_folder, with_words, write_file, write_text
from plumbing.posts import Post, load_posts
from plumbing.server import Kept, Refused, connect
from plumbing.significance import interval
from squish import TEMPLATE, UNITS, allowance, fits, shorten, size, squish
from task import (
    CLOSE,
    REQUEST,
    TEMPLATES,
    UNIT_WORDS,
    completion_limit,
    extract,
    fill,
    make_task,
    read_answer,
)

PROMPT_VERSION = hashlib.sha256((REQUEST + TEMPLATES["tagged"] + TEMPLATES["notes"]).encode()).hexdigest()[:8]
BASELINES = ("first", "reference", "other", "empty")


def identity(name: str) -> str:
    """What stands for a model in the cache: a folder, and size and time of its weights, which may be trained again."""
    folder = find_folder(find_model(name)[0])
    files = sorted(folder.glob("*.safetensors"))
    return f"{folder.resolve()} {[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]}"


# --- who writes summaries ---------------------------------------------------------------------------------------------


def by_server(name: str, posts: list[Post], budget, config: Config, args, kept: Kept, n_tokens: int) -> tuple:
    """-> ({(post index, sample): answer or None} of URL#NAME; why there is none to some, or None)."""
    url, _, model = name.partition("#")
    found, todo = {}, []
    for i, post in enumerate(posts):
        target = int(allowance(args.tokenizer, post.document, budget, config.budget_unit))
        unit = UNIT_WORDS[config.budget_unit]
        for k in range(args.samples):
            key = ("written", name, PROMPT_VERSION, budget, config.budget_unit, post.document, k, args.temperature,
                   n_tokens)
            found[i, k] = kept.get(*key)
            if not isinstance(found[i, k], str) or not found[i, k].strip():  # kept before such were refused
                found[i, k] = None
                todo.append((i, k, key, fill(REQUEST, post, target, unit)))
    if not todo:
        return found, None
    server, why = connect(url, model, os.environ.get("OPENAI_API_KEY", "")), None

    def work(item):
        i, k, _, system = item
        return server.chat(system, posts[i].document, max_tokens=n_tokens, temperature=args.temperature, seed=k,
                           close=CLOSE)

    for n, ((i, k, key, _), answer) in enumerate(server.together(work, todo, args.jobs), 1):
        if isinstance(answer, Refused):  # a failure is not kept: next time it is asked again
            why = answer if why is None or answer.final else why  # rather what ended all than what spared one
        else:
            found[i, k] = answer
            kept.put(answer, *key)
        progress(f"{name} @{budget}: {n} of {len(todo)}")
    return found, why


def by_folder(name: str, posts: list[Post], budget, config: Config, args, kept: Kept, n_tokens: int) -> dict:
    """{(post index, sample): completion} of a model that runs here."""
    found, todo, who = {}, [], identity(name)
    for k in range(args.samples):
        for i, post in enumerate(posts):
            key = ("written", who, PROMPT_VERSION, config.template, budget, config.budget_unit, post.document, k,
                   args.temperature, n_tokens)
            found[i, k] = kept.get(*key)
            if found[i, k] is None:
                todo.append((i, k, key))
    if todo:
        model, tokenizer = with_words(name, *load(find_model(name)[0]))
        for k in range(args.samples):
            mine = [(i, key) for i, sample, key in todo if sample == k]
            prompts = [make_task(tokenizer, posts[i], config, budget).prompt for i, _ in mine]
            for at in range(0, len(mine), 64):
                groups = complete(model, tokenizer, prompts[at:at + 64], n_tokens, stop_text=CLOSE,
                                  temperature=args.temperature, seed=k)
                for (i, key), group in zip(mine[at:at + 64], groups):
                    found[i, k] = group.texts[0]
                    kept.put(found[i, k], *key)
                progress(f"{name} @{budget}: {at + len(mine[at:at + 64])} of {len(mine)}")
    return found


def another(posts: list[Post], i: int) -> str:
    """The nearest reference before post i's that is not its own; "" where there is none."""
    others = (posts[i - n].reference for n in range(1, len(posts)))
    return next((text for text in others if text and text != posts[i].reference), "")


def baseline(name: str, posts: list[Post], budget, config: Config, tokenizer) -> list[str | None]:
    """A summary of each post that no model wrote, cut to the budget."""
    texts = {"first": [post.document for post in posts], "reference": [post.reference for post in posts],
             "other": [another(posts, i) for i in range(len(posts))], "empty": [""] * len(posts)}[name]
    result = []
    for post, text in zip(posts, texts):
        room = int(allowance(tokenizer, post.document, budget, config.budget_unit))
        result.append((text[:room] if config.budget_unit == "chars" else shorten(tokenizer, text, room)) or None)
    return result


# --- what they are worth ----------------------------------------------------------------------------------------------


def measure(posts: list[Post], summaries: dict, budget, unit: str, scorers: list, kept: Kept) -> dict:
    """{(post, sample): value}: the mean SQUISH of the scorers, (identity, model, tokenizer) each."""
    values = dict.fromkeys(summaries, 0.0)
    for n, (i, post) in enumerate(enumerate(posts), 1):
        mine = {at: s for at, s in summaries.items() if at[0] == i}
        for who, model, tokenizer in scorers:
            keys = {at: ("squish", who, TEMPLATE, post.document, s, budget, unit) for at, s in mine.items()}
            known = {at: kept.get(*key) for at, key in keys.items()}
            todo = [at for at, value in known.items() if value is None]
            if todo:
                for at, value in zip(todo, squish(model, tokenizer, post.document, [mine[at] for at in todo], budget,
                                                  unit)):
                    kept.put(value, *keys[at])
                    known[at] = value
            for at, value in known.items():
                values[at] += value / len(scorers)
        progress(f"measured {n} of {len(posts)} @{budget}")
    return values


def score(name: str, posts: list[Post], budget, config: Config, args, scorers: list, kept: Kept) -> dict:
    """One row of the table: a model at a budget."""
    tokenizer, why = scorers[0][2], None
    if name in BASELINES:
        summaries = {(i, 0): s for i, s in enumerate(baseline(name, posts, budget, config, tokenizer))}
    else:
        n_tokens = completion_limit(tokenizer, posts, config)
        if "#" in name:
            n_tokens = args.max_new_tokens or max(1024, n_tokens)  # some think before they write
            answers, why = by_server(name, posts, budget, config, args, kept, n_tokens)
            if why and (why.final or not any(answers.values())):  # a part would pass for the whole
                return {"model": name, "budget": budget, "squish": None, "n": len(posts), "failed": 1.0,
                        "why": str(why), "summaries": []}
            summaries = {at: None if s is None else extract(s, opened=False) for at, s in answers.items()}
        else:
            config = replace(config, template=args.template or find_model(name)[1].get("template", config.template))
            answers = by_folder(name, posts, budget, config, args, kept, n_tokens)
            summaries = {at: read_answer(s, config.template) for at, s in answers.items()}
    summaries = {at: s or None for at, s in summaries.items()}
    values = measure(posts, summaries, budget, config.budget_unit, scorers, kept)
    over = {(i, k) for (i, k), s in summaries.items()
            if s and not fits(tokenizer, posts[i].document, s, budget, config.budget_unit)}
    samples = max(k for _, k in summaries) + 1
    each = np.array([[values[i, k] for k in range(samples)] for i in range(len(posts))]).mean(1)  # [P]
    low, high = interval(each[None]) if len(posts) > 1 else (None, None)  # one document shows no spread
    used = [size(tokenizer, s, config.budget_unit)
            / max(1.0, allowance(tokenizer, posts[i].document, budget, config.budget_unit))
            for (i, _), s in summaries.items() if s]
    failed = fmean(s is None for s in summaries.values())
    return {"model": name, "budget": budget, "squish": float(each.mean()), "low": low, "high": high, "n": len(posts),
            "coverage": 1 - failed - len(over) / len(summaries), "failed": failed, "over": len(over) / len(summaries),
            "used": fmean(used or [0.0]), "why": str(why or ""),
            "summaries": [{"id": posts[i].id, "sample": k, "summary": s, "squish": values[i, k]}
                          for (i, k), s in summaries.items()]}


def table(rows: list[dict]) -> str:
    """Markdown, the best first at the smallest budget."""
    lines = ["| model | budget | SQUISH (95%) | coverage | failed | over budget | budget used |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    measured = [r for r in rows if r["squish"] is not None]
    for r in sorted(measured, key=lambda r: (r["budget"], -r["squish"])):
        why = f" ({r['why']})".replace("|", "/") if r.get("why") else ""
        spread = "" if r["low"] is None else f" ({r['low']:.3f}..{r['high']:.3f})"
        lines.append(f"| {r['model']} | {r['budget']} | {r['squish']:.3f}{spread} | "
                     f"{r['coverage']:.0%} | {r['failed']:.0%}{why} | {r['over']:.0%} | {r['used']:.0%} |")
    for r in rows:
        if r["squish"] is None:
            lines.append(f"| {r['model']} | {r['budget']} | not measured | | {r['why'].replace('|', '/')} | | |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Bars with their intervals, a group of bars a model, a colour a budget."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names, budgets = list(dict.fromkeys(r["model"] for r in rows)), sorted({r["budget"] for r in rows})
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.3 * len(names) * len(budgets)), layout="constrained")
    height = 0.8 / len(budgets)
    for b, budget in enumerate(budgets):
        mine = [r for r in rows if r["budget"] == budget]
        x = np.array([r["squish"] for r in mine])
        error = None if mine[0]["low"] is None else np.abs(np.array([[r["low"], r["high"]] for r in mine]).T - x)
        ax.barh([names.index(r["model"]) + (b - (len(budgets) - 1) / 2) * height for r in mine], x, height,
                xerr=error, color=f"C{b}", label=f"budget {budget}", error_kw={"lw": 1, "capsize": 2})
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlabel("SQUISH: share of the document's bits that the summary saves, 95% intervals over documents")
    ax.legend(fontsize=8)
    ax.grid(axis="x", alpha=0.2)
    write_file(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.squish_benchmark", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny"], metavar="MODEL",
                        help="runs, model folders, hub names, or URL#NAME")
    parser.add_argument("--budgets", default="0.1,0.2", help="sizes of a summary: shares (0.1) or numbers (200)")
    parser.add_argument("--unit", default="chars", choices=UNITS, help="what a budget counts")
    parser.add_argument("--data", default="tiny", help="documents: tiny, a folder, a .jsonl file or a hub data set")
    parser.add_argument("--split", default="test", help="which file of a folder (default: test)")
    parser.add_argument("--document-field", default="", help="field that holds the document (default: guessed)")
    parser.add_argument("--summary-field", default="", help="field that holds the reference (default: guessed)")
    parser.add_argument("--n", type=int, default=100, help="only the first N documents")
    parser.add_argument("--min-chars", type=int, default=0, help="leave out documents of fewer characters")
    parser.add_argument("--max-document", type=int, default=0, help="cut documents to this many tokens")
    parser.add_argument("--references", default="tiny", help="models that measure, with commas between")
    parser.add_argument("--template", default="", help="prompt of local models (default: their run's, or tagged)")
    parser.add_argument("--samples", type=int, default=1, help="summaries of each document by each model")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest summary")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="where a summary is cut (0: by the budget)")
    parser.add_argument("--jobs", type=int, default=8, help="requests to a server at a time")
    parser.add_argument("--cache", default="runs/squish.sqlite", help="what was written and measured before")
    parser.add_argument("--out", default="runs/squish", help="folder of table.md, scores.jsonl and chart.png")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # as in train.py
    connect.cache_clear()  # a server that was away may be back
    try:
        if min(args.n, args.samples, args.jobs) < 1 or args.temperature < 0:
            raise ValueError("--n, --samples and --jobs must be at least 1, --temperature at least 0.")
        if args.samples > 1 and args.temperature == 0:
            raise ValueError("--samples of a greedy model are all the same: give a --temperature.")
        config = Config(max_new_tokens=args.max_new_tokens, budgets=args.budgets, budget_unit=args.unit,
                        template="tagged")
        budgets = parse_budgets(args.budgets)
        scorers = [(identity(name), *with_words(name, *load(find_model(name)[0])))
                   for name in args.references.split(",")]
        args.tokenizer = scorers[0][2]
        posts = load_posts(args.data, args.split, args.document_field or None, args.summary_field or None,
                           max_posts=args.n, min_chars=args.min_chars)
        if args.max_document:
            posts = [replace(post, document=shorten(args.tokenizer, post.document, args.max_document))
                     for post in posts]
        there = {"first": True, "empty": True, "reference": any(post.reference for post in posts),
                 "other": any(another(posts, i) for i in range(len(posts)))}
        names = [*args.models, *(name for name in BASELINES if there[name])]
        kept, rows = Kept(Path(args.cache)), []
        for name in names:
            rows += [score(name, posts, budget, config, args, scorers, kept) for budget in budgets]
            progress("")
        out = Path(args.out)
        text = table(rows)
        write_text(out / "table.md", text)
        write_text(out / "scores.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        draw([r for r in rows if r["squish"] is not None], out / "chart.png")
    except (ValueError, OSError) as e:
        progress("")
        print(f"squish_benchmark: {e}", file=sys.stderr)
        return 1
    print(f"{len(posts)} documents of {args.data}, measured by {args.references}; failed and over budget counts "
          f"0.\n\n{text}\nSummaries and chart are in {out}.")
    silent = {r["model"]: r["why"] for r in rows if r["squish"] is None}
    for name, why in silent.items():
        print(f"squish_benchmark: {name} could not be measured ({why}): mend that, or leave it out; what it has "
              f"answered is kept. A server's models are URL#NAME, and OPENAI_API_KEY is its key.", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
