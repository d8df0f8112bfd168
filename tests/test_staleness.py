"""Samples of other weights than those that learn: how they count, which are too old, and servers that write ahead.

The oracles: a policy of a few words, all of whose completions can be listed, so that expectations are sums; trl's own
lines; and our model, whose log-probabilities a server must have said.
"""

import doctest
import inspect
import itertools
import json
import math
import re
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal, tiny_model

import grpo
import train
from config import Config, check
from lora import save_adapters
from model import load, save
from plumbing import once, staleness
from plumbing.cli import Stop
from plumbing.micro_batches import micro_batches
from plumbing.posts import TINY
from plumbing.rollouts import on_servers
from plumbing.staleness import importance_weights, renew, weights_of_now, weights_seen, with_weights
from plumbing.symptoms import two_policies
from rollout import Group, sample, split
from studies import staleness as study
from tests.loopback_vllm import Vllm, learn

INF = math.inf


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(staleness).failed == doctest.testmod(study).failed == 0


# --- a toy whose expectations are sums --------------------------------------------------------------------------------

WORDS = 3
REWARDS = {1: [1.0, 0.0, -0.5], 2: [1.0, 0.0, 2.0, -1.0, 0.3, 0.0, 0.5, -2.0, 1.5]}  # of all completions of T words


def toy(T, seed):
    """Logits of a policy over WORDS words, anew for each prefix: [1 + WORDS, WORDS]."""
    return 2 * torch.randn(1 + WORDS, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logp_of(logits, T):
    """-> log-probabilities of the words of all WORDS^T completions [1, WORDS^T, T]."""
    table = logits.log_softmax(-1)  # [prefixes, WORDS]; the first row is of the empty prefix
    rows = [[table[0 if t == 0 else 1 + words[0], words[t]] for t in range(T)]
            for words in itertools.product(range(WORDS), repeat=T)]
    return torch.stack([torch.stack(row) for row in rows])[None]


def expected_gradient(T, cap, mode):
    """The mean, over the sampler's completions, of minus the gradient of the loss; and the exact one, of the expected
    reward under the trainer. cap None: no weights. All completions are one group, and each counts as often as the
    sampler says it: its advantage is its reward times that probability."""
    trainer, sampler = toy(T, 1).requires_grad_(), toy(T, 5)
    logp, theirs = logp_of(trainer, T), logp_of(sampler, T)
    mask, reward = torch.ones(logp.shape) > 0, torch.tensor(REWARDS[T], dtype=torch.float64)
    often = theirs.sum(-1).exp()  # [1, WORDS^T]
    w = None
    if cap:
        w = importance_weights(logp.detach(), theirs, mask, SimpleNamespace(tis=cap, tis_mode=mode))
    loss, _ = grpo.policy_loss(logp, None, None, often * reward, mask, "dr_grpo", weights=w, max_length=1,
                               n_completions=1)  # a plain sum over tokens and completions
    found, = torch.autograd.grad(-loss, trainer, retain_graph=True)
    exact, = torch.autograd.grad((logp.sum(-1).exp() * reward).sum(), trainer)
    return found, exact


@pytest.mark.parametrize("T, mode", [(1, "token"), (1, "sequence_mask"), (2, "sequence_mask")])
def test_without_a_cap_the_corrected_gradient_is_exact_and_the_uncorrected_one_is_not(T, mode):
    found, exact = expected_gradient(T, INF, mode)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    found, _ = expected_gradient(T, None, mode)
    assert (found - exact).abs().max() > 0.05


def test_a_token_s_own_ratio_leaves_its_prefix_to_the_sampler():
    """With two words and token weights, the second word's gradient is the trainer's over prefixes of the sampler's."""
    found, exact = expected_gradient(2, INF, "token")
    trainer, sampler = (toy(2, seed).log_softmax(-1).exp() for seed in (1, 5))
    reward = torch.tensor(REWARDS[2], dtype=torch.float64).view(WORDS, WORDS)
    first, second = sampler[0], trainer[1:]  # [WORDS] of the sampler; [WORDS prefixes, WORDS] of the trainer
    want = first[:, None] * second * (reward - (second * reward).sum(1, keepdim=True))  # p (r - mean), each prefix
    torch.testing.assert_close(found[1:], want, rtol=0, atol=1e-6)
    assert (found - exact).abs().max() > 0.01


def test_the_cap_s_bias_is_what_one_computes_by_hand():
    """What is missing at a word of weight above C: q (w - C) r (e_word - p), by the gradient of a log-softmax."""
    cap = 1.2
    found, exact = expected_gradient(1, cap, "token")
    p, q = (toy(1, seed)[0].softmax(-1) for seed in (1, 5))
    missing = sum(q[word] * max(p[word] / q[word] - cap, 0.0) * REWARDS[1][word] * (torch.eye(WORDS)[word] - p)
                  for word in range(WORDS))
    torch.testing.assert_close(exact[0] - found[0], missing, rtol=0, atol=1e-6)
    assert missing.abs().max() > 0.01


# --- the numbers of others --------------------------------------------------------------------------------------------


def trl_weights(old_logp, sampler_logp, mask, mode, cap):
    """The lines of trl's trainer, run as they stand in the installed version, on [N, T] tensors."""
    trl = pytest.importorskip("trl", reason="trl is for Python 3.11 and later")
    text = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    lines = re.search(r"\n( +mask = completion_mask if tool_mask is None.*?vllm_importance_sampling_ratio\.mask.*?)"
                      r"\n +else:\n", text, re.S)[1]
    names = {"self": SimpleNamespace(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=cap,
                                     vllm_importance_sampling_clip_min=None), "torch": torch, "math": math,
             "completion_mask": mask.long(), "tool_mask": None, "old_per_token_logps": old_logp,
             "sampling_per_token_logps": sampler_logp}
    exec(textwrap.dedent(lines), names)
    return names["vllm_importance_sampling_ratio"].expand_as(old_logp)


@pytest.mark.parametrize("cap", [1.1, 2.0, 3.0])
@pytest.mark.parametrize("ours, theirs", [("token", "token_truncate"), ("sequence_mask", "sequence_mask")])
def test_weights_are_trls(ours, theirs, cap):
    g = torch.Generator().manual_seed(1)
    old, sampler = (-torch.rand(6, 5, dtype=torch.float64, generator=g) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    found = importance_weights(old, sampler, mask, SimpleNamespace(tis=cap, tis_mode=ours))
    want = trl_weights(old, sampler, mask, theirs, cap)
    torch.testing.assert_close(found[mask], want[mask], rtol=0, atol=1e-12)
    assert (found[mask] != 1).all() and (ours == "token" or cap == 3 or (found == 0).any())


def test_padding_may_hold_anything():
    x, mask = torch.tensor([[[-1.0, math.nan]]]), torch.tensor([[[True, False]]])
    for mode in ("token", "sequence_mask"):
        found = importance_weights(x, 0 * x - 1.5, mask, SimpleNamespace(tis=2, tis_mode=mode))
        assert found[0, 0, 0] == pytest.approx(math.exp(0.5)) and found.isfinite().all()
    assert "sequence_mask" in refusal(ValueError, importance_weights, x, x, mask, SimpleNamespace(tis=2, tis_mode="?"))


# --- the update -------------------------------------------------------------------------------------------------------


def groups_of(model, gap=0.4, seed=0):
    """Two groups that the model wrote, whose log-probabilities the sampler saw otherwise."""
    groups = sample(model, [[3, 4, 5], [6, 7]], 4, 6, seed=seed)
    for i, group in enumerate(groups):
        noise = torch.randn(group.mask.shape, generator=torch.Generator().manual_seed(i))
        group.logp = group.logp + gap * noise * group.mask
        group.rewards = [1.0, 0.0, 0.5, 0.2]
    return groups


def settings(**more):
    return SimpleNamespace(**{"loss": "grpo", "advantage": "group", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0,
                              "kl": "k3", "updates": 1, "temperature": 1.0, "grad_clip": 1e9, "micro_tokens": 10 ** 6,
                              "max_new_tokens": 6} | more)


def step_of(config, model=None):
    """-> (what an SGD step of rate 1 did to the weights, the metrics)."""
    model = model or tiny_model()
    groups, before = groups_of(model), weights_of_now(model)
    metrics = grpo.update(model, None, groups, torch.optim.SGD(model.parameters(), 1.0), config)
    return [q - p for p, q in zip(weights_of_now(model), before)], metrics, groups


@pytest.mark.parametrize("mode, cap", [("token", 1.3), ("sequence_mask", 3.0)])
def test_the_update_counts_a_token_as_often_as_its_weight_says(mode, cap):
    """The step is the gradient of `policy_loss` with weights that are worked out here, from the trainer's own
    log-probabilities; metrics and step do not depend on how the batch is cut."""
    moved, metrics, groups = step_of(settings(tis=cap, tis_mode=mode))
    model = tiny_model()
    A = grpo.advantages(torch.tensor([g.rewards for g in groups]))
    batch, = micro_batches(groups, A, 10 ** 6)
    logp, _ = grpo.group_logprobs(model, batch.prompts, batch.tokens, batch.mask)
    gap = (logp.detach() - batch.sampler_logp) * batch.mask
    w = gap.exp().clamp(max=cap)
    if mode == "sequence_mask":
        w = gap.sum(-1, keepdim=True).exp()
        w = (w * (w <= cap)).expand_as(gap)
    loss, _ = grpo.policy_loss(logp, None, None, batch.advantages, batch.mask, weights=w)
    loss.backward()
    for found, p in zip(moved, model.parameters()):
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-6)
    w = w[batch.mask]
    assert metrics["tis_mean"] == pytest.approx(w.mean().item()) and metrics["tis_max"] == pytest.approx(w.max().item())
    ess = (w.sum() ** 2 / (len(w) * (w ** 2).sum())).item()
    assert metrics["tis_ess"] == pytest.approx(ess, rel=1e-4) and ess < 1
    assert metrics["logp_gap"] == pytest.approx(gap.abs().max().item())

    again, pieces, _ = step_of(settings(tis=cap, tis_mode=mode, micro_tokens=12))
    assert all(pieces[name] == pytest.approx(metrics[name], rel=1e-4) for name in ("tis_mean", "tis_max", "tis_ess"))
    for found, want in zip(again, moved):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-6)


def test_where_nothing_is_asked_for_nothing_changes():
    """A config without the fields, and one with --tis 0: the same bits, and no new number."""
    moved, metrics, _ = step_of(settings())
    again, same, _ = step_of(settings(tis=0.0, tis_mode="token"))
    assert metrics == same and not [name for name in metrics if name.startswith("tis")]
    assert all((p == q).all() for p, q in zip(moved, again))
    corrected, _, _ = step_of(settings(tis=2.0))
    assert any((p != q).any() for p, q in zip(moved, corrected))


def test_a_second_update_keeps_the_weights_of_the_first():
    """They compare the policy before the batch with the sampler: what the first update did is the ratio's business."""
    _, metrics, groups = step_of(settings(tis=2.0, updates=2))
    _, once, _ = step_of(settings(tis=2.0))
    assert metrics["tis_mean"] == once["tis_mean"] and metrics["ratio"] != 1 and once["ratio"] == pytest.approx(1)


def test_weights_that_are_all_0_are_an_effective_size_of_0():
    m = SimpleNamespace(weights=torch.zeros(1, 1, 2), mask=torch.ones(1, 1, 2) > 0)
    assert weights_seen([m]) == {"tis_mean": 0, "tis_max": 0, "tis_ess": 0}
    m.weights = torch.tensor([[[0.0, 4.0]]])
    assert weights_seen([m])["tis_ess"] == 0.5  # one of two has all


# --- too old ----------------------------------------------------------------------------------------------------------


def group(version, prompt=5):
    return Group(torch.tensor([prompt]), torch.ones(2, 1), torch.ones(2, 1) > 0, torch.zeros(2, 1),
                 torch.ones(2) > 0, ["", ""], version=version)


def test_groups_that_are_too_old_are_written_anew():
    asked = []

    def write(prompts):
        asked.append([prompt.tolist() for prompt in prompts])
        return [group(None, int(prompt)) for prompt in prompts]

    config = SimpleNamespace(max_age=2, ahead=0, tis=0.0)
    groups = [group(7, 5), group(8, 6), group(None, 7), group(0, 8)]
    assert renew(groups, 10, config, write) == {"age": 0.5, "thrown_away": 2}  # 7 is three steps behind, 8 is two
    assert asked == [[[5], [8]]] and [g.version for g in groups] == [10, 8, 10, 10]
    assert [int(g.prompt) for g in groups] == [5, 6, 7, 8]  # each for its own post
    groups = [group(0), group(1)]
    assert renew(groups, 10, config, write) == {"age": 0, "thrown_away": 2} and len(groups) == 2  # no step is lost


def test_a_local_run_says_nothing_of_age():
    config = SimpleNamespace(max_age=0, ahead=0, tis=0.0)
    groups = [group(None), group(None)]
    assert renew(groups, 3, config, None) == {} and [g.version for g in groups] == [3, 3]
    assert renew([group(1), group(3)], 3, config, None) == {"age": 1}  # a sampler of yours may be behind
    config.tis = 2.0
    assert renew(groups, 3, config, None) == {"age": 0}


def test_a_run_whose_samples_are_too_old_learns_from_fresh_ones(monkeypatch, tmp_path):
    """Three steps behind, with --max-age 2: from the fourth step on all is written anew, and no gap is left."""
    monkeypatch.chdir(tmp_path)
    flags = ["--stages", "length:5", "--prompts", "2", "--group", "2", "--target", "16", "--eval-posts", "2", "--run",
             "r", "--lr", "3e-3", "--tis", "2", "--max-age", "2"]
    fresh = train.sample
    with study.behind(3), monkeypatch.context() as patch:  # which is undone before the sampler is
        stale, calls = train.sample, []

        def once(model, prompts, **wish):  # the loop asks; then `renew` does
            calls.append(wish["seed"])
            again = len(calls) > 1 and calls[-1] == calls[-2] and wish["temperature"] > 0
            return (fresh if again else stale)(model, prompts, **wish)

        patch.setattr(train, "sample", once)
        assert train.main(flags) == 0
    rows = rows_of(tmp_path)
    assert [row["thrown_away"] for row in rows] == [0, 0, 0, 2, 2] and [row["age"] for row in rows] == [0, 1, 2, 0, 0]
    gaps = [row["logp_gap"] for row in rows]
    assert max(gaps[0], *gaps[3:]) < 1e-4 < 1e-2 < max(gaps[1:3])


def test_weights_are_put_back_as_they_were():
    model = tiny_model()
    kept, place = weights_of_now(model), [p.data_ptr() for p in model.parameters()]
    learn(model)
    own = weights_of_now(model)
    with pytest.raises(KeyError), with_weights(model, kept):
        assert all(p is not q and (p == q).all() for p, q in zip(model.parameters(), kept))
        raise KeyError
    assert [p.data_ptr() for p in model.parameters()] == place
    assert all((p == q).all() for p, q in zip(model.parameters(), own))


def test_old_samples_are_no_symptom():
    config = SimpleNamespace(lean=False)
    assert "not the one" in two_policies([], {}, {"logp_gap": 0.3}, config)
    assert two_policies([], {}, {"logp_gap": 0.3, "age": 1.0}, config) == ""
    assert two_policies([], {}, {"logp_gap": 0.3, "age": 0.0}, config)


@pytest.mark.parametrize("wrong, words", [
    ({"ahead": 1}, "--rollouts"), ({"tis": 0.5}, "--tis"), ({"tis": -1.0}, "--tis"), ({"max_age": -1}, "--max-age"),
    ({"backend": "mlx", "tis": 2.0}, "--backend mlx"), ({"backend": "mlx", "max_age": 1}, "--backend mlx"),
    ({"backend": "mlx", "ahead": 1, "rollouts": ("http://h:1",)}, "--backend mlx")])
def test_what_cannot_work_is_refused(wrong, words):
    assert words in refusal(ValueError, check, Config(**wrong))
    check(Config(ahead=1, rollouts=("http://h:1",), tis=2.0, max_age=1))


# --- servers that write ahead -----------------------------------------------------------------------------------------

PROMPTS = [[[1, 300 + step, 301, 302], [1, 400 + step, 401]] for step in range(6)]
G, T = 3, 8


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """`begin(lora=, ...)`; `step()` -> the groups of the next of six steps, after which the weights move."""
    pytest.importorskip("openai")
    from openai import _base_client
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    run = SimpleNamespace(servers=[Vllm(), Vllm()], at=0, said=lambda: capsys.readouterr().out, folder=tmp_path,
                          stop=Stop().__enter__(), history=[])

    def begin(lora=2, servers=2):
        run.model, run.tokenizer = load(TINY)
        if lora:
            train.add_lora(run.model, lora, 2.0 * lora, seed=0)
        run.config = Config(lora=lora, max_new_tokens=T, ahead=1,
                            rollouts=tuple(server.url for server in run.servers[:servers]))
        run.act = on_servers(run.config, tmp_path, act=sample, model=run.model, tokenizer=run.tokenizer,
                             prompt=PROMPTS[0][0], grpo=grpo, split=split, save=save, save_adapters=save_adapters,
                             stop=run.stop)
        return run

    def step(update=lambda: learn(run.model)):
        run.history.append(weights_of_now(run.model))
        n, more = run.at, {}
        if n + 1 < len(PROMPTS):
            more = {"step": n, "then": lambda: [SimpleNamespace(prompt=prompt) for prompt in PROMPTS[n + 1]]}
        groups = run.act(run.model, PROMPTS[n], G=G, max_new_tokens=T, temperature=1.0, seed=n, tokenizer=run.tokenizer,
                         stop_text="", **more)
        assert [group.prompt.tolist() for group in groups] == PROMPTS[n]
        for group in groups:  # by the weights of its version, to the last bits that two programs share
            with with_weights(run.model, run.history[n if group.version is None else group.version]):
                ours, _ = grpo.group_logprobs(run.model, [group.prompt], group.tokens[None], group.mask[None])
            torch.testing.assert_close(group.logp, ours[0].detach(), rtol=0, atol=1e-4)
        update()
        run.at += 1
        return groups

    run.begin, run.step = begin, step
    yield run
    run.stop.__exit__()
    for server in run.servers:
        server.close()
    assert not in_flight()


def in_flight():
    return [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def slow(server, seconds, spans):
    """Each completion takes so long; `spans` gets (begin, end) of each."""
    quick = server.complete

    def complete(body):
        begun = time.monotonic()
        time.sleep(seconds)
        answer = quick(body)
        spans.append((begun, time.monotonic()))
        return answer

    server.complete = complete


@pytest.mark.parametrize("lora", [0, 2])
def test_a_group_that_was_written_ahead_is_one_step_old(run, lora):
    run.begin(lora)
    versions = [{group.version for group in run.step()} for _ in PROMPTS]
    assert versions == [{None}, {0}, {1}, {2}, {3}, {4}]
    asked = [body["prompt"] for server in run.servers for body in server.bodies("/v1/completions") if body["n"] == G]
    assert sorted(asked) == sorted(prompt for step in PROMPTS for prompt in step)  # each once, none beyond the end
    assert not in_flight() and "dropped" not in run.said()
    assert max(seeds_of(run).values()) == 1


def seeds_of(run):
    """{seed of a completion: how often}"""
    bodies = [body for server in run.servers for body in server.bodies("/v1/completions") if body["n"] == G]
    found = [body["seed"] + g for body in bodies for g in range(G)]
    return {seed: found.count(seed) for seed in found}


def test_servers_write_while_this_machine_learns_and_get_weights_while_nothing_is_written(run, record_property):
    """Both take 0.3 s. In one loop the one waits for the other; in the other they go side by side."""
    run.begin(servers=1)
    server, seconds = run.servers[0], 0.3
    written, learnt, loaded = [], [], []
    slow(server, seconds, written)
    load_adapter = server.load_adapter

    def load_noted(*given):
        loaded.append(time.monotonic())
        return load_adapter(*given)

    def update():
        begun = time.monotonic()
        time.sleep(seconds)
        learn(run.model)
        learnt.append((begun, time.monotonic()))

    server.load_adapter = load_noted
    run.step(update)  # the first batch has nothing to be written beside
    begun = time.monotonic()
    for _ in PROMPTS[1:]:
        run.step(update)
    whole = time.monotonic() - begun
    steps = [(min(b for b, _ in pair), max(e for _, e in pair)) for pair in zip(written[::2], written[1::2])]
    assert len(steps) == len(learnt) == len(PROMPTS) and len(loaded) == len(PROMPTS) - 1
    for (first, last), (learns, has_learnt) in zip(steps[1:], learnt):  # step n + 1 is written in the update of step n
        assert first < has_learnt and learns < last
    assert not [moment for moment in loaded for first, last in steps if first < moment < last]
    serial = sum(e - b for b, e in (*steps[1:], *learnt[1:]))
    said = f"--ahead 1: {whole:.2f} s, and {serial:.2f} s one after the other: {whole / serial:.0%}"
    record_property("ahead", said)
    print(f"\n{said}")


@pytest.mark.parametrize("fault, words", [("no adapter", "without the adapter"), ("dies", "is dropped"),
                                          ("abort", "paused"), ("few words", "--generation-config vllm")])
def test_a_server_that_lies_about_what_it_wrote_ahead_is_found(run, fault, words):
    """It is compared with the weights that wrote, so age is no lie and a lie is none of age; no step is lost."""
    run.begin()
    run.step(), run.step()
    first, second = run.servers
    first.fault = fault  # what is in flight may be right still; what comes then is not
    run.step()
    groups = run.step()
    said = run.said()
    assert said.count("is dropped") == 1 and first.url in said and words in said, said
    assert {group.version for group in groups} == {2}  # by the other one, whose weights are as old
    second.fault = "dies"
    run.step()
    assert [group.version for group in run.step()] == [None, None]  # sampled here, by the weights of now
    assert "on this machine from now on" in run.said() and not in_flight()


def test_old_weights_are_found_although_a_step_behind_is_what_one_expects(run):
    """A server that keeps weights of two steps before, where one before is right."""
    run.begin(lora=0, servers=1)
    run.step(), run.step()
    run.servers[0].fault = "stale"
    run.step(), run.step()
    assert "weights of before the reload" in run.said()


@pytest.mark.parametrize("n, seed, version", [(1, 1, 0), (1, 3, None), (3, 1, None), (3, 3, None)])
def test_what_was_written_ahead_counts_only_for_what_is_asked(run, n, seed, version):
    """Another seed, or other prompts, than were foreseen: the answer is waited for, and asked for anew."""
    run.begin()
    spans = []
    for server in run.servers:
        slow(server, 0.1, spans)
    run.step()
    groups = run.act(run.model, PROMPTS[n], G=G, max_new_tokens=T, temperature=1.0, seed=seed, tokenizer=run.tokenizer,
                     stop_text="")
    assert [group.prompt.tolist() for group in groups] == PROMPTS[n]
    assert {group.version for group in groups} == {version}  # the answer to another question would be a lie
    if version is None:  # two prompts of the step, two foreseen, and only when those are done the two that are asked
        *before, first, second = sorted(spans)
        assert len(before) == 4 and max(end for _, end in before) <= min(first[0], second[0])
    assert not in_flight() and "dropped" not in run.said()


def test_held_out_posts_do_not_wait_for_what_is_in_flight(run):
    run.begin(servers=1)
    run.step()
    wish = {"G": 1, "max_new_tokens": T, "temperature": 0.0, "seed": 0, "tokenizer": run.tokenizer}
    assert run.act(run.model, PROMPTS[0][:1], **wish, stop_text="")[0].texts == sample(
        run.model, PROMPTS[0][:1], **wish)[0].texts
    assert {group.version for group in run.step()} == {0}


FLAGS = ["--prompts", "2", "--group", "3", "--target", "8", "--eval-posts", "2", "--save-every", "2", "--lora", "2",
         "--run", "r", "--ahead", "1", "--tis", "2"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "runs/r/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_whole_run_with_two_stages(run, monkeypatch):
    """Only its first step is of the same age. A stage's end changes the reward, and the next prompts are known."""
    monkeypatch.chdir(run.folder)
    urls = [server.url for server in run.servers]
    assert train.main([*FLAGS, "--stages", "length:2", "rouge_l+length:3", "--rollouts", *urls]) == 0
    rows = rows_of(run.folder)
    assert [row["age"] for row in rows] == [0, 1, 1, 1, 1] and "dropped" not in run.said()
    assert all(0 < row["tis_ess"] <= 1 and row["tis_mean"] > 0 and row["tis_max"] <= 2 for row in rows)
    assert rows[0]["logp_gap"] < 1e-4 and not in_flight() and not list((run.folder / "runs/r").glob("rollouts-*"))
    asked = [body for server in run.servers for body in server.bodies("/v1/completions") if body["n"] == 3]
    assert len(asked) == 5 * 2


@pytest.mark.parametrize("end", ["stop", "exception", "at once"])
def test_a_run_that_ends_early_leaves_nothing_behind(run, end, monkeypatch):
    """A batch is in flight, at a server that does not answer any more: nobody waits for it. Then the run goes on."""
    monkeypatch.chdir(run.folder)
    update, steps = grpo.update, []

    def ends(model, ref_model, groups, optimizer, config):
        steps.append(0)
        if len(steps) == 3:
            if end == "stop":
                stops[0].asked = True
            if end == "exception":
                raise FloatingPointError("The loss is nan")
            if end == "at once":
                raise SystemExit
        elif len(steps) == 2:
            run.servers[0].fault = "hangs"  # from the batch on that is sent in the third step
        return update(model, ref_model, groups, optimizer, config)

    stops, enter = [], Stop.__enter__
    monkeypatch.setattr(Stop, "__enter__", lambda self: stops.append(self) or enter(self))
    monkeypatch.setattr(train.grpo, "update", ends)
    begun = time.monotonic()
    command = [*FLAGS, "--stages", "length:5", "--rollouts", run.servers[0].url]
    if end == "at once":
        with pytest.raises(SystemExit):
            train.main(command)
    else:
        assert train.main(command) == (1 if end == "exception" else 0)
    assert not in_flight() and time.monotonic() - begun < 30  # the server would take 60 s
    assert len(run.servers[0].bodies("/v1/completions")) <= 1 + 4 * 2
    assert not list((run.folder / "runs/r").glob("rollouts-*"))
    run.servers[0].fault = ""
    run.servers[0].ending.set()
    assert train.main(["--run", "r", "--resume"]) == 0
    rows = rows_of(run.folder)
    begins = 3 if end == "stop" else 2
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[begins]["age"] == 0 and rows[-1]["age"] == 1


# --- the study --------------------------------------------------------------------------------------------------------


def test_behind_has_older_weights_write():
    model, versions = tiny_model(), []
    history = []
    with study.behind(2):
        for step in range(5):
            history.append(weights_of_now(model))
            found, = train.sample(model, [[3, 4, 5]], G=2, max_new_tokens=5, temperature=1.0, seed=step)
            versions.append(found.version)
            with with_weights(model, history[found.version]):
                want, = sample(model, [[3, 4, 5]], G=2, max_new_tokens=5, temperature=1.0, seed=step)
            assert (found.logp == want.logp).all() and (found.tokens == want.tokens).all()
            greedy, = train.sample(model, [[3, 4, 5]], G=2, max_new_tokens=5, temperature=0.0)
            assert greedy.version is None  # held-out posts are for the weights of now
            learn(model)
    assert versions == [0, 0, 0, 1, 2] and train.sample is sample


def test_the_study_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    """Two runs of two steps in this process; what is kept has no text; a second command begins none."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "machines.md"
    page.write_text(f"Before.\n\n{study.HEADING}| old |\n| --- |\n\nAfter.\n", encoding="utf-8")
    for name, value in {"STEPS": 2, "SEEDS": 1, "AGES": (1,), "CORRECTIONS": {"none": (), "tokens": ("--tis", "2")},
                        "BETAS": (0.0,), "RESULTS": tmp_path / "results", "PAGE": page, "ROOT": tmp_path}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study.Run, "flags", property(lambda run: [
        "--stages", "length:2", "--prompts", "2", "--group", "2", "--target", "12", "--eval-posts", "2", "--beta", "0",
        *study.CORRECTIONS[run.correction]]))
    monkeypatch.setattr(once.subprocess, "run", lambda command, stdout, **_: SimpleNamespace(
        returncode=print("train.py: nothing", file=stdout) or study.main(command[3:])))
    assert study.main(["run", "--seeds", "1", "--jobs", "1"]) == 0, capsys.readouterr().err
    plain, corrected = (json.loads((tmp_path / "results" / f"1-{name}-free-0.json").read_text(encoding="utf-8"))
                        for name in ("none", "tokens"))
    assert plain["curves"]["age"] == [None, 1] and corrected["curves"]["age"] == [0, 1]
    assert len(corrected["curves"]["tis_ess"]) == 2
    assert "tis_ess" not in plain["curves"] and len(plain["val"]) == 2
    assert not re.search("summary|document", str(plain["val"]))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Before.\n\n{study.HEADING}| `--beta` | age |") and text.endswith("|\n\nAfter.\n")
    assert "| 0 | 1 | tokens | 1 |" in text and "old" not in text
    monkeypatch.setattr(once.subprocess, "run", None)
    assert study.main(["run", "--seeds", "1", "--jobs", "1"]) == 0  # no run is begun again
    assert study.main(["figures"]) == 0 and (tmp_path / "figures" / "staleness.png").stat().st_size > 10_000


def test_the_page_is_what_the_results_say():
    """Whoever changes a result makes the table anew: python -m studies.staleness tables."""
    text = study.PAGE.read_text(encoding="utf-8")
    assert text == study.with_table(text, study.make_table())
    assert "has no heading" in refusal(ValueError, study.with_table, "", "")
