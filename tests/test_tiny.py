"""The embedded default: what `tiny/make.py` promises about the folder it wrote, and that the folder can be taught."""

import json
import random
import re
import sys
from itertools import product
from statistics import fmean
from zlib import crc32

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from eval import Config, evaluate
from model import load, token_logprobs
from plumbing.posts import TINY, load_posts
from rewards import rouge_l
from task import tokenize

sys.path.insert(0, str(TINY))
import make  # noqa: E402
import stories  # noqa: E402

POSTS = {split: load_posts("tiny", split) for split in make.SPLITS}


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, "cpu")


def test_no_post_is_in_two_splits_or_twice():
    documents = [post.document for posts in POSTS.values() for post in posts]
    assert {split: len(posts) for split, posts in POSTS.items()} == make.SPLITS
    assert len(set(documents)) == len(documents)
    assert all(post.reference for posts in POSTS.values() for post in posts)


def test_held_out_posts_name_nobody_whom_training_knew():
    """Held-out posts are about people, towns, streets, pets and makers of their own: a summary of one can be true only
    by reading it."""
    common = {*stories.DAYS, *stories.MONTHS, "Street", "French", "Spanish", "Dutch"}

    def names(split: str) -> set[str]:
        inside = (set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", post.document)) for post in POSTS[split])
        return set().union(*inside) - common

    known = names("train")
    assert len(known) > 5000 and len(names("test")) > 800
    assert not (names("test") | names("val")) & known


@pytest.mark.parametrize("kind", stories.NAMES)
def test_there_are_thousands_of_each_name_and_one_in_ten_is_held_out(kind):
    rng, parts = random.Random(0), [part.split() or [""] for part in stories.NAMES[kind]]
    drawn = {held_out: {stories.name(kind, rng, held_out) for _ in range(3000)} for held_out in (False, True)}
    assert not drawn[False] & drawn[True]
    words = {"".join(word) for word in product(*parts)}
    assert len(words) > 1000 and 0.07 < sum(crc32(word.encode()) % 10 == 0 for word in words) / len(words) < 0.13


def test_the_posts_are_the_generators(tmp_path, monkeypatch):
    """The same seed writes the same posts: what is in the folder can be made again."""
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(make, "SPLITS", {"train": 40})
    make.write_posts(random.Random(0))
    written = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert written == (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]


def test_a_reference_keeps_the_point_and_a_careless_summary_does_not():
    rng = random.Random(1)
    for _ in range(200):
        s = stories.story(rng)
        words = set(s.document.lower().replace(".", " ").replace(",", " ").split())
        used = s.reference.lower().replace(".", " ").replace(",", " ").split()
        assert fmean(word in words for word in used) > 0.8  # a summary copies, it does not invent
        assert 2 <= sum(not fact.point for fact in s.facts) and 3 <= sum(fact.point for fact in s.facts)
        assert 21 <= len(used) <= 33 and len(used) >= len(s.brief.split())
    drawn = [stories.story(rng) for _ in range(200)]
    careless = fmean(rouge_l(stories.summary(s, rng), s.reference) for s in drawn)
    assert 0.3 < careless < 0.7


def test_transformers_loads_the_folder_as_it_is(tiny):
    model, tokenizer = tiny
    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    # transformers gives every qwen2 folder the splitting rule of its own Qwen2 class: ours must be the same rule.
    text = AutoTokenizer.from_pretrained(TINY)
    for post in POSTS["test"]:
        assert text(post.document)["input_ids"] == tokenizer.encode(post.document).ids
    odd = "It's 3,510.75 euros!!\n\n  Né à Zoë's <|im_end|> cafe\u0301 \U0001f600\t(12th)"
    assert text(odd)["input_ids"] == tokenizer.encode(odd).ids
    post = POSTS["test"][0]
    ids = text.apply_chat_template(
        [{"role": "system", "content": "Summarise the post in about 30 tokens."},
         {"role": "user", "content": post.document}], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenize(tokenizer, post, "chatml", 30)
    tokens = torch.tensor([ids])  # [1, P]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert set(model.config.eos_token_ids) == set(theirs.generation_config.eos_token_id)
    assert (TINY / "model.safetensors").stat().st_size < 8e6
    assert json.loads((TINY / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2"


def test_it_writes_summaries_but_misses_the_length(tiny):
    """There is something to learn, and something to learn it with."""
    posts = POSTS["test"][:100]
    r = evaluate(*tiny, posts, Config())
    assert r["within_10pct"] < 0.45 and r["stopped"] > 0.9
    strangers = fmean(rouge_l(row["summary"], post.reference) for row, post in zip(r["summaries"][1:], posts))
    assert r["rouge_l"] > 0.35 > strangers + 0.1  # about this post, not about posts


def test_it_copies(tiny):
    """Shown random tokens twice, it says the second half from the first: what a true name in a summary needs."""
    model, rng = tiny[0], random.Random(0)
    said = []
    for _ in range(40):
        ids, half, _ = make.echo(rng, 5, 40)
        tokens = torch.tensor([ids])  # [1, T]
        with torch.no_grad():
            guesses = model(tokens).argmax(-1)[0]  # [T]
        said += (guesses[half - 1:-1] == tokens[0, half:]).tolist()
    assert fmean(said) > 0.9


def test_its_summaries_are_true_and_not_empty(tiny):
    """Names and numbers stand in the post, also those that it has never met; and there are some."""
    posts = POSTS["test"][:100]
    r = evaluate(*tiny, posts, Config())
    assert r["invented"] < 0.05 and r["nothing_invented"] > 0.85 and r["names"] > 4


def test_a_summary_saves_bits_of_its_own_document(tiny):
    """The model can be a SQUISH reference: a document is cheaper after its own summary than after a stranger's or
    after nothing, in bits."""
    model, tokenizer = tiny
    end = tokenizer.token_to_id("<|endoftext|>")

    def bits(document: str, before: list[int]) -> float:
        ids = tokenizer.encode(document).ids
        tokens = torch.tensor([[end, *before, *ids]])  # [1, T]
        with torch.no_grad():
            logp, _ = token_logprobs(model, model.hidden(tokens)[:, :-1], tokens[:, 1:])  # [1, T-1]
        return -logp[0, -len(ids):].sum().item() / 0.6931

    alone, own, other = [], [], []
    for post, stranger in zip(POSTS["test"][:30], POSTS["test"][1:]):
        alone.append(bits(post.document, []))
        for result, summary in ((own, post.reference), (other, stranger.reference)):
            opening = make.SUMMARY_FIRST.split("{document}")[0].replace("{summary}", summary)
            result.append(bits(post.document, tokenizer.encode(opening).ids))
    assert fmean(own) < 0.85 * fmean(alone)
    assert fmean(own) < 0.85 * fmean(other)


def test_a_few_steps_teach_it_its_length(tmp_path, monkeypatch):
    """Twenty steps of the default's first stage: the mean distance from the target shrinks."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--run", "r", "--stages", "length:20", "--eval-posts", "16", "--beta", "0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert fmean(r["reward"] for r in rows[-5:]) > fmean(r["reward"] for r in rows[:5]) + 0.05
    assert all(row["kl"] is None for row in rows)  # beta 0 needs no reference, and none is asked
