"""The words that BLEU and METEOR are counted in, by hand: those of NIST's scoring script mteval-v13a."""

import re
from functools import lru_cache
from itertools import chain

_PUNCTUATION = str.maketrans({mark: f" {mark} " for mark in "{|}~[\\]^_` !\"#$%&()*+:;<=>?@/"})
_13A = (  # commas, full stops and dashes: apart from words, together with digits ("3.5", "1,000"; but "1-2" is 1 - 2)
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


@lru_cache(maxsize=2**16)  # the rules look no further than a blank, so what stands between two is cut once and for all
def _cut(word: str) -> tuple[str, ...]:
    text = f" {word} ".translate(_PUNCTUATION)
    for pattern, spaced in _13A:
        text = pattern.sub(spaced, text)
    return tuple(text.split())


@lru_cache(maxsize=1024)  # BLEU and METEOR cut the same texts, and a group's reference comes back G times
def words_13a(text: str) -> tuple[str, ...]:
    """The words of mteval-v13a, NIST's scoring script: what BLEU is counted in everywhere, case kept.

    >>> words_13a("Tom's cat (aged 3.5) won 1,000 euros, twice.")
    ("Tom's", 'cat', '(', 'aged', '3.5', ')', 'won', '1,000', 'euros', ',', 'twice', '.')
    """
    # The script also joins words that a hyphen splits over two lines, and knows a few names for characters.
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, mark in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(name, mark)
    return tuple(chain.from_iterable(map(_cut, text.split())))
