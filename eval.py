"""What a model is worth: greedy summaries of held-out posts, and what can be counted about them.

    python eval.py tiny runs/tiny-1            # any mix of model folders and runs, one row each

The training loop calls `evaluate` before, between and after its stages, on validation posts; this command takes the
test posts. Greedy means the likeliest token at each step. There is no chance in it, so two models can be compared on
few posts; but it is not what GRPO trains, which is the mean over what the policy samples. Greedy summaries are usually
the better ones.

Look first at the run's own reward and its parts: what training bought. Then at the metrics that it was not paid by: the
price. Then read summaries (--show 5): numbers do not say what changed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, pstdev

from config import Config, parse_stages, reward_names
from metrics import bleu, copy_rate, distinct, meteor, repetition, rouge_l, templated
from model import load
from plumbing.folder import read_json
from plumbing.memory import Full, in_batches
from plumbing.posts import TINY, Post, has_splits, load_posts, load_split
from rewards import NEED_MODEL
from rollout import Group, sample
from squish import fits, size
from task import (
    CLOSE,
    budgets_of,
    choose_template,
    completion_limit,
    content_lengths,
    has_tag,
    make_task,
    read_answer,
    score,
)

# --- your experiment starts here: a metric compares a summary with its reference, higher meaning better ---
METRICS = {"rouge_l": rouge_l, "meteor": meteor, "bleu": bleu}
# The command's table: key of the result, title, width, format.
COLUMNS = (("n", "n", 5, "{}"), ("length", "length", 6, "{:.1f}"), ("length_std", "±", 5, "{:.1f}"),
           ("within_2", "±2", 6, "{:.1%}"), ("within_10pct", "±10%", 6, "{:.1%}"), ("rouge_l", "ROUGE-L", 8, "{:.3f}"),
           ("meteor", "METEOR", 7, "{:.3f}"), ("bleu", "BLEU", 6, "{:.3f}"), ("distinct", "distinct", 8, "{:.3f}"),
           ("copy_rate", "copied", 7, "{:.1%}"), ("stopped", "stopped", 8, "{:.1%}"), ("over", "over", 6, "{:.1%}"),
           ("missing", "missing", 7, "{:.1%}"), ("reward", "reward", 7, "{:.3f}"))


def complete(model, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int, stop_text: str = "",
             batch: int = 64, temperature: float = 0.0, seed: int = 0) -> list[Group]:
    """One completion of each prompt, in the prompts' order; greedy unless there is a temperature.

    `batch` prompts go through the model together, those of like length, so that little is padded; fewer where memory
    does not suffice. It changes no result.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def complete_some(some: Sequence[int]) -> list[Group]:
        return sample(model, [prompts[i] for i in some], G=1, max_new_tokens=max_new_tokens, temperature=temperature,
                      seed=seed, tokenizer=tokenizer, stop_text=stop_text)

    groups = dict(zip(order, in_batches(order, batch, complete_some)))
    return [groups[i] for i in range(len(prompts))]


def evaluate(model, tokenizer, posts: Sequence[Post], config, scorers: Sequence = (), batch: int = 64) -> dict:
    """Greedy summaries of all posts -> what docs/read-your-run.md explains, and the summaries themselves.

    The same tasks, the same reading of the answers and the same rewards as in training: `reward` and `reward/NAME` are
    those of the run's last stage, at every evaluation, so that before and after mean the same. Beside them stand all
    metrics. Where the template has a budget, each number is the mean over --budgets, and NAME@BUDGET that of one.
    `scorers`: the (model, tokenizer) pairs that measure the rewards in NEED_MODEL. "summaries": a row for each post
    (and budget), with id, summary, length and what it scored. An empty summary counts like any other.
    """
    stages = parse_stages(config.stages)
    config = replace(config, template=config.template or choose_template(model, tokenizer, reward_names(stages)))
    results, rows = {}, []
    for budget in budgets_of(config):
        # A group of one for each post. What compares the members of a group (`distinct`, the worst total, the penalty)
        # has nobody to compare with: such parts of a reward mean something else here than in training.
        tasks = [make_task(tokenizer, post, config, budget) for post in posts]
        groups = complete(model, tokenizer, [task.prompt for task in tasks],
                          completion_limit(tokenizer, posts, config),
                          CLOSE if has_tag(config.template) else "", batch)
        means = score(groups, tasks, stages[-1].reward, config, tokenizer, scorers)
        means.pop("reward_std")  # of groups of one
        means["stopped"] = fmean(bool(group.stopped[0]) for group in groups)
        found = [row_of(group, task, config, tokenizer) for group, task in zip(groups, tasks)]
        results[budget] = means | summarise(found, posts)
        rows += found
    # Without budgets there is one set of numbers. With them, the plain name is the mean over all, and each budget's own
    # number stands beside it.
    result = {"n": len(posts)}
    for name in next(iter(results.values())):
        result[name] = fmean(means[name] for means in results.values())
        if None not in results:
            result |= {f"{name}@{budget}": means[name] for budget, means in results.items()}
    return result | {"summaries": rows}


def row_of(group: Group, task, config, tokenizer) -> dict:
    """What is kept of one greedy summary; `group` has been scored.

    The metrics are computed whatever the reward was: a run that is paid by one of them is judged by the others.
    """
    summary = read_answer(group.texts[0], config.template) or ""
    row = {"id": task.post.id, "summary": summary, "length": content_lengths(group)[0], "reward": group.rewards[0],
           **{f"reward/{name}": values[0] for name, values in group.parts.items()}}
    if task.budget is not None:
        used = size(tokenizer, summary, config.budget_unit) / max(1, task.target)
        kept = fits(tokenizer, task.post.document, summary, task.budget, config.budget_unit)
        row |= {"budget": task.budget, "used": used, "over": bool(summary) and not kept}
    if has_tag(config.template):
        row["missing"] = not summary
    if task.post.reference:
        row |= {name: metric(summary, task.post.reference) for name, metric in METRICS.items()}
    return row


def summarise(rows: Sequence[dict], posts: Sequence[Post]) -> dict[str, float]:
    """Means over one summary of each post: the metrics, and what shows stock phrases, stammering and copying.

    Posts without a reference of their own count in all but rouge_l, meteor and bleu.
    """
    texts = [row["summary"] for row in rows]
    compared = [row for row in rows if "rouge_l" in row]  # posts that have a reference
    means = {name: fmean(row[name] for row in compared) for name in METRICS if compared}
    return {**means, "length_std": pstdev(row["length"] for row in rows),
            "distinct": distinct(texts), "templated": templated([[text] for text in texts]),
            "repetition": fmean(map(repetition, texts)),
            "copy_rate": fmean(copy_rate(text, post.document) for text, post in zip(texts, posts))}


# --- the command ------------------------------------------------------------------------------------------------------


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


def config_of(run: dict, args: argparse.Namespace) -> Config:
    """The run's own settings, where the command line does not say otherwise.

    So a run is measured on the task that it was trained for. A plain model gets the defaults.
    """
    own = {f.name: run[f.name] for f in fields(Config) if f.name in run}
    config = replace(Config(**own), stages=tuple(own.get("stages", Config.stages)))
    if args.target:  # another target needs another cut: a summary cut at the target would count as on target
        config = replace(config, target=args.target, max_new_tokens=0)
    return replace(config, max_new_tokens=args.max_new_tokens or config.max_new_tokens,
                   template=args.template or config.template)


def posts_of(config: Config, args: argparse.Namespace) -> list[Post]:
    """The posts that are asked for, as they are; else the run's own test posts, or what it held out of its file."""
    data = args.data or config.eval_data or config.data
    if args.data or config.eval_data or has_splits(data):
        return load_posts(data, args.split, max_posts=args.n or config.max_posts, min_chars=config.min_chars)
    return load_split(data, "", config.max_posts, config.min_chars)[1][:args.n]  # the part of the file held out


def scorers_of(config: Config) -> list:
    """The models that measure squish and cost: those of --references, or the one that the run began with.

    They are loaded anew, for the run's own model has moved; under LoRA its base has not, but a merged folder hides it.
    """
    if NEED_MODEL.isdisjoint(reward_names(parse_stages(config.stages))):
        return []
    return [load(TINY if name == "tiny" else name) for name in (config.references or config.model).split(",") if name]


def main(argv: list[str] | None = None) -> int:
    """The command -> its exit code: a table with a row for each model; what a user can mend is one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="a run, a model folder, or 'tiny'")
    parser.add_argument("--data", help="posts: tiny, a folder, a file or a hub data set (default: the run's own, "
                                       "or tiny)")
    parser.add_argument("--split", default="test", help="which split of a folder or hub data set (default: test)")
    parser.add_argument("--target", type=int, help="wanted length in tokens (default: the run's own, or 30)")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="where a summary is cut (0: twice the target)")
    parser.add_argument("--template", default="", help="prompt template (default: the run's own, or what fits)")
    parser.add_argument("--n", type=int, help="only the first N posts")
    parser.add_argument("--show", type=int, default=0, help="print this many summaries of each model")
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1 or args.target is not None and args.target < 1:
        parser.error("--n and --target must be at least 1")
    sys.stdout.reconfigure(errors="replace")  # as in train.py
    print(f"{'model':32}" + "".join(f"{title:>{width + 1}}" for _, title, width, _ in COLUMNS))
    try:
        for name in args.models:
            folder, run = find_model(name)
            config = config_of(run, args)
            model, tokenizer = load(folder)  # in float32, whatever the folder holds
            if tokenizer is None:
                raise ValueError(f"{folder} has no tokenizer.json, so its tokens cannot be read.")
            posts = posts_of(config, args)
            r = evaluate(model, tokenizer, posts, config, scorers_of(config))
            cells = [form.format(r[key]) if key in r else "-" for key, _, _, form in COLUMNS]
            print(f"{name:32}" + "".join(f"{cell:>{w + 1}}" for cell, (_, _, w, _) in zip(cells, COLUMNS)), flush=True)
            for row, post in zip(r["summaries"][:args.show], posts):
                print(f"    {row['id']}: {row['summary']!r} ({row['length']} tokens)\n    for {post.reference!r}")
    except (ValueError, OSError, Full) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
