"""What a model is worth: greedy summaries of held-out posts, and what can be counted about them.

    python eval.py tiny runs/tiny-1            # any mix of model folders and runs, one row each

The training loop calls `evaluate` before, between and after its stages, on validation posts; this command takes the
test posts, or those that the run held out where there are no others. It reads a run's posts as the run read them:
fields, shortest and longest posts, where documents are cut. So --split val, or a run on one file, gives the run's last
line again. Greedy means the likeliest token at each step. There is no chance in it, so two models can be compared on
few posts; but it is not what GRPO trains, which is the mean over what the policy samples. Greedy summaries are usually
the better ones.

Look first at the run's own reward and its parts: what training bought. Then at the metrics that it was not paid by: the
price. Then read summaries (--show 5): numbers do not say what changed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, pstdev

from config import Config, parse_stages, reading, reward_names
from metrics import bleu, copy_rate, count_names, distinct, meteor, repetition, rouge_l, templated, twice
from model import load
from plumbing.folder import read_json, with_words
from plumbing.hub import VALIDATION
from plumbing.memory import Full, in_batches
from plumbing.posts import TINY, Post, has_splits, load_posts, load_split, posts_that_fit, say_differences
from rewards import NEED_MODEL, NEED_REFERENCE
from rollout import Group, sample
from squish import fits, shorten, size
from task import (
    CLOSE,
    budgets_of,
    choose_template,
    completion_limit,
    content_lengths,
    describe_goal,
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
           ("copy_rate", "copied", 7, "{:.1%}"), ("invented", "invented", 8, "{:.1%}"), ("names", "names", 5, "{:.1f}"),
           ("stopped", "stopped", 8, "{:.1%}"), ("over", "over", 6, "{:.1%}"),
           ("missing", "missing", 7, "{:.1%}"), ("reward", "reward", 7, "{:.3f}"))
# Settings of a run that the command may say anew: {field of Config: what its flag means}.
OWN = {"max_new_tokens": "where a summary is cut; 0: twice the target", "template": "prompt template",
       "document_field": "field that holds the text", "summary_field": "field that holds the summary",
       "min_chars": "leave out posts of fewer characters; from 1 on also rows without a text",
       "max_document": "cut documents to this many tokens", "max_prompt": "leave out posts of longer prompts"}


def fit_posts(model, tokenizer, splits: Sequence[Sequence[Post]], config) -> list[tuple[list[Post], list[list[int]]]]:
    """Splits as they were read -> for each (the posts that fit, the longest prompt that each of them may get).

    Documents are cut to --max-document, prompts beyond --max-prompt left out, what then does not fit is refused. And
    where nobody says how long a completion may be, config.max_new_tokens is set. Training and evaluation share this.
    """
    if config.max_document:
        splits = [[replace(post, document=shorten(tokenizer, post.document, config.max_document)) for post in posts]
                  for posts in splits]
    config.max_new_tokens = max(completion_limit(tokenizer, posts, config) for posts in splits)
    if config.overlong >= config.max_new_tokens:
        raise ValueError(f"--overlong {config.overlong}: completions are cut at {config.max_new_tokens} tokens, so all "
                         f"would be too long. Take a smaller zone, or raise --max-new-tokens.")

    def longest_prompt(post: Post) -> list[int]:
        return max((make_task(tokenizer, post, config, budget).prompt for budget in budgets_of(config)), key=len)

    return [posts_that_fit(posts, longest_prompt, max_prompt=config.max_prompt, new_tokens=config.max_new_tokens,
                           context=model.config.max_position_embeddings) for posts in splits]


def complete(model, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int, stop_text: str = "",
             batch: int = 64, temperature: float = 0.0, seed: int = 0, act: Callable | None = None) -> list[Group]:
    """One completion of each prompt, in the prompts' order; greedy unless there is a temperature.

    `batch` prompts go through the model together, those of like length, so that little is padded; fewer where memory
    does not suffice. It changes no result.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def complete_some(some: Sequence[int]) -> list[Group]:
        return (act or sample)(model, [prompts[i] for i in some], G=1, max_new_tokens=max_new_tokens,
                               temperature=temperature, seed=seed, tokenizer=tokenizer, stop_text=stop_text)

    groups = dict(zip(order, in_batches(order, batch, complete_some)))
    return [groups[i] for i in range(len(prompts))]


def evaluate(model, tokenizer, posts: Sequence[Post], config, scorers: Sequence = (), batch: int = 64,
             act: Callable | None = None) -> dict:
    """Greedy summaries of all posts -> what docs/read-your-run.md explains, and the summaries themselves.

    The same tasks, the same reading of the answers and the same rewards as in training: `reward` and `reward/NAME` are
    those of the run's last stage, at every evaluation, so that before and after mean the same. Beside them stand all
    metrics. Where the template has a budget, each number is the mean over --budgets, and NAME@BUDGET that of one.
    `scorers`: the (model, tokenizer) pairs that measure the rewards in NEED_MODEL. `act`: another backend's `sample`.
    "summaries": a row for each post (and budget), with id, summary, length and what it scored. An empty summary counts
    like any other.
    """
    stages = parse_stages(config.stages)
    config = replace(config, template=config.template or choose_template(model, tokenizer, reward_names(stages)))
    # One cut for all budgets; --overlong counts from it, too.
    config.max_new_tokens = completion_limit(tokenizer, posts, config)
    results, rows = {}, []
    for budget in budgets_of(config):
        # A group of one for each post. What compares the members of a group (`distinct`, the worst total, the penalty)
        # has nobody to compare with: such parts of a reward mean something else here than in training.
        tasks = [make_task(tokenizer, post, config, budget) for post in posts]
        groups = complete(model, tokenizer, [task.prompt for task in tasks], config.max_new_tokens,
                          CLOSE if has_tag(config.template) else "", batch, act=act)
        means = score(groups, tasks, stages[-1].reward, config, tokenizer, scorers)
        means.pop("reward_std")  # of groups of one
        means["stopped"] = fmean(bool(group.stopped[0]) for group in groups)
        found = [row_of(group, task, config, tokenizer) for group, task in zip(groups, tasks)]
        results[budget] = means | summarise(found, posts)
        rows += found
    # Without budgets there is one set of numbers. With them, the plain name is the mean over all, and each budget's own
    # number stands beside it.
    result = {"n": len(posts), "compared": sum(bool(post.reference) for post in posts)}
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
    said, false = count_names(summary, task.post.document)
    row = {"id": task.post.id, "summary": summary, "length": content_lengths(group)[0], "reward": group.rewards[0],
           **{f"reward/{name}": values[0] for name, values in group.parts.items()}, "names": said,
           "invented": false / max(1, said)}
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

    Posts without a reference of their own count in all but rouge_l, meteor and bleu. `names` stands beside `invented`,
    because who names nobody invents nothing.
    """
    texts = [row["summary"] for row in rows]
    compared = [row for row in rows if "rouge_l" in row]  # posts that have a reference
    means = {name: fmean(row[name] for row in compared) for name in METRICS if compared}
    return {**means, "length_std": pstdev(row["length"] for row in rows),
            "distinct": distinct(texts), "templated": templated([[text] for text in texts]),
            "repetition": fmean(map(repetition, texts)), "twice": fmean(map(twice, texts)),
            **{name: fmean(row[name] for row in rows) for name in ("names", "invented")},
            "nothing_invented": fmean(row["invented"] == 0 for row in rows),
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
    if args.data:  # what the run's own data call their fields says nothing about others
        config = replace(config, document_field="", summary_field="", max_posts=0)
    said = {name: value for name in OWN if (value := getattr(args, name)) is not None}
    return replace(config, **said)


def posts_of(config: Config, args: argparse.Namespace) -> tuple[list[Post], int | None]:
    """-> (test posts: those that are asked for, or the run's own; how many of those that fit are measured, None: all).

    Never a post that the run has learnt from, unless it is asked for by name. Where there is no test split, they are
    the posts that the run itself held out, as many as it measured: its last line comes again, to the digit.
    """
    how = reading(config)
    # How many are read of other posts than the run's own is a matter of this command. Of its own, those that did not
    # fit were left out before they were counted.
    if args.data:
        return load_posts(args.data, args.split or "test", **how | {"max_posts": args.n or 0}), None
    if has_splits(config.data) and not config.eval_data:
        if args.split in VALIDATION:
            return load_posts(config.data, args.split, **how), args.n or config.eval_posts
        if args.split:
            return load_posts(config.data, args.split, **how | {"max_posts": args.n or config.max_posts}), None
        if config.split != "test":
            with suppress(FileNotFoundError):
                return load_posts(config.data, "test", **how | {"max_posts": args.n or config.max_posts}), None
    return load_split(config.data, config.eval_data, split=config.split, **how)[1], args.n or config.eval_posts


def scorers_of(config: Config) -> list:
    """The models that measure squish and cost: those of --references, or the one that the run began with.

    They are loaded anew, for the run's own model has moved; under LoRA its base has not, but a merged folder hides it.
    """
    if NEED_MODEL.isdisjoint(reward_names(parse_stages(config.stages))):
        return []
    names = [name for name in (config.references or config.model).split(",") if name]
    return [with_words(name, *load(TINY if name == "tiny" else name)) for name in names]


def read_command(argv: list[str] | None) -> argparse.Namespace:
    """The command's flags. None: as the run had it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="a run, a model folder, or 'tiny'")
    parser.add_argument("--data", help="posts: tiny, a folder, a file or a hub data set (default: the run's own, "
                                       "or tiny)")
    parser.add_argument("--split", help="which split of a folder or hub data set (default: test, or what the run held "
                                        "out where there is none)")
    parser.add_argument("--target", type=int, help="wanted length in tokens (default: the run's own, or 30)")
    for name, what in OWN.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(getattr(Config, name)),
                            help=f"{what} (default: the run's own)")
    parser.add_argument("--n", type=int, help="only the first N posts")
    parser.add_argument("--show", type=int, default=0, help="print this many summaries of each model")
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1 or args.target is not None and args.target < 1:
        parser.error("--n and --target must be at least 1")
    if any(isinstance(value, int) and value < 0 for value in vars(args).values()):
        parser.error("no number can be negative")
    return args


def say_row(name: str, r: dict, posts: Sequence[Post], n_shown: int) -> None:
    """A row of the table, and the first summaries."""
    cells = [form.format(r[key]) if key in r else "-" for key, _, _, form in COLUMNS]
    print(f"{name:32}" + "".join(f"{cell:>{w + 1}}" for cell, (_, _, w, _) in zip(cells, COLUMNS)), flush=True)
    for row, post in zip(r["summaries"][:n_shown], posts):
        print(f"    {row['id']}: {row['summary']!r} ({row['length']} tokens)\n    for {post.reference!r}")


def main(argv: list[str] | None = None) -> int:
    """The command -> its exit code: a table with a row for each model; what a user can mend is one sentence."""
    # A console that cannot show "±" or an emoji should not end the command, not even --help.
    sys.stdout.reconfigure(errors="replace")
    args = read_command(argv)
    print(f"{'model':32}" + "".join(f"{title:>{width + 1}}" for _, title, width, _ in COLUMNS))
    measured, comparing = {}, False
    try:
        for name in args.models:
            folder, run = find_model(name)
            config = config_of(run, args)
            model, tokenizer = with_words(folder, *load(folder))  # in float32, whatever the folder holds
            names = reward_names(parse_stages(config.stages))
            config.template = config.template or choose_template(model, tokenizer, names)
            # Documents are cut and posts left out as in the run: else it would be measured on texts it never saw.
            posts, limit = posts_of(config, args)
            (posts, _), = fit_posts(model, tokenizer, [posts], config)
            if not (posts := posts[:limit]):
                raise ValueError(f"No post of {args.data or config.data} has a prompt of at most {config.max_prompt} "
                                 f"tokens: raise --max-prompt.")
            r = evaluate(model, tokenizer, posts, config, scorers_of(config))
            say_row(name, r, posts, args.show)
            task = f"{args.data or config.eval_data or config.data}, {describe_goal(config)}"
            measured[name] = (task, posts)
            comparing = comparing or not NEED_REFERENCE.isdisjoint(names)
        say_differences(measured, comparing)
    except (ValueError, OSError, Full) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
