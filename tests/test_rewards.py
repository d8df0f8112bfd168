"""Rewards, as a lesson: what each number means, and who says so.

The oracles are the field's own: Google's rouge_score, sacreBLEU and nltk's METEOR, on text that hypothesis makes up,
and numbers that the original Perl ROUGE printed. ROUGE is compared with ==: the same divisions in the same order.
"""

import doctest
import json
import math
import os
import random
import sys
import threading
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import OUR_REWARDS, nltk_wordnet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

import metrics
import rewards
import task
import train
from metrics import (
    copy_rate,
    corpus_bleu,
    count_names,
    distinct,
    invented,
    own_shares,
    repetition,
    stem,
    templated,
    twice,
    well_formed,
    words_13a,
)
from plumbing import server as server_module
from plumbing.names import names
from plumbing.scripts import without_rouge
from plumbing.words import find_wordnet
from rewards import GROUP_REWARDS, REWARDS, bleu, length_penalty, meteor, parse, rouge_l
from task import load_posts

DATA = Path(os.environ.get("CRISP_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
GOLDEN = DATA / "golden"
scorer = RougeScorer(["rougeL"], use_stemmer=True)

# The same examples on every run, so that a red test is red for the next person too.
search = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def words(text):
    return text.split()


def test_worked_examples_in_the_docstrings_hold():
    for module in (metrics, rewards, server_module):
        results = doctest.testmod(module)
        assert results.attempted >= 1 and results.failed == 0


# ------------------------------------------------------------------------------------------------------------- length


def test_length_penalty_counts_the_miss_in_units_of_the_target():
    assert length_penalty(64, 64) == 0.0
    assert length_penalty(48, 64) == length_penalty(80, 64) == -0.25  # too short is as bad as too long
    assert length_penalty(0, 64) == -1.0  # the most that one can be too short
    assert length_penalty(640, 64) == -9.0  # while too long has no floor


@pytest.mark.parametrize("target", [0, -64])
def test_length_penalty_refuses_a_target_that_would_turn_it_into_a_prize(target):
    with pytest.raises(ValueError, match="positive number of tokens"):
        length_penalty(10, target)


# At the target, at the edge of its tenth and beyond, far away; and of a blank text, which has 0 tokens whatever it has.
FORMS = {"length": [0, -0.05, -0.1, -0.125, -0.5, -1, -2, -1],
         "length_binary": [1, 1, 1, 0, 0, 0, 0, 0],
         "length_saturating": [0, 0, 0, -0.025, -0.4, -0.9, -1.9, -0.9],
         "length_exp": [1, 2 ** -0.5, 2 ** -1, 2 ** -1.25, 2 ** -5, 2 ** -10, 2 ** -20, 2 ** -10]}


@pytest.mark.parametrize("name", FORMS)
def test_the_four_lengths_by_hand(name):
    _, parts = parse(name)([*"abcdefg", " \n"], [40, 38, 36, 35, 20, 80, 120, 40], "", 40)
    assert parts[name] == pytest.approx(FORMS[name], abs=1e-12)


@search
@given(st.integers(1, 500), st.lists(st.integers(0, 1200), min_size=2, max_size=2))
def test_each_length_is_best_at_the_target_and_never_rises_with_the_distance(target, sizes):
    near, far = sorted(sizes, key=lambda n: abs(n - target))
    for name in FORMS:
        _, parts = parse(name)(["x"] * 5, [target, near, far, target + 3, max(0, target - 3)], "", target)
        best, at_near, at_far, above, below = parts[name]
        assert best >= at_near >= at_far and best == (name in ("length_binary", "length_exp"))
        assert above == below or target < 3  # too long is as bad as too short
    _, parts = parse("length_binary + length_saturating")(["x"], [near], "", target)
    tenth = task.within([near], [target])["within_10pct"]  # the share that evaluations and curves show
    assert parts == {"length_binary": [tenth], "length_saturating": [min(0, 0.1 - abs(near - target) / target)]}


# ------------------------------------------------------------------------------------------------------------- ROUGE-L


def assert_equals_rouge_score(candidate, reference):
    assert rouge_l(candidate, reference) == scorer.score(target=reference, prediction=candidate)["rougeL"].fmeasure


@search
@given(st.text(), st.text())
def test_rouge_l_equals_rouge_score_on_any_text(candidate, reference):
    assert_equals_rouge_score(candidate, reference)


# Random text hardly ever shares a word, so: few words and many repeats; and often more than the 64 that fit into one
# machine word, where a row of the LCS table, kept in one integer, would be cut off in most other languages.
few_words = st.sampled_from(words("the cat cats sat sitting relational relate 42 a news"))
few_words = st.lists(few_words, max_size=12) | st.lists(few_words, min_size=65, max_size=90)


@search
@given(few_words.map(" ".join), few_words.map(" ".join))
def test_rouge_l_equals_rouge_score_on_long_common_subsequences(candidate, reference):
    assert_equals_rouge_score(candidate, reference)


# Characters on which "lower-case, then keep a-z and 0-9" and other readings of that rule disagree, by code point so
# that no editor normalises them: dotted capital I, long s, Kelvin sign, ligature fi, full-width A, Arabic 3, sharp s,
# a combining accent, and two controls that count as white space.
odd_words = st.lists(
    st.sampled_from(
        words("Don't don\u2019t CAF\u00c9 caf\u00e9 cafe Running run's runs x2 3 TL;DR tldr Stra\u00dfe STRASSE _ --")
        + words("\u0130stanbul istanbul \u017fong song \u212aing king \ufb01x fix \uff21 a \u0663 e\u0301t et")
        + ["\x1c", "\x85", ""]
    )
)
odd_joins = st.sampled_from([" ", "", "\n", "-", "\u00a0", "\u200b", "'", "."])


@search
@given(odd_words, odd_words, odd_joins, odd_joins)
def test_rouge_l_equals_rouge_score_on_case_accents_apostrophes_and_digits(candidate, reference, join, other_join):
    assert_equals_rouge_score(join.join(candidate), other_join.join(reference))


def test_rouge_l_by_hand():
    # "police killed the gunman" / "police kill the gunman": the stems agree, LCS 4 of 4 and 4 (Lin 2004's example)
    assert rouge_l("police kill the gunman", "Police killed the gunman!") == 1.0
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5  # "the gunman": p = r = 2/4
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)  # order counts: only one of the three can stay
    assert rouge_l("a x b y c z", "a b c") == pytest.approx(2 / 3)  # gaps do not: p = 3/6, r = 3/3
    assert rouge_l("was", "wa") == 0.0  # three letters and fewer are not stemmed
    assert (
        rouge_l("\u212a", "k") == rouge_l("\u0130", "i") == 1.0 and rouge_l("\u017f", "s") == 0.0
    )  # Kelvin, I, long s
    assert rouge_l("anything", "") == rouge_l("", "anything") == rouge_l("", "") == rouge_l("...", "!?") == 0.0


def golden():
    path = GOLDEN / "rouge_google.json"
    if not path.is_file():
        pytest.skip(f"no {path}: the numbers of the original Perl ROUGE are checked only where that file is at hand")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def unstemmed(monkeypatch):
    """A switch that turns the stemmer off, for those golden numbers that were made without it."""

    def switch(off):
        metrics._where.cache_clear()  # tokens of either kind must not outlive the switch
        monkeypatch.setattr(metrics, "stem", (lambda word: word) if off else stem)

    yield switch
    metrics._where.cache_clear()


def test_rouge_l_gives_the_golden_numbers(unstemmed):
    cases = [case for case in golden()["cases"] if case["rouge_type"] == "rougeL"]
    assert cases, "the golden file has no ROUGE-L case left"
    for case in cases:
        unstemmed(not case["use_stemmer"])
        assert rouge_l(case["prediction"], case["target"]) == pytest.approx(case["fmeasure"], abs=10 ** -case["places"])
    units = golden()["lcs_units"]["lcs_len"]
    candidate, reference = (" ".join(map(str, units[side])) for side in ("can", "ref"))
    p, r = units["len"] / len(units["can"]), units["len"] / len(units["ref"])
    assert rouge_l(candidate, reference) == 2 * p * r / (p + r)


def test_tokens_and_stems_give_the_golden_unigram_numbers(unstemmed):
    cases = [case for case in golden()["cases"] if case["rouge_type"] == "rouge1"]
    assert any(case["use_stemmer"] for case in cases)
    for case in cases:
        unstemmed(not case["use_stemmer"])
        candidate, reference = Counter(metrics._tokens(case["prediction"])), Counter(metrics._tokens(case["target"]))
        hits, margin = (candidate & reference).total(), 10 ** -case["places"]
        assert hits / max(candidate.total(), 1) == pytest.approx(case["precision"], abs=margin)
        assert hits / max(reference.total(), 1) == pytest.approx(case["recall"], abs=margin)


# ----------------------------------------------------------------------------------------------------- the expression


@pytest.mark.parametrize(
    "text, names, weights, normal",
    [
        ("length", ("length",), (1.0,), "length"),
        ("rouge_l+length", ("rouge_l", "length"), (1.0, 1.0), "rouge_l + length"),
        ("  length +0.5 *rouge_l\n", ("length", "rouge_l"), (1.0, 0.5), "length + 0.5*rouge_l"),
        ("2*length - 0.1*rouge_l", ("length", "rouge_l"), (2.0, -0.1), "2*length - 0.1*rouge_l"),
        ("1.0*length-1e-3*rouge_l", ("length", "rouge_l"), (1.0, -0.001), "length - 0.001*rouge_l"),
        ("length + 0*rouge_l", ("length", "rouge_l"), (1.0, 0.0), "length + 0*rouge_l"),
        (".25*length - rouge_l", ("length", "rouge_l"), (0.25, -1.0), "0.25*length - rouge_l"),
    ],
)
def test_parse_reads_names_and_weights_in_order(text, names, weights, normal):
    reward = parse(text)
    assert (reward.names, reward.expression) == (names, normal)
    assert [weight for _, weight in reward.terms] == list(weights)
    assert parse(reward.expression) == reward


@search
@given(st.floats(0, allow_infinity=False, allow_nan=False), st.floats(allow_infinity=False, allow_nan=False))
def test_what_parse_writes_it_reads_back_to_the_last_digit(first, second):
    sign = "-" if second < 0 else "+"
    reward = parse(f"{first}*rouge_l {sign} {abs(second)}*length")
    assert reward.terms == (("rouge_l", first), ("length", second)) and parse(reward.expression) == reward


@pytest.mark.parametrize(
    "text, wrong, mend",
    [
        ("", "it is empty", "name at least one of length, rouge_l"),
        (" \n", "it is empty", "name at least one"),
        ("length +", "lacks a term on one side", "put a term on both"),
        ("- length", "lacks a term on one side", "put a term on both"),
        ("length + - rouge_l", "lacks a term on one side", "put a term on both"),
        ("0.5 rouge_l", "nothing joins '0.5' and 'rouge_l'", "put '*' after a weight"),
        ("length rouge_l", "nothing joins 'length' and 'rouge_l'", "'+' or '-' between rewards"),
        ("length*rouge_l", "'length' is not a finite number", "write a weight such as 0.5 before the '*'"),
        ("rouge_l*0.5", "'rouge_l' is not a finite number", "before the '*'"),
        ("nan*length", "'nan' is not a finite number", "write a weight such as 0.5"),
        ("inf*length", "'inf' is not a finite number", "write a weight such as 0.5"),
        ("1e999*length", "'1e999' is not a finite number", "write a weight such as 0.5"),
        ("2**length", "cannot read the term '2 * * length'", "write it as name or number*name"),
        ("2*", "cannot read the term '2 *'", "write it as name or number*name"),
        ("2*(length + rouge_l)", "cannot read the term '2 * ( length'", "write it as name or number*name"),
        ("length + 0.5*length", "'length' appears twice", "give it the sum of the weights"),
        ("length + lenght", "unknown name 'lenght'", "choose among length, rouge_l"),
        ("0.5", "unknown name '0.5'", "choose among length, rouge_l"),
        ("__import__", "unknown name '__import__'", "choose among length, rouge_l"),
    ],
)
def test_parse_says_what_is_wrong_shows_it_and_tells_how_to_mend_it(text, wrong, mend):
    with pytest.raises(ValueError) as caught:
        parse(text)
    sentence = str(caught.value)
    assert repr(text) in sentence and wrong in sentence and mend in sentence and sentence.endswith(".")


# ---------------------------------------------------------------------------------------------------------- the group


def test_reward_returns_weighted_totals_and_unweighted_parts_in_order():
    texts, lengths = ["the cats sat", "a dog"], [4, 1]
    totals, parts = parse("2*rouge_l - 0.5*length")(texts, lengths, reference="the cat sat", target=4)
    assert list(parts) == ["rouge_l", "length"]
    assert parts["rouge_l"] == [rouge_l("the cats sat", "the cat sat"), 0.0]
    assert parts["length"] == [0.0, -0.75]
    assert totals == [2 * parts["rouge_l"][0], 0.375]
    assert parse("length")([], [], "the cat sat", 4) == ([], {"length": []})


def test_reward_takes_the_count_it_is_given_and_does_not_count_words():
    _, parts = parse("length")(["one two three"], [8], reference="", target=8)
    assert parts["length"] == [0.0]


def test_reward_refuses_texts_and_lengths_that_do_not_pair_up():
    with pytest.raises(ValueError, match="2 texts and 1 lengths"):
        parse("length")(["a", "b"], [1], reference="", target=8)


def test_a_new_reward_is_one_line_and_sees_the_document(monkeypatch):
    monkeypatch.setitem(REWARDS, "copied", lambda s: float(s.text in s.document))
    totals, parts = parse("length + copied")(["a cat", "a dog"], [2, 2], "", target=2, document="I saw a cat.")
    assert totals == parts["copied"] == [1.0, 0.0]
    with pytest.raises(ValueError, match="choose among length, rouge_l.*, copied"):
        parse("copy")


# ------------------------------------------------------------------------------------------------- silence never pays


@pytest.mark.parametrize("silence, n", [("", 0), (" ", 1), ("\n" * 64, 64), ("\t \u3000", 3)])
def test_a_blank_completion_counts_as_no_tokens_and_no_text(silence, n):
    # 64 sampled newlines hit a target of 64 exactly; they are worth as much as nothing at all.
    totals, parts = parse("length + rouge_l")([silence, "the cat sat"], [n, 64], "the cat sat", target=64)
    assert parts == {"length": [-1.0, 0.0], "rouge_l": [0.0, 1.0]}
    assert totals == [-1.0, 1.0]


def test_a_blank_completion_is_shown_to_every_reward_as_nothing(monkeypatch):
    monkeypatch.setitem(REWARDS, "characters", lambda s: len(s.text))  # a reward that would love 64 newlines
    _, parts = parse("characters")(["\n" * 64, "cat"], [64, 1], "", target=64)
    assert parts["characters"] == [0.0, 3.0]


def test_silence_does_not_beat_rambling():
    # 3x the target has length -2. Were silence left at -1, the policy would learn to say nothing.
    totals, parts = parse("length")(["", "far too much", "fine", " "], [0, 192, 64, 5], "", target=64)
    assert totals == [-2.0, -2.0, 0.0, -2.0]
    assert parts["length"] == [-1.0, -2.0, 0.0, -1.0]  # the log keeps what was measured
    assert len(totals) == 4  # nobody is dropped: the group's mean and G stay what they were


def test_silence_does_not_win_by_a_negative_weight():
    # With -length a miss is a prize: 0 tokens would get +1, more than the completion that hits the target.
    totals, _ = parse("rouge_l - length")(["", "the cat sat"], [0, 4], "a dog", target=4)
    assert totals == [0.0, 0.0]


def test_a_group_of_nothing_but_silence_is_flat():
    totals, parts = parse("length + rouge_l")(["", "\n"], [0, 1], "the cat sat", target=64)
    assert totals == [-1.0, -1.0] and parts["rouge_l"] == [0.0, 0.0]


@search
@given(st.lists(st.tuples(st.sampled_from(["", " ", "a cat", "the cat sat", "dogs"]), st.integers(0, 50)), min_size=1))
def test_silence_is_never_above_anybody(group):
    texts, lengths = [text for text, _ in group], [n for _, n in group]
    totals, parts = parse("length + 0.5*rouge_l")(texts, lengths, "the cat sat", target=10)
    assert len(totals) == len(parts["length"]) == len(parts["rouge_l"]) == len(texts)
    for i, text in enumerate(texts):
        by_hand = parts["length"][i] + 0.5 * parts["rouge_l"][i]
        assert totals[i] == (by_hand if text.strip() else min(totals))


# ---------------------------------------------------------------------------------------------------------------- BLEU

SMOOTHINGS = ("none", "exp", "floor", "add-k")
SENTENCE = {smooth: BLEU(smooth_method=smooth, effective_order=True) for smooth in SMOOTHINGS}
CORPUS = {smooth: BLEU(smooth_method=smooth) for smooth in SMOOTHINGS}
# Text for all that the 13a tokenizer knows: entities, digits around marks, hyphens at a line's end.
typeset = st.lists(st.sampled_from(words("a cat Cat the 3 3.5 1,000 - -- . , ... U.S. &amp; &quot; &lt;b&gt; don't it's"
                                         " x-y 1-2 <skipped> (so) [a] {b} $5 100% … é #!?")
                                   + ["\n", "-\n", " ", "\t", "\u00a0", "\u2028"]), max_size=14).map(" ".join)
glued = st.lists(st.sampled_from([*"ab1.,-&;<>'\" \n", "-\n", "&lt;", "&amp;", "lt;", "quot;", "é"]), max_size=20)
glued = glued.map("".join)
few_words = st.lists(st.sampled_from(words("a b c d")), max_size=12).map(" ".join)
any_text = st.text() | typeset | glued | few_words


@search
@given(any_text)
@example("<skip-\nped>")  # a mark that only comes to be when the line is joined stays
@example("&amp;lt;b&amp;quot;")  # a name within a name: only in the script's order is it read twice
def test_words_are_those_of_sacrebleus_13a(text):
    assert list(words_13a(text)) == Tokenizer13a()(text.rstrip()).split()


@search
@given(any_text, any_text, st.sampled_from(SMOOTHINGS))
def test_bleu_equals_sacrebleu(candidate, reference, smooth):
    theirs = SENTENCE[smooth].sentence_score(candidate, [reference]).score / 100
    assert bleu(candidate, reference, smooth) == pytest.approx(theirs, abs=1e-12)


short = st.lists(st.sampled_from(words("a b")), max_size=3).map(" ".join)


@search
@given(short, few_words, st.sampled_from(SMOOTHINGS))
def test_bleu_equals_sacrebleu_on_texts_without_a_four_gram(candidate, reference, smooth):
    """The mean is over the orders that there are: all of the one word, half of the pairs... not a fourth of them."""
    theirs = SENTENCE[smooth].sentence_score(candidate, [reference]).score / 100
    assert bleu(candidate, reference, smooth) == pytest.approx(theirs, abs=1e-12)


@search
@given(st.lists(st.tuples(few_words | typeset, few_words | typeset), min_size=1, max_size=5),
       st.sampled_from(SMOOTHINGS))
def test_corpus_bleu_equals_sacrebleu_and_is_no_mean(pairs, smooth):
    candidates, references = map(list, zip(*pairs))
    theirs = CORPUS[smooth].corpus_score(candidates, [references]).score / 100
    assert corpus_bleu(candidates, references, smooth) == pytest.approx(theirs, abs=1e-12)


def test_what_each_smoothing_makes_of_a_missing_four_gram():
    """Words 3 of 4, pairs 2 of 3, triples 1 of 2, the one quadruple is not in the reference; BP 1."""
    candidate, reference = "the cat sat quietly", "the cat sat down"
    assert bleu(candidate, reference, "none") == 0
    assert bleu(candidate, reference, "exp") == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** 0.25)
    assert bleu(candidate, reference, "floor") == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** 0.25)
    assert bleu(candidate, reference, "add-k") == pytest.approx((3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert bleu("a a a a", "b c d e") == 0.0  # nothing to smooth
    assert bleu("a b", "a c") == pytest.approx((1 / 2 * 0.5 / 1) ** 0.5)  # two words have no triples: a square root


def test_the_brevity_penalty_is_for_short_ones_only():
    assert bleu("the cat sat down", "the cat sat down over there now ok") == pytest.approx(math.exp(1 - 8 / 4))
    assert bleu("the cat sat down over there", "the cat sat down") < 1  # too long pays by its precision


def test_bleu_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="choose none, exp, floor or add-k"):
        bleu("a", "a", "laplace")
    with pytest.raises(ValueError, match="1 candidates and 2 references"):
        corpus_bleu(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no texts"):
        corpus_bleu([], [])


# -------------------------------------------------------------------------------------------------------------- METEOR


class NoSynonyms:
    def synsets(self, word):
        return []


def assert_equals_nltk(candidate, reference):
    """With the synonyms that this machine has, and without any."""
    ours, theirs = words_13a(candidate), words_13a(reference)
    with pytest.MonkeyPatch.context() as patch:
        if find_wordnet() is not None:
            score = meteor_score([theirs], ours, wordnet=nltk_wordnet())
            assert meteor(candidate, reference) == pytest.approx(score, abs=1e-12)
        patch.setattr(metrics, "synonyms", lambda word: frozenset())
        score = meteor_score([theirs], ours, wordnet=NoSynonyms())
        assert meteor(candidate, reference) == pytest.approx(score, abs=1e-12)


# Words that meet at each stage, and where stages compete: equal, of one stem, synonyms, chains of them, and marks.
related = st.lists(st.sampled_from(words(
    "big large larger great cat cats cat's guy run runs running ran hasten The the THE . , buy bought purchase "
    "purchases house home houses dog hound fast quick quickly rapid begin start starts commence İ ß")),
    max_size=14).map(" ".join)


@search
@given(st.data())
def test_meteor_equals_nltk(data):
    assert_equals_nltk(data.draw(related | any_text), data.draw(related | any_text))


@search
@given(related, st.randoms(use_true_random=False))
def test_meteor_equals_nltk_on_shuffles(text, rng):
    shuffled = text.split()
    rng.shuffle(shuffled)
    assert_equals_nltk(" ".join(shuffled[: rng.randint(0, 14)]), text)


def test_long_texts_and_the_shortest():
    rng = random.Random(0)
    pool = words("the a cat dog large big home house runs ran in of . , it") * 3
    long = [" ".join(rng.choices(pool, k=2000)) for _ in range(2)]
    short = [("", ""), ("", "a"), ("a", ""), ("a", "a"), ("a", "b")]
    short += [("Straße", "strasse"), ("&AMP; A", "& a"), ("<SKIPPED>", "a")]  # lower-cased, no more, and after cutting
    for candidate, reference in [long, (long[0], "the"), long[:1] * 2, *short]:
        assert_equals_nltk(candidate, reference)
        theirs = SENTENCE["exp"].sentence_score(candidate, [reference]).score / 100
        assert bleu(candidate, reference) == pytest.approx(theirs, abs=1e-12)


def test_the_matching_goes_from_the_right_and_takes_the_last_place():
    assert metrics._align(["a"], ["a", "b", "a"]) == [(0, 2)]
    assert metrics._align(["a", "a"], ["a", "b", "a", "a"]) == [(0, 2), (1, 3)]
    # A word that could have had a better partner at a later stage is gone: exact first, then stems.
    assert metrics._align(["cats", "cat"], ["cat", "cats"]) == [(0, 1), (1, 0)]
    assert metrics._align(["runs", "run"], ["run", "running"]) == [(0, 1), (1, 0)]


def test_synonyms_are_looked_for_by_stem(monkeypatch):
    """nltk's peculiarity, kept: "larg" is no word, so "large" never meets "big", while "cats" meets "guy" as "cat"."""
    monkeypatch.setattr(metrics, "synonyms", {"cat": {"guy", "tom"}, "large": {"big"}, "car": {"auto"}}.get)
    monkeypatch.setattr(metrics, "synonyms", lambda word, table=metrics.synonyms: frozenset(table(word, ())))
    assert metrics._align(["large", "cats", "cars"], ["big", "guy", "autos"]) == [(1, 1), (2, 2)]
    # Of several synonyms it is the one that stands last, though it may stand first as well.
    assert metrics._align(["cat"], ["guy", "tom"]) == [(0, 1)]
    assert metrics._align(["cat"], ["guy", "tom", "guy"]) == [(0, 2)]


def test_chunks_by_hand():
    """Six words of six: F = 1; in one run 1 - 0.5/6^3, in reverse six runs and half is left."""
    assert meteor("one two three four five six", "one two three four five six") == 1 - 0.5 / 6**3
    assert meteor("six five four three two one", "one two three four five six") == 0.5
    # Recall counts nine times as much: half the words missing costs more than as many words too many.
    assert meteor("a b", "a b c d") == pytest.approx(1 * 0.5 / (0.9 * 1 + 0.1 * 0.5) * (1 - 0.5 / 2**3))
    assert meteor("a b c d", "a b") == pytest.approx(0.5 * 1 / (0.9 * 0.5 + 0.1 * 1) * (1 - 0.5 / 2**3))


# ------------------------------------------------------------------------------------------------- golden values, posts


def from_golden(name):
    if not (GOLDEN / name).exists():
        pytest.skip("the golden values of other projects' test suites are not on this machine")
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_golden_values_of_meteor():
    if find_wordnet() is None:
        pytest.skip("these numbers count synonyms, and there is no WordNet on this machine")
    cases = from_golden("meteor.json")["meteor_1_0_nltk"]["cases"]
    assert cases
    for case in cases:
        best = max(meteor(case["hyp"], reference) for reference in case["refs"])
        assert best == pytest.approx(case["meteor"], abs=0.6 * 10 ** -case["places"]), case


def test_golden_values_of_bleu():
    """Those with one reference, 13a's words (or none that it would cut), and the constants of our smoothings."""
    file, ours = from_golden("bleu_sacrebleu_nltk.json"), {"floor": 0.1, "add-k": 1}
    sentences = [case for case in file["sentence_effective_order"]
                 if case["tokenize"] == "13a" and case["smooth_value"] in (None, ours.get(case["smooth_method"]))]
    assert {case["smooth_method"] for case in sentences} == set(SMOOTHINGS)
    for case in sentences:  # printed with three to five decimals, from 0 to 100
        score = bleu(case["hyp"], case["ref"], case["smooth_method"])
        assert score == pytest.approx(case["score"] / 100, abs=1e-5), case
    for case in file["raw_corpus_floor_default_0.1"]:
        [candidate], [[reference]] = case["hyps"], case["refs"]
        assert metrics._matches(candidate, reference)[2:] == (case["counts"], case["totals"])
        assert bleu(candidate, reference, "floor") == pytest.approx(case["score"] / 100, abs=1e-9)
    for case in file["from_statistics"]:
        score = metrics._bleu(case["sys_len"], case["ref_len"], case["counts"], case["totals"], "none", False)
        assert score == pytest.approx(case["score"] / 100, abs=1e-9)
    zero = file["sentence_zero"]
    assert [bleu(zero["hyp"], zero["ref"], smooth) for smooth in zero["smooth_methods"]] == [0.0] * 4


def test_real_posts():
    path = GOLDEN.parent / "reddit" / "tldr_test.jsonl.gz"
    if not path.exists():
        pytest.skip("the real posts are not on this machine")
    posts = load_posts(path)
    for post, other in zip(posts, posts[1:]):
        for candidate in (other.reference, post.document[:300], post.reference.upper()):
            assert_equals_nltk(candidate, post.reference)
            theirs = SENTENCE["exp"].sentence_score(candidate, [post.reference]).score / 100
            assert bleu(candidate, post.reference) == pytest.approx(theirs, abs=1e-12)


# ------------------------------------------------------------------------------------- what shows that a policy cheats


def test_characters_for_tokens_is_a_bug_that_can_be_seen():
    """A summary of exactly 30 tokens has some 140 characters: rewarded for 30 of them, a policy learns telegrams."""
    summary = " ".join(["wörd"] * 30)  # characters, not bytes
    _, parts = parse("length + char_length")([summary], [30], reference="", target=30)
    assert parts == {"length": [0.0], "char_length": [-(149 - 30) / 30]}


def test_copies():
    document = "Then a cat sat on the mat, and it slept."
    assert copy_rate("A cat sat on the mat", document) == 1.0  # whatever the case
    assert copy_rate("dogs ran off", document) == 0.0
    assert copy_rate("a cat", document) == 1.0 and copy_rate("cat a", document) == 0.0  # too short for a triple
    assert copy_rate("", document) == 0.0 and copy_rate("a cat", "") == 0.0


@search
@given(typeset | few_words, st.integers(0, 20), st.integers(1, 20))
def test_an_excerpt_is_a_copy(document, start, n):
    excerpt = " ".join(document.split()[start : start + n])
    assert copy_rate(excerpt, " ".join(document.split())) == bool(words_13a(excerpt))


CHINESE = "汤姆昨天在公园里丢了他的新自行车，他非常难过，因为那是父母送给他的生日礼物。警察正在调查。"
JAPANESE = "トムは昨日公園で新しい自転車をなくした。とても悲しかった。"
THAI = "เมื่อวานนี้ทอมทำจักรยานคันใหม่หายในสวนสาธารณะ"


@pytest.mark.parametrize("document", [CHINESE, JAPANESE, THAI], ids=["zh", "ja", "th"])
def test_where_no_blank_parts_the_words_characters_are_counted(document):
    """A sentence without blanks is one word: half of it would be no copy, and the same clause eight times no loop."""
    assert copy_rate(document[: len(document) // 2], document) == copy_rate(document, document) == 1.0
    assert copy_rate(document[:4][::-1], document) == 0.0
    assert repetition(document[:10] * 8) == 1 - 10 / 78  # 80 characters, 78 triples, of ten kinds
    assert repetition(document[:10]) == 0.0
    assert distinct([document[:9]] * 2) == 0.5 and own_shares([document[:9], document[9:18]])[0] > 0.8
    assert templated([[document[:5]], [document[:5]]]) == 1.0


def test_scripts_side_by_side_are_cut_each_in_its_own_way():
    assert list(metrics._words("In 2023年 Tokyo东京")) == ["in", "2023", "年", "tokyo", "东", "京"]
    for spaced in ("Том потерял велосипед.", "톰은 자전거를 잃었다.", "टॉम की साइकिल", "فقد توم دراجته", "été ½ 🚲"):
        assert list(metrics._words(spaced)) == list(words_13a(spaced.lower()))  # these have blanks


@search
@given(st.text(), st.text())
@example(CHINESE[:30], CHINESE[:12] + "，" + CHINESE[12:30])
@example("3.5 &amp; 1-2", "3.4 & 1-2")
def test_char_bleu_is_sacrebleu_s_of_characters(candidate, reference):
    ours = parse("char_bleu")([candidate], [1], reference, 1)[1]["char_bleu"][0]
    if candidate.strip():
        score = BLEU(tokenize="char", effective_order=True).sentence_score(candidate, [reference]).score / 100
        assert ours == pytest.approx(score, abs=1e-9)


def test_repetition_and_templates():
    assert repetition("a b c d e f") == 0.0
    assert repetition("a b c " * 10) == pytest.approx(1 - 3 / 28)  # 28 triples, of three kinds
    assert repetition("a b") == repetition("") == 0.0
    assert templated([["a b c d"], ["e f g h"]]) == 0.0
    assert templated([["a b c d"], ["x a b c"]]) == 0.5  # one of each two triples
    assert templated([["a b c d", "a b c d"]]) == 0.0  # alike within one post: that is what distinct tells
    assert templated([]) == templated([[""]]) == 0.0
    # Whatever the case, all three of them: 4 triples of three kinds; 2 pairs of one; the one triple, twice.
    assert (repetition("A b c a B C"), distinct(["The cat", "the CAT"]), templated([["a b c"], ["A B C"]])) == (
        0.25, 0.5, 1.0)


@search
@given(st.lists(few_words, min_size=1, max_size=8))
def test_each_ones_share_of_distinct_adds_up_to_the_groups(texts):
    pairs = [max(0, len(text.split()) - 1) for text in texts]
    shares = own_shares(texts)
    if sum(pairs):
        whole = sum(share * n for share, n in zip(shares, pairs)) / sum(pairs)
        assert whole == pytest.approx(distinct(texts))
    assert distinct(texts * 2) == pytest.approx(distinct(texts) / 2)  # everything is said twice


def test_a_sentence_that_is_said_twice():
    assert twice("He celebrated. He won a cup! he celebrated") == 1  # whatever its case and its mark
    assert twice("He celebrated. He celebrated it.") == twice("He won, and he won.") == twice("") == 0
    assert twice("Mr. Lee met Mr. Day. No. No.") == 0  # a title or a single word is no sentence
    assert twice("猫がいる。犬がいる。猫がいる。") == 1 and twice("He left\nHe left") == 1


POST = "Mara lost her goat, noodle, in Rye; the O'Briens’ aunt Anne-Lise paid £1,200.50 and 165 or 2000 more tomorrow."


@pytest.mark.parametrize(("text", "said", "false"), [
    ("", [], 0),
    ("the goat was lost", [], 0),
    ("Mara's goat", ["mara"], 0),  # the ending is cut here...
    ("MARA’S goat", ["mara"], 0),
    ("O'Briens paid.", ["o'briens"], 0),  # ... and not this one
    ("After that, Mara won; Finally she and I slept. I'm sure she'd won. He didn't. Didn't he?", ["mara"], 0),
    ("Went to The Hague", ["went", "hague"], 2),  # an opener is never a name; an unusual first word is taken for one
    ("Noodle came", ["noodle"], 0),  # the post has it in small letters
    ("Tom and Tomorrow", ["tom"], 1),  # Tom is in "tomorrow", but it is no word of the post
    ("Anne Lise, Anne-Lise, anne-Lise", ["anne", "lise", "anne", "lise", "lise"], 0),  # a hyphen parts words
    ("New York, York", ["new", "york", "york"], 3),  # each word by itself, each time that it is said
    ("1,200.50 or 1200.50", ["1200.50", "1200.50"], 0),
    ("2,000 and 2000, not 1,200", ["2000", "2000", "1200"], 1),
    ("65 of 165 in 1,65", ["65", "165", "1", "65"], 3),  # 65 stands inside of 165 only; 1,65 has no thousands
    ("A 165th, £165.", ["165", "165"], 0),  # what is joined to a number does not count
    ("José and Jose\u0301", ["josé", "josé"], 2),  # however the accent is written
    ("猫がいる 165", ["165"], 0),  # no capitals
])
def test_names_and_numbers_by_hand(text, said, false):
    assert names(text) == said and count_names(text, POST) == (len(said), false)
    assert invented(text, POST) == (false / len(said) if said else 0.0)


some_names = st.lists(st.sampled_from("Mara Rye Dunmore O'Brien Anne-Lise José 7 165 1,200 3.5".split()), max_size=6)


@search
@given(some_names, some_names, st.sampled_from([" ", ", ", ". ", " - ", " (", "'s "]))
def test_what_stands_in_the_post_is_not_invented_and_all_else_is(ours, theirs, join):
    """Whatever stands between them, and however the post writes them."""
    text, post = join.join(ours), "It was " + "; ".join(theirs).lower() + "."
    pieces, there = ([piece for name in some for piece in name.split("-")] for some in (ours, theirs))
    assert count_names(text, post) == (len(pieces), sum(piece not in there for piece in pieces))
    assert invented(text, text.upper()) == 0 and invented(text, "") == bool(pieces)
    assert count_names(text.lower(), "")[0] == sum(piece[0].isdigit() for piece in pieces)  # only numbers are left


@search
@given(typeset, typeset)
def test_a_longer_post_makes_nothing_more_invented(text, post):
    said, false = count_names(text, post)
    assert 0 <= false <= said and count_names(text, f"{post} {text}")[1] == 0
    assert count_names(text, f"{post}\nTom won.")[1] <= false
    assert count_names(f"{text} and {text}", post) == (2 * said, 2 * false)


def test_the_references_of_the_embedded_posts_invent_nothing():
    assert not [post.id for post in load_posts("tiny", "test") if invented(post.reference, post.document)]


def test_form():
    good = ["The cat sat.", "“Did it?”", "3 cats sat!", "Élan (of a cat.)", '"It did."', "'So?'", "It’s ‘on.’\n"]
    bad = ["the cat sat.", "The cat sat", "The cat.\nThe dog.", "", "  ", "The cat sat,"]
    assert [well_formed(text) for text in good + bad] == [1.0] * 7 + [0.0] * 6


def test_form_in_other_scripts():
    """Each has full stops and quotes of its own; Thai puts a blank there, so its last word may end a text."""
    good = ["汤姆丢了车。", "他说：「丢了！」", "猫がいる。", "（猫がいる。）", "क्या हुआ।", "ماذا حدث؟",
            "Il a dit : « Non. »", "Il a dit : «\u00a0Non.\u00a0»", "Er sagte: „Nein.“", "Он сказал: «Нет.»",
            "Տոմը գնաց։", THAI, "ቶም ሄደ።"]
    bad = ["汤姆丢了车，", "猫がいる、", "क्या हुआ", "ماذا حدث،", "Il a dit : « Non »",
           "汤姆丢了车。\n他走了。", "”", "« »"]
    assert [well_formed(text) for text in good] == [1.0] * len(good)
    assert [well_formed(text) for text in bad] == [0.0] * len(bad)


@pytest.mark.parametrize(("references", "said"), [
    ([CHINESE], True), ([CHINESE + " 2023 Tokyo"], True), (["Том потерял велосипед."], True), ([JAPANESE, THAI], True),
    (["A cat sat."], False), (["Élan à l'été."], False), ([], False), ([""], False), (["A cat.", "", "…"], False),
    (["A cat sat on a mat.", CHINESE[:8]], False)])
def test_a_run_is_told_where_rouge_counts_nothing(references, said):
    """rouge_score, which everybody's ROUGE-L is, knows a-z and 0-9. A reward that is always 0 should say so."""
    sentence = without_rouge(references)
    assert bool(sentence) == said
    if said:
        assert all(name in REWARDS and name in sentence for name in ("bleu", "meteor", "char_bleu"))


# ---------------------------------------------------------------------------------------------------- for all of them


@pytest.mark.parametrize("name", sorted({*OUR_REWARDS} - {"embedding", "judge"} - rewards.NEED_MODEL))
def test_every_reward_can_be_used_and_silence_is_never_best(name):
    texts = ["Tom won a race.", "Tom lost a cat and a dog.", "", " \n"]
    bad = name in ("copy_rate", "repetition", "twice", "invented")  # shares of what is bad
    expression = f"0*length - {name}" if bad else name
    totals, parts = parse(expression)(texts, [5, 9, 0, 2], "Tom won the race.", 6, document="Tom won a race.")
    assert list(parts)[-1] == name and len(parts[name]) == 4
    assert totals[2] == totals[3] == min(totals)


def test_nothing_breaks_them_and_a_text_is_most_like_itself():
    rng = random.Random(0)
    pool = words("the The cat cats sat . , 3.5 &amp; large big - don't é 日本 \u200b \U0001f600 ran")
    for _ in range(5000):
        a, b = (" ".join(rng.choices(pool, k=rng.randrange(9))) if rng.random() < 0.7 else
                "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                        for _ in range(rng.randrange(30))) for _ in range(2))
        for metric in (rouge_l, bleu, meteor, copy_rate):
            assert 0 <= metric(a, b) <= metric(b, b) + 1e-12 <= 1 + 1e-12, (metric, a, b)
        assert (bleu(b, b), rouge_l(b, b)) == (bool(words_13a(b)), bool(metrics._tokens(b))), b  # 1, to the last digit
        assert 0 <= repetition(a) <= 1 and well_formed(a) in (0, 1) and twice(a) in (0, 1)
        assert 0 <= invented(a, b) <= 1 and invented(a, a) == 0, (a, b)
        assert all(0 <= share <= 1 for share in own_shares((a, b)))


@pytest.mark.parametrize("name", OUR_REWARDS)
def test_a_name_is_what_it_says_and_needs_what_it_says(name, monkeypatch):
    """The measures are not symmetric: who swaps text and reference, or reference and document, gets other numbers."""
    monkeypatch.setattr(server_module, "embed", lambda texts: {
        text: [float(text.count(letter)) for letter in "abcd"] for text in texts})
    monkeypatch.setattr(task, "paid", lambda pairs: [d.count("a") - 3 * text.count("c") for d, text in pairs])
    text, reference, document, other = "a b c a b c", "a b c d a a", "x a b c a y", "d d a c"
    if name in ("twice", "invented"):
        text, document = "B Rye. Tom 7. B Rye.", "tom"
    expected = {
        "length": -(8 - 6) / 8, "length_binary": 0.0, "length_saturating": -0.25 + 0.1, "length_exp": 2 ** -2.5,
        "char_length": -(11 - 8) / 8, "embedding": (2 * 3 + 2 * 1 + 2 * 1) / 12,
        "rouge_l": rouge_l(text, reference), "bleu": bleu(text, reference),
        "char_bleu": bleu(" ".join(text), " ".join(reference)), "meteor": meteor(text, reference),
        "copy_rate": 3 / 4, "repetition": 1 / 4, "distinct": (4 * 1 / 2 + 1) / 5, "format": 0.0,
        "twice": 1.0, "invented": 5 / 6,
        "squish": 0.5, "cost": 0.25, "judge": 2 - 3 * 2,
    }
    measured = {"squish": [0.5, 0.0], "cost": [0.25, 0.125]}
    _, parts = parse(name)([text, other], [6, 4], reference, 8, document, measured)
    assert parts[name][0] == pytest.approx(expected[name])
    _, elsewhere = parse(name)([text, other], [6, 4], "nothing of it", 8, document, measured)
    assert (parts != elsewhere) == (name in rewards.NEED_REFERENCE)


def test_a_forker_s_reward_of_a_whole_group(monkeypatch):
    """It sees all summaries of a post at once, and must answer for each of them."""
    monkeypatch.setitem(GROUP_REWARDS, "rank", lambda group: [sum(len(o.text) < len(s.text) for o in group)
                                                              for s in group])
    monkeypatch.setitem(GROUP_REWARDS, "short", lambda group: [1.0])
    totals, parts = parse("2*rank + length")(["ccc", "a", "bb"], [3, 3, 3], "", 3)
    assert parts["rank"] == [2, 0, 1] and totals == [4.0, 0.0, 2.0]
    with pytest.raises(ValueError, match="'short' gave 1 values for 2 summaries"):
        parse("short")(["a", "b"], [1, 1], "", 1)


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), "0.5", b"1", [1.0], {}, 1j, torch.zeros(2)],
                         ids=str)
def test_what_a_reward_should_not_give_is_named(monkeypatch, value):
    """The reward's name, the value and the summary: with ten terms in the sum, "NaN" alone is a search."""
    monkeypatch.setitem(REWARDS, "mine", lambda s: 1.0 if s.text == "a" else value)
    with pytest.raises(ValueError) as caught:
        parse("length + 0*mine")(["a", "b b"], [1, 2], "", 1)
    assert "'mine'" in str(caught.value) and repr(value) in str(caught.value) and "'b b'" in str(caught.value)


@pytest.mark.parametrize("values", [None, 1.0, "12", {"a": 1, "b": 2}], ids=str)
def test_what_a_reward_of_a_group_should_not_give_is_named(monkeypatch, values):
    monkeypatch.setitem(GROUP_REWARDS, "mine", lambda group: values)
    with pytest.raises(ValueError) as caught:
        parse("mine")(["a", "b"], [1, 2], "", 1)
    assert "'mine'" in str(caught.value) and repr(values) in str(caught.value) and "2 summaries" in str(caught.value)


def test_numbers_of_any_library_are_numbers(monkeypatch):
    given = iter([True, np.float32(0.5), torch.tensor(2.0), 3])
    monkeypatch.setitem(REWARDS, "mine", lambda s: next(given))
    assert parse("mine")(["a"] * 4, [1] * 4, "", 1)[0] == [1.0, 0.5, 2.0, 3.0]
    monkeypatch.setitem(GROUP_REWARDS, "tensor", lambda group: torch.tensor([1.0, 2.0]))
    assert parse("tensor")(["a", "b"], [1, 1], "", 1)[0] == [1.0, 2.0]


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("wrong", [ValueError, KeyError, OSError, FloatingPointError, RuntimeError])
def test_an_error_in_a_forker_s_reward_says_which_and_where(monkeypatch, wrong, group):
    """train.py shows a ValueError as one sentence, for it is its own. In a forker's reward it is a mistake in a
    program, and a json.loads that fails says nothing without its line. RuntimeErrors keep their traceback."""
    def mine(given):
        raise wrong("out of somebody's library")

    monkeypatch.setitem(GROUP_REWARDS if group else REWARDS, "mine", mine)
    with pytest.raises(RuntimeError, match=f"'mine'.*{wrong.__name__}") as caught:
        parse("length + mine")(["a", "b"], [1, 1], "", 1)
    shown = "".join(traceback.format_exception(caught.value))
    assert "in mine" in shown and "out of somebody's library" in shown


def test_what_a_language_model_measures_is_handed_in():
    totals, parts = parse("squish - 0.5*cost")(["a", "b"], [1, 1], "", 8, "d", {"squish": [0.5, 0.25],
                                                                             "cost": [0.5, 1.0]})
    assert totals == [0.25, -0.25] and parts == {"squish": [0.5, 0.25], "cost": [0.5, 1.0]}
    with pytest.raises(ValueError, match="measured by a language model"):
        parse("squish")(["a"], [1], "", 8)


# ---------------------------------------------------------------------------------------------------------- embeddings


@pytest.fixture
def server(monkeypatch):
    """A server of embeddings on this machine: [number of a's, number of b's], or whatever `answer` says."""
    monkeypatch.setattr(pytest.importorskip("openai._base_client"), "INITIAL_RETRY_DELAY", 0.01)  # what it waits
    asked = []

    class Handler(BaseHTTPRequestHandler):
        answer = None

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            data = [{"embedding": [text.count("a"), text.count("b")], "index": i}
                    for i, text in enumerate(body["input"])]
            said = Handler.answer(body, len(asked)) if callable(Handler.answer) else Handler.answer
            status, text = said or (200, json.dumps({"data": data[::-1]}))  # in whatever order
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1/")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        monkeypatch.setenv("EMBEDDING_MODEL", "small")
        server_module._known.clear()
        yield Handler, asked
        http.shutdown()
    server_module._known.clear()


def cosine_of(text, reference):
    return server_module.similarities([(text, reference)])[0]


def test_embedding_is_the_cosine_of_a_servers_vectors(server):
    assert cosine_of("aaa", "aaabbbb") == pytest.approx(3 / 5)  # (3, 0) and (3, 4)
    assert cosine_of("bb", "aaabbbb") == pytest.approx(4 / 5)
    _, asked = server
    assert [body["input"] for _, _, body in asked] == [["aaa", "aaabbbb"], ["bb"]]  # nothing is asked twice
    assert asked[0][:2] == ("/v1/embeddings", "Bearer secret") and asked[0][2]["model"] == "small"
    assert cosine_of("", "aaa") == cosine_of("aaa", " ") == 0.0 and len(asked) == 2
    assert cosine_of("c", "aaa") == 0.0  # a zero vector is no division by zero


def test_a_group_is_one_request(server):
    totals, _ = parse("embedding")(["b", "aaa", " ", "bb"], [1, 1, 1, 1], reference="aaabbbb", target=1)
    assert totals == pytest.approx([0.8, 0.6, 0.0, 0.8])
    (_, _, body), = server[1]
    assert sorted(body["input"]) == ["aaa", "aaabbbb", "b", "bb"]  # for silence nobody is asked


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_server_that_takes_fewer_texts_gets_halves_from_then_on(server, status):
    """Vectors are (a's, b's), so each text tells which vector is its own."""
    texts = [a * "a" + b * "b" for a in range(4) for b in range(1, 6)]  # 20 different ones
    server[0].answer = lambda body, n: (status, '{"error": "at most 6"}') if len(body["input"]) > 6 else None
    found = server_module.embed(texts[:13])
    assert found == {text: [text.count("a"), text.count("b")] for text in texts[:13]} and list(found) == texts[:13]
    assert [len(body["input"]) for _, _, body in server[1]] == [13, 7, 4, 4, 4, 1]
    server_module.embed(texts[13:])
    assert [len(body["input"]) for _, _, body in server[1][6:]] == [4, 3]  # 7 at once is not tried again


def test_a_text_that_no_batch_makes_right_ends_in_what_the_server_says_of_it(server):
    server[0].answer = lambda body, n: (400, '{"error": "too long"}') if "bbb" in body["input"] else None
    with pytest.raises(ConnectionError, match="HTTP 400 too long"):
        server_module.embed(["a", "b", "bbb", "aa"])
    assert server_module.embed(["ab", "aab", "abb"])["aab"] == [2, 1]
    assert len(server[1][-1][2]["input"]) == 3  # it was not the batch


def test_what_is_kept_of_a_server_is_bounded(server, monkeypatch):
    monkeypatch.setattr(server_module, "MOST", 3)
    for text in ("a", "b", "ab"):
        assert cosine_of(text, "aab") == pytest.approx(cosine_of(text, "aab"))
        assert len(server_module._known) <= 3


def vectors(*each) -> tuple[int, str]:
    return 200, json.dumps({"data": [{"embedding": vector} for vector in each]})


@pytest.mark.parametrize("answer, why", [
    ((500, "no"), "HTTP 500 no"), ((200, "<html>"), "<html>"), ((200, "{}"), "KeyError"), ((200, "[]"), "\\[\\]"),
    ((200, '{"error": "no such page"}'), "no such page"), (vectors(), "0 vectors for 2 texts"),
    (vectors([1.0]), "1 vectors for 2 texts"), (vectors(None, None), "TypeError"), (vectors([], []), "empty"),
    (vectors([1.0, 2.0], [1.0, 2.0, 5.0]), "vectors of 2 and 3 numbers"), (vectors([1.0], [math.nan]), "not finite"),
    (vectors([1.0], [10**400]), "OverflowError"), ((200, '{"data": [{"embedding": "AAAA"}]}'), "ValueError"),
    ((401, "the key secret is wrong"), "HTTP 401 the key \\*\\*\\* is wrong")])
def test_a_server_that_gives_no_vector_is_a_sentence_and_nothing_is_kept(server, answer, why):
    server[0].answer = answer
    with pytest.raises(ConnectionError, match=f"no vectors from http://127.*/v1/embeddings .*{why}.*OPENAI_BASE_URL"):
        cosine_of("a", "b")
    server[0].answer = None  # it is well again
    assert cosine_of("a", "ab") == pytest.approx(0.5 ** 0.5)


def test_vectors_of_another_size_than_those_that_are_kept_are_an_error(server):
    assert cosine_of("a", "ab") == pytest.approx(0.5 ** 0.5)
    server[0].answer = vectors([1.0, 2.0, 5.0])  # another model came to live there
    with pytest.raises(ConnectionError, match="vectors of 2 and 3 numbers"):
        cosine_of("b", "ab")


@pytest.mark.parametrize("fault", [(503, "busy"), (429, "slow down"), (200, '{"data": [')])
def test_a_fault_that_passes_costs_nothing(server, fault):
    server[0].answer = lambda body, n: fault if n == 1 else None
    assert cosine_of("a", "ab") == pytest.approx(0.5 ** 0.5) and len(server[1]) == 2


@pytest.mark.parametrize("key", ["secret\n", "secret\u201d", "se cret"])
def test_a_key_that_is_none_is_refused_and_not_shown(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="^OPENAI_API_KEY holds ") as caught:
        cosine_of("a", "b")
    assert "secret" not in str(caught.value) and not server[1]


def test_a_run_whose_server_stays_away_ends_after_a_checkpoint_and_goes_on_when_it_is_back(
        server, tmp_path, monkeypatch, capsys):
    """Away in the middle of a step, in the evaluation at the end, and never: three runs, one result."""
    monkeypatch.chdir(tmp_path)
    settings = ["--stages", "embedding:4", "--prompts", "2", "--group", "2", "--target", "8", "--eval-posts", "2",
                "--lr", "0.02", "--save-every", "9"]  # at such a rate the evaluation at the end meets new texts

    def rows_of(name, *files):
        return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")}
                for file in files if Path(f"runs/{name}/{file}.jsonl").exists()
                for line in Path(f"runs/{name}/{file}.jsonl").read_text(encoding="utf-8").splitlines()]

    def run_that_loses_its_server(name, step, group):  # with this group of the next step, or in the evaluation
        server_module._known.clear()
        since = []

        def answer(body, n):
            since.extend([n] * (len(rows_of(name, "metrics")) == step))
            return (503, "busy") if len(since) > group else None

        server[0].answer = answer
        assert train.main([*settings, "--run", name]) == 1
        err = capsys.readouterr().err
        assert f"All {step} steps are kept" in err and f"train.py --run {name} --resume" in err
        server[0].answer = None
        assert train.main(["--resume", "--run", name]) == 0
        assert f"Resumed after step {step}." in capsys.readouterr().out
        return rows_of(name, "metrics", "eval")

    assert train.main([*settings, "--run", "whole"]) == 0
    whole = rows_of("whole", "metrics", "eval")
    assert len(whole) == 4 + 2
    assert run_that_loses_its_server("a", 3, 1) == whole
    assert run_that_loses_its_server("b", 4, 0) == whole


def test_half_a_character_can_be_sent(server):
    assert cosine_of("a\ud83d", "ab") == pytest.approx(0.5 ** 0.5)


def test_no_server_and_no_package_are_sentences(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("openai._base_client"), "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ConnectionError, match="start a server there.*OPENAI_BASE_URL, OPENAI_API_KEY, EMBEDDING_MODEL"):
        cosine_of("nobody", "listens")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:10/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(OSError, match="pip install openai"):
        cosine_of("nobody", "asks")
