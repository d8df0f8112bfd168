"""Between text and tokens: a prompt in which a post spells no control token, and where a completion spells its end."""

import functools
import re
import secrets

from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from plumbing.thoughts import is_ended

MARK = re.compile(r"<\|[^<>|]+\|>")  # how ChatML and its descendants spell control tokens
TAG = re.compile(r"<[^<>\[\]]+>|\[[^<>\[\]]+\]")  # and others: <end_of_turn>, [INST]
THOUGHTS = ("<think>", "</think>")  # Qwen3 lets anybody write them: to it they are ordinary words
SECRET = secrets.token_hex(8)  # of this process: no post can spell it


def encode_prompt(tokenizer: Tokenizer, text: str, document: str, template: str) -> list[int]:
    """The template's `text`, with `document` in the place of {document}, as token ids [P].

    They are those of `Tokenizer.encode` on the whole text, with whatever the tokenizer puts in front (a bos, or
    nothing) and without what it puts behind: a prompt is to be continued. Only that in the document a control token is
    text. For that, marks get other names for a moment: the template's are spelled with them, the document's are not.
    ValueError for a mark in the template that the tokenizer does not know.
    """
    tags = frozenset(TAG.findall(text))
    renamed, control, back, marks = with_other_names(tokenizer, tokenizer.get_vocab_size(), tags)
    unknown = [mark for mark in MARK.findall(text) if mark not in control]
    if unknown:
        raise ValueError(f"The tokenizer has no {unknown[0]}, which the template '{template}' asks for: take "
                         f"--template plain for this model, or one with its own control tokens (task.py).")
    spelled = marks.sub(lambda found: found[0] + SECRET * (found[0] in control), text) if marks else text
    ids = renamed.encode(spelled.replace("{document}", document), add_special_tokens=False).ids
    ids, front = [new for i in ids for new in back.get(i, [i])], put_in_front(tokenizer, text)
    return ids if ids[:len(front)] == front else front + ids  # the template may spell the bos itself


@functools.lru_cache(maxsize=8)  # hundreds of marks take longer than a prompt does
def with_other_names(tokenizer: Tokenizer, size: int,
                     tags: frozenset[str]) -> tuple[Tokenizer, frozenset[str], dict, re.Pattern | None]:
    """-> (a tokenizer in which control tokens are spelled with SECRET behind them, those tokens as they were spelled,
    its ids -> the old ids, a pattern of added tokens). `size` is the tokenizer's: one that has grown is made anew.
    """
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    control = frozenset(token.content for _, token in added if is_control(token, tags))
    renamed = Tokenizer(tokenizer.model)  # the same model, not a copy of it
    renamed.normalizer, renamed.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    names = {number: token.content + SECRET * (token.content in control) for number, token in added}
    renamed.add_tokens([AddedToken(names[number], lstrip=token.lstrip, rstrip=token.rstrip, special=token.special,
                                   normalized=token.normalized,
                                   single_word=token.single_word and token.content not in control)
                        for number, token in added])  # SECRET is letters: `as_the_tokenizer_looks` sees to single words
    back = {renamed.token_to_id(name): [number] for number, name in names.items()}
    for number, token in added:  # a Unigram model may find a mark in a text by itself: then it is letters, one by one
        if token.content in control and token.content.lower() not in ("<unk>", "[unk]") and number not in back:
            back[number] = [piece.id for letter in token.content for piece in tokenizer.model.tokenize(letter)]
    return renamed, control, back, as_the_tokenizer_looks([token for _, token in added], control)


def as_the_tokenizer_looks(added: list[AddedToken], control: frozenset[str]) -> re.Pattern | None:
    """A pattern of the added tokens that are looked for in the text as it is: of two that begin together, the longer.
    None where there is none."""
    marks = [token for token in added if token.content in control or not token.normalized]
    forms = [(r"(?<!\w)%s(?!\w)" if token.single_word else "%s") % re.escape(token.content)
             for token in sorted(marks, key=lambda token: len(token.content), reverse=True)]
    return re.compile("|".join(forms)) if forms else None


def is_control(token: AddedToken, tags: frozenset[str]) -> bool:
    """Whether a token of the tokenizer's directs the model: it says so, looks so, or is one of the template's tags."""
    mark = token.content
    return token.special or bool(MARK.fullmatch(mark)) or mark in tags and mark not in THOUGHTS


def put_in_front(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that the tokenizer itself sets before a text; those that it sets behind it are another matter."""
    if not tokenizer.num_special_tokens_to_add(False):
        return []
    whole, ids = tokenizer.encode(text).ids, tokenizer.encode(text, add_special_tokens=False).ids
    at = next(i for i in range(len(whole) + 1) if whole[i:i + len(ids)] == ids)
    return whole[:at]


def spelt(tokenizer: Tokenizer, stop_text: str, tokens: Tensor) -> list[int]:
    """tokens [n, t] -> for each row, how many of its last tokens it takes to spell the stop text; 0: it is not there.

    Special tokens are no text, here as in the texts that are read: one in the middle interrupts nothing. Each of the
    others is a byte at least, so as many of them as the text has bytes hold it. What comes after it in the same token
    does not matter. Where it is only mentioned, it ends nothing.
    """
    special, width = special_ids(tokenizer, tokenizer.get_vocab_size()), len(stop_text.encode())
    last = tokens[:, -width:].tolist()
    for i, row in enumerate(last):
        if not special.isdisjoint(row):  # look further back, for as many that are text
            row = tokens[i].tolist()
            at = [t for t, number in enumerate(row) if number not in special][-width:]
            last[i] = row[at[0]:] if at else []
    counts = [0] * len(last)
    for i, text in enumerate(tokenizer.decode_batch(last, skip_special_tokens=True)):
        if stop_text in text and is_ended(tokenizer.decode(tokens[i].tolist(), True), stop_text):
            sizes = range(1, len(last[i]) + 1)
            counts[i] = next(n for n in sizes if stop_text in tokenizer.decode(last[i][-n:], True))
    return counts


@functools.lru_cache(maxsize=4)
def special_ids(tokenizer: Tokenizer, size: int) -> frozenset[int]:
    """The ids that are no text. `size` is the tokenizer's: with it, a tokenizer that has grown is looked at again."""
    return frozenset(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)
