"""What a model is worth: summaries of held-out posts, and what can be counted about them.

    python eval.py tiny runs/tiny-1                        # any mix of model folders and runs
    python eval.py compare runs/tiny-1 runs/tiny-2         # are two runs different? docs/evaluation.md

The training loop calls `evaluate` before, between and after its stages, on validation posts; this command takes the
test posts, or those that the run held out where there are no others. It reads a run's posts as the run read them:
fields, shortest and longest posts, where documents are cut. So --split val, or a run on one file, gives the run's last
line again. Greedy means the likeliest token at each step. There is no chance in it, so two models can be compared on
few posts; but it is not what GRPO trains, which is the mean over what the policy samples (--samples K). Greedy
summaries are usually the better ones.

Look first at the run's own reward and its parts: what training bought. Then at the metrics that it was not paid by: the
price. Then read summaries (--show 5): numbers do not say what changed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, pstdev

from tokenizers import Tokenizer

from config import Config, parse_budgets, parse_stages, reading, reward_names
from judge import Judge, duels, judge_rows
from metrics import bleu, copy_rate, count_names, distinct, meteor, repetition, rouge_l, templated, twice
from model import Transformer, load
from plumbing.cli import open_console
from plumbing.compare import refuse_unlike, say_comparison
from plumbing.evaluation import OWN, find_model, read_flags, say_figures, say_head, say_row
from plumbing.folder import find_folder, read_tokenizer, with_words
from plumbing.hub import VALIDATION
from plumbing.memory import Full, in_batches
from plumbing.posts import TINY, Post, has_splits, load_posts, load_split, posts_that_fit, say_differences
from plumbing.power import Meter
from plumbing.progress import bar
from plumbing.results import near, order
from rewards import NEED_MODEL, NEED_REFERENCE
from rollout import Group, sample
from squish import ensemble, fits, shorten, size
from task import (
    CLOSE,
    Task,
    budgets_of,
    choose_template,
    completion_limit,
    content_lengths,
    describe_goal,
    has_budget,
    has_tag,
    make_task,
    read_answer,
    score,
    wanted_tokens,
)

# --- your experiment starts here: a metric compares a summary with its reference, higher meaning better ---
METRICS = {"rouge_l": rouge_l, "meteor": meteor, "bleu": bleu}


def fit_posts(model: Transformer, tokenizer: Tokenizer, splits: Sequence[Sequence[Post]],
              config: Config) -> list[tuple[list[Post], list[list[int]]]]:
    """Splits as they were read -> for each (the posts that fit, the longest prompt that each of them may get).

    Documents are cut to --max-document, prompts beyond --max-prompt left out, what then does not fit is refused. And
    where nobody says how long a completion may be, config.max_new_tokens is set. Training and evaluation share this.
    """
    if config.max_document:
        splits = [[replace(post, document=shorten(tokenizer, post.document, config.max_document)) for post in posts]
                  for posts in splits]
    budgets = has_budget(config.template)
    # A completion that is cut at its target counts as a hit, so there must be room to miss. With budget and tags it is
    # no hit, for its closing tag is missing.
    if (cut := config.max_new_tokens) and not (budgets and has_tag(config.template)):
        wanted = max(wanted_tokens(tokenizer, posts, config) for posts in splits)
        if cut <= 1.1 * wanted:
            raise ValueError(f"--max-new-tokens {cut} would cut summaries at the wanted size, about {wanted:.0f} tokens"
                             f", and count them as hits: take at least {int(1.1 * wanted) + 1}, or lower "
                             f"--{'budgets' if budgets else 'target'}.")
    config.max_new_tokens = max(completion_limit(tokenizer, posts, config) for posts in splits)
    if config.overlong >= config.max_new_tokens:
        raise ValueError(f"--overlong {config.overlong}: completions are cut at {config.max_new_tokens} tokens, so all "
                         f"would be too long. Take a smaller zone, or raise --max-new-tokens.")

    def longest_prompt(post: Post) -> list[int]:
        return max((make_task(tokenizer, post, config, budget).prompt for budget in budgets_of(config)), key=len)

    return [posts_that_fit(posts, longest_prompt, max_prompt=config.max_prompt, new_tokens=config.max_new_tokens,
                           context=model.config.max_position_embeddings) for posts in splits]


def complete(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
             stop_text: str = "", batch: int = 64, temperature: float = 0.0, seed: int = 0, G: int = 1,
             act: Callable | None = None) -> list[Group]:
    """G completions of each prompt, in the prompts' order; greedy unless there is a temperature.

    `batch` completions go through the model together, those of prompts of like length, so that little is padded; fewer
    where memory does not suffice. It changes no result.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def complete_some(some: Sequence[int]) -> list[Group]:
        groups = (act or sample)(model, [prompts[i] for i in some], G=G, max_new_tokens=max_new_tokens,
                                 temperature=temperature, seed=seed, tokenizer=tokenizer, stop_text=stop_text)
        step(len(some))
        return groups

    with bar("summaries of posts", len(prompts)) as step:
        groups = dict(zip(order, in_batches(order, max(1, batch // G), complete_some)))
    return [groups[i] for i in range(len(prompts))]


def evaluate(model: Transformer, tokenizer: Tokenizer, posts: Sequence[Post], config: Config, scorers: Sequence = (),
             batch: int = 64, samples: int = 0, seed: int = 0, act: Callable | None = None) -> dict:
    """Summaries of all posts -> what docs/read-your-run.md explains, and the summaries themselves.

    Greedy ones, or `samples` of each post, drawn at the run's temperature.

    The same tasks, the same reading of the answers and the same rewards as in training: `reward` and `reward/NAME` are
    those of the run's last stage, at every evaluation, so that before and after mean the same. Beside them stand all
    metrics. Where the template has a budget, each number is the mean over --budgets, and NAME@BUDGET that of one.
    `scorers`: the (model, tokenizer) pairs that measure the rewards in NEED_MODEL. `act`: another backend's `sample`.
    "summaries": a row for each summary, budget by budget and post by post, with id, length and what it scored. An empty
    summary counts like any other.
    """
    stages = parse_stages(config.stages)
    config = replace(config, template=config.template or choose_template(model, tokenizer, reward_names(stages)))
    # One cut for all budgets; --overlong counts from it, too.
    config.max_new_tokens = completion_limit(tokenizer, posts, config)
    results, rows = {}, []
    for budget in budgets_of(config):
        # Greedy: a group of one for each post. What compares the members of a group (`distinct`, the worst total, the
        # penalty) has nobody to compare with: such parts of a reward mean something else here than in training.
        tasks = [make_task(tokenizer, post, config, budget) for post in posts]
        groups = complete(model, tokenizer, [task.prompt for task in tasks], config.max_new_tokens,
                          CLOSE if has_tag(config.template) else "", batch,
                          config.temperature if samples else 0.0, seed, samples or 1, act)
        means = score(groups, tasks, stages[-1].reward, config, tokenizer, scorers)
        if not samples:
            means.pop("reward_std")  # of groups of one
        means["stopped"] = fmean(float(stopped) for group in groups for stopped in group.stopped)
        found = []
        for group, task in zip(groups, tasks):
            found += [row_of(group, task, config, tokenizer, g) for g in range(samples or 1)]
        results[budget] = means | summarise(found, posts)
        rows += found
    # Without budgets there is one set of numbers. With them, the plain name is the mean over all, and each budget's own
    # number stands beside it.
    result: dict[str, float] = {"n": len(posts), "compared": sum(bool(post.reference) for post in posts)}
    for name in next(iter(results.values())):
        result[name] = fmean(means[name] for means in results.values())
        if None not in results:
            result |= {f"{name}@{budget}": means[name] for budget, means in results.items()}
    return result | {"summaries": rows}


def row_of(group: Group, task: Task, config: Config, tokenizer: Tokenizer, g: int = 0) -> dict:
    """What is kept of one summary, the g-th of a group that has been scored.

    The metrics are computed whatever the reward was: a run that is paid by one of them is judged by the others.
    """
    summary = read_answer(group.texts[g], config.template) or ""
    said, false = count_names(summary, task.post.document)
    row = {"id": task.post.id, "summary": summary, "length": content_lengths(group)[g], "target": task.target,
           "stopped": bool(group.stopped[g]), "reward": (group.rewards or [])[g],
           **{f"reward/{name}": values[g] for name, values in group.parts.items()}, "names": said,
           "invented": false / max(1, said), "copy_rate": copy_rate(summary, task.post.document),
           "repetition": repetition(summary), "twice": twice(summary)}
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
    """Means over the summaries of all posts: the metrics, and what shows stock phrases, stammering and copying.

    Posts without a reference of their own count in all but rouge_l, meteor and bleu. `names` stands beside `invented`,
    because who names nobody invents nothing.
    """
    texts, each = [row["summary"] for row in rows], len(rows) // len(posts)
    compared = [row for row in rows if "rouge_l" in row]  # posts that have a reference
    means = {name: fmean(row[name] for row in compared) for name in METRICS if compared}
    return {**means, "length_std": pstdev(row["length"] for row in rows),
            "distinct": distinct(texts),
            "templated": templated([texts[at:at + each] for at in range(0, len(texts), each)]),
            **{name: fmean(row[name] for row in rows)
               for name in ("repetition", "twice", "copy_rate", "names", "invented")},
            "nothing_invented": fmean(row["invented"] == 0 for row in rows)}


# --- the command ------------------------------------------------------------------------------------------------------


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


def scorers_of(config: Config, asked: bool = False) -> list:
    """The models that measure squish and cost: those of --references, or the one that the run began with.

    They are loaded anew, for the run's own model has moved; under LoRA its base has not, but a merged folder hides it.
    """
    if NEED_MODEL.isdisjoint(reward_names(parse_stages(config.stages))) and not asked:
        return []
    names = [name for name in (config.references or config.model).split(",") if name]
    return [with_words(name, *load(TINY if name == "tiny" else name)) for name in names]


def read_command(argv: list[str] | None) -> argparse.Namespace:
    """The command's flags. None: as the run had it. A folder that is called compare is ./compare."""
    return read_flags(argv, __doc__, {name: type(getattr(Config, name)) for name in OWN})


@dataclass
class Measured:
    """A model that was evaluated: its greedy result and, with --samples, that of what it samples."""

    config: Config
    posts: list[Post]
    results: dict[str, dict]  # {"": greedy, ", sampled x K": ...}


def measure(name: str, args: argparse.Namespace, judge: Judge | None) -> Measured:
    """One model, evaluated as the command asks for it."""
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
    scorers, results = scorers_of(config, bool(args.squish)), {}
    # Greedy first. Then, where it was asked for, what the policy samples: the thing that GRPO has made better, and the
    # one in which a policy that has become sure of itself differs from one that has not.
    for samples in dict.fromkeys((0, args.samples)):
        with Meter() as meter:
            r = evaluate(model, tokenizer, posts, config, scorers, samples=samples, seed=args.seed)
        n = len(r["summaries"])
        r = {**r, "per_second": n / meter.seconds, "per_watt_hour": meter.watt_hours and n / meter.watt_hours}
        measure_more(r, posts, config, args, scorers, judge)
        results[f", {samples} sampled" if samples else ""] = r
    return Measured(config, posts, results)


def measure_more(r: dict, posts: Sequence[Post], config: Config, args: argparse.Namespace, scorers: Sequence,
                 judge: Judge | None) -> None:
    """What the command was asked for beside: SQUISH@BUDGET and a judge's scores go into the rows of summaries."""
    rows, at = r["summaries"], order(r["summaries"], len(posts))
    for budget in parse_budgets(args.squish) if args.squish else ():
        with bar(f"SQUISH@{budget}", len(posts)) as step:
            for i, post in enumerate(posts):
                mine = [row for row, of in zip(rows, at) if of == i]
                texts = [row["summary"] or None for row in mine]
                for row, value in zip(mine, ensemble(scorers, post.document, texts, budget, config.budget_unit)):
                    row[f"SQUISH@{budget}"] = value
                step()
    if judge:
        r["judge"] = judge_rows(judge, rows, [posts[i].document for i in at], [near(row, 0.1) for row in rows])


def material(name: str, args: argparse.Namespace) -> tuple[list[Post], str]:
    """The posts and the tokenizer of a model that is to be compared, read before anybody waits for an evaluation."""
    folder, run = find_model(name)
    posts, limit = posts_of(config_of(run, args), args)
    tokenizer = read_tokenizer(find_folder(folder))
    return posts[:limit], tokenizer.to_str() if tokenizer else ""


def main(argv: list[str] | None = None) -> int:
    """The command -> its exit code: a table with a row for each model; what a user can mend is one sentence."""
    open_console()  # one that cannot show "±" or an emoji should not end the command, not even --help
    args = read_command(argv)
    tasks, found, comparing = {}, {}, False
    try:
        judge = Judge(args.judge, args.judge_replies, args.jobs, args.judge_tokens, args.judge_seconds, args.cache,
                      args.judge_prices) if args.judge else None
        if args.comparing:  # what cannot be compared is refused before anybody waits
            refuse_unlike({name: material(name, args) for name in args.models})
        say_head()
        for name in args.models:
            found[name] = one = measure(name, args, judge)
            for kind, r in one.results.items():
                say_row(name + kind, r, one.posts, args.show)
            tasks[name] = (f"{args.data or one.config.eval_data or one.config.data}, {describe_goal(one.config)}",
                           one.posts)
            comparing = comparing or not NEED_REFERENCE.isdisjoint(reward_names(parse_stages(one.config.stages)))
        say_differences(tasks, comparing)
        # The rows above were for whoever waits. Now all numbers with their intervals, a model a column.
        results = {name + kind: r for name, one in found.items() for kind, r in one.results.items()}
        say_figures(results, {name + kind: one.posts for name, one in found.items() for kind in one.results},
                    Path(args.out))
        if args.comparing:
            say_comparison(found, {name: find_model(name)[1] for name in found}, Path(args.out),
                           (lambda triples: duels(judge, triples)) if judge and args.duels else None)
    except (ValueError, OSError, Full) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

# Next: judge.py, a language model as the judge
