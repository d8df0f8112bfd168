"""Text in, numbers out: how much of a reference summary a text says again, and what shows that a policy cheats.

ROUGE-L, BLEU and METEOR are equal to the libraries that people quote (rouge_score, sacreBLEU, nltk), and several times
faster, because they are done for single pairs of short texts. Copies, repetitions, inventions, templates and form are
counted in words. Formula, source and a worked example stand with each.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from plumbing.mteval import words_13a
from plumbing.names import names, words_in
from plumbing.scripts import FULL_STOPS, by_character, ends_a_sentence
from plumbing.words import stem, synonyms

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
    tokens = _tokens(reference)
    where: dict[str, int] = {}
    for j, token in enumerate(tokens):
        where[token] = where.get(token, 0) | 1 << j
    return len(tokens), where


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3), stemmed, in [0, 1].

        p = LCS / |candidate|    r = LCS / |reference|    F1 = 2 p r / (p + r)

    LCS is the length of the longest common subsequence of words: same order, gaps allowed. Equal to `fmeasure` of
    rouge_score's RougeScorer(["rougeL"], use_stemmer=True): over the whole text at once. Published figures for
    CNN/DailyMail are often the summary-level one (rougeLsum), which takes sentence by sentence and is about 0.1 higher.

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


# ---------------------------------------------------------------------------------------------------------------- BLEU


def ngrams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)))


@lru_cache(maxsize=1024)
def _counts(reference: str) -> list[Counter]:
    """How often each n-gram stands in the reference, for n = 1..4."""
    return [Counter(ngrams(words_13a(reference), n)) for n in (1, 2, 3, 4)]


def _matches(candidate: str, reference: str) -> tuple[int, int, list[int], list[int]]:
    """Words of the candidate, words of the reference; n-grams of the candidate that match, and all of them (n = 1..4).

    An n-gram matches at most as often as it stands in the reference, or "the the the" would be perfect.
    """
    words, total = words_13a(candidate), []
    correct: list[int] = []
    for n, there in enumerate(_counts(reference), 1):
        total.append(max(0, len(words) - n + 1))
        # Few n-grams are found, and only those are worth counting. No pair found: no triple can be.
        found = list(filter(there.__contains__, ngrams(words, n))) if n == 1 or correct[-1] else []
        if len(set(found)) < len(found):  # some come twice
            correct.append(sum(min(count, there[gram]) for gram, count in Counter(found).items()))
        else:
            correct.append(len(found))
    return len(words), len(words_13a(reference)), correct, total


def _bleu(c: int, r: int, correct: Sequence[float], total: Sequence[float], smooth: str, effective: bool) -> float:
    """The formula of `bleu`, from counts that belong to one text or are summed over many."""
    if smooth not in ("none", "exp", "floor", "add-k"):
        raise ValueError(f"there is no BLEU smoothing {smooth!r}: choose none, exp, floor or add-k.")
    if not any(correct):
        return 0.0  # not even a common word: there is nothing to smooth
    logs, halved = [], 1.0
    for n, (match, of) in enumerate(zip(correct, total), 1):
        if smooth == "add-k" and n > 1:
            match, of = match + 1, of + 1  # Lin and Och 2004
        if of == 0:
            break  # a text of two words has no 3-grams
        if match == 0:
            if smooth == "none":
                return 0.0
            halved /= 2
            match = halved if smooth == "exp" else 0.1  # NIST's 1/2, 1/4, 1/8 of a match, or a constant tenth
        logs.append(math.log(match / of))
    if len(logs) < 4 and not effective:
        return 0.0
    brevity = 1.0 if c >= r else math.exp(1 - r / c)
    return brevity * math.exp(sum(logs) / len(logs))


def bleu(candidate: str, reference: str, smooth: str = "exp") -> float:
    """Sentence BLEU (Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation"): [0, 1].

        BLEU = BP * exp(mean over n of log p_n)    p_n = matching n-grams / n-grams of the candidate, n = 1..4
        BP   = 1 if c >= r else exp(1 - r/c)       c, r = words of candidate and reference

    One summary seldom shares a 4-gram with its reference, and one p_n = 0 makes the product 0: smoothing gives such an
    order a share of a match (Chen and Cherry 2014): `exp` 1/2 the first time, 1/4 the second..., `floor` 1/10, `add-k`
    adds 1 to matches and n-grams from n = 2 on, `none` is the corpus formula. Texts of fewer than 4 words are scored by
    the orders that they have. Equal to sacreBLEU's BLEU(smooth_method=smooth, effective_order=True) / 100, except that
    identical texts score 1 and not 1.0000000000000004.

    Words 3 of 4, pairs 2 of 3, triples 1 of 2, no quadruple of 1, which counts as 1/2; 4 words for 6: BP = exp(-1/2).

    >>> round(bleu("The cat sat quietly", "The cat sat down once more"), 6)  # (3/4 * 2/3 * 1/2 * 1/2)^(1/4) * BP
    0.360645
    >>> bleu("The cat sat quietly", "The cat sat down once more", smooth="none")
    0.0
    >>> bleu("the the the", "The cat"), bleu("", "a cat"), bleu("a cat", "a cat")
    (0.0, 0.0, 1.0)
    """
    return _bleu(*_matches(candidate, reference), smooth, effective=True)


def corpus_bleu(candidates: Sequence[str], references: Sequence[str], smooth: str = "exp") -> float:
    """BLEU of many texts: counts are summed first, as in the paper; not the mean of the texts' own. In [0, 1].

    Equal to sacreBLEU's corpus score / 100. 0 where no text at all has 4 words.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates and {len(references)} references: each needs one of both.")
    if not candidates:
        raise ValueError("corpus_bleu of no texts is not defined.")
    c, r, correct, total = zip(*map(_matches, candidates, references))
    return _bleu(sum(c), sum(r), list(map(sum, zip(*correct))), list(map(sum, zip(*total))), smooth, effective=False)


# -------------------------------------------------------------------------------------------------------------- METEOR


def _align(candidate: Sequence[str], reference: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, j): candidate word i stands for reference word j, each word in one pair at most, sorted by i.

    Three stages, each over the words that the ones before left: same word, same stem, synonyms. In each the candidate
    is gone through from right to left, and a word takes the last free place in the reference that fits. (The paper asks
    for the alignment with the fewest crossings, and for synonyms of words; this is nltk's way, whose numbers people
    compare with. nltk also hands the stems of the second stage on to the third, so only words that are their own stems
    have synonyms: "cats" meets "guy", but "large", which becomes "larg", does not meet "big".)
    """
    pairs, left, free = [], dict(enumerate(candidate)), dict(enumerate(reference))
    for stage in ("word", "stem", "synonym"):
        if stage == "stem":
            left, free = ({i: stem(word) for i, word in texts.items()} for texts in (left, free))
        places: dict[str, list[int]] = {}
        for j, word in free.items():
            places.setdefault(word, []).append(j)
        for i, word in reversed(list(left.items())):
            if stage == "synonym":
                word = max(places.keys() & synonyms(word), key=lambda k: places[k][-1], default="")
            if word in places:
                j = places[word].pop()
                if not places[word]:
                    del places[word]
                pairs.append((i, j))
                del left[i], free[j]
        if not left or not free:
            break
    return sorted(pairs)


def meteor(candidate: str, reference: str, alpha: float = 0.9, beta: float = 3.0, gamma: float = 0.5) -> float:
    """METEOR (Lavie and Agarwal 2007, "METEOR: An Automatic Metric for MT Evaluation..."), in [0, 1].

        P = m / |candidate|    R = m / |reference|          m words are matched: equal, of one stem, or synonyms
        F = P R / (alpha P + (1 - alpha) R)                 alpha = 0.9: recall counts nine times as much
        METEOR = F * (1 - gamma (chunks / m)^beta)          a chunk is a run of matches adjacent in both texts

    A summary of m words that is the reference itself is one chunk and scores 1 - 0.5/m^3, the most there is. Equal to
    nltk's meteor_score on the same words: those of `words_13a`, lower-cased. Without WordNet (`words.find_wordnet`)
    there are no synonyms, and the numbers are a little lower.

    "the" "cat" match as they are, "sits" and "sitting" by their stem: m = 3 of 4 and of 5 words, in 2 chunks, so
    P = 3/4, R = 3/5, F = 0.45 / 0.735, and a share of 1 - 0.5 (2/3)^3 is left of it.

    >>> round(meteor("the cat sits outside", "the cat is sitting idly"), 6)
    0.521542
    >>> meteor("", "the cat"), meteor("dog", "the cat"), meteor("The cat", "the cat")
    (0.0, 0.0, 0.9375)
    """
    ours, theirs = ([word.lower() for word in words_13a(text)] for text in (candidate, reference))
    pairs = _align(ours, theirs)
    m = len(pairs)
    if m == 0:
        return 0.0
    p, r = m / len(ours), m / len(theirs)
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in zip(pairs, pairs[1:]))
    return p * r / (alpha * p + (1 - alpha) * r) * (1 - gamma * (chunks / m) ** beta)


# ------------------------------------------------------------------------------------- what shows that a policy cheats


def _words(text: str) -> Sequence[str]:
    """The words of `words_13a`, lower-cased; where a script has no blanks between words, its characters."""
    return by_character(words_13a(text.lower()))


def copy_rate(text: str, document: str, n: int = 3) -> float:
    """Share of the text's word n-grams that stand in the document: 1 is cut out of it, 0 is all its own words.

    A text of fewer than n words is looked for as a whole.

    >>> copy_rate("a cat sat on a mat", "Then a cat sat on the mat.")  # a cat sat, cat sat on; not: sat on a, on a mat
    0.5
    """
    words = _words(text)
    if not words:
        return 0.0
    n = min(n, len(words))
    grams, there = list(ngrams(words, n)), set(ngrams(_words(document), n))
    return sum(gram in there for gram in grams) / len(grams)


def repetition(text: str, n: int = 3) -> float:
    """Share of the text's word n-grams that it has said before: 0 for normal prose, near 1 for a loop.

    >>> repetition("so it goes, so it goes, so it goes")  # 9 triples, the first 4 of which are new
    0.5555555555555556
    """
    grams = list(ngrams(_words(text), n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def twice(text: str) -> float:
    """1 where a sentence of at least two words is said twice, whatever its capitals and marks, else 0.

    >>> twice("He lost a cat. He wept. He wept!"), twice("Mr. Rye met Mr. Dee.")
    (1.0, 0.0)
    """
    said = [tuple(_words(part)) for part in re.split(f"[{re.escape(FULL_STOPS)}\n]", text)]
    said = [words for words in said if len(words) > 1]
    return float(len(set(said)) < len(said))


def count_names(text: str, document: str) -> tuple[int, int]:
    """-> (names and numbers that the text says, how many of them are no word of the document), as often as said."""
    said = names(text)
    return len(said), sum(word not in words_in(document) for word in said)


def invented(text: str, document: str) -> float:
    """Share of the text's names and numbers that do not stand in the document: 0 is faithful, or names nobody.

    A name is a word with a capital letter, one that begins a sentence too, unless sentences ordinarily begin with it
    (plumbing/names.py lists those: He, After, ...). It stands in the document if it is a word there, however
    capitalised. So Mara's is Mara, and 1,200 is 1200, but Tom is not in Tomorrow, nor 65 in 165.

    What it cannot see: the wrong one of the document's names, a name in small letters, a number in words ("seven" for
    7 is overlooked, 7 for "seven" counts as invented, and so does a plural or a nickname). A quotation counts like any
    other text. An unusual first word counts as a name, and German nouns all do; Chinese has no capitals, only numbers.

    >>> invented("Mara's goat ran from Dunmore. After 7 days, Tom found it.", "Mara lost her goat in Rye for 7 days.")
    0.5
    """
    said, false = count_names(text, document)
    return false / said if said else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n of several texts (Li et al. 2016): different word n-grams / all word n-grams. 1: none comes twice.

    >>> distinct(["the cat sat", "the cat ran"])  # the cat, cat sat, the cat, cat ran
    0.75
    """
    grams = [gram for text in texts for gram in ngrams(_words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def own_shares(texts: Sequence[str], n: int = 2) -> list[float]:
    """What each text adds to `distinct` of them all: an n-gram that stands k times in the group earns 1/k.

    So the mean over the group, each text weighted by its n-grams, is distinct-n of the group: a reward for each text
    whose sum is a property of all.

    >>> own_shares(["the cat sat", "the cat ran"])  # (1/2 + 1) / 2 each
    [0.75, 0.75]
    """
    per_text = [list(ngrams(_words(text), n)) for text in texts]
    counts = Counter(gram for grams in per_text for gram in grams)
    return [sum(1 / counts[gram] for gram in grams) / len(grams) if grams else 0.0 for grams in per_text]


def templated(groups: Sequence[Sequence[str]], n: int = 3) -> float:
    """Share of word n-grams that were also written about another post of the batch: stock phrases, fillers, templates.

    >>> templated([["Tom won. He was happy."], ["Ann lost. He was happy."]])  # 3 of 5 triples each: . he was happy .
    0.6
    """
    per_post = [[gram for text in texts for gram in ngrams(_words(text), n)] for texts in groups]
    posts = Counter(gram for grams in per_post for gram in set(grams))
    return sum(posts[g] > 1 for grams in per_post for g in grams) / max(1, sum(map(len, per_post)))


def well_formed(text: str) -> float:
    """1 for one line that begins like a sentence and ends like one, else 0.

    >>> well_formed("The cat sat."), well_formed("the cat sat."), well_formed("The cat sat and")
    (1.0, 0.0, 0.0)
    """
    text = text.strip()
    return float(bool(text) and len(text.splitlines()) == 1 and not text[0].islower() and ends_a_sentence(text))

# Next: model.py, the transformer that all of this trains
