"""Rewards, as a lesson: what each number means, and who says so.

The oracles are the field's own: nltk's Porter stemmer and Google's rouge_score, on text that hypothesis makes up, and
numbers that the original Perl ROUGE printed. Floats are compared with ==: the same divisions in the same order.
"""

import doctest
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

import rewards
from rewards import REWARDS, length_penalty, parse, rouge_l, stem

porter = PorterStemmer()
scorer = RougeScorer(["rougeL"], use_stemmer=True)

# The same examples on every run, so that a red test is red for the next person too.
search = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def words(text):
    return text.split()


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(rewards)
    assert results.attempted >= 10 and results.failed == 0


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


# ------------------------------------------------------------------------------------------------------ Porter stemmer

# Every vowel pattern that the rules look at, times every ending that they know, alone and in pairs.
BEGINNINGS = words("""
    a be by eg ey y yy sky tr tree up use oat tan hop hopp fil fail fall hiss fizz tax bow play enjoy happ syz rel
    rat ration condi conn adopt opin operat troubl conflat siz digit radic differ vil analog geo theo archaeo log bio
    sensit formal activ hope good electr depend communic bowdler gener adjust repl champ ceas contro roll 24 x9
""")
ENDINGS = words("""
    s es ies sses ss ed eed ied ing ings y ly li lli alli ally fulli fully logi logy ational tional enci ency anci ancy
    izer bli ably entli ently eli ely ousli ously ization ation ator alism iveness fulness ousness aliti ality iviti
    biliti bility icate ative alize iciti icity ical ful ness al ance ence er ic able ible ant ement ment ent sion tion
    ion ou ism ate iti ous ive ize e ee ll lle at bl iz
""")
IRREGULAR = words("""
    sky skies dying lying tying news inning innings outing outings canning cannings howe proceed exceed succeed
    proceeds exceeded succeeding die dies died lie lied tie ties flies fly spied enjoyment
""")
EDGES = words("""
    yes oed eed ed ing s ss ies ied sses ion sion tion logi alli e ee y yy yyy yyyy ays bly bing a an the bled feed
""")


def test_stem_equals_nltk_on_words_built_from_every_ending():
    built = {begin + end for begin in BEGINNINGS for end in ENDINGS}
    built |= {begin + first + second for begin in BEGINNINGS[::4] for first in ENDINGS for second in ENDINGS[::5]}
    built |= set(BEGINNINGS + ENDINGS + IRREGULAR + EDGES)
    assert len(built) > 10_000
    assert [(word, stem(word), porter.stem(word)) for word in sorted(built) if stem(word) != porter.stem(word)] == []


ascii_words = st.text("abcdefghijklmnopqrstuvwxyz0123456789", max_size=12)
stubborn_words = st.builds(
    lambda begin, ends: begin + "".join(ends),
    st.text("aeiouyybdlnstwxz", max_size=5),  # few letters, so that double letters and cvc endings are common
    st.lists(st.sampled_from(ENDINGS), max_size=3),
)


@search
@given(ascii_words | stubborn_words)
def test_stem_equals_nltk_on_words_that_nobody_has_seen(word):
    assert stem(word) == porter.stem(word)


def test_stem_lets_relatives_meet_and_keeps_strangers_apart():
    assert len({stem(word) for word in ("relate", "relates", "related", "relating", "relational")}) == 1
    assert stem("news") != stem("new") and stem("university") != stem("unit")
    assert stem("dying") == stem("dies") == "die"  # irregular forms, and nltk's rule for four letters
    assert stem("enjoy") == "enjoy" and stem("fly") == stem("flies") == "fli"  # where nltk and the 1980 paper part


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
    data = Path(os.environ.get("CRISP_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = data / "golden" / "rouge_google.json"
    if not path.is_file():
        pytest.skip(f"no {path}: the numbers of the original Perl ROUGE are checked only where that file is at hand")
    return json.loads(path.read_text())


@pytest.fixture
def unstemmed(monkeypatch):
    """A switch that turns the stemmer off, for those golden numbers that were made without it."""

    def switch(off):
        rewards._where.cache_clear()  # tokens of either kind must not outlive the switch
        monkeypatch.setattr(rewards, "stem", (lambda word: word) if off else stem)

    yield switch
    rewards._where.cache_clear()


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
        candidate, reference = Counter(rewards._tokens(case["prediction"])), Counter(rewards._tokens(case["target"]))
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
        (".5*length - rouge_l", ("length", "rouge_l"), (0.5, -1.0), "0.5*length - rouge_l"),
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
