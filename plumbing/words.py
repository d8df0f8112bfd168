"""When are two words the same word? Two answers, by hand: they share a stem, or WordNet lists them as synonyms.

1. `stem`: the Porter stemmer, for ROUGE and for METEOR's second stage;
2. `synonyms`: a reader of Princeton's WordNet files, for METEOR's third stage. The files are found on the machine, not
   shipped: `apt install wordnet-base` (Debian), `brew install wordnet` (macOS) or nltk's downloader brings them.
"""

import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

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


# ------------------------------------------------------------------------------------------------------------- WordNet
#
# G. A. Miller, "WordNet: a lexical database for English", CACM 38(11), 1995; file formats: the manual page wndb(5WN).
# index.noun says in which synsets a lemma is, data.noun what their words are, noun.exc the irregular forms:
#
#     index.noun   dog n 7 5 @ ~ #m #p %p 7 1 02084071 10114209 ...   lemma, part of speech, 7 synsets; their offsets
#     data.noun    02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 ...   at that byte: 3 words (in hexadecimal)
#     noun.exc     mice mouse

# How each part of speech is inflected: (ending, what the base form has in its place). Morphy of morphy(7WN).
_ENDINGS = {
    "noun": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
             ("men", "man"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
_FILES = [name for pos in _ENDINGS for name in (f"index.{pos}", f"data.{pos}", f"{pos}.exc")]


def _places() -> Iterator[Path | zipfile.Path]:
    """Folders in which WordNet's files usually lie, the likeliest first; nltk keeps its copy zipped or unpacked."""
    roots = [*os.environ.get("NLTK_DATA", "").split(os.pathsep), "~/nltk_data", f"{sys.prefix}/nltk_data",
             f"{sys.prefix}/share/nltk_data", f"{sys.prefix}/lib/nltk_data"]
    if sys.platform == "win32":
        programs = os.environ.get("ProgramFiles(x86)", "C:/Program Files (x86)")
        folders = [f"{programs}/WordNet/2.1/dict"]  # Princeton's installer
        roots += [f"{os.environ.get('APPDATA', '~/AppData/Roaming')}/nltk_data",
                  *(f"{drive}:/nltk_data" for drive in "CDE")]
    else:
        folders = ["/usr/share/wordnet", "/usr/local/WordNet-3.0/dict", "/usr/local/share/wordnet/dict"]
        folders += [f"{brew}/opt/wordnet/dict" for brew in  # Apple silicon, Intel, Linux, or wherever Homebrew is
                    ("/opt/homebrew", "/usr/local", "/home/linuxbrew/.linuxbrew", os.environ.get("HOMEBREW_PREFIX"))
                    if brew]
        roots += ["/usr/share/nltk_data", "/usr/local/share/nltk_data", "/usr/lib/nltk_data",
                  "/usr/local/lib/nltk_data"]
    yield from map(Path, folders)
    for corpora in (Path(root).expanduser() / "corpora" for root in roots if root):
        yield corpora / "wordnet"
        if (corpora / "wordnet.zip").is_file():
            yield zipfile.Path(corpora / "wordnet.zip", "wordnet/")


@lru_cache(maxsize=1)
def find_wordnet() -> Path | zipfile.Path | None:
    """The folder that holds WordNet: $WNSEARCHDIR (as WordNet's own tools read it), else the usual places, else None.

    FileNotFoundError where $WNSEARCHDIR names a folder without it: who sets it wants it used.
    """
    if named := os.environ.get("WNSEARCHDIR"):
        missing = [name for name in _FILES if not (Path(named) / name).is_file()]
        if missing:
            raise FileNotFoundError(f"WNSEARCHDIR={named} has no {', '.join(missing)}: name the folder with WordNet's "
                                    f"data.* and index.* files, or unset it.")
        return Path(named)
    return next((place for place in _places() if all((place / name).is_file() for name in _FILES)), None)


def how_to_get_wordnet() -> str:
    """The command that brings WordNet to this platform."""
    if sys.platform == "darwin":
        return "brew install wordnet"
    if shutil.which("apt"):
        return "apt install wordnet-base"
    return "pip install nltk, then python -m nltk.downloader wordnet"


@lru_cache(maxsize=1)
def _wordnet() -> dict[str, bytes] | None:
    """WordNet's twelve files as they are (28 MB): they are made to be searched, so nothing needs to be unpacked."""
    folder = find_wordnet()
    return None if folder is None else {name: (folder / name).read_bytes() for name in _FILES}


@lru_cache(maxsize=4)
def _exceptions(pos: str) -> dict[str, list[str]]:
    """"mice" -> ["mouse"]: irregular forms of one part of speech."""
    lines = (_wordnet() or {})[f"{pos}.exc"].decode().splitlines()
    return {form: bases for form, *bases in map(str.split, lines)}


def _look_up(index: bytes, lemma: str) -> list[str]:
    """The line of a lemma, as fields; [] where it has none. The lines are sorted, so: a binary search over bytes."""
    key, low, high = lemma.encode() + b" ", 0, len(index)
    while low < high:
        start = index.rfind(b"\n", 0, (low + high) // 2) + 1  # of the line that the middle byte is in
        end = index.find(b"\n", start)
        line = index[start:end]
        if line.startswith(key):
            return line.decode().split()
        if line < key:
            low = end + 1
        else:
            high = start
    return []


@lru_cache(maxsize=2**16)
def synonyms(word: str) -> frozenset[str]:
    """All single words that share a synset with a lower-case word or its base forms, over all parts of speech.

    Equal to the lemma names without "_" of nltk's wordnet.synsets(word), spelled as in WordNet: names keep capitals.
    Empty where the word is unknown, or where there is no WordNet (`find_wordnet() is None`).

        synonyms("cats")   has cat, guy, vomit and cast: every sense counts, METEOR does not know which one is meant
    """
    files = _wordnet()
    if files is None or not word.isascii() or not word:
        return frozenset()
    found = set()
    for pos, endings in _ENDINGS.items():
        index, data = files[f"index.{pos}"], files[f"data.{pos}"]
        bases = _exceptions(pos).get(word) or [word.removesuffix(end) + new for end, new in endings
                                               if word.endswith(end)]
        for base in {word, *bases} - {""}:
            fields = _look_up(index, base)
            for offset in fields[len(fields) - int(fields[2]):] if fields else ():
                _, _, _, count, *words = data[int(offset):data.index(b"\n", int(offset))].decode().split()
                for name in words[:2 * int(count, 16):2]:  # each name is followed by a number
                    found.add(re.sub(r"\([^()]*\)$", "", name))  # "ready(p)": an adjective that only follows a verb
    return frozenset(name for name in found if "_" not in name)
