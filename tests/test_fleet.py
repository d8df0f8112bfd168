"""studies/fleet.py: fleets whose cost can be reckoned by hand, and what holds for all of them."""

import doctest
import json
import re
import threading
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import load
from plumbing.posts import TINY
from rollout import sample
from studies import fleet as study
from studies.fleet import Fleet, Job, Machine, Pieces, by_rule, cost, sampling, simulate
from tests.helpers import few

# Round numbers: a prompt of 10 tokens takes 1 + 10/10 = 2 s alone; a token for 4 rows takes 0.5 + 4/4 = 1.5 s.
P = Pieces("round", read=(1, 0.1), draw=(0.5, 0.25), score=(1, 0.5), learn=(2, 0.25), compare=(0, 0.5), write=(1, 0.01),
           load=(2, 0.02), weights=1000)
SAME = Job(prompts=2, group=2, prompt=(10, 0), length=(5, 0), steps=10)  # every text as long as the others
SAMPLES = 1 + 0.1 * 20 + 4 * (0.5 + 0.25 * 4)  # two prompts, then four more tokens for four rows: 9 s
LEARNS = (1 + 0.5 * 4) + (2 + 0.25 * (20 + 4 * 5))  # scores of four completions; one step on 40 tokens: 15 s


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_one_machine_does_one_thing_after_the_other():
    out = simulate(SAME, Fleet(P, P))
    assert out.seconds == 10 * (SAMPLES + LEARNS) == 10 * (9 + 15)
    assert out.tokens == 10 * 4 * 5 and out.age == 0 and out.waits(out.learners) == 0


def test_two_servers_halve_the_sampling():
    """Each prompt takes a second, one after another."""
    server, job = replace(P, request=1), replace(SAME, prompts=4)
    learn = simulate(job, Fleet(replace(P, request=0, read=(0, 0), draw=(0, 0)), P)).step
    compare = 0.5 * 20  # one group of each server: 10 + 2 * 5 tokens
    assert simulate(job, Fleet(server, P, samplers=1)).step - learn - compare == pytest.approx(4 + 0.9 * 3)
    assert simulate(job, Fleet(server, P, samplers=2)).step - learn - 2 * compare == pytest.approx(2 + 0.9 * 3)


@pytest.mark.parametrize("wait", [1, 40])
def test_ahead_a_step_takes_as_long_as_the_slower_half(wait):
    free = replace(P, write=(0, 0), load=(0, 0), compare=(0, 0), request=wait)
    samples = 2 * wait
    serial, ahead = (simulate(SAME, Fleet(free, free, samplers=1, ahead=x)) for x in (False, True))
    assert serial.seconds == 10 * (samples + LEARNS)
    assert ahead.seconds == samples + 9 * max(samples, LEARNS) + LEARNS
    assert serial.age == 0 and ahead.age == 9 / 10  # the first batch is fresh
    assert ahead.learners[0].idle(ahead.seconds) == pytest.approx(samples + 9 * max(0, samples - LEARNS))


def test_new_weights_are_written_once_carried_to_each_and_loaded_by_all_at_once():
    server = replace(P, request=1)
    out = simulate(SAME, Fleet(server, replace(P, compare=(0, 0)), samplers=2, sync=100, network=50))
    # Written in 1 + 1 s; carried in 2 s, twice, one after another; loaded in 2 + 2 s; a second for one prompt each.
    assert out.seconds == pytest.approx(10 * (1 + LEARNS) + 9 * (2 + 2 * 2 + 4))
    assert out.network.busy == 9 * 2 * 2
    assert [s.busy for s in out.samplers] == [10 + 9 * 4] * 2


def test_rarer_weights_are_older_samples():
    """Every third step: batches learnt from at 0, 1, 2 | 3, 4, 5 | ... are 0, 1, 2 updates old."""
    out = simulate(replace(SAME, steps=9), Fleet(P, P, samplers=1, every=3, sync=100, network=50))
    assert out.age == 1 and out.network.busy == 2 * 2
    assert simulate(replace(SAME, steps=9), Fleet(P, P, samplers=1, every=3, sync=1, ahead=True)).age > 1


def test_who_has_short_texts_waits_for_who_has_long_ones(monkeypatch):
    """A straggler: one prompt of two is answered with 41 tokens, the other with 1."""
    monkeypatch.setattr(Job, "batch", lambda self, n, seed: (np.array([10.0, 10.0]), np.array([[1.0, 1], [41, 41]])))
    out = simulate(replace(SAME, steps=1), Fleet(P, P, samplers=2))
    long = 2 + 40 * (0.5 + 0.25 * 2)
    assert [s.busy for s in out.samplers] == [2, long]
    assert out.samplers[0].idle(out.seconds) - out.samplers[1].idle(out.seconds) == long - 2
    assert out.learners[0].spans[0][0] == long  # the learner waits for it, too


def test_ranks_share_the_prompts_and_add_up_their_gradients():
    """Each of two ranks has one prompt; of 4000 bytes of gradients each sends and gets 2 * 1/2 of all."""
    out = simulate(SAME, Fleet(P, P, learners=2, network=1000))
    alone = (1 + 1 + 4 * (0.5 + 0.25 * 2)) + (1 + 0.5 * 2) + (2 + 0.25 * 20)
    assert out.step == alone + 4000 / 1000
    assert len(out.learners) == 2 and all(m.idle(out.seconds) == 0 for m in out.learners)


def test_the_rule_by_hand():
    """A thousand weights of 2 bytes, read at 100 bytes a second: 20 s a token; 500 products a second: 4 s each."""
    p = by_rule(P, "a machine", bandwidth=100, products=500)
    assert p.draw == (20, 4) and p.read == (0, 4) and p.learn == (7 * 20, 5 * 4)
    assert p.saved == 2000 and p.score == P.score
    q = replace(p, draw=(40, 8), read=(0, 4), learn=(70, 10))
    assert study.off(q, SAME) == {"read": 1, "draw": 2, "learn": 0.5}
    assert study.slower(p, study.off(q, SAME)).draw == q.draw


def test_enough_samplers_by_hand():
    """12 prompts of 10 s beside 20 s of learning: six servers are as good as twelve."""
    server = replace(P, request=10)
    learner = Pieces("learner", learn=(20, 0))
    assert study.enough(replace(SAME, prompts=12), Fleet(server, learner, samplers=1)) == 6


# --- what the sampler really does -------------------------------------------------------------------------------------


def test_the_rows_of_a_simulated_batch_are_those_of_the_sampler(monkeypatch):
    """Finished rows leave as they do in rollout.py: the simulated seconds count each token's rows of the real one."""
    model, _ = load(TINY)
    prompts = [[1, 300, 301, 302], [1, 400, 401], [1, 500, 501, 502, 503]]
    rows, hidden = [], type(model).hidden

    def spy(self, tokens, *args):
        rows.append(tokens.shape[0])
        return hidden(self, tokens, *args)

    monkeypatch.setattr(type(model), "hidden", spy)
    groups = sample(model, prompts, 3, 40, stop_ids=range(0, 400, 3))
    lengths = np.stack([group.mask.sum(1).numpy() for group in groups])
    assert len(set(lengths.flatten().tolist())) > 2  # else nothing leaves
    counted = sampling(Pieces("counts", draw=(0, 1)), np.zeros(3), lengths)
    assert counted == sum(rows[1:]) and rows[0] == 3
    assert sampling(Pieces("counts", draw=(1, 0)), np.zeros(3), lengths) == len(rows) - 1


def test_a_slow_server_takes_as_long_as_it_is_told_for_each_prompt():
    server = study.slow_server(0.25)
    body = {"model": "served", "prompt": [1, 300, 301], "n": 2, "max_tokens": 3, "seed": 0, "stop_token_ids": [],
            "stop": [], "ignore_eos": True, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0,
            "frequency_penalty": 0}

    def ask():
        request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            assert len(json.load(answer)["choices"]) == 2

    try:
        begun = time.perf_counter()
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0.5 <= time.perf_counter() - begun < 2
    finally:
        server.close()


def test_measured_pieces_are_those_of_the_model(monkeypatch):
    """One call each, so that it is quick; whether they add up to a run: python -m studies.fleet check."""
    threads, clock = torch.get_num_threads(), iter(range(10 ** 6))
    calls = []

    def once(call, clock_of_bench):
        calls.append(call)
        call()
        return float(next(clock))  # later calls, which do more, take longer

    monkeypatch.setattr(study, "typical", once)
    p = study.measure("tiny")
    torch.set_num_threads(threads)
    model, _ = load(TINY)
    weights = sum(x.numel() for x in model.parameters())
    assert p.weights == weights and len(calls) == 4 + 2 + 2 + 3
    assert 4 * weights <= p.saved < 4 * weights + 10_000
    adapters = sum(16 * sum(m.weight.shape) for name, m in model.named_modules() if name.endswith("_proj"))
    assert 4 * adapters <= p.adapters < 4 * adapters + 20_000
    assert 20 < p.lengths[0] < 80 and 50 < p.prompt[0] < 200
    assert all(min(getattr(p, name)) >= 0 < max(getattr(p, name))
               for name in ("read", "draw", "learn", "compare", "write", "load", "score"))
    assert study.Pieces(**json.loads(json.dumps(study.asdict(p)))).saved == p.saved


# --- what holds for every fleet ---------------------------------------------------------------------------------------

seconds = st.tuples(st.floats(0, 2), st.floats(0, 0.2))
pieces = st.builds(Pieces, machine=st.just("any"), read=seconds, draw=seconds, compare=seconds, score=seconds,
                   learn=seconds, write=seconds, load=seconds, request=st.sampled_from([0, 0, 1.5]))
jobs = st.builds(Job, prompts=st.integers(1, 9), group=st.integers(1, 4), prompt=st.just((30, 10)),
                 length=st.tuples(st.floats(1, 30), st.floats(0, 20)), most=st.just(40), steps=st.integers(1, 6))


@few
@given(jobs, pieces, pieces, st.integers(1, 4), st.integers(2, 3), st.booleans())
def test_more_samplers_are_never_slower(job, sampler, learner, n, times, ahead):
    """`times` as many, so that each has a part of what one had before; and to compare them costs nothing. Not so with
    one more: two long answers may fall to the same one. Nor over a network, which has to carry more weights."""
    free = replace(learner, compare=(0, 0))
    few_of_them, many = (simulate(job, Fleet(sampler, free, samplers=x, ahead=ahead)) for x in (n, n * times))
    assert many.seconds <= few_of_them.seconds * (1 + 1e-9)


@few
@given(jobs, pieces, pieces, st.integers(1, 4), st.integers(1, 3), st.floats(0, 100), st.sampled_from([0, 50.0]))
def test_ahead_is_never_slower_and_its_samples_never_younger(job, sampler, learner, n, every, sync, network):
    serial, ahead = (simulate(job, Fleet(sampler, learner, samplers=n, ahead=x, every=every, sync=sync,
                                         network=network)) for x in (False, True))
    assert ahead.seconds <= serial.seconds * (1 + 1e-9) and ahead.tokens == serial.tokens
    assert 0 <= serial.age <= ahead.age <= every


@few
@given(jobs, pieces, pieces, st.integers(0, 4), st.integers(1, 3), st.booleans(), st.sampled_from([0, 50.0]))
def test_a_machine_is_busy_or_idle_and_does_one_thing_at_a_time(job, sampler, learner, samplers, learners, ahead,
                                                                network):
    out = simulate(job, Fleet(sampler, replace(learner, weights=100), samplers=samplers, learners=learners,
                              ahead=ahead, sync=10, network=network))
    for machine in (*out.samplers, *out.learners, out.network):
        assert machine.busy + machine.idle(out.seconds) == pytest.approx(out.seconds)
        assert all(a[1] <= b[0] for a, b in zip(machine.spans, machine.spans[1:]))
        assert not machine.spans or machine.spans[-1][1] <= out.seconds + 1e-9


def test_a_machine_begins_when_it_is_free():
    machine = Machine()
    assert machine.work(2, 3) == 5 and machine.work(1, 1) == 6 and machine.work(8, 1) == 9
    assert machine.busy == 5 and machine.idle(10) == 2 + 2 + 1


def test_a_line_never_pays_for_more():
    assert doctest.testmod(study).failed == 0
    assert study.line((10, 20), (5, 3)) == (4, 0)
    fixed, each = study.line((10, 20), (1, 3))
    assert fixed == 0 and cost((fixed, each), 15) == 2


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_command_says():
    """The kept pieces simulated again: python -m studies.fleet --write, after anything here has changed."""
    page = study.PAGE.read_text(encoding="utf-8")
    found = study.tables([2, 28], Job())
    assert all(f"<!-- fleet: {name} -->\n{text}<!-- end -->" in page for name, text in found.items())
    assert study.filled(page, found) == page


def test_a_fleet_of_your_own(capsys):
    """A Mac by the rule: 494M weights of 2 bytes over 125 MB/s."""
    free = '{"read": [0, 0], "compare": [0, 0]}'
    assert study.main(["--machine", "mac", "--network", "125e6", "--pieces", free]) == 0
    one, serial, ahead, adapters = re.findall(r"^\| .*\d \|$", capsys.readouterr().out, re.M)
    assert "0.99 GB" in serial and "35 MB" in adapters and one.endswith("0.0 |") and ahead.endswith("1.0 |")
    step = [float(row.split("|")[2]) for row in (one, serial, adapters)]
    assert 0 < step[1] - step[0] - 2 * 494_032_768 / 125e6 < 2  # written, carried, loaded
    assert step[2] < step[0]
