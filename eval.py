"""What a model is worth: greedy summaries of held-out posts, and what can be counted about them.

    python eval.py tiny runs/tiny-1            # any mix of model folders and runs, one row each
    python eval.py squish --models tiny runs/tiny-2 --budgets 0.1,0.2           # the SQUISH benchmark: benchmark.py

The training loop calls `evaluate` before, between and after its stages, on validation posts; this command takes the
test posts.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np

from model import load
from plumbing.folder import read_json, write_file
from plumbing.posts import TINY, Post, has_splits, load_posts, load_split
from rewards import bleu, copy_rate, distinct, meteor, repetition, rouge_l, templated
from rollout import Group, sample
from squish import CLOSE, allowance, encode, ensemble, extract, fits, size
from task import TEMPLATES, choose_template, tokenize


@dataclass
class Config:
    """What an evaluation needs to know; `train.Config` has the same names."""

    target: int = 30  # wanted summary length, in tokens
    max_new_tokens: int = 0  # where a summary is cut; 0: twice the target
    template: str = ""  # of the prompt; "": whatever fits the model
    budgets: str = "0.1,0.2"  # for SQUISH: sizes of a summary, shares of the document or numbers
    budget_unit: str = "chars"


def write(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, batch: int = 64, stop_text: str = "",
          temperature: float = 0.0, seed: int = 0) -> list[Group]:
    """One completion for each of many prompts, greedy unless told, in the prompts' order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    groups = [group for at in range(0, len(order), batch)
              for group in sample(model, [prompts[i] for i in order[at:at + batch]], 1, max_new_tokens, temperature,
                                  seed=seed, tokenizer=tokenizer, stop_text=stop_text)]
    return [group for _, group in sorted(zip(order, groups), key=lambda pair: pair[0])]


def evaluate(model, tokenizer, posts: list[Post], config, batch: int = 64) -> dict:
    """Greedy summaries of all posts -> what the README's table of metrics explains, and the summaries themselves.

    n; length and length_std in tokens; within_2 and within_10pct, the shares of summaries at most 2 tokens and at most
    10% of the target away from it; rouge_l, meteor and bleu, means of the summaries' own scores against the references;
    stopped, the share that ended by itself; distinct, templated, repetition and copy_rate as in rewards.py, which tell
    of phrases that come again and again; summaries, one {id, summary, length, rouge_l, meteor, bleu} a post. An empty
    summary counts like any other: it is 0 tokens long.
    """
    template = config.template or choose_template(model, tokenizer)
    prompts = [tokenize(tokenizer, post, template, config.target) for post in posts]
    groups = write(model, tokenizer, prompts, config.max_new_tokens or 2 * config.target, batch)
    rows = [{"id": post.id, "summary": group.texts[0], "length": content_lengths(group)[0],
             **{metric.__name__: metric(group.texts[0], post.reference) for metric in (rouge_l, meteor, bleu)}}
            for post, group in zip(posts, groups)]
    lengths = [row["length"] for row in rows]
    return {"n": len(rows), "length": fmean(lengths), "length_std": pstdev(lengths), **within(lengths, config.target),
            **{name: fmean(row[name] for row in rows) for name in ("rouge_l", "meteor", "bleu")},
            "stopped": fmean(bool(group.stopped[0]) for group in groups),
            **style([row["summary"] for row in rows], posts), "summaries": rows}


def style(texts: list[str], posts: list[Post]) -> dict[str, float]:
    """What shows stock phrases, stammering and copying in one summary of each post."""
    return {"distinct": distinct(texts), "templated": templated([[text] for text in texts]),
            "repetition": fmean(map(repetition, texts)),
            "copy_rate": fmean(copy_rate(text, post.document) for text, post in zip(texts, posts))}


def parse_budgets(text: str) -> list[float | int]:
    """Sizes of a summary: "0.1,200" -> a tenth of the document, and 200 characters (or tokens)."""
    try:
        budgets = [float(b) if "." in b else int(b) for b in text.split(",")]
    except ValueError:
        budgets = [0]
    if not all(0 < b < math.inf for b in budgets):
        raise ValueError(f"--budgets {text}: write shares of the document with a point and sizes without, like "
                         f"0.05,0.1,200.")
    return budgets


def ask(tokenizer, post: Post, config, budget: float | int) -> tuple[list[int], int]:
    """The prompt that asks for a summary within the budget, and what the budget comes to for this post."""
    target = int(allowance(tokenizer, post.document, budget, config.budget_unit))
    unit = {"chars": "characters", "tokens": "tokens"}[config.budget_unit]
    return tokenize(tokenizer, post, config.template or "tagged", target, unit), target


def opened(config) -> bool:
    """Whether the prompt ends inside <summary>, so that a completion begins there."""
    return TEMPLATES[config.template or "tagged"].rstrip().endswith("<summary>")


def room_for(tokenizer, posts: list[Post], config) -> int:
    """Where to cut a completion and never a summary that keeps to its budget: half as much again, and the tag."""
    longest = max(posts, key=lambda post: len(post.document)).document
    most = max(allowance(tokenizer, longest, b, config.budget_unit) for b in parse_budgets(config.budgets))
    if config.budget_unit == "chars":
        most *= len(encode(tokenizer, longest).ids) / len(longest)
    return 16 + math.ceil(1.5 * most)


def evaluate_squish(model, tokenizer, posts: list[Post], config, references: list) -> dict:
    """Greedy summaries of all posts within each of the budgets -> SQUISH@budget, and what became of the summaries.

    For each budget b: squish@b, the mean over all posts, where a missing summary and one over budget count 0; over@b
    and missing@b, the shares of those; used@b, the mean size of the summaries that there are, as a share of the budget.
    Over all budgets: length in tokens, and what `style` finds; summaries, one row a post and budget. `references` are
    (model, tokenizer) pairs that measure.
    """
    result, rows = {"n": len(posts)}, []
    for budget in parse_budgets(config.budgets):
        asked = [ask(tokenizer, post, config, budget) for post in posts]
        groups = write(model, tokenizer, [prompt for prompt, _ in asked],
                       config.max_new_tokens or room_for(tokenizer, posts, config), stop_text=CLOSE)
        found = []
        for post, group, (_, target) in zip(posts, groups, asked):
            summary = extract(group.texts[0], opened(config))
            value, = ensemble(references, post.document, [summary], budget, config.budget_unit)
            used = size(tokenizer, summary or "", config.budget_unit) / max(1, target)
            found.append({"id": post.id, "budget": budget, "summary": summary or "", "squish": value, "used": used,
                          "over": bool(summary) and not fits(tokenizer, post.document, summary, budget,
                                                             config.budget_unit),
                          "missing": not summary, "length": int(group.lengths[0])})
        result |= {f"squish@{budget}": fmean(row["squish"] for row in found),
                   f"over@{budget}": fmean(row["over"] for row in found),
                   f"missing@{budget}": fmean(row["missing"] for row in found),
                   f"used@{budget}": fmean([row["used"] for row in found if not row["missing"]] or [0.0])}
        rows += found
    texts = [row["summary"] for row in rows]
    return result | {"length": fmean(row["length"] for row in rows),
                     **style(texts, posts * (len(texts) // len(posts))), "summaries": rows}


def content_lengths(group: Group) -> list[int]:
    """Tokens of each completion, as the rewards see them: a blank one has none, however many newlines it sampled."""
    return [n if text.strip() else 0 for n, text in zip(group.lengths.tolist(), group.texts)]


def within(lengths: list[int], target: int) -> dict[str, float]:
    """The two shares of lengths near the target.

    >>> within([30, 32, 35, 64], target=32)
    {'within_2': 0.5, 'within_10pct': 0.75}
    """
    off = [abs(n - target) for n in lengths]
    return {"within_2": fmean(d <= 2 for d in off), "within_10pct": fmean(d <= 0.1 * target for d in off)}


def describe(r: dict) -> str:
    budgets = [name.partition("@")[2] for name in r if name.startswith("squish@")]
    if budgets:
        return "; ".join(f"SQUISH@{b} {r[f'squish@{b}']:.3f} (over budget {r[f'over@{b}']:.0%}, missing "
                         f"{r[f'missing@{b}']:.0%})" for b in budgets) + f"; distinct {r['distinct']:.2f}"
    return (f"{r['within_10pct']:.0%} within ±10% of the target, {r['within_2']:.0%} within ±2 tokens; "
            f"length {r['length']:.1f} ± {r['length_std']:.1f}; ROUGE-L {r['rouge_l']:.3f}, METEOR {r['meteor']:.3f}, "
            f"BLEU {r['bleu']:.3f}; distinct {r['distinct']:.2f}")


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a JSONL file; a last one cut by a kill is no line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curves(folder: Path, config, stage_ends: list[int]) -> None:
    """metrics.jsonl and eval.jsonl of a run -> its curves.png: faint lines are steps, thick ones means over nine."""
    import matplotlib
    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    rows, evals = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")

    def curve(ax, name, title):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            return
        x, y = zip(*points)
        ax.plot(x, y, lw=0.7, alpha=0.35, color="C0")
        k = min(9, len(y))
        smooth = np.convolve(y, np.ones(k) / k, "valid")
        ax.plot(x[k - 1:], smooth, lw=1.8, color="C0")
        ax.set_title(title, fontsize=10)

    def dots(ax, name):
        label = "held out, greedy" + (f", budget {name.partition('@')[2]}" if "@" in name else "")
        ax.plot([e["step"] for e in evals], [e[name] for e in evals], "o", label=label,
                color=f"C{3 + len(ax.get_legend_handles_labels()[1])}")
        ax.legend(fontsize=8)

    curve(axes[0, 0], "reward", "reward of sampled completions")
    if rows and "over" in rows[0]:  # SQUISH: no length is wanted
        curve(axes[0, 1], "squish", "SQUISH")
        for b in config.budgets.split(","):
            dots(axes[0, 1], f"squish@{parse_budgets(b)[0]}")
        curve(axes[0, 2], "over", "share over budget")
        curve(axes[1, 0], "length", "length in tokens")
    else:
        curve(axes[0, 1], "length", f"length in tokens (target {config.target})")
        axes[0, 1].axhspan(0.9 * config.target, 1.1 * config.target, color="C2", alpha=0.2)
        dots(axes[0, 1], "length")
        curve(axes[0, 2], "within_10pct", "share within ±10% of the target")
        dots(axes[0, 2], "within_10pct")
        curve(axes[1, 0], "rouge_l", "ROUGE-L")
        dots(axes[1, 0], "rouge_l")
        axes[1, 0].set_title("ROUGE-L F1", fontsize=10)
    curve(axes[1, 1], "kl", "KL to the reference (nats a token)")
    curve(axes[1, 2], "entropy", "entropy (nats a token)")
    for ax in axes.flat:
        ax.set_xlabel("step", fontsize=8)
        ax.set_xlim(0, stage_ends[-1])
        ax.grid(alpha=0.2)
        for end in stage_ends[:-1]:
            ax.axvline(end, color="grey", lw=0.8, ls=":")
    write_file(folder / "curves.png", lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    if (argv := sys.argv[1:] if argv is None else argv)[:1] == ["squish"]:
        sys.exit("eval.py: the benchmark is python -m studies.squish_benchmark.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="a run, a model folder, or 'tiny'")
    parser.add_argument("--data", help="posts: tiny, a folder, a .jsonl file or a hub data set (default: the run's "
                                       "own, or tiny)")
    parser.add_argument("--split", default="test", help="which split of a folder or hub data set (default: test)")
    parser.add_argument("--target", type=int, help="wanted length in tokens (default: the run's own, or 30)")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="where a summary is cut (0: twice the target)")
    parser.add_argument("--template", default="", help="chatml, qwen3 or plain (default: whatever fits the model)")
    parser.add_argument("--n", type=int, help="only the first N posts")
    parser.add_argument("--show", type=int, default=0, help="print this many summaries of each model")
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1 or args.target is not None and args.target < 1:
        parser.error("--n and --target must be at least 1")
    sys.stdout.reconfigure(errors="replace")  # as in train.py
    print(f"{'model':32} {'n':>5} {'length':>12} {'+-2':>6} {'+-10%':>6} {'ROUGE-L':>8} {'METEOR':>7} "
          f"{'BLEU':>6} {'distinct':>8} {'copied':>7} {'stopped':>8}")
    try:
        for name in args.models:
            folder, run = find_model(name)
            # Another target needs another cut: a summary cut at the target would count as on target.
            config = Config(args.target or run.get("target", Config.target),
                            args.max_new_tokens or (0 if args.target else run.get("max_new_tokens", 0)),
                            args.template or run.get("template", ""))
            model, tokenizer = load(folder)
            data = args.data or run.get("eval_data") or run.get("data", "tiny")
            max_posts, min_chars = run.get("max_posts", 0), run.get("min_chars", 0)
            if args.data or run.get("eval_data") or has_splits(data):
                posts = load_posts(data, args.split, max_posts=args.n or max_posts, min_chars=min_chars)
            else:  # of the file that the run was trained on, the part held out
                posts = load_split(data, "", max_posts, min_chars)[1][:args.n]
            if tokenizer is None:
                raise ValueError(f"{folder} has no tokenizer.json, so its tokens cannot be read.")
            r = evaluate(model, tokenizer, posts, config)
            print(f"{name:32} {r['n']:5} {r['length']:6.1f} ±{r['length_std']:4.1f} {r['within_2']:6.1%} "
                  f"{r['within_10pct']:6.1%} {r['rouge_l']:8.3f} {r['meteor']:7.3f} {r['bleu']:6.3f} "
                  f"{r['distinct']:8.3f} {r['copy_rate']:7.1%} {r['stopped']:8.1%}", flush=True)
            for row, post in zip(r["summaries"][:args.show], posts):
                print(f"    {row['id']}: {row['summary']!r} ({row['length']} tokens)\n    for {post.reference!r}")
    except (ValueError, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 1
    return 0


def find_model(name: str) -> tuple[str | Path, dict]:
    """A run's folder -> (its model folder, its config); anything else -> (itself, {})."""
    path = Path(name)
    if name == "tiny":
        return TINY, {}
    if not (path / "metrics.jsonl").exists():
        return name, {}
    if not (path / "model").is_dir():
        raise FileNotFoundError(f"{path} has no model yet: the run was not finished. Continue it with "
                                f"python train.py --run {path.name} --resume.")
    return path / "model", read_json(path / "config.json")


if __name__ == "__main__":
    sys.exit(main())
