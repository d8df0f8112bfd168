"""Rewards: text in, numbers out.

What a summary is paid is decided here. Two things come from elsewhere: the numbers of squish.py, and what
`task.score_group` adds (`--overlong`, `--missing penalty`). Three things live in this file:

1. `length_penalty`, the one measure that is made for training; the others are metrics (`metrics.py`);
2. `REWARDS` and `GROUP_REWARDS`, the tables that give each measure a name (a forker's first stop);
3. `parse`, which turns a line such as "length + 0.5*rouge_l" into a function that scores one group of completions.

No tensors and no tokenizer: whoever sampled the tokens counts them, and hands over text and counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from metrics import bleu, copy_rate, invented, meteor, own_shares, repetition, rouge_l, twice, well_formed
from plumbing.expression import read_sum
from plumbing.own_reward import Refused, asked, numbers
from plumbing.server import similarities

# ------------------------------------------------------------------------------------------------------------- length


def length_penalty(n_tokens: int, target: int) -> float:
    """How far a completion is from the wanted length: -|n - target| / target, so 0 is best and there is no worst.

    `n_tokens`: tokens that were sampled, without the stop token. Encoding the text again would not do: a policy may
    spell "sum" + "mary", which is read back as one token, so a length would be graded that nobody sampled.

    >>> [length_penalty(n, target=64) for n in (48, 64, 0, 192)]  # 48 is 16 tokens short: -16/64
    [-0.25, 0.0, -1.0, -2.0]
    """
    if target <= 0:
        raise ValueError(f"the target length must be a positive number of tokens, not {target}.")
    return -abs(n_tokens - target) / target


# ----------------------------------------------------------------------------------------------- names and expressions


class Summary(NamedTuple):
    """All that a reward may look at: one completion, and the post that it summarises."""

    text: str  # the summary: the whole completion, or what stands between its tags
    n_tokens: int  # sampled tokens of the whole completion, the stop token not counted
    reference: str  # the summary that came with the post; "" where none did
    target: int  # wanted size: tokens, or the budget in its unit
    document: str  # the post itself
    measured: dict[str, float] = {}  # what a language model found out about it: squish.py's numbers, by name


def _measured(summary: Summary, name: str) -> float:
    if name not in summary.measured:
        raise Refused(f"The reward '{name}' is measured by a language model: pass measured={{'{name}': [...]}} with "
                      f"the numbers of squish.{name}.")
    return summary.measured[name]


# --- your experiment starts here ---
# A reward is one line: a name for the expression, and a function from Summary to a number, higher meaning better.
REWARDS: dict[str, Callable[[Summary], float]] = {
    "length": lambda s: length_penalty(s.n_tokens, s.target),
    "rouge_l": lambda s: rouge_l(s.text, s.reference),
    "bleu": lambda s: bleu(s.text, s.reference),
    "char_bleu": lambda s: bleu(" ".join(s.text), " ".join(s.reference)),  # for Chinese, Japanese, Thai
    "meteor": lambda s: meteor(s.text, s.reference),
    "char_length": lambda s: length_penalty(len(s.text), s.target),  # right for budgets in characters
    "length_binary": lambda s: float(length_penalty(s.n_tokens, s.target) >= -0.1),  # 1 within 10%, else 0
    "length_saturating": lambda s: min(0.0, length_penalty(s.n_tokens, s.target) + 0.1),  # within 10% is near enough
    "length_exp": lambda s: 2.0 ** (10 * length_penalty(s.n_tokens, s.target)),  # halved by every 10% of the target
    "copy_rate": lambda s: copy_rate(s.text, s.document),  # shares of what is bad: give them a negative weight
    "repetition": lambda s: repetition(s.text),
    "twice": lambda s: twice(s.text),
    "invented": lambda s: invented(s.text, s.document),
    "format": lambda s: well_formed(s.text),
    "squish": lambda s: _measured(s, "squish"),
    "cost": lambda s: _measured(s, "cost"),  # bits of the summary itself, as a share of the document's
}
# The same for rewards that see all G summaries of a post at once: a server that is asked once for a group, a reward
# model, or a measure that compares the summaries with each other.
GROUP_REWARDS: dict[str, Callable[[Sequence[Summary]], list[float]]] = {
    "distinct": lambda group: own_shares([s.text for s in group]),
    "embedding": lambda group: similarities([(s.text, s.reference) for s in group]),
}
NEED_REFERENCE = {"rouge_l", "bleu", "char_bleu", "meteor", "embedding"}  # these compare with the post's own summary
NEED_MODEL = {"squish", "cost"}  # these are measured by a language model, see squish.py
NEED_TARGET = {"char_length", "length", "length_binary", "length_saturating", "length_exp"}  # these pay for a size


@dataclass(frozen=True)
class Reward:
    """A weighted sum of named rewards; made by `parse`, called on one group of completions."""

    terms: tuple[tuple[str, float], ...]  # (name, weight), in the order of the expression

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sum, in its order: ("length", "rouge_l")."""
        return tuple(name for name, _ in self.terms)

    @property
    def expression(self) -> str:
        """The same sum, spelled in one way only, so that logs of equal runs are equal; `parse` reads it back."""
        text = ""
        for name, weight in self.terms:
            number = repr(abs(weight)).removesuffix(".0")
            text += (" - " if weight < 0 else " + ") + (name if number == "1" else f"{number}*{name}")
        return text.removeprefix(" + ")

    def __call__(
        self, texts: list[str], lengths: list[int], reference: str, target: int, document: str = "",
        measured: dict[str, list[float]] | None = None,
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Score the G completions of one post: (totals [G], {name: values [G]}), the values without their weights.

        `measured`: values [G] of the rewards in NEED_MODEL, which this file cannot compute.

            total_i = sum over names k of weight_k * value_k(completion i)

        >>> reward = parse("length + 2*rouge_l")
        >>> reward(["the cat sat", "the cat", ""], [4, 2, 0], reference="the cat sat", target=4)
        ([2.0, 1.1, -1.0], {'length': [0.0, -0.5, -1.0], 'rouge_l': [1.0, 0.8, 0.0]})
        """
        if len(texts) != len(lengths):
            raise ValueError(f"{len(texts)} texts and {len(lengths)} lengths: each completion needs one of both.")
        # A blank completion counts as no tokens and no text, or else 64 sampled newlines would be a perfect length.
        blank = [not text.strip() for text in texts]
        texts = ["" if empty else text for text, empty in zip(texts, blank)]
        group = [Summary(text, 0 if empty else n, reference, target, document,
                         {name: values[i] for name, values in (measured or {}).items()})
                 for i, (text, n, empty) in enumerate(zip(texts, lengths, blank))]
        parts = {name: values_of(name, group) for name in self.names}
        totals = [sum(w * parts[name][i] for name, w in self.terms) for i in range(len(group))]
        # And nobody may score below silence. A completion of 3x the target has length -2, an empty one -1: paid like
        # this, GRPO would teach a rambler to say nothing. So an empty one gets its group's worst total. Dropping it is
        # no way out: that shifts the others' mean, and the policy never hears that silence is bad.
        worst = min(totals, default=0.0)
        return [worst if empty else total for total, empty in zip(totals, blank, strict=True)], parts


def values_of(name: str, group: Sequence[Summary]) -> list[float]:
    """The values [G] of one reward, by its name, for the G summaries of a post."""
    if name in REWARDS:
        values = [asked(name, REWARDS[name], summary) for summary in group]
    else:
        values = asked(name, GROUP_REWARDS[name], group)
    return numbers(name, values, group)


def parse(expression: str) -> Reward:
    """Read a sum of rewards:  expression = term (("+" | "-") term)*,  term = [number "*"] name.  Spaces are free.

    A weight of 0 is allowed: that reward is measured and logged but teaches nothing. What cannot be read is refused
    with a sentence; nothing is ever handed to eval().

    >>> reward = parse("2*length-.5 * rouge_l")
    >>> reward.names, reward.terms, reward.expression
    (('length', 'rouge_l'), (('length', 2.0), ('rouge_l', -0.5)), '2*length - 0.5*rouge_l')
    >>> parse("length + lenght")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: reward expression 'length + lenght': unknown name 'lenght'; choose among length, rouge_l...
    """
    return Reward(read_sum(expression, [*REWARDS, *GROUP_REWARDS]))

# Next: metrics.py, what the names in REWARDS measure
