"""GRPO in a hundred lines is GRPO: its update is the real one, and it learns."""

import copy
import re
import sys

import pytest
import torch
from helpers import tiny_model
from torch.nn.utils import parameters_to_vector

import grpo
from config import Config
from model import pad
from rollout import Group
from studies import hundred_lines as short


def batch(model, prompts=(3, 9, 5), lengths=((4, 1, 2, 4), (6, 3, 6, 2), (1, 2, 1, 1))):
    """The same completions twice: B tuples as the hundred lines have them, and B groups as the sampler makes them."""
    draw = torch.Generator().manual_seed(0)
    plain, groups = [], []
    for n, own in zip(prompts, lengths):
        prompt = torch.randint(40, (n,), generator=draw)  # [P]
        completions = [torch.randint(40, (T,), generator=draw) for T in own]  # G of [T]
        rewards = torch.randn(len(own), generator=draw).tolist()
        tokens, mask = pad(completions)  # [G, T] each
        plain.append((prompt, completions, rewards))
        groups.append(Group(prompt, tokens, mask, torch.zeros(mask.shape), mask[:, 0], [""] * len(own), rewards))
    return plain, groups


@pytest.mark.parametrize("updates, temperature", [(1, 1.0), (3, 0.7)])
def test_an_update_is_grpo_update(updates, temperature, monkeypatch):
    """By the defaults of config.py; and with more updates on a batch, so that something is old, and clipped.

    Three batches one after the other, so that the KL and AdamW's moments count. The real update runs each prompt once,
    pads, and never has all logits; this one does everything the long way. Each weight is the same.
    """
    settings = Config(updates=updates, temperature=temperature)
    monkeypatch.setattr(short, "UPDATES", updates)
    monkeypatch.setattr(short, "TEMPERATURE", temperature)
    start = tiny_model(dtype=torch.float64)
    ref_model = copy.deepcopy(start)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [torch.optim.AdamW(m.parameters(), settings.lr, (0.9, 0.99), 1e-8, 0.0) for m in (ours, theirs)]
    for lengths in (((4, 1, 2, 4), (6, 3, 6, 2)), ((1, 2, 1, 1), (5, 5, 5, 5)), ((2, 3, 4, 5), (1, 1, 1, 2))):
        plain, groups = batch(start, lengths=lengths)
        short.update(ours, ref_model, plain, optimizers[0])
        metrics = grpo.update(theirs, ref_model, groups, optimizers[1], settings)
        a, b = parameters_to_vector(ours.parameters()), parameters_to_vector(theirs.parameters())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert metrics["kl"] > 1e-4 and (a - parameters_to_vector(start.parameters())).abs().max() > 1e-3


def test_its_settings_are_the_defaults():
    c = Config()
    assert (short.B, short.G, short.TARGET, short.UPDATES) == (c.prompts, c.group, c.target, c.updates)
    assert (short.LR, short.BETA, short.TEMPERATURE, short.GRAD_CLIP) == (c.lr, c.beta, c.temperature, c.grad_clip)
    assert short.CLIP == c.clip_low == c.clip_high and (c.loss, c.advantage, c.kl) == ("grpo", "group", "k3_ratio")


def test_a_completion_ends_with_its_first_stop_token():
    """It is part of the completion, for to stop is learnt like all else; and it is no token of the summary."""
    model = tiny_model(vocab_size=3, eos_token_id=2)
    torch.manual_seed(0)
    completions = [o.tolist() for _ in range(4) for o in short.sample(model, torch.tensor([1, 0, 1]))]
    stopped = [o for o in completions if 2 in o]
    assert stopped and all(o.index(2) == len(o) - 1 for o in stopped)
    assert all(len(o) == 2 * short.TARGET for o in completions if 2 not in o)
    assert short.reward(model, torch.tensor([0] * short.TARGET + [2])) == short.reward(
        model, torch.tensor([0] * short.TARGET)) == 0


def test_it_learns(monkeypatch):
    """One post a step, and summaries of 12 tokens, to be quick: it stops earlier after six steps than before them."""
    monkeypatch.setattr(short, "B", 1)
    monkeypatch.setattr(short, "TARGET", 12)
    means = short.train(6)
    assert sum(means[-2:]) > sum(means[:2]) + 0.2


def test_it_is_short_and_needs_nothing_but_torch_and_load():
    with open(short.__file__, encoding="utf-8") as file:
        text = file.read()
    assert len(text.splitlines()) <= 115
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) - sys.stdlib_module_names == {"torch", "model"}
    assert re.findall(r"^from model import (.*)$", text, re.M) == ["load"]
    inside = [line for line in text.splitlines() if re.match(r" +(?!text |return|print|train|\"\"\"|python)\S", line)]
    assert len(inside) > 40 and not [line for line in inside if "  # " not in line]  # every line says what it is for
