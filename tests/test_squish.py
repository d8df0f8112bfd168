"""SQUISH: a lesson in counting the bits of one document twice, over the same tokens."""

import math

import pytest
import torch
from helpers import byte_bpe, few, raw_config, refusal, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import rollout
import squish as sq
from lora import add_lora
from model import load, save
from plumbing.posts import TINY, Post
from rollout import sample
from squish import TEMPLATE, allowance, cost, encode, ensemble, information, shorten, squish, token_bits
from task import TEMPLATES, extract, penalise, render, tokenize

BOS = 1
DOCUMENT = "I lost a shoe in the post and found the other one about 64 tokens later."
SUMMARY = "Lost one shoe."


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe()


def reference(family="qwen2", seed=0, **more):
    """A model with room for these texts and a word for each of their bytes."""
    return tiny_model(family, seed, **({"vocab_size": 320, "max_position_embeddings": 512} | more))


def slow_bits(folder, tokenizer, document, summary):
    """The obvious implementation on transformers: the whole text, all logits, and a mask that says which tokens are the
    document's. Bits of each of them."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = [BOS]
    if summary is not None:
        first, rest = TEMPLATE.split("{summary}")
        for piece in (first, summary, rest.replace("{document}", "")):
            before += tokenizer.encode(piece, add_special_tokens=False).ids
    text = tokenizer.encode(document, add_special_tokens=False).ids
    ids = torch.tensor([before + text])
    is_document = torch.tensor([False] * len(before) + [True] * len(text))
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)  # [T, V]; row t speaks of token t + 1
    bits = torch.zeros(len(ids[0]))
    for t in range(1, len(ids[0])):
        bits[t] = -log_p[t - 1, ids[0, t]] / math.log(2)
    return bits[is_document]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "lfm2"])
def test_the_bits_are_those_of_a_slow_and_obvious_implementation(family, tokenizer, tmp_path):
    model = reference(family)
    model.raw_config = raw_config(family, vocab_size=320, max_position_embeddings=512, torch_dtype="float32")
    save(model, tokenizer, tmp_path)
    summaries = [None, SUMMARY, "", DOCUMENT, "Ünï 日本 🙂"]
    ours = token_bits(model, tokenizer, DOCUMENT, summaries)
    theirs = torch.stack([slow_bits(tmp_path, tokenizer, DOCUMENT, s) for s in summaries])
    assert ours.shape == (5, len(encode(tokenizer, DOCUMENT).ids))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    whole, left = theirs[0].sum().item(), theirs[1].sum().item()
    assert information(model, tokenizer, DOCUMENT) == pytest.approx(whole, rel=1e-5)
    assert information(model, tokenizer, DOCUMENT, SUMMARY) == pytest.approx(left, rel=1e-5)
    assert squish(model, tokenizer, DOCUMENT, [SUMMARY], 0.5) == [pytest.approx((whole - left) / whole, abs=1e-5)]


def test_first_and_last_token_of_the_document_count_and_the_template_s_do_not(tokenizer):
    """By the chain rule: p(first token) * p(rest | first token), and nothing else, is the whole."""
    model, text = reference(), encode(tokenizer, DOCUMENT).ids
    with torch.no_grad():
        log_p = model(torch.tensor([[BOS] + text]))[0].double().log_softmax(-1)
    by_hand = [-log_p[t, token].item() / math.log(2) for t, token in enumerate(text)]
    assert token_bits(model, tokenizer, DOCUMENT)[0].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert len(by_hand) == len(text)


def test_both_sums_run_over_the_same_tokens(tokenizer):
    """The document is tokenised by itself. Tokenised with the template, its first letters could melt into the tag."""
    text = encode(tokenizer, DOCUMENT).ids
    for summary in ("x", ">", "<summary>\n", "\n"):
        bits = token_bits(reference(), tokenizer, DOCUMENT, [None, summary])
        assert bits.shape == (2, len(text))
    assert TEMPLATE.count("{summary}") == TEMPLATE.count("{document}") == 1 and TEMPLATE.endswith("{document}")


def test_micro_batches_and_company_change_nothing(tokenizer):
    model = reference()
    summaries = ["a", SUMMARY, "the other one " * 5, None, "", "shoe", SUMMARY]
    together = token_bits(model, tokenizer, DOCUMENT, summaries, micro_tokens=10 ** 6)
    for micro_tokens in (1, 200):
        torch.testing.assert_close(token_bits(model, tokenizer, DOCUMENT, summaries, micro_tokens), together,
                                   rtol=0, atol=1e-4)
    for summary, row in zip(summaries, together):
        torch.testing.assert_close(token_bits(model, tokenizer, DOCUMENT, [summary])[0], row, rtol=0, atol=1e-4)
    assert torch.equal(together[1], together[6])


def test_rows_go_together_as_long_as_they_fit(tokenizer, monkeypatch):
    model, shapes, real = reference(), [], type(reference()).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, x, *a, **k: shapes.append(tuple(x.shape)) or real(self, x))
    sq.sequence_bits(model, [([BOS] * 2, [5] * n) for n in (30, 10, 20, 9)], micro_tokens=65)
    assert shapes == [(2, 31), (2, 11)]  # 31 + 21 and 11 + 10 with their padding; a third of 31 would be too many
    shapes.clear()
    sq.sequence_bits(model, [([BOS] * 2, [5] * 40)] * 2, micro_tokens=10)
    assert shapes == [(1, 41), (1, 41)]  # and one row always goes


def test_logits_are_made_for_the_document_only(tokenizer, monkeypatch):
    """None for the template's tokens, and never by the model's own forward, which makes them all at once."""
    model, rows, real = reference(), [], sq.token_logprobs
    monkeypatch.setattr(sq, "token_logprobs", lambda m, h, t: rows.append(len(h)) or real(m, h, t))
    monkeypatch.setattr(type(model), "forward", None)
    text = encode(tokenizer, DOCUMENT).ids
    whole = sq.sequence_bits(model, [([BOS, 5, 6, 7], text), ([BOS], text[:9]), ([BOS, 5], [])])
    assert sum(rows) == len(text) + 9 and [len(bits) for bits in whole] == [len(text), 9, 0]
    alone, = sq.sequence_bits(model, [([BOS], text[:9])])
    torch.testing.assert_close(whole[1], alone, rtol=0, atol=1e-5)


def test_the_adapters_state_does_not_change_the_measure(tokenizer):
    base, policy = reference(), reference()
    add_lora(policy, 2, 4.0)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    x = torch.tensor([encode(tokenizer, DOCUMENT).ids])
    assert (policy(x) - base(x)).abs().max() > 0.1
    on = policy(x)
    expected = squish(base, tokenizer, DOCUMENT, [SUMMARY, "x"], 0.5)
    assert squish(policy, tokenizer, DOCUMENT, [SUMMARY, "x"], 0.5) == expected
    with policy.adapters_off():
        assert squish(policy, tokenizer, DOCUMENT, [SUMMARY, "x"], 0.5) == expected
    assert torch.equal(policy(x), on)  # and they are on again
    assert cost(policy, tokenizer, DOCUMENT, [SUMMARY]) == cost(base, tokenizer, DOCUMENT, [SUMMARY])


def test_what_a_document_costs_is_computed_once_and_again_when_the_model_changes(tokenizer, monkeypatch):
    model, calls, real = reference(), [], sq.token_bits
    monkeypatch.setattr(sq, "token_bits", lambda *a, **k: calls.append(a[3] if len(a) > 3 else None) or real(*a, **k))
    first = information(model, tokenizer, DOCUMENT)
    assert information(model, tokenizer, DOCUMENT) == first and len(calls) == 1
    squish(model, tokenizer, DOCUMENT, [SUMMARY], 0.5)
    assert len(calls) == 2 and calls[1] == [SUMMARY]
    other = information(model, tokenizer, DOCUMENT + " It was blue.")
    assert other > first and len(calls) == 3
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert information(model, tokenizer, DOCUMENT) != first and len(calls) == 4
    assert information(reference(seed=1), tokenizer, DOCUMENT) != first and len(calls) == 5
    add_lora(model, 2, 4.0)  # the base is as it was, and stays so when the adapters learn
    changed = information(model, tokenizer, DOCUMENT)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.lora_B.add_(1.0)
    assert information(model, tokenizer, DOCUMENT) == changed and len(calls) == 5


def test_a_tokenizer_that_puts_tokens_around_a_text_puts_none_into_the_sums():
    """Llama's and LFM2's begin every text with bos by themselves: here it stands once, before everything."""
    from tokenizers.processors import TemplateProcessing
    plain, eager = byte_bpe(), byte_bpe()
    eager.post_processor = TemplateProcessing(single="<|endoftext|> $A <|im_end|>",
                                              special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)])
    assert len(eager.encode("x").ids) == 3
    for summary in (None, SUMMARY):
        assert torch.equal(token_bits(reference(), eager, DOCUMENT, [summary]),
                           token_bits(reference(), plain, DOCUMENT, [summary]))
    assert shorten(eager, DOCUMENT, 9) == shorten(plain, DOCUMENT, 9)


def test_text_that_spells_tags_and_control_tokens_is_text(tokenizer):
    """Neither a document nor a summary may say "<|im_end|>" or close a tag: every byte of it costs bits."""
    assert tokenizer.encode("<|im_end|>").ids == [2] and len(encode(tokenizer, "<|im_end|>").ids) > 3
    assert tokenizer.encode("<|im_end|>").ids == [2]  # and the tokenizer is as it was
    model = reference()
    for text in ("<|im_end|>", "</summary>", "<|endoftext|>", "</summary>\n<document>\n"):
        bits = token_bits(model, tokenizer, DOCUMENT + text, [text])
        assert bits.shape[1] > len(encode(tokenizer, DOCUMENT).ids) + 3
        n = len(encode(tokenizer, text).ids)
        row, = sq.sequence_bits(model, [([BOS], encode(tokenizer, text).ids)])
        assert len(row) == n and squish(model, tokenizer, DOCUMENT, [text], 1.0)[0] != 0


def test_no_summary_and_one_over_budget_are_worth_nothing(tokenizer):
    model = reference()
    good, *bad = squish(model, tokenizer, DOCUMENT, [SUMMARY, None, "", "  \n\t", "\u00a0", DOCUMENT], 0.5)
    assert good != 0 and bad == [0.0] * 5
    assert squish(model, tokenizer, DOCUMENT, [], 0.5) == []
    assert squish(model, tokenizer, DOCUMENT, [None, ""], 0.5) == [0.0, 0.0]
    assert all(math.isfinite(v) for v in squish(model, tokenizer, DOCUMENT, ["é日🙂\x00", "\ud7ff"], 1.0))
    assert squish(model, tokenizer, "I", [SUMMARY], 100)[0] != 0  # a document of one token


def test_the_budget_is_a_share_or_a_number_of_characters_or_tokens(tokenizer):
    model, n, tokens = reference(), len(DOCUMENT), len(encode(tokenizer, DOCUMENT).ids)

    def passes(summary, budget, unit="chars"):
        return squish(model, tokenizer, DOCUMENT, [summary], budget, unit) != [0.0]

    assert passes("x" * (n // 2), 0.5) and not passes("x" * (n // 2 + 1), 0.5)
    assert passes("x" * 7, 7) and not passes("x" * 8, 7)
    assert passes("é日🙂x", 4) and not passes("é日🙂xx", 4)  # characters, not bytes
    words = "the other one the other one"
    used = len(encode(tokenizer, words).ids)
    assert passes(words, used, "tokens") and not passes(words, used - 1, "tokens")
    assert passes(words, used / tokens, "tokens") and not passes(words, (used - 0.5) / tokens, "tokens")
    assert allowance(None, "a" * 10, 0.7) == 7  # 0.7 * 10 is 7.000000000000001, and 0.29 * 100 is below 29
    assert allowance(None, "a" * 100, 0.29) == 29
    for budget in (0, 0.0, -1, -0.5, float("nan"), math.inf):
        assert "budget" in refusal(ValueError, squish, model, tokenizer, DOCUMENT, ["x"], budget)
    assert "chars, tokens" in refusal(ValueError, squish, model, tokenizer, DOCUMENT, ["x"], 0.1, "words")


def test_a_document_known_by_heart_is_no_division_by_zero(tokenizer, monkeypatch):
    monkeypatch.setattr(sq, "information", lambda *a, **k: 0.0)
    assert squish(reference(), tokenizer, DOCUMENT, [SUMMARY], 0.5) == [0.0]
    assert cost(reference(), tokenizer, DOCUMENT, [SUMMARY]) == [0.0]


def test_what_cannot_be_measured_is_refused_with_a_sentence(tokenizer):
    assert "empty" in refusal(ValueError, squish, reference(), tokenizer, "", ["x"])
    first, middle = TEMPLATE.removesuffix("{document}").split("{summary}")
    n = 1 + sum(len(encode(tokenizer, text).ids) for text in (first, SUMMARY, middle, DOCUMENT)) - 1  # bos; last unread
    assert squish(reference(max_position_embeddings=n), tokenizer, DOCUMENT, [SUMMARY], 0.5) != [0.0]
    assert f"context of {n - 1}" in refusal(ValueError, squish, reference(max_position_embeddings=n - 1), tokenizer,
                                            DOCUMENT, [SUMMARY], 0.5)
    nothing = reference(bos_token_id=None, eos_token_id=None)
    assert "bos_token_id" in refusal(ValueError, information, nothing, tokenizer, DOCUMENT)


def test_a_model_without_bos_begins_with_its_end_of_text(tokenizer):
    """Qwen names no bos; eos is 2 in these configs."""
    text = encode(tokenizer, DOCUMENT).ids
    model = reference(bos_token_id=None)
    expected, = sq.sequence_bits(model, [([2], text)])
    assert torch.equal(token_bits(model, tokenizer, DOCUMENT)[0], expected)


@few
@given(st.text(min_size=1, max_size=60), st.integers(1, 40))
def test_a_document_is_cut_to_tokens_and_stays_a_beginning(text, n):
    tokenizer = byte_bpe()
    short = shorten(tokenizer, text, n)
    assert text.startswith(short) and len(encode(tokenizer, short).ids) <= n
    if len(encode(tokenizer, text).ids) <= n:
        assert short == text.rstrip()


def test_a_cut_takes_as_many_tokens_as_there_may_be(tokenizer):
    whole = encode(tokenizer, DOCUMENT)
    for n in range(1, len(whole.ids)):
        assert shorten(tokenizer, DOCUMENT, n) == DOCUMENT[:whole.offsets[n][0]].rstrip()



@few
@given(st.lists(st.none() | st.text(max_size=20), max_size=5), st.sampled_from([0.05, 0.5, 1.0, 3, 15]))
def test_any_group_gets_finite_values_that_belong_to_the_texts(summaries, budget):
    model, tokenizer = reference(), byte_bpe()
    values = squish(model, tokenizer, DOCUMENT, summaries, budget)
    assert len(values) == len(summaries) and all(v <= 1 and math.isfinite(v) for v in values)
    backwards = squish(model, tokenizer, DOCUMENT, summaries[::-1], budget)[::-1]
    assert values == pytest.approx(backwards, abs=1e-5)
    for s, v in zip(summaries, values):
        if not s or not s.strip() or len(s) > allowance(None, DOCUMENT, budget):
            assert v == 0


def test_an_ensemble_is_the_mean_of_its_models_each_with_its_own_tokens(tokenizer):
    tiny = load(TINY, "cpu")
    references = [(reference(), tokenizer), (reference("llama", seed=3), tokenizer), tiny]
    singles = [squish(*r, DOCUMENT, [SUMMARY, None, "x"], 0.5) for r in references]
    assert ensemble(references, DOCUMENT, [SUMMARY, None, "x"], 0.5) == pytest.approx(
        [sum(v) / 3 for v in zip(*singles)])
    assert encode(references[0][1], DOCUMENT).ids != encode(references[2][1], DOCUMENT).ids


def test_what_a_summary_costs_itself(tokenizer):
    """I(s) / I(d), both alone; nothing for no summary."""
    model = reference()
    expected = information(model, tokenizer, SUMMARY) / information(model, tokenizer, DOCUMENT)
    values = cost(model, tokenizer, DOCUMENT, [None, SUMMARY, "", DOCUMENT])
    assert values == pytest.approx([0, expected, 0, 1], abs=1e-6)


def test_the_embedded_model_finds_its_own_summaries_informative():
    """On three of its posts: the reference summary saves bits, another post's costs some, and copying the document's
    first words saves something."""
    model, tokenizer = load(TINY, "cpu")
    from task import load_posts
    posts = load_posts("tiny", "val")[:4]
    for post, other in zip(posts, posts[1:]):
        own, foreign, start = squish(model, tokenizer, post.document,
                                     [post.reference, other.reference, post.document[:60]], 1.0)
        assert own > 0.08 and own > start > 0 > foreign


def test_the_summary_is_what_stands_before_the_closing_tag():
    assert extract(" A cat.\n</summary> and more</summary>", opened=True) == "A cat."
    assert extract("</summary>", opened=True) == "" and extract("", opened=True) is None
    assert extract("A cat.</summary", opened=True) is None
    assert extract("I think <summary>no <summary> A cat. </summary>", opened=False) == "A cat."
    assert extract("I think</summary> <summary>A cat.</summary>", opened=False) == "A cat."
    assert extract("<summary>A cat.", opened=False) is extract("A cat.</summary>", opened=False) is None


NAMED = "It goes between <summary> and </summary>."  # what prompts say and thoughts repeat


@pytest.mark.parametrize("text, summary", [
    (f"{NAMED} <summary>A cat.</summary> I closed it with </summary>.", "A cat."),
    (f"<think>\n{NAMED}\n</think>\n\n<summary>A cat.</summary>", "A cat."),
    (f"{NAMED}</think><summary>A cat.</summary>", "A cat."),  # the prompt had begun the thoughts
    (f"[THINK]{NAMED}[/THINK]A cat.", None), (f"{NAMED}</think>A cat.", None),
    (f"<think>{NAMED} I", None),  # cut off while it thought
])
def test_tags_that_thoughts_name_are_no_summary(text, summary):
    assert extract(text, opened=False) == summary


def test_tags_that_thoughts_name_do_not_end_a_completion(monkeypatch):
    """The sampler, made to say a text by heart: it stops where the answer closes its tag, and not where
    thoughts or a sentence only name the two."""
    model, tokenizer = load(TINY, "cpu")
    for text in (f"<think>{NAMED}</think> <summary>A cat.</summary>", f"{NAMED} <summary>A cat.</summary>"):
        ids = encode(tokenizer, text + " And so on.").ids
        said = iter(ids)
        monkeypatch.setattr(rollout, "draw", lambda logits, *_, said=said: (
            torch.full((len(logits),), next(said)), torch.zeros(len(logits))))
        group, = rollout.sample(model, [[5, 6]], 2, len(ids), tokenizer=tokenizer, stop_text="</summary>")
        assert group.texts[0].count("</summary>") == 2 and "And so on" not in group.texts[0]
        assert bool(group.stopped.all()) and (group.ending > 0).all()


def test_the_format_penalty_is_below_everybody_by_the_spread():
    assert penalise([0.75, 0.25, 0.0, 0.0], [False, False, True, True]) == [0.75, 0.25, -0.25, -0.25]
    assert penalise([0.5, 0.0], [False, True]) == pytest.approx([0.5, 0.4])
    assert penalise([0.5, 0.0], [False, False]) == [0.5, 0.0] and penalise([0.2, 0.1], [True, True]) == [0.0, 0.0]


# --- prompts, and the end of a completion -----------------------------------------------------------------------------


def test_prompts_state_the_budget_and_nine_tenths_of_it(tokenizer):
    post = Post("A cat sat on {target} mats.", "", "1")
    assert render(post, "tagged", 50) == (
        "A document, and a summary of it in at most 50 characters, about 45.\n<document>\nA cat sat on {target} mats.\n"
        "</document>\n<summary>\n")
    assert "at most 12 tokens, about 11, between <summary>" in render(post, "notes", 12, "tokens")
    assert render(post, "tagged_chatml", 50).endswith("<|im_end|>\n<|im_start|>assistant\n")
    text = render(post, "tagged_chatml", 50)
    assert tokenizer.decode(tokenize(tokenizer, post, "tagged_chatml", 50), skip_special_tokens=False) == text
    assert [TEMPLATES[name].rstrip().endswith("<summary>") for name in ("tagged", "notes", "tagged_chatml")] == [
        True, False, False]


def always(model, tokenizer, ids):
    """Make the model write these tokens whatever it reads: each one's successor is all that its embedding says."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_() if "norm" not in name else p.fill_(1.0)
        size = model.embed_tokens.weight.shape[1]
        codes = torch.eye(size)[:len(ids)]
        for i, token in enumerate(ids):
            model.embed_tokens.weight[token] = codes[i]
            if i:
                model.lm_head.weight[token] = 50 * codes[i - 1]
    return model


def spelling(tokenizer, *pieces):
    """Token ids for pieces of text, one by one, so that no piece melts into the next."""
    return [i for piece in pieces for i in encode(tokenizer, piece).ids]


@pytest.mark.parametrize("pieces", [("I", " lost", "</summary>"), ("I", ".</", "sum", "mary", ">\n"),
                                    ("I", *"</summary>")])
def test_the_closing_tag_ends_a_completion_whatever_tokens_spell_it(pieces):
    """The model writes one fixed text, and would go on for ever: no token of it comes twice."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["</summary>", ".</", "sum", "mary", ">\n", " lost"])
    ids = [tokenizer.token_to_id(p) if tokenizer.token_to_id(p) is not None else encode(tokenizer, p).ids[0]
           for p in pieces]
    repeated = len(set(ids)) < len(ids)
    if repeated:  # "</summary>" has two m: a chain of tokens cannot, so it is looked for with the function itself
        rows = torch.tensor([ids])
        assert [_spelt_at(tokenizer, rows, t) for t in range(1, len(ids))] == [0] * (len(ids) - 2) + [10]
        return
    tail = encode(tokenizer, "Z").ids
    model = always(tiny_model("llama", vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False,
                              eos_token_id=2), tokenizer, ids + tail)
    group, = sample(model, [ids[:1]], 3, 20, stop_text="</summary>", tokenizer=tokenizer)
    n = len(ids) - 1
    assert group.tokens.tolist() == [ids[1:]] * 3 and bool(group.mask.all()) and bool(group.stopped.all())
    assert group.texts == ["".join(pieces[1:])] * 3  # all that was sampled stands in the text, and is trained
    first = next(i for i, p in enumerate(pieces) if "</" in p)
    assert group.ending.tolist() == [len(pieces) - first] * 3
    assert group.lengths.tolist() == [n - (len(pieces) - first)] * 3
    cut_off, = sample(model, [ids[:1]], 2, n - 1, stop_text="</summary>", tokenizer=tokenizer) if n > 1 else (None,)
    if cut_off:
        assert not cut_off.stopped.any() and cut_off.lengths.tolist() == [n - 1] * 2


def _spelt_at(tokenizer, rows, t):
    from rollout import _spelt
    return _spelt(tokenizer, "</summary>", rows[:, :t + 1])[0]


def test_a_stop_text_changes_no_token_before_it():
    """The same random completions with and without one; those that come to it are cut right there."""
    model, tokenizer = load(TINY, "cpu")
    from task import load_posts
    posts = load_posts("tiny", "val")[:3]
    prompts = [tokenize(tokenizer, post, "tagged", 60) for post in posts]
    free = sample(model, prompts, 4, 60, tokenizer=tokenizer)
    ended = sample(model, prompts, 4, 60, tokenizer=tokenizer, stop_text="</summary>")
    seen = 0
    for a, b in zip(free, ended):
        for i in range(4):
            n = int(b.mask[i].sum())
            assert torch.equal(a.tokens[i, :n], b.tokens[i, :n])
            text = tokenizer.decode(b.tokens[i, :n].tolist(), skip_special_tokens=False)
            short = tokenizer.decode(b.tokens[i, :n - 1].tolist(), skip_special_tokens=False)
            assert "</summary>" not in short and bool(b.stopped[i]) == ("</summary>" in text)
            content = tokenizer.decode(b.tokens[i, :int(b.lengths[i])].tolist())
            assert "</" not in content
            seen += bool(b.stopped[i])
    assert seen > 6
    assert "tokenizer" in refusal(ValueError, sample, model, prompts, 2, 5, stop_text="</summary>")


def test_a_stop_token_ends_a_completion_beside_the_stop_text():
    """It is trained, it is no content, and no text."""
    tokenizer = byte_bpe()
    ids = spelling(tokenizer, "Zab") + [2]
    model = always(tiny_model("llama", vocab_size=320, tie_word_embeddings=False, eos_token_id=2), tokenizer, ids)
    group, = sample(model, [ids[:1]], 2, 20, stop_text="</summary>", tokenizer=tokenizer)
    assert group.tokens.tolist() == [ids[1:]] * 2 and bool(group.stopped.all()) and group.ending.tolist() == [0, 0]
    assert group.lengths.tolist() == [len(ids) - 2] * 2 and group.texts == ["ab", "ab"]
