"""Which words of a text are names or numbers, as far as spelling shows it."""

import re
import unicodedata
from functools import lru_cache

# A number, with or without commas between its thousands, or a run of letters, with apostrophes inside of it.
_WORD = re.compile(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|[^\W\d_]+(?:['’][^\W\d_]+)*")
_ENDING = re.compile(r"['’](?:s|m|d|ll|re|ve)$", re.I)  # Mara's, I'm, he'd, she'll, they're, we've

# What an ordinary sentence begins with, so that its capital says nothing. "May" and "Will" are names as well: not here.
OPENERS = frozenset("""
a an the this that these those such
i me my mine myself you your he him his himself she her hers herself it its itself we us our they them their
who whom whose what which when whenever where wherever why how whether
one another any anybody anyone anything each either every everybody everyone everything nobody none nothing no other
others somebody someone something both all many much more most few several some half neither same
about above according across after against along among around as at before behind below beneath beside besides between
beyond by despite down due during except for from in inside into like near next of off on onto opposite out outside
over past per since through throughout till to toward towards under underneath unlike until up upon via with within
without
and although because but even if instead lest nor not once only or otherwise provided rather so than then though thus
unless whereas while yet
am are be been being is was were can cannot could did do does had has have having let might must ought shall should
would
actually afterwards again ago ahead almost already also always anyway apparently away back basically better certainly
clearly currently early else especially eventually ever exactly far finally first firstly fortunately further
furthermore generally hence here hopefully however immediately indeed initially just last lastly late lately later
least less luckily maybe meanwhile mostly naturally nearly never nevertheless nonetheless normally now obviously often
originally overall perhaps please possibly previously probably quickly quite really recently sadly second secondly
simply slowly sometimes soon sorry still subsequently suddenly surely surprisingly thank thankfully thanks there
thereafter therefore third thirdly today together tomorrow tonight too twice ultimately unfortunately usually very
well yes yesterday
mr mrs ms dr tl edit update
""".split())


def spelled(text: str) -> list[tuple[str, bool]]:
    """The words of a text in small letters, without endings such as 's, each with whether it has a capital or a digit.

    Hyphens part words, and so does the border between letters and digits. A comma between thousands is left out.

    >>> spelled("Mara's aunt Anne-Lise paid 1,200.50.")
    [('mara', True), ('aunt', False), ('anne', True), ('lise', True), ('paid', False), ('1200.50', True)]
    """
    found = []
    for word in _WORD.findall(unicodedata.normalize("NFC", text)):
        number = word[0].isdigit()
        word = word.replace(",", "") if number else _ENDING.sub("", word.replace("’", "'"))
        found.append((word.lower(), number or word != word.lower()))
    return found


def names(text: str) -> list[str]:
    """Names and numbers of a text, word by word, in small letters, as often as they are said.

    >>> names("However, Mara didn't hike to New York in 2019. She'd flown; I'm sure. Mara's 30.")
    ['mara', 'new', 'york', '2019', 'mara', '30']
    """
    return [word for word, marked in spelled(text) if marked and word not in OPENERS and not word.endswith("n't")]


@lru_cache(maxsize=1024)  # all G summaries of a post, and every later epoch, are held against the same text
def words_in(document: str) -> frozenset[str]:
    """All words of a text, names or not, in small letters."""
    return frozenset(word for word, _ in spelled(document))
