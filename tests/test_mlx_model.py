"""The MLX model and its sampler are the torch ones: same weights in, same numbers and same tokens out."""

import numpy as np
import pytest
import torch

import model as torch_model
import rollout
from tests.helpers import byte_bpe, raw_config, tiny_model, tokens

mx = pytest.importorskip("mlx.core")
mlx_model = pytest.importorskip("mlx_model")

FAMILIES = ["llama", "qwen2", "qwen3", "lfm2"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> (torch model, the MLX model of the same folder)."""
    found = {}
    for family in FAMILIES:
        folder, ours = tmp_path_factory.mktemp(family), tiny_model(family)
        ours.raw_config = raw_config(family)
        torch_model.save(ours, byte_bpe(), folder)
        found[family] = ours, mlx_model.load(folder)[0]
    return found


def assert_close(theirs, ours, atol=1e-4):
    np.testing.assert_allclose(np.array(theirs), ours.detach().numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_torch(pairs, family):
    ours, theirs = pairs[family]
    ids = tokens(3, 17)
    want = ours(ids)
    assert want.std() > 0.5
    assert_close(theirs(ids.numpy()), want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaks_nowhere(pairs, family, side):
    ours, theirs = pairs[family]
    ids, lengths = tokens(3, 9).numpy(), (4, 9, 1)
    mask = np.arange(9) < np.array(lengths)[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    hidden = np.array(theirs.hidden(ids, mask=mask))
    for row, real in enumerate(mask):
        assert_close(hidden[row][real], ours.hidden(torch.tensor(ids[row, real][None]))[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_and_a_cache_change_nothing(pairs, family, masked):
    """Prompts of two lengths, three rows each, read in three calls: as torch reads each row alone."""
    ours, theirs = pairs[family]
    prompts = [tokens(1, 6, seed=1)[0], tokens(1, 3 if masked else 6, seed=2)[0]]
    said = tokens(6, 80, seed=3)
    cache = mlx_model.Cache()
    padded, mask = mlx_model.pad(prompts)
    theirs.hidden(padded, cache, mask if masked else None)
    cache.share(3)
    calls = said.split([1, 1, 68, 1, 9], 1)
    hidden = np.concatenate([np.array(theirs.hidden(part.numpy(), cache)) for part in calls], 1)
    for row in range(6):
        whole = torch.cat([prompts[row // 3], said[row]])[None]
        assert_close(hidden[row], ours.hidden(whole)[0, len(prompts[row // 3]):])


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(), dict(temperature=0.7, top_k=5), dict(top_p=0.8)],
                         ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_the_same_tokens(pairs, family, settings):
    ours, theirs = pairs[family]
    prompts = [tokens(1, n, seed=n)[0] for n in (5, 9, 2)]
    if settings == {"temperature": 0.0}:  # the greedy one need not say its end token: let it end by another
        said = rollout.sample(ours, prompts, G=1, max_new_tokens=9, temperature=0.0)[0].tokens[0].tolist()
        settings = {**settings, "stop_ids": [said[-1]]}
    want = rollout.sample(ours, prompts, G=4, max_new_tokens=24, seed=7, **settings)
    got = mlx_model.sample(theirs, prompts, G=4, max_new_tokens=24, seed=7, **settings)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask) and torch.equal(a.stopped, b.stopped)
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-4)
    assert any(group.stopped.any() for group in want)
