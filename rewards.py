"""Rewards: text in, numbers out.

Everything the policy is ever told about its summaries is decided in this file, by hand and by the standard library
alone. Three things live here:

1. the measures: `length_penalty`, `rouge_l`, and the Porter stemmer `stem` that ROUGE needs;
2. `REWARDS`, the table that gives each measure a name (a forker's first stop);
3. `parse`, which turns a line such as "length + 0.5*rouge_l" into a function that scores one group of completions.

No tensors and no tokenizer: whoever sampled the tokens counts them, and hands over text and counts.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, NoReturn

# ------------------------------------------------------------------------------------------------------------- length


def length_penalty(n_tokens: int, target: int) -> float:
    """How far a completion is from the wanted length: -|n - target| / target, so 0 is best and there is no worst.

    `n_tokens` is the number of tokens that were sampled, without the stop token. It must not come from encoding the
    decoded text again: a policy may spell "summary" as "sum" + "mary", the tokenizer would read it back as one token,
    and the reward would then grade a sequence that nobody sampled and no gradient touches.

    >>> length_penalty(48, target=64)  # 16 tokens short: -16/64
    -0.25
    >>> length_penalty(64, target=64), length_penalty(0, target=64), length_penalty(192, target=64)
    (0.0, -1.0, -2.0)
    """
    if target <= 0:
        raise ValueError(f"the target length must be a positive number of tokens, not {target}.")
    return -abs(n_tokens - target) / target


# ------------------------------------------------------------------------------------------------------ Porter stemmer
#
# M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, pp. 130-137, together with the amendments
# that nltk's PorterStemmer applies by default, each marked (nltk) below. They matter: rouge_score stems with nltk, so
# a stemmer that is only true to the paper gives other ROUGE values.

_IRREGULAR = {  # (nltk) words that the rules would spoil
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "howe": "howe",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning",
    "canning": "canning", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip


def _rules(table: str) -> dict[str, str]:
    return dict(rule.split(">") for rule in table.split())


# "from>to", in the order in which they are tried: a suffix stands before the shorter ones that it contains.
_STEP_2 = _rules(
    "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble entli>ent eli>e ousli>ous ization>ize ation>ate "
    "ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble fulli>ful"
)
_STEP_3 = _rules("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>")
_STEP_4 = _rules("al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> ou> ism> ate> iti> ous> ive> ize>")


def _shape(word: str) -> str:
    """Consonants and vowels; y is a vowel after a consonant ("syzygy" -> "cvcvcv") and a consonant elsewhere."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape.endswith("c")) else "c"
    return shape


def _m(stem: str) -> int:
    """The paper's measure: every word reads [C](VC){m}[V]; "tree" has m = 0, "trouble" 1, "private" 2."""
    return _shape(stem).count("vc")


def _ends_short(stem: str) -> bool:
    """The paper's *o: ends consonant-vowel-consonant, the last not w, x or y ("hop"); or is vowel-consonant (nltk)."""
    shape = _shape(stem)
    return shape == "vc" or (shape.endswith("cvc") and stem[-1] not in "wxy")


def _swap(word: str, rules: dict[str, str], m: int) -> str:
    """Apply the first rule whose suffix fits, if what stays has measure > m; if it has not, no later rule may try."""
    for suffix, replacement in rules.items():
        if word.endswith(suffix):
            left = word.removesuffix(suffix)
            return left + replacement if _m(left) > m else word
    return word


def _strip_plural(word: str) -> str:  # step 1a
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]  # (nltk) "dies" -> "die", but "flies" and "ponies" lose "es"
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _strip_past(word: str) -> str:  # step 1b
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]  # (nltk) "died" -> "die", "spied" -> "spi"
    if word.endswith("eed"):
        return word[:-1] if _m(word[:-3]) > 0 else word  # "agreed" -> "agree", but "feed" stays
    left = word.removesuffix("ed") if word.endswith("ed") else word.removesuffix("ing")
    if left == word or "v" not in _shape(left):
        return word  # "sing" and "bled" have no vowel left, so there was no ending to strip
    if left.endswith(("at", "bl", "iz")):
        return left + "e"  # "conflat(ed)" -> "conflate": later steps look for -ate, -ble and -ize
    if left[-2:-1] == left[-1] and _shape(left)[-1] == "c":
        return left if left[-1] in "lsz" else left[:-1]  # "hopp(ing)" -> "hop", but "fall(ing)" -> "fall"
    return left + "e" if _m(left) == 1 and _ends_short(left) else left  # "fil(ing)" -> "file"


def _strip_e(word: str) -> str:  # step 5
    if word.endswith("e") and (_m(word[:-1]) > 1 or (_m(word[:-1]) == 1 and not _ends_short(word[:-1]))):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _m(word[:-1]) > 1 else word


@lru_cache(maxsize=2**16)  # a summary's words come back all the time, and a look-up is more than ten times cheaper
def stem(word: str) -> str:
    """The Porter stem of a lower-case word, equal to nltk's PorterStemmer().stem(word): "motoring" -> "motor".

    A stem is not a word: it is the key under which related words meet. Rules fire on the measure m of what would stay
    (see `_m`), so that short words keep their endings: "adjustment" leaves adjust, m = 2, but "cement" only c, m = 0.

    >>> [stem(word) for word in ("caresses", "ponies", "hopping", "filing", "relational", "adjustment", "happily")]
    ['caress', 'poni', 'hop', 'file', 'relat', 'adjust', 'happili']
    >>> stem("connect") == stem("connected") == stem("connecting") == stem("connection") == stem("connections")
    True
    >>> [stem(word) for word in ("cement", "feed", "is", "enjoy", "news", "dying")]  # too short, or an exception
    ['cement', 'feed', 'is', 'enjoy', 'news', 'die']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _strip_past(_strip_plural(word))
    if word.endswith("y") and len(word) > 2 and _shape(word)[-2] == "c":
        word = word[:-1] + "i"  # step 1c, (nltk) "fly" -> "fli" to meet "flies"; "enjoy" keeps its y after a vowel
    if word.endswith("alli") and _m(word[:-4]) > 0:
        word = word[:-2]  # step 2, (nltk) first -alli -> -al, and then the other rules see the -al
    if word.endswith("logi") and _m(word[:-3]) > 0:
        word = word[:-1]  # step 2, (nltk) the l counts with the stem, so that "geologi" finds "geolog"
    else:
        word = _swap(word, _STEP_2, m=0)
    word = _swap(word, _STEP_3, m=0)
    if word.endswith("ion"):
        word = word[:-3] if _m(word[:-3]) > 1 and word[-4] in "st" else word  # "adoption", but not "champion"
    else:
        word = _swap(word, _STEP_4, m=1)
    return _strip_e(word)


# ------------------------------------------------------------------------------------------------------------- ROUGE-L


def _tokens(text: str) -> list[str]:
    """ROUGE's words: runs of a-z and 0-9 in the lower-cased text, the ones longer than three characters stemmed.

    Lower-casing comes first and is Unicode's: the Kelvin sign becomes a k and stays, a dotted capital I becomes an i
    and a combining dot, while é and the long s are not in a-z and split the word. IGNORECASE would do otherwise.
    """
    return [stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]


@lru_cache(maxsize=1024)  # all G completions of a group, and every later epoch, meet the same reference
def _where(reference: str) -> tuple[int, dict[str, int]]:
    """Number of tokens, and for each token an integer whose bit j says "reference token j is this one"."""
    tokens, where = _tokens(reference), {}
    for j, token in enumerate(tokens):
        where[token] = where.get(token, 0) | 1 << j
    return len(tokens), where


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3), stemmed, in [0, 1].

        p = LCS / |candidate|    r = LCS / |reference|    F1 = 2 p r / (p + r)

    LCS is the length of the longest common subsequence of words: same order, gaps allowed. Equal to `fmeasure` of
    rouge_score's RougeScorer(["rougeL"], use_stemmer=True).

    "The" "cat" "sat" appear in both, in this order: LCS 3, p = 3/4, r = 3/6, F1 = 0.75 / 1.25.

    >>> rouge_l("The cat sat quietly.", "the cats have sat down again")
    0.6
    >>> rouge_l("", "the cat"), rouge_l("the cat", ""), rouge_l("a b", "b a")
    (0.0, 0.0, 0.5)
    """
    words = _tokens(candidate)
    m, where = _where(reference)
    # The table of the textbook, one row per candidate word, a whole row per Python integer (Crochemore et al. 2001,
    # Hyyrö 2004). Along a row the LCS with reference[:j+1] rises by 0 or 1; bit j of `flat` is 0 where it rises. The
    # zeros cut the row into runs of ones. A new word slides the zero at the upper end of each run down to the lowest
    # match in that run: adding the matches starts a carry there, which travels up and fills the old zero. In the last
    # run, which has no zero above it, the carry falls off the end, a zero is new, and the LCS is one longer.
    flat = full = (1 << m) - 1
    for word in words:
        match = flat & where.get(word, 0)
        flat = ((flat + match) | (flat - match)) & full
    lcs = m - flat.bit_count()
    if lcs == 0:
        return 0.0
    p, r = lcs / len(words), lcs / m
    return 2 * p * r / (p + r)


# ----------------------------------------------------------------------------------------------- names and expressions


class Summary(NamedTuple):
    """All that a reward may look at: one completion, and the post that it summarises."""

    text: str  # the completion, decoded
    n_tokens: int  # sampled tokens, the stop token not counted
    reference: str  # the summary that the post's own author wrote
    target: int  # wanted number of tokens
    document: str  # the post itself


# --- your experiment starts here ---
# A reward is one line: a name for the expression, and a function from Summary to a number, higher meaning better.
REWARDS = {
    "length": lambda s: length_penalty(s.n_tokens, s.target),
    "rouge_l": lambda s: rouge_l(s.text, s.reference),
}


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
        self, texts: list[str], lengths: list[int], reference: str, target: int, document: str = ""
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Score the G completions of one post: (totals [G], {name: values [G]}), the values without their weights.

            total_i = sum over names k of weight_k * value_k(completion i)

        >>> reward = parse("length + 2*rouge_l")
        >>> reward(["the cat sat", "the cat", ""], [4, 2, 0], reference="the cat sat", target=4)
        ([2.0, 1.1, -1.0], {'length': [0.0, -0.5, -1.0], 'rouge_l': [1.0, 0.8, 0.0]})
        """
        if len(texts) != len(lengths):
            raise ValueError(f"{len(texts)} texts and {len(lengths)} lengths: each completion needs one of both.")
        # A blank completion counts as no tokens and no text, or else 64 sampled newlines would be a perfect length.
        blank = [not text.strip() for text in texts]
        group = [
            Summary("" if empty else text, 0 if empty else n, reference, target, document)
            for text, n, empty in zip(texts, lengths, blank, strict=True)
        ]
        parts = {name: [float(REWARDS[name](summary)) for summary in group] for name in self.names}
        totals = [sum(w * parts[name][i] for name, w in self.terms) for i in range(len(group))]
        # And nobody may score below silence: a rambling 3x the target has length -2, silence only -1, so GRPO would
        # teach a rambler to fall silent. Silence shares the group's worst total instead. Dropping the blank ones is no
        # way out: it shifts the mean that the others are compared with, and the policy never hears that silence is bad.
        worst = min(totals, default=0.0)
        return [worst if empty else total for total, empty in zip(totals, blank, strict=True)], parts


_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_PIECE = re.compile(_NUMBER.pattern + r"|[A-Za-z_][A-Za-z0-9_]*|\S")


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

    def refuse(wrong: str, mend: str) -> NoReturn:
        raise ValueError(f"reward expression {expression!r}: {wrong}; {mend}.")

    terms = [("+", [])]
    for piece in _PIECE.findall(expression):
        if piece in ("+", "-"):
            terms.append((piece, []))
        else:
            terms[-1][1].append(piece)

    weights = {}
    for sign, term in terms:
        match term:
            case [name]:
                number = "1"
            case [number, "*", name]:
                pass
            case []:
                if len(terms) == 1:
                    refuse("it is empty", f"name at least one of {', '.join(REWARDS)}")
                refuse("a '+' or '-' lacks a term on one side", "put a term on both, as in 'length - 0.1*rouge_l'")
            case [first, second] if "*" not in term:
                refuse(f"nothing joins {first!r} and {second!r}", "put '*' after a weight, '+' or '-' between rewards")
            case _:
                refuse(f"cannot read the term {' '.join(term)!r}", "write it as name or number*name, like 0.5*rouge_l")
        if not _NUMBER.fullmatch(number) or not math.isfinite(float(number)):
            refuse(f"{number!r} is not a finite number", "write a weight such as 0.5 before the '*' (rewards only add)")
        if name not in REWARDS:
            refuse(f"unknown name {name!r}", f"choose among {', '.join(REWARDS)}")
        if name in weights:
            refuse(f"{name!r} appears twice", "keep one term and give it the sum of the weights")
        weights[name] = float(sign + number)
    return Reward(tuple(weights.items()))
