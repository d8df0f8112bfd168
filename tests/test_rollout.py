"""Sampling, as a lesson: what the policy says, and an honest record of how likely it was to say it.

Oracles: transformers' greedy search and its logits warpers; where there is none, the slow way of doing the same thing,
or an identity that holds exactly. There are no statistics in here: the sampler is a deterministic function of logits
and one uniform number a token, and is tested as such.
"""

import doctest

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import rollout
from grpo import group_logprobs
from model import save
from plumbing import products
from rollout import draw, sample
from tests.helpers import assert_same, byte_bpe, few, raw_config, refusal, tiny_model, tokens


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(rollout)
    assert results.attempted >= 1 and results.failed == 0


# ----------------------------------------------------------------------------------------- drawing one token


def warped(logits, temperature, top_k, top_p):
    """transformers' own, in the order in which `generate` applies them."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    return TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores


def random_logits(seed, n=1, vocab=30):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


switches = given(st.integers(0, 10**6), st.sampled_from([0.3, 0.7, 1.0, 1.5]), st.sampled_from([0, 1, 3, 10, 99]),
                 st.sampled_from([1.0, 0.99, 0.9, 0.5, 1e-6]))


@few
@switches
@example(0, 1.0, 0, 0.9)
@example(1, 0.7, 5, 0.8)
def test_draw_means_by_its_switches_what_transformers_means(seed, temperature, top_k, top_p):
    """Every token that survives transformers' warpers is drawn by a number from the middle of its own interval, with
    the log-probability it has among the survivors; and a grid of numbers draws no other token. (Below 1e-5 the middle
    is closer to the edge than float32 probabilities are exact.)"""
    logits = random_logits(seed)
    log_p = warped(logits, temperature, top_k, top_p).log_softmax(-1)[0]  # [V], -inf where cut
    p = log_p.double().exp()
    likely = (p > 1e-5).nonzero().squeeze(1)
    middle = (p.cumsum(0) - p / 2)[likely] / p.sum()
    token, logp = draw(logits.expand(len(likely), -1), middle, temperature, top_k, top_p)
    assert token.tolist() == likely.tolist()
    assert_same(logp, log_p[likely], 1e-5)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    token, _ = draw(logits.expand(1000, -1), grid, temperature, top_k, top_p)
    assert (p[token] > 0).all()


@few
@switches
def test_draw_gives_every_token_its_share_exactly(seed, temperature, top_k, top_p):
    """n evenly spaced numbers instead of random ones: a token of probability p owns an interval of length p, which
    holds n p of them, give or take one. Exact, where a chi-square test would be neither sharp nor certain."""
    n, logits = 2000, random_logits(seed)
    p = warped(logits, temperature, top_k, top_p)[0].double().softmax(-1)  # [V]
    noise = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token, _ = draw(logits.expand(n, -1), noise, temperature, top_k, top_p)
    counts = torch.bincount(token, minlength=logits.shape[1])
    assert ((counts - n * p).abs() < 1 + 1e-3).all()


@few
@given(st.integers(0, 10**6), st.integers(1, 29), st.sampled_from([0, 2]))
@example(0, 29, 0)
def test_draw_never_draws_the_impossible(seed, n_impossible, top_k):
    """The smallest and the largest number that a generator can give, with impossible tokens at both ends and between.

    A sampled token of probability zero has logp -inf, and one of those makes the whole batch's loss infinite."""
    logits = random_logits(seed, 200)
    gone = torch.rand(200, 30, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :n_impossible]
    logits = logits.scatter(-1, gone, -1e4)
    for noise in (0.0, 2.0 ** -53, 1 - 2.0 ** -53):
        token, logp = draw(logits, torch.full((200,), noise, dtype=torch.float64), 1.0, top_k, 1.0)
        assert (logits.gather(-1, token[:, None]) > -1e4).all() and logp.isfinite().all()


def test_draw_sees_rare_words_of_a_large_vocabulary():
    """One word is nearly certain, and 1,000 share the rest, 2e-9 each. A running sum in float32 moves in steps of
    6e-8 near 1 and jumps over 30 of them at a time; in float64 each one has its interval, and its log-probability."""
    logits = torch.zeros(1, 1001)
    logits[0, 0] = 20
    log_p = logits.log_softmax(-1)[0]  # [V]
    p = log_p.exp().double()
    token, logp = draw(logits.expand(1001, -1), (p.cumsum(0) - p / 2) / p.sum(), 1.0, 0, 1.0)
    assert token.tolist() == list(range(1001))
    torch.testing.assert_close(logp, log_p, rtol=0, atol=1e-6)


def test_greedy_takes_the_likeliest_and_needs_no_number():
    logits = random_logits(0, 5)
    token, logp = draw(logits, torch.full((5,), 0.99, dtype=torch.float64), 0.0, 0, 1.0)
    assert torch.equal(token, logits.argmax(-1)) and torch.equal(logp, logits.log_softmax(-1).amax(-1))


# ----------------------------------------------------------------------------------------------------- sampling

V = 24
STOP = [3, 11, 17]  # three of 24 words end a completion: some stop at once, some never


def policy(family="qwen2", **more):
    return tiny_model(family, vocab_size=V, **more)


def prompts_of(lengths, seed=0):
    return [tokens(1, n, seed=seed + i, vocab=V)[0].tolist() for i, n in enumerate(lengths)]


def naive_greedy(model, prompt, n, stop):
    """Without cache, batch or cleverness: read everything again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] not in stop):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def spoken(group):
    """The tokens of each row of a group, as lists of their own lengths."""
    return [row[mask].tolist() for row, mask in zip(group.tokens, group.mask)]


some_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@few
@given(some_lengths, st.sampled_from(["llama", "qwen2", "qwen3", "lfm2"]))
@example([1, 9, 2, 1, 5], "lfm2")  # prompts shorter than its convolution is wide
def test_greedy_sampling_equals_the_naive_loop(lengths, family):
    """Cache, padding, shared prompts and rows that leave: none of it may show in the tokens."""
    model, prompts = policy(family), prompts_of(lengths)
    groups = sample(model, prompts, 2, 12, temperature=0, stop_ids=STOP)
    for prompt, group in zip(prompts, groups):
        assert group.prompt.tolist() == prompt
        assert spoken(group) == [naive_greedy(model, prompt, 12, STOP)] * 2


@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
def test_greedy_sampling_equals_transformers_generate(tmp_path, family):
    """And the oracle's oracle: five prompts of different lengths at once against transformers, one by one."""
    ours = policy(family, eos_token_id=STOP)
    ours.raw_config = raw_config(family, vocab_size=V, eos_token_id=STOP)
    save(ours, None, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = prompts_of([1, 4, 9, 2, 6])
    groups = sample(ours, prompts, 1, 12, temperature=0)  # stop_ids None: the model's own
    for prompt, group in zip(prompts, groups):
        ids = torch.tensor([prompt])
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                               pad_token_id=0)
        assert spoken(group) == [want[0, len(prompt):].tolist()]
    assert {bool(group.stopped) for group in groups} == {True, False}  # both ends of a completion were compared


def assert_same_groups(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert torch.equal(x.prompt, y.prompt) and torch.equal(x.stopped, y.stopped) and spoken(x) == spoken(y)
        assert_same(x.logp[x.mask], y.logp[y.mask], 1e-5)


@settings(few, max_examples=5)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.randoms(use_true_random=False), st.integers(0, 2**40))
def test_the_seed_decides_and_the_batch_does_not(lengths, random, seed):
    """A run that is cut into other batches, or resumed, or repeated on more memory, must say the same words. So a
    completion's numbers depend on the seed, its prompt and its place in the group, and on nothing else."""
    model, prompts = policy(), prompts_of(lengths)
    before = torch.random.get_rng_state()
    together = sample(model, prompts, 3, 10, stop_ids=STOP, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own numbers are nobody's business here
    assert_same_groups(together, sample(model, prompts, 3, 10, stop_ids=STOP, seed=seed))
    alone = [sample(model, [prompt], 3, 10, stop_ids=STOP, seed=seed)[0] for prompt in prompts]
    assert_same_groups(together, alone)
    order = random.sample(range(len(prompts)), len(prompts))
    shuffled = sample(model, [prompts[i] for i in order], 3, 10, stop_ids=STOP, seed=seed)
    assert_same_groups([together[i] for i in order], shuffled)
    others = prompts_of([9, 1], seed=100)  # longer and shorter company
    assert_same_groups(together, sample(model, [others[0], *prompts, others[1]], 3, 10, stop_ids=STOP, seed=seed)[1:-1])
    fewer = sample(model, prompts, 2, 10, stop_ids=STOP, seed=seed)  # the first of a larger group
    assert [spoken(g)[:2] for g in together] == [spoken(g) for g in fewer]
    longer = sample(model, prompts, 3, 14, stop_ids=STOP, seed=seed)  # a later cut does not change what comes before
    assert [spoken(g) for g in together] == [[row[:10] for row in spoken(g)] for g in longer]


def test_rows_seeds_and_repetitions_differ():
    """The same prompt twice in a batch is two groups, not one group twice; and no row of a group repeats another."""
    model, prompt = policy(), prompts_of([6])[0]
    first, second = sample(model, [prompt, prompt], 4, 16, stop_ids=[], seed=1)
    (other,) = sample(model, [prompt], 4, 16, stop_ids=[], seed=2)
    (alone,) = sample(model, [prompt], 4, 16, stop_ids=[], seed=1)
    rows = spoken(first) + spoken(second) + spoken(other)
    assert len({tuple(row) for row in rows}) == 12
    assert spoken(alone) == spoken(first)


@few
@given(some_lengths, st.sampled_from([0.7, 1.0, 1.3]), st.sampled_from(["llama", "qwen2", "qwen3", "lfm2"]))
@example([1, 9, 2, 1, 5], 1.0, "lfm2")
def test_the_sampler_believes_what_the_trainer_computes(lengths, temperature, family):
    """Sampler and loss must speak of the same policy, temperature included: the ratio of the first update is 1 only
    if they do. Two separate computations, one token by token and one at once."""
    model = policy(family)
    for group in sample(model, prompts_of(lengths), 3, 12, temperature=temperature, stop_ids=STOP, seed=5):
        logp, _ = group_logprobs(model, [group.prompt], group.tokens[None], group.mask[None], temperature)
        assert_same(group.logp, logp[0].detach(), 1e-4)
        assert not group.logp.requires_grad and (group.logp[~group.mask] == 0).all()


def test_what_a_group_says_about_its_completions():
    """The stop token is sampled, so it is in the mask and is trained; it is not content, so it is not in the length,
    nor in the text. What was cut at max_new_tokens did not stop. Word 0 is a word, though padding is 0 as well."""
    tokenizer, n = byte_bpe(), 8
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    # A sharper head for words 0, 65 ('a') and the stop words makes them common among 320.
    with torch.no_grad():
        model.embed_tokens.weight[[0, 65, 66, 100, 101]] *= 3
    stop = [100, 101]  # ordinary words: not even their decoding could tell that they ended anything
    groups = sample(model, [[5, 9], [7], [65, 66, 67, 68]], 24, n, stop_ids=stop, seed=3, tokenizer=tokenizer)
    zeros = cut = ended = at_last = 0
    for group in groups:
        G, T = group.tokens.shape
        assert group.mask.shape == group.logp.shape == (G, T) and group.stopped.shape == (G,) and G == 24
        assert group.mask.dtype == group.stopped.dtype == torch.bool and group.mask.any(0).all()  # no idle column
        rows = zip(group.tokens, group.mask, group.stopped, group.lengths, group.texts)
        for row, mask, stopped, length, text in rows:
            ids = row[mask].tolist()
            assert mask.tolist() == [True] * len(ids) + [False] * (T - len(ids))  # one piece, from the left
            assert bool(stopped) == (ids[-1] in stop) and not set(ids[:-1]) & set(stop)
            assert stopped or len(ids) == n
            content = ids[:-1] if stopped else ids
            assert length == len(content)
            assert text == tokenizer.decode(content, skip_special_tokens=True)
            assert (row[~mask] == 0).all()
            zeros, cut, ended = zeros + (0 in ids), cut + (not stopped), ended + bool(stopped)
            at_last += bool(stopped) and len(ids) == n
    assert min(zeros, cut, ended) > 3 and at_last > 0  # every case did occur


def test_padding_that_is_also_the_stop_word():
    """Llamas without a pad token pad with 0, and 0 may be the stop word as well: lengths come from sampling."""
    (group,) = sample(policy(), prompts_of([4]), 64, 8, stop_ids=[0], seed=1)
    assert group.stopped.any() and not group.stopped.all()
    assert torch.equal(group.stopped, ((group.tokens == 0) & group.mask).any(1))
    assert torch.equal(group.mask.sum(1), group.lengths + group.stopped)


def test_no_text_without_a_tokenizer_and_no_stop_without_stop_words():
    (group,) = sample(policy(), prompts_of([4]), 3, 6, stop_ids=[])
    assert group.texts == ["", "", ""] and group.mask.all() and not group.stopped.any() and group.mask.shape == (3, 6)
    (group,) = sample(policy(), prompts_of([4]), 3, 6, stop_ids=range(V))  # everything ends it
    assert group.mask.shape == (3, 1) and group.stopped.all() and group.lengths.tolist() == [0, 0, 0]


def test_a_stop_text_is_counted_once_and_a_stop_token_is_none_of_it(monkeypatch):
    """Rows that finished stay in the batch for a while, to fill it: what they would spell there is not counted.

    The oracle reads every row again from the left. Where a token ends the completion by itself, it is no text, even if
    it would have completed the stop text.
    """
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["bc"])
    words = torch.tensor([tokenizer.token_to_id(word) for word in ("a", "bc", "c")])  # [3]
    a, bc, _ = words.tolist()
    # Whatever the model thinks, it says one of these three.
    monkeypatch.setattr(rollout, "draw", lambda logits, noise, *_: (words[(noise * 3).long()], noise.float()))
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    more = {"seed": 3, "tokenizer": tokenizer, "stop_text": "abc"}
    spelt = 0
    for group in sample(model, [[5, 9], [7], [a, bc, 67, 68]], 24, 12, stop_ids=[], **more):
        for i, row in enumerate(spoken(group)):
            texts = [tokenizer.decode(row[:t], skip_special_tokens=False) for t in range(1, len(row) + 1)]
            assert ["abc" in text for text in texts] == [False] * (len(row) - 1) + [bool(group.stopped[i])]
            n = next((n for n in range(1, 13) if "abc" in tokenizer.decode(row[-n:], skip_special_tokens=False)), 0)
            assert group.ending[i] == n and group.lengths[i] == len(row) - n
            assert group.texts[i] == tokenizer.decode(row, skip_special_tokens=True)
            spelt += n > 0
    assert 10 < spelt < 72
    ended = 0
    for group in sample(model, [[5, 9], [a]], 24, 12, stop_ids=[bc], **more):
        for i, row in enumerate(spoken(group)):
            assert not group.ending[i] and bool(group.stopped[i]) == (row[-1] == bc)
            content = row[:-1] if group.stopped[i] else row
            assert group.texts[i] == tokenizer.decode(content, skip_special_tokens=True)
            ended += row[-2:] == [a, bc]
    assert ended > 3


def test_a_group_waits_for_its_rewards():
    """Scores are filled in later, by whoever scores; parts of one group are never another's."""
    first, second = sample(policy(), prompts_of([4, 5]), 3, 6)
    assert first.rewards is None and first.parts == {}
    first.parts["length"] = [0.0, -0.5, -1.0]
    assert second.parts == {}


@pytest.mark.parametrize("seed", range(3))
def test_work_is_done_once_a_prompt_and_for_living_rows_only(seed):
    """Each prompt is read once, not G times. Then the batch is the smallest rectangle that holds whoever still
    speaks: prompts with a living row x the most living rows of one prompt. Nobody speaks: nothing is computed."""
    model, calls, G, n = policy(), [], 6, 20
    plain = model.hidden
    model.hidden = lambda tokens, *args: calls.append(tuple(tokens.shape)) or plain(tokens, *args)
    groups = sample(model, prompts_of([5, 2, 7]), G, n, stop_ids=STOP, seed=seed)
    assert calls[0] == (3, 7)
    expected = []
    for t in range(1, n):
        alive = [int((g.mask.sum(1) > t).sum()) for g in groups]  # rows that say more than t words
        expected.append((sum(a > 0 for a in alive) * max(alive), 1))
    assert calls[1:] == [shape for shape in expected if shape[0] > 0]
    assert sum(rows for rows, _ in calls[1:]) < 3 * G * (n - 1) * 0.75  # worth the trouble


def test_switches_reach_every_token():
    """top_k=1 is greedy, with logp 0: nothing else could have been said. top_k=2 only ever says one of two."""
    model, prompts = policy(), prompts_of([4, 7])
    greedy = sample(model, prompts, 2, 8, temperature=0, stop_ids=STOP)
    for more in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 5, "top_p": 1e-9}):
        single = sample(model, prompts, 2, 8, stop_ids=STOP, seed=4, **more)
        assert [spoken(g) for g in single] == [spoken(g) for g in greedy]
        assert all((g.logp == 0).all() for g in single)
    for group in sample(model, prompts, 16, 8, stop_ids=STOP, top_k=2):
        for row in spoken(group):
            logits = model(torch.tensor([group.prompt.tolist() + row]))[0, len(group.prompt) - 1:-1]  # [T, V]
            assert all(token in two for token, two in zip(row, logits.topk(2).indices.tolist()))


@pytest.mark.parametrize("prompts, named", [([], "prompt"), ([[]], "prompt"), ([[1, 2], []], "prompt")], ids=str)
def test_there_is_no_empty_prompt(prompts, named):
    assert named in refusal(ValueError, sample, policy(), prompts, 2, 4)


def test_a_prompt_must_fit_with_its_completion():
    """Beyond its context a model speaks nonsense without any error; so the last possible length works, and no more."""
    model = policy()  # a context of 96
    assert sample(model, [[1] * 90], 2, 6, stop_ids=[])[0].mask.shape == (2, 6)
    message = refusal(ValueError, sample, model, [[1], [1] * 90], 2, 7)
    assert all(number in message for number in ("90", "7", "96"))


@pytest.mark.parametrize("bad", [{"G": 0}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0},
                                 {"top_p": 1.1}, {"top_k": -1}, {"temperature": float("nan")}], ids=str)
def test_arguments_out_of_range_are_named(bad):
    message = refusal(ValueError, sample, policy(), [[1, 2]], **{"G": 2, "max_new_tokens": 4, **bad})
    (name, value), = bad.items()
    assert name in message and str(value) in message


@pytest.mark.parametrize("token", [V, -1])
def test_a_prompt_of_another_vocabulary_is_refused(token):
    """A tokenizer that does not belong to the model: on a GPU this would be an assertion deep in a kernel."""
    assert str(token) in refusal(ValueError, sample, policy(), [[1, token]], 2, 4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
def test_long_completions_are_sampled_with_packed_weights(monkeypatch):
    """Inside the loop, and not before or after it; the same tokens as without."""
    model, seen = tiny_model("qwen2", vocab_size=9000), []
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: seen.append(len(products.PACKED)) or real(*args))
    group, = sample(model, [[1, 2, 3]], 4, 20, stop_ids=[])
    assert seen == [0] + [1] * 19 and not products.PACKED  # the prompt, then a token at a time: the head is packed
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain, = sample(model, [[1, 2, 3]], 4, 20, stop_ids=[])
    assert set(seen[20:]) == {0} and torch.equal(group.tokens, plain.tokens)


@pytest.mark.parametrize("tokens", [4, 20], ids=["plain", "packed"])
def test_a_bfloat16_model_draws_from_logits_that_are_not_rounded_again(tokens, monkeypatch):
    """The trainer's logits are float32 too, where bfloat16 is widened; rounded ones would be another policy's."""
    monkeypatch.setattr(products, "NARROW_IS_SLOW", True)
    seen, real = [], rollout.draw
    monkeypatch.setattr(rollout, "draw", lambda logits, *args: seen.append(logits) or real(logits, *args))
    sample(tiny_model("qwen2", vocab_size=9000, dtype=torch.bfloat16), [[1, 2, 3]], 4, tokens, stop_ids=[])
    assert len(seen) == tokens
    for logits in seen:
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
