"""What the policy is asked, how its answer is read, and what it is paid. A task of your own begins in this file.

    post        -> Task       a prompt and the size that is wanted                   make_task, TEMPLATES
    completion  -> summary    all of its text, or what stands between two tags       read_answer
    summaries   -> rewards    the stage's expression, for the G answers to a post    score

Training and evaluation share all three, so what a run is paid for is what it is measured by. The loop, the log and the
evaluation do not know which task it is: the words of the template decide that.

    {document}       the post
    {target}         the wanted length, in tokens; {goal} is nine tenths of it
    {unit}           a budget in its place: the summary may be as long as a share of its document (--budgets)
    <summary>        the answer stands between <summary> and </summary>, and a completion ends with the closing tag

Shapes: B prompts, G completions a prompt (the group), P prompt tokens.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np
from tokenizers import Tokenizer

from config import Config, parse_budgets, parse_stages, reward_names
from judge import paid
from metrics import distinct, invented, repetition, templated
from model import Transformer
from plumbing import ranks
from plumbing.posts import Post, load_posts
from plumbing.prompts import encode_prompt
from plumbing.thoughts import without_thoughts
from rewards import GROUP_REWARDS, NEED_MODEL, NEED_REFERENCE, NEED_TARGET, Reward
from rollout import Group
from squish import allowance, cost, ensemble, fits, most_tokens, size

__all__ = ["TEMPLATES", "Post", "Task", "extract", "load_posts", "make_task", "render", "score", "tokenize"]

# What a chat model is asked for where the answer stands between tags.
REQUEST = "Summarise the document in at most {target} {unit}, about {goal}. Write the summary, and nothing else, " \
          "between <summary> and </summary>."
# --- your experiment starts here: a prompt is a string with {target} and {document} in it ---
# It may contain any control token that the model's tokenizer knows (<|im_start|>, <|eot_id|>, ...).
TEMPLATES = {
    # What the chat templates of Qwen2.5, Qwen3 and LFM2 make of one system and one user message. The system message is
    # always written out, because Qwen2.5's template fills in one of its own where there is none.
    "chatml": "<|im_start|>system\nSummarise the post in about {target} tokens.<|im_end|>\n"
              "<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n",
    # For models that only continue text; the model ends with its end-of-text token.
    "plain": "Post:\n{document}\n\nSummary in about {target} tokens:\n",
    # Budgets and tags. To a base model, with the tag opened; to a base model that may write what it likes first; and to
    # a chat model.
    "tagged": "A document, and a summary of it in at most {target} {unit}, about {goal}.\n<document>\n{document}\n"
              "</document>\n<summary>\n",
    "notes": "A document, then notes on what matters in it, then a summary in at most {target} {unit}, about {goal}, "
             "between <summary> and </summary>.\n<document>\n{document}\n</document>\nNotes:\n",
    "tagged_chatml": f"<|im_start|>system\n{REQUEST}<|im_end|>\n"
                     "<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n",
}
# Qwen3 with thinking off: the prompt ends with an empty thought. Otherwise the thought would count as the summary.
TEMPLATES["qwen3"] = TEMPLATES["chatml"] + "<think>\n\n</think>\n\n"

CLOSE = "</summary>"  # whatever tokens spell it, it ends a tagged answer
UNIT_WORDS = {"chars": "characters", "tokens": "tokens"}
# A language model on a server reads and marks each summary (judge.py): a reward that gets hacked.
GROUP_REWARDS["judge"] = lambda group: paid([(s.document, s.text) for s in group])


# --- the prompt -------------------------------------------------------------------------------------------------------


def template_text(name: str) -> str:
    if name not in TEMPLATES:
        raise ValueError(f"There is no prompt template '{name}': take one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def has_budget(template: str) -> bool:
    """Whether the target is a budget, a share of the document, and not a length in tokens."""
    return "{unit}" in template_text(template)


def has_tag(template: str) -> bool:
    """Whether the summary stands between tags."""
    return "<summary>" in template_text(template)


def opens_tag(template: str) -> bool:
    """Whether the prompt ends with the opening tag, so that a completion begins inside it."""
    return template_text(template).rstrip().endswith("<summary>")


def choose_template(model: Transformer, tokenizer: Tokenizer, reward_names: Iterable[str] = ()) -> str:
    """The template that fits the model, where --template names none.

    A reward that a model measures (SQUISH) asks for budgets. Else a chat model is one that ends with `<|im_end|>`;
    Qwen3's is told not to think where its own template can say so. The tokenizer alone does not tell: the base models
    of Qwen and SmolLM2 have the same marks, and Qwen's even ship the chat template, but they end with `<|endoftext|>`.
    """
    if not NEED_MODEL.isdisjoint(reward_names):
        return "tagged"
    if tokenizer.token_to_id("<|im_end|>") not in model.config.eos_token_ids:
        return "plain"
    own = b"".join(model.sidecars.get(name, b"") for name in ("chat_template.jinja", "tokenizer_config.json"))
    return "qwen3" if b"enable_thinking" in own else "chatml"


def render(post: Post, template: str, target: int, unit: str = "characters") -> str:
    """The prompt as text. `target` is in tokens, and in `unit` where the template says {unit}.

    >>> render(Post("I lost a shoe.", "", "1"), "plain", 8)
    'Post:\\nI lost a shoe.\\n\\nSummary in about 8 tokens:\\n'
    """
    return fill(template_text(template), post, target, unit)


def fill(text: str, post: Post, target: int, unit: str) -> str:
    """A template's places filled in; {goal} is nine tenths of the target."""
    for name, value in (("{target}", str(target)), ("{goal}", str(round(0.9 * target))), ("{unit}", unit),
                        ("{document}", post.document)):  # the document last: it may spell {target}
        text = text.replace(name, value)
    return text


def tokenize(tokenizer: Tokenizer, post: Post, template: str, target: int, unit: str = "characters") -> list[int]:
    """The prompt as token ids [P]: the tokenizer's own of the rendered text, and what it puts in front of any text.

    Only the template's own control tokens become control tokens. A post that spells `<|im_end|>` is a post about chat
    templates, not the end of the user's turn, so its text is encoded as text. ValueError for a control token in the
    template that the tokenizer does not know.
    """
    text = fill(template_text(template), replace(post, document="{document}"), target, unit)
    return encode_prompt(tokenizer, text, post.document, template)


# --- the task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the policy is asked: to summarise a post to a size."""

    post: Post
    prompt: list[int]  # token ids [P]
    target: int  # the wanted length in tokens, or what the budget comes to for this post, in its unit
    budget: float | int | None = None  # a share of the document, or a size; None: the target is a length


def make_task(tokenizer: Tokenizer, post: Post, config: Config, budget: float | int | None = None) -> Task:
    """A post's task. The target is --target, or with a budget what that comes to for this document, in its unit."""
    target = config.target
    if budget is not None:
        target = int(allowance(tokenizer, post.document, budget, config.budget_unit))
    unit = UNIT_WORDS[config.budget_unit]
    return Task(post, tokenize(tokenizer, post, config.template, target, unit), target, budget)


def budgets_of(config: Config) -> list[float | int | None]:
    """The budgets that tasks are drawn from; [None] where the template knows none."""
    return [*parse_budgets(config.budgets)] if has_budget(config.template) else [None]


def tasks_of(posts: Sequence[Post], step: int, config: Config, tokenizer: Tokenizer) -> list[Task]:
    """The B tasks of a step. A pure function of seed and step, so that resuming needs no state."""
    budgets = budgets_of(config)
    draw = np.random.default_rng([config.seed, step, 1])
    return [make_task(tokenizer, post, config, budgets[draw.integers(len(budgets))])
            for post in batch_of(posts, step, config)]


def batch_of(posts: Sequence, step: int, config: Config) -> list:
    """The B posts of a step: every epoch has each post once, in an order of its own."""
    batch = []
    for i in range(step * config.prompts, (step + 1) * config.prompts):
        epoch, at = divmod(i, len(posts))
        order = np.random.default_rng([config.seed, epoch]).permutation(len(posts))
        batch.append(posts[order[at]])
    return batch


def describe_goal(config: Config) -> str:
    """The task in a few words, for the screen."""
    if has_budget(config.template):
        return f"budgets {config.budgets} {config.budget_unit}"
    return f"target {config.target} tokens"


def completion_limit(tokenizer: Tokenizer, posts: Sequence[Post], config: Config) -> int:
    """Where a completion is cut, in tokens: --max-new-tokens, or so far beyond the target that only a miss is cut."""
    if config.max_new_tokens:
        return config.max_new_tokens
    wanted = wanted_tokens(tokenizer, posts, config)
    limit = math.ceil(1.5 * wanted if has_budget(config.template) else 2 * max(wanted, config.target))
    return limit + 16 if has_tag(config.template) else limit  # room for the closing tag


def wanted_tokens(tokenizer: Tokenizer, posts: Sequence[Post], config: Config) -> float:
    """About how many tokens the longest wanted summary has; 0 where no size is asked or paid for."""
    text, documents = template_text(config.template), {post.document for post in posts}
    paid = NEED_TARGET & reward_names(parse_stages(config.stages))
    if has_budget(config.template):
        return most_tokens(tokenizer, documents, parse_budgets(config.budgets), config.budget_unit)
    if paid == {"char_length"}:
        return most_tokens(tokenizer, documents, [config.target], "chars")
    return config.target if paid or "{target}" in text or "{goal}" in text else 0


# --- the answer -------------------------------------------------------------------------------------------------------


def read_answer(completion: str, template: str) -> str | None:
    """The summary in a completion; None where there is none."""
    return extract(completion, opens_tag(template)) if has_tag(template) else completion


def extract(completion: str, opened: bool) -> str | None:
    """The summary between tags, or None where there is none: no closing tag, or nothing to close.

    `opened`: the prompt ended with <summary>, so the completion begins inside it. Otherwise thoughts and free text,
    which may name the tags, come first, and the last closed pair counts.

    >>> extract(" A cat sat.</summary>\\n", opened=True), extract(" A cat sat", opened=True)
    ('A cat sat.', None)
    >>> extract("Between <summary> and </summary>: <summary>A cat.</summary>", opened=False)
    'A cat.'
    """
    answer = without_thoughts(completion)
    if opened:
        text, closed, _ = answer.partition(CLOSE)
        return text.strip() if closed else None
    pairs = re.findall(f"<summary>((?:(?!</?summary>).)*){CLOSE}", answer, re.DOTALL)
    return pairs[-1].strip() if pairs else None


def content_lengths(group: Group) -> list[int]:
    """Tokens of each completion [G], as rewards see them: a blank one has none, however many newlines it sampled."""
    return [n if text.strip() else 0 for n, text in zip(group.lengths.tolist(), group.texts)]


# --- the reward -------------------------------------------------------------------------------------------------------


def score(groups: Sequence[Group], tasks: Sequence[Task], reward: Reward, config: Config, tokenizer: Tokenizer,
          scorers: Sequence = ()) -> dict[str, float]:
    """Set each group's `rewards` [G] and `parts` {name: [G]} -> the batch's means, by the names of metrics.jsonl.

    It reads texts and lengths and sets plain floats, so groups may come from any sampler. `scorers`: the (model,
    tokenizer) pairs that measure the rewards in NEED_MODEL.
    """
    summaries = ranks.scored(partial(score_group, reward=reward, config=config, scorers=scorers), groups, tasks)
    lengths, rewards = [content_lengths(group) for group in groups], [group.rewards or [] for group in groups]
    # A reward that compares is a mean over the posts that have a reference, where there are any.
    compares = not NEED_REFERENCE.isdisjoint(reward.names)
    counted = [group for group, task in zip(groups, tasks) if task.post.reference or not compares] or groups
    line = {"reward": fmean(value for group in counted for value in group.rewards or ()),
            "reward_std": fmean(float(np.std(each, ddof=min(1, len(each) - 1))) for each in rewards)}
    for name in groups[0].parts:
        line[f"reward/{name}"] = fmean(value for group in counted for value in group.parts[name])
    return {**line, "length": fmean(n for group in lengths for n in group),
            **on_target(summaries, lengths, tasks, config, tokenizer),
            "distinct": fmean(map(distinct, summaries)),
            "templated": templated(summaries),
            "invented": fmean(invented(text, task.post.document) for texts, task in zip(summaries, tasks)
                              for text in texts),
            "repetition": fmean(repetition(text) for texts in summaries for text in texts)}


def score_group(group: Group, task: Task, reward: Reward, config: Config, scorers: Sequence) -> list[str]:
    """Set the group's `rewards` [G], `parts` and `weights` -> its G summaries, "" where one is missing."""
    found = [read_answer(text, config.template) for text in group.texts]
    texts = [text or "" for text in found]
    measured, document = {}, task.post.document
    if "squish" in reward.names and scorers:
        measured["squish"] = ensemble(scorers, document, found, task.budget, config.budget_unit)
    if "cost" in reward.names and scorers:
        measured["cost"] = [fmean(values) for values in zip(*(cost(m, words, document, found) for m, words in scorers))]
    group.rewards, group.parts = reward(texts, content_lengths(group), task.post.reference, task.target, document,
                                        measured)
    group.weights = dict(reward.terms)
    if config.overlong:  # DAPO's penalty near the cap (Yu et al. 2025, eq. 13): 0, then over the last tokens down to -1
        near = [-max(0.0, 1 - (config.max_new_tokens - n) / config.overlong) for n in group.lengths.tolist()]
        group.parts["overlong"], group.weights["overlong"] = near, 1.0
        group.rewards = list(map(sum, zip(group.rewards, near)))
    group.rewards = with_silence(group.rewards, texts, config)
    if config.advantage == "gdpo":  # it compares part by part, so silence is the worst in each
        group.parts = {name: with_silence(values, texts, config, math.copysign(1, group.weights[name]))
                       for name, values in group.parts.items()}
    return texts


def with_silence(values: list[float], texts: list[str], config: Config, sign: float = 1.0) -> list[float]:
    """Values of a group [G] -> the same; where there is no summary the worst of them, or less (--missing penalty)."""
    values = [sign * value for value in values]
    values = [value if text.strip() else min(values) for value, text in zip(values, texts)]
    if config.missing == "penalty" and has_tag(config.template):
        values = penalise(values, [not text for text in texts])
    return [sign * value for value in values]


def penalise(totals: list[float], missing: list[bool]) -> list[float]:
    """Totals of a group [G] -> the same with min - max(max - min, 0.1) where the summary is missing.

    min and max are those of the completions with a summary. So a missing one is always the worst, by their spread or by
    0.1 (the published penalty). Where all are missing, all are equal, and nothing is learnt.

    >>> penalise([0.75, 0.5, 0.0], [False, False, True]), penalise([0.5, 0.5, 0.0], [False, False, True])
    ([0.75, 0.5, 0.25], [0.5, 0.5, 0.4])
    """
    there = [total for total, gone in zip(totals, missing) if not gone]
    if not there:
        return [0.0] * len(totals)
    low = min(there) - max(max(there) - min(there), 0.1)
    return [low if gone else total for total, gone in zip(totals, missing)]


def on_target(summaries: Sequence[list[str]], lengths: Sequence[list[int]], tasks: Sequence[Task], config: Config,
              tokenizer: Tokenizer) -> dict[str, float]:
    """How often the wanted size was kept to: shares of all completions of a batch.

    Without budgets within_2 and within_10pct. With them `over`, the share that is longer, and `used`, the mean size of
    the summaries that there are, as a share of the budget. With tags also `missing`.
    """
    every = [(text, n, task) for texts, ns, task in zip(summaries, lengths, tasks) for text, n in zip(texts, ns)]
    if has_budget(config.template):
        over, used = [], []
        for text, _, task in every:
            over.append(bool(text) and not fits(tokenizer, task.post.document, text, task.budget, config.budget_unit))
            if text:
                used.append(size(tokenizer, text, config.budget_unit) / max(1, task.target))
        shares = {"over": fmean(over), "used": fmean(used or [0.0])}
    else:
        shares = within([n for _, n, _ in every], [task.target for _, _, task in every])
    if has_tag(config.template):
        shares["missing"] = fmean(not text for text, _, _ in every)
    return shares


def within(lengths: Sequence[int], targets: Sequence[int]) -> dict[str, float]:
    """The two shares of lengths near their targets: at most 2 tokens away, and at most a tenth of the target.

    >>> within([30, 32, 35, 64], targets=[32, 32, 32, 32])
    {'within_2': 0.5, 'within_10pct': 0.75}
    """
    off = [(abs(n - target), target) for n, target in zip(lengths, targets)]
    return {"within_2": fmean(d <= 2 for d, _ in off), "within_10pct": fmean(d <= 0.1 * target for d, target in off)}

# Next: rewards.py, what an answer is worth
