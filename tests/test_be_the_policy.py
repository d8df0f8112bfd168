"""Be the policy: what is shown is what the real step does, and the model stays as it was."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

import grpo
import task
from config import Config
from model import load
from plumbing.posts import TINY, load_posts
from rewards import parse
from rollout import sample
from studies import be_the_policy as game

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def played():
    """A post, the embedded model's three summaries of it, and two of ours: the post's own one, and nonsense."""
    model, tokenizer = load(TINY, "cpu")
    post = load_posts("tiny", "val", max_posts=1)[0]
    config = Config(lr=1e-4, template="chatml", max_new_tokens=60)
    asked = task.make_task(tokenizer, post, config)
    (others,) = sample(model, [asked.prompt], 3, 60, tokenizer=tokenizer)
    groups = {}
    for name, answer in (("good", post.reference), ("bad", "No.")):
        groups[name] = game.join(model, tokenizer, others, answer, config)
        task.score([groups[name]], [asked], parse("rouge_l + 3*length"), config, tokenizer)
    return model, tokenizer, post, config, groups


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(game)
    assert results.attempted >= 1 and results.failed == 0


def test_you_are_one_row_among_the_models(played):
    """Your tokens, a stop token behind them, and log-probabilities that are the trainer's own."""
    model, tokenizer, post, config, groups = played
    group = groups["good"]
    n = int(group.mask[0].sum())
    assert tokenizer.decode(group.tokens[0, :n - 1].tolist()) == post.reference == group.texts[0]
    assert int(group.tokens[0, n - 1]) in model.config.eos_token_ids and bool(group.stopped[0])
    assert int(group.lengths[0]) == n - 1 and len(group.texts) == len(group.rewards) == 4
    text = torch.cat([group.prompt, group.tokens[0, :n]])  # [P+n]
    log_p = model(text[None])[0, :-1].log_softmax(-1).gather(1, text[1:, None])[-n:, 0]  # [n]
    torch.testing.assert_close(group.logp[0, :n], log_p, rtol=0, atol=1e-4)
    assert groups["good"].rewards[1:] == pytest.approx(groups["bad"].rewards[1:])  # the others' do not depend on yours
    assert groups["good"].rewards[0] > groups["bad"].rewards[0]


def test_what_is_too_long_is_cut_like_the_models_own(played):
    model, tokenizer, post, config, groups = played
    group = game.join(model, tokenizer, groups["good"], "on and " * 200, config)
    assert int(group.mask[0].sum()) == 60 and not group.stopped[0] and int(group.lengths[0]) == 60


def test_the_step_is_real_and_the_weights_are_put_back(played):
    """Bit for bit. In between, what did better than its group became likelier, and what did worse became rarer."""
    model, tokenizer, _, config, groups = played
    before = parameters_to_vector(model.parameters()).clone()
    for name, sign in (("good", 1), ("bad", -1)):
        group = groups[name]
        gain = ((game.after_one_step(model, group, config) - group.logp) * group.mask).sum(1)  # [G]
        A = grpo.advantages(torch.tensor([group.rewards]))[0]  # [G]
        assert sign * A[0] > 0.3 and sign * gain[0] > 0.1, (name, A, gain)
        assert (gain / group.mask.sum(1) * A).sum() > 0  # on the whole, it went where the advantages point
    assert torch.equal(parameters_to_vector(model.parameters()), before)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_shown_is_what_was_computed(played):
    model, tokenizer, post, config, groups = played
    group = groups["bad"]
    after = game.after_one_step(model, group, config)
    shown = game.show_group(group, [0.0, 1.0, 2.0, 30.0])
    rewards = [float(x) for x in re.findall(r"^ *(-?\d\.\d{3}) .* [+-]\d", shown, re.M)]
    assert rewards == pytest.approx(sorted(group.rewards, reverse=True), abs=1e-3)  # best first
    assert "<- you" in shown and "x 2.72" in shown and "x 1e+13" in shown and "worse than the mean" in shown
    tokens = game.show_tokens(tokenizer, group, after)
    assert len(re.findall("->", tokens)) == int(group.mask[0].sum()) + 1  # one a token, and the heading's
    pays = game.show_pay(group, post.reference, 30)
    assert post.reference.split()[0] in pays and "times 3" in pays
    assert max(map(len, "\n".join([shown, tokens, pays]).splitlines())) <= 80


def test_without_a_terminal():
    """Two answers by --answer, and one from a pipe: the same lines."""
    command = [sys.executable, "-m", "studies.be_the_policy", "--group", "3"]
    once = subprocess.run([*command, "--answer", "A dog.", "A dog ran home."], cwd=ROOT, text=True, check=True,
                          capture_output=True, encoding="utf-8").stdout
    assert once.count("<- you") == 2 and once.count("What pays:") == 2
    piped = subprocess.run(command, cwd=ROOT, text=True, check=True, capture_output=True, encoding="utf-8",
                           input="A dog.\n").stdout
    table = re.search(r"The group, best first.*?What pays:", once, re.S)[0]
    assert table in piped


@pytest.mark.parametrize("arguments, says", [(["--reward", "squish"], "budget"), (["--group", "2"], "at least 3"),
                                             (["--answer", " "], "no summary"), (["--reward", "lenght"], "unknown")])
def test_what_cannot_be_played_is_a_sentence(arguments, says, capsys):
    assert game.main(["--answer", "A dog.", *arguments]) == 1
    assert says in capsys.readouterr().err
