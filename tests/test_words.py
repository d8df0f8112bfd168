"""When two words are the same word, as a lesson: stems against nltk's Porter stemmer, synonyms against nltk's WordNet.

WordNet itself is not shipped: a little one, written here byte by byte, shows how its files are read everywhere, and the
whole one is compared where this machine has it.
"""

import doctest
import os
import random
import zipfile
from pathlib import Path

import pytest
from helpers import nltk_wordnet
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer

import plumbing.words as module
from plumbing.words import find_wordnet, stem, synonyms

porter = PorterStemmer()

# The same examples on every run, so that a red test is red for the next person too.
search = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def words(text):
    return text.split()


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(module)
    assert results.attempted >= 3 and results.failed == 0


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


@search
@given(st.text(min_size=1, max_size=8).map(str.lower))
def test_stem_equals_nltk_on_any_text(word):
    """METEOR stems whatever stands between two spaces."""
    assert stem(word) == porter.stem(word)


# ------------------------------------------------------------------------------------------------------------- WordNet


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Each test looks for WordNet anew."""
    def clear():
        for cached in (find_wordnet, module._wordnet, module._exceptions, synonyms):
            cached.cache_clear()
    clear()
    yield
    monkeypatch.undo()
    clear()


@pytest.fixture
def small(tmp_path):
    """A WordNet of five synsets, in the format of wndb(5WN): offsets are byte positions, headers begin with blanks."""
    synsets = {
        "noun": ["05 n 02 dog 0 domestic_dog 0 001 @ 00000000 n 0000 | it barks",
                 "05 n 03 mouse 0 Mickey 1 rodent 0 000 |"],
        "verb": ["38 v 0c run 0 hare 1 a1 0 a2 0 a3 0 a4 0 a5 0 a6 0 a7 0 a8 0 a9 0 a10 0 000 01 + 02 00 | 12 words"],
        "adj": ["00 s 02 ready(p) 0 set(a) 0 000 | a satellite", "00 a 01 good 0 000 |"],
        "adv": [],
    }
    lemmas = {"noun": {"dog": [0], "domestic_dog": [0], "mickey": [1], "mouse": [1], "rodent": [1], "set": [0, 1]},
              "verb": {"run": [0]}, "adj": {"good": [1], "ready": [0]}, "adv": {}}
    irregular = {"noun": "mice mouse\nsets rodent\n", "verb": "ran run\n", "adj": "better good well\n", "adv": ""}
    folder = tmp_path / "small"
    folder.mkdir()
    for pos in synsets:
        data, offsets = "  1 A licence stands here.  \n  2 It begins with blanks.  \n", []
        for line in synsets[pos]:
            offsets.append(len(data))
            data += f"{len(data):08d} {line}  \n"
        index = "  1 A licence stands here.  \n"
        for lemma, where in sorted(lemmas[pos].items()):
            places = " ".join(f"{offsets[i]:08d}" for i in where)
            index += f"{lemma} {pos[0]} {len(where)} 1 @ {len(where)} 0 {places}  \n"
        (folder / f"data.{pos}").write_text(data, encoding="utf-8", newline="\n")
        (folder / f"index.{pos}").write_text(index, encoding="utf-8", newline="\n")
        (folder / f"{pos}.exc").write_text(irregular[pos], encoding="utf-8", newline="\n")
    return folder


def test_a_small_wordnet_by_hand(small, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(small))
    assert synonyms("dog") == synonyms("dogs") == {"dog"}  # "domestic_dog" is no single word
    assert synonyms("mice") == synonyms("rodent") == {"mouse", "Mickey", "rodent"}  # an exception; capitals are kept
    assert len(synonyms("ran")) == len(synonyms("runs")) == 12  # the count is hexadecimal: 0c
    assert synonyms("sets") == synonyms("mouse")  # an exception takes the place of the rules: this is not "set"
    assert synonyms("better") == {"good"}  # of the bases good and well, the one that is there
    assert synonyms("ready") == {"ready", "set"}  # without their (p) and (a)
    assert synonyms("set") == {"dog", "mouse", "Mickey", "rodent"}  # two senses; as an adjective it is not in the index
    for nothing in ("", "s", "es", "ing", "unknown", "1", "zürich", "the", "domestic_do"):
        assert synonyms(nothing) == frozenset()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 50])
def test_a_line_is_found_wherever_it_stands(n):
    """The first, the last, and not the neighbour that only begins alike."""
    lemmas = sorted({f"{'abcab'[i % 5]}{'-' * (i % 7)}{i}" for i in range(n)})
    index = "  1 A licence.  \n" + "".join(f"{lemma} n {i}  \n" for i, lemma in enumerate(lemmas))
    for i, lemma in enumerate(lemmas):
        assert module._look_up(index.encode(), lemma) == [lemma, "n", str(i)]
        for near in {lemma[:-1], lemma + "0", lemma + "-", "~" + lemma, "!"} - set(lemmas) - {""}:
            assert module._look_up(index.encode(), near) == []


def test_where_wordnet_is_looked_for(small, tmp_path, monkeypatch):
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr(module, "_places", lambda: iter([tmp_path / "nowhere", small]))
    assert find_wordnet() == small
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "index.noun").touch()  # another program's, or an installation that was broken off
    monkeypatch.setattr(module, "_places", lambda: iter([tmp_path / "half", small]))
    find_wordnet.cache_clear()
    assert find_wordnet() == small
    other = tmp_path / "other"
    small.rename(other)
    find_wordnet.cache_clear()
    assert find_wordnet() is None and synonyms("dog") == frozenset()
    monkeypatch.setenv("WNSEARCHDIR", str(other))
    find_wordnet.cache_clear()
    assert find_wordnet() == other
    (other / "data.verb").unlink()
    find_wordnet.cache_clear()
    with pytest.raises(FileNotFoundError, match="WNSEARCHDIR=.*other has no data.verb"):
        find_wordnet()


@pytest.mark.parametrize("platform, apt, command, place", [
    ("linux", "/usr/bin/apt", "apt install wordnet-base", "/usr/share/wordnet"),
    ("linux", None, "python -m nltk.downloader wordnet", "/usr/local/share/nltk_data/corpora/wordnet"),
    ("darwin", None, "brew install wordnet", "/opt/homebrew/opt/wordnet/dict"),
    ("darwin", "/usr/bin/apt", "brew install wordnet", "/my/brew/opt/wordnet/dict"),  # macOS has another apt
    ("win32", None, "python -m nltk.downloader wordnet", "C:/Users/me/AppData/Roaming/nltk_data/corpora/wordnet")])
def test_each_platform_has_its_places_and_its_command(platform, apt, command, place, monkeypatch):
    monkeypatch.setattr(module.sys, "platform", platform)
    monkeypatch.setattr(module.shutil, "which", lambda name: apt)
    monkeypatch.setenv("HOMEBREW_PREFIX", "/my/brew")
    monkeypatch.setenv("APPDATA", "C:/Users/me/AppData/Roaming")
    assert module.how_to_get_wordnet().endswith(command)
    assert Path(place) in list(module._places())


def test_an_empty_variable_is_no_place(monkeypatch):
    monkeypatch.setenv("NLTK_DATA", "")  # and not the folder that one happens to be in
    assert all(Path(str(place)).is_absolute() for place in module._places())


@pytest.mark.parametrize("pos, inflected", [
    ("noun", "dogs=dog buses=bus halves=half boxes=box waltzes=waltz churches=church dishes=dish firemen=fireman "
             "ponies=pony"),
    ("verb", "runs=run flies=fly bakes=bake passes=pass baked=bake walked=walk baking=bake walking=walk"),
    ("adj", "taller=tall tallest=tall later=late latest=late"),
])
def test_each_ending_is_taken_off(pos, inflected, monkeypatch):
    """The table of morphy(7WN), an example a line, where no other line could help: the index has just the one lemma."""
    for form, base in (pair.split("=") for pair in inflected.split()):
        files = {f"{kind}.{p}": b"" for kind in ("index", "data") for p in ("noun", "verb", "adj", "adv")}
        files |= {f"{p}.exc": b"" for p in ("noun", "verb", "adj", "adv")}
        files |= {f"index.{pos}": f"{base} {pos[0]} 1 0 1 0 0  \n".encode(),
                  f"data.{pos}": f"00000000 00 {pos[0]} 01 {base} 0 000 |  \n".encode()}
        monkeypatch.setattr(module, "_wordnet", lambda files=files: files)
        module._exceptions.cache_clear()
        synonyms.cache_clear()
        assert synonyms(form) == {base}


@pytest.mark.parametrize("zipped", [False, True])
def test_nltks_copy_is_found_too(small, tmp_path, monkeypatch, zipped):
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setenv("NLTK_DATA", os.pathsep.join([str(tmp_path / "none"), str(tmp_path / "nltk_data")]))
    places = [place for place in module._places() if str(place).startswith(str(tmp_path))]
    corpora = tmp_path / "nltk_data" / "corpora"
    assert places == [tmp_path / "none" / "corpora" / "wordnet", corpora / "wordnet"]
    corpora.mkdir(parents=True)
    if zipped:  # as nltk.download leaves it
        with zipfile.ZipFile(corpora / "wordnet.zip", "w") as archive:
            for file in small.iterdir():
                archive.write(file, f"wordnet/{file.name}")
    else:
        small.rename(corpora / "wordnet")
    here = [place for place in module._places() if str(place).startswith(str(tmp_path))]
    monkeypatch.setattr(module, "_places", lambda: iter(here))
    assert str(find_wordnet()).rstrip("/").endswith("wordnet") and synonyms("mice") == {"mouse", "Mickey", "rodent"}


@pytest.fixture(scope="module")
def theirs():
    if module.find_wordnet() is None:
        pytest.skip("there is no WordNet on this machine: apt install wordnet-base, or set WNSEARCHDIR")
    return nltk_wordnet()


def names(reader, word):
    return {lemma.name() for synset in reader.synsets(word) for lemma in synset.lemmas() if "_" not in lemma.name()}


def test_synonyms_equal_nltks_over_wordnet(theirs):
    """Lemmas and irregular forms, a few of each letter; and made-up inflections, most of which are no words."""
    rng = random.Random(0)
    lemmas = [lemma for lemma in theirs.all_lemma_names() if "_" not in lemma]
    irregular = [line.split()[0] for pos in ("noun", "verb", "adj", "adv")
                 for line in module._wordnet()[f"{pos}.exc"].decode().splitlines()]
    tried = rng.sample(lemmas, 2000) + rng.sample(irregular, 1000) + ["", "s", "ses", "ies", "men", "er", "est", "1"]
    tried += [rng.choice(lemmas) + end for end in words("s es ed ing er est ies ves men ches") for _ in range(60)]
    tried += ["u.s.", "o'clock", "cat-o'-nine-tails", "naïve", "dog\u0301", "'s", "-", "a", "zzz"]
    assert [word for word in tried if synonyms(word) != names(theirs, word)] == []


short_words = st.text("abcdefghilmnoprstuwy", max_size=4)  # so short that many of them are words


@search
@given(st.builds(str.__add__, short_words, st.sampled_from(["", *words("s es ed ing er est ses ies ves men")]))
       | st.text("ab1.-'_/()*", max_size=5) | st.text(max_size=5).map(lambda text: "".join(text.lower().split())))
def test_synonyms_equal_nltks_on_words_that_nobody_has_seen(theirs, word):
    assert synonyms(word) == names(theirs, word)


def test_every_line_of_the_index_is_found(theirs):
    rng = random.Random(0)
    for pos in ("noun", "verb", "adj", "adv"):
        index = module._wordnet()[f"index.{pos}"]
        lines = [line for line in index.decode().splitlines() if not line.startswith(" ")]
        for line in [lines[0], lines[-1], *rng.sample(lines, 1500)]:
            assert module._look_up(index, line.split()[0]) == line.split()


def test_stem_equals_nltk_on_every_word_of_wordnet(theirs):
    lemmas = {part for lemma in theirs.all_lemma_names() for part in lemma.split("_")}
    assert len(lemmas) > 60_000
    assert [word for word in lemmas if stem(word) != porter.stem(word)] == []
