"""studies/plan.py: what a run takes in memory, counted without taking it."""

import json
import re
import shutil

import pytest
import torch

import grpo
from model import load, read_config
from plumbing.cli import read_arguments
from plumbing.posts import TINY
from studies import plan as study
from studies.plan import Alive, Config, plan, read_only_config

P, T = 48, 10
RAW = {"model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
       "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LAYER = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 64 + 2 * 32 + 2 * 8  # q, k, v, o; gate, up, down; norms
WEIGHTS = 96 * 32 + 3 * LAYER + 32


def planned(*flags: str):
    config, _, _ = read_arguments(Config, ["--prompts", "2", "--group", "4", *flags], "")
    return plan(read_config(RAW, "test"), config, P, T)


def test_what_is_held_by_hand():
    full, lean, lora = planned(), planned("--lean"), planned("--lora", "2")
    assert full.weights == full.trained == WEIGHTS
    assert full.holds == {"weights": 4 * WEIGHTS, "reference model": 4 * WEIGHTS, "AdamW's moments": 8 * WEIGHTS}
    assert lean.holds == {name: n // 2 for name, n in full.holds.items()}
    adapters = 3 * 2 * (4 * 32 + 32 + 2 * 16 + 32 + 3 * (32 + 64))  # rank 2: (in + out) of q, k, v, o, gate, up, down
    assert lora.holds == {"weights": 4 * (WEIGHTS + adapters), "reference model": 0, "AdamW's moments": 8 * adapters}
    assert lora.learning["gradients"] == 4 * adapters == 4 * lora.trained
    assert planned("--beta", "0").holds["reference model"] == 0


def test_the_cache_by_hand():
    """Keys and values, 3 layers, 2 heads of 8 numbers: 2 prompts, and 8 rows of up to T tokens."""
    assert planned().sampling["cache"] == 2 * 3 * 2 * 8 * 4 * (2 * P + 8 * T)


@pytest.mark.parametrize("flags", [(), ("--lean",), ("--lora", "2"), ("--checkpointing",)])
def test_the_micro_batch_is_that_of_a_real_step(flags):
    """The same count of the real function on real tensors. It has a few small tensors more: masks and metrics."""
    config, _, _ = read_arguments(Config, [*flags], "")
    with Alive() as alive:
        model = study.fake_model(read_config(RAW, "test"), config)  # outside `without_memory` nothing is fake
        prompts = [torch.ones(n, dtype=torch.long) for n in (P, P - 1)]
        tokens = torch.ones(2, 4, T, dtype=torch.long)
        before = alive.peak = alive.now
        logp, _ = grpo.group_logprobs(model, prompts, tokens, tokens.bool())
        logp.sum().backward()
        real = alive.peak - before
    found = planned(*flags, "--beta", "0").learning
    assert sum(found.values()) == pytest.approx(real, rel=0.05)


def test_storages_count_until_nobody_holds_them():
    with Alive() as alive:
        x = torch.zeros(1000)
        y = x.view(10, 100)  # the same memory
        z = x + 1
        assert alive.now == 8000
        del x, z
        assert alive.now == 4000 and alive.peak == 8000
        del y
        assert alive.now == 0


def test_mlx_keeps_the_scores_of_its_attention():
    """More than torch keeps by the softmax of each layer at least: 8 rows, 4 heads, T - 1 questions, P + T - 1 keys."""
    torchs, mlxs = planned("--beta", "0"), planned("--beta", "0", "--backend", "mlx")
    scores = 4 * 8 * 4 * (T - 1) * (P + T - 1)
    copies = 4 * 8 * 2 * 2 * 8 * P  # which torch makes instead: each row's prompt keys and values
    assert sum(mlxs.learning.values()) - sum(torchs.learning.values()) > 3 * (scores - copies)


def test_a_config_alone_is_enough(tmp_path, capsys):
    shutil.copy(TINY / "config.json", tmp_path)
    assert study.main(["--memory", "16", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Fits into 16 GiB" in said
    assert read_only_config(str(tmp_path)) == read_only_config("tiny")
    weights = sum(p.numel() for p in load(TINY)[0].parameters())
    assert f"{weights / 1e6:,.1f} million weights" in said


def test_what_is_advised_fits(capsys):
    flags = ["--prompts", "8", "--group", "16", "--max-prompt", "256"]
    assert study.main(["--memory", "100", *flags]) == 0
    base = float(re.search(r"libraries +([\d.]+)", capsys.readouterr().out)[1])
    memory = ["--memory", str((base + 0.25) / study.ROOM)]
    assert study.main([*memory, *flags]) == 2
    helps = re.search(r"It does with (--micro-tokens \d+[- a-z]*)\.", capsys.readouterr().out)[1]
    assert study.main([*memory, *flags, *helps.split()]) == 0


def test_a_mistake_is_a_sentence(capsys):
    assert study.main(["--memory", "16", "--model", "nowhere"]) == 1
    assert study.main(["--memory", "16", "--group", "1"]) == 1
    said = capsys.readouterr().err
    assert "There is no folder nowhere" in said and "at least 2" in said


def test_a_teacher_is_counted(tmp_path):
    """Its weights are held all the time, in the run's precision, and without adapters. While it is asked, no layer's
    activations stay: the step takes hardly more."""
    (tmp_path / "config.json").write_text(json.dumps(RAW), encoding="utf-8")
    name = str(tmp_path)
    for flags, size in (((), 4), (("--lean",), 2), (("--lora", "2"), 4)):
        without, taught = planned(*flags), planned(*flags, "--teacher", name)
        assert taught.holds == without.holds | {f"teacher {name}": size * WEIGHTS}
        assert sum(taught.learning.values()) <= 1.1 * sum(without.learning.values())
    assert planned("--beta", "0", "--teacher", name).holds["reference model"] == 0
