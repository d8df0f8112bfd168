"""The MLX model and its sampler are the torch ones: same weights in, same numbers and same tokens out.

The oracle is `model.py`, which test_model.py holds to transformers. Models are small and all their weights random.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import lora
import model as torch_model
import rollout
from plumbing.posts import TINY, load_posts
from task import tokenize
from tests.helpers import byte_bpe, disk_full_after, raw_config, refusal, tiny_model, tokens

mx = pytest.importorskip("mlx.core", exc_type=ImportError)
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import mlx_model  # noqa: E402
from plumbing import mlx_arrays  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BACK = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}
FAMILIES = ["llama", "qwen2", "qwen3", "lfm2"]
SWITCHES = [("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
            ("llama", {"num_key_value_heads": 1}), ("qwen3", {"attention_bias": True}),
            ("qwen2", {"rms_norm_eps": 0.1}),
            ("lfm2", {"conv_bias": True, "conv_L_cache": 5}), ("lfm2", {"conv_L_cache": 1}),
            ("lfm2", {"tie_word_embeddings": False})]


def both(folder, family, tokenizer=None, **more):
    """A torch model with random weights, and the MLX model of the folder that it was saved in."""
    ours = tiny_model(family, **more)
    ours.raw_config = raw_config(family, **more)
    torch_model.save(ours, tokenizer, folder)
    return ours, mlx_model.load(folder)[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return {family: both(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def embedded():
    """The embedded default -> (torch model, MLX model, tokenizer, two prompts of different lengths)."""
    ours, tokenizer = torch_model.load(TINY, "cpu")
    posts = load_posts("tiny", "val")[:6]
    prompts = sorted((tokenize(tokenizer, post, "chatml", 16) for post in posts), key=len)
    assert len(prompts[0]) < len(prompts[-1])
    return ours, mlx_model.load(TINY)[0], tokenizer, [prompts[0], prompts[-1]]


def assert_close(theirs, ours, atol=1e-4):
    np.testing.assert_allclose(np.array(theirs), ours.detach().numpy(), rtol=0, atol=atol)


def assert_same_groups(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.texts == b.texts
        for name in ("prompt", "tokens", "mask", "stopped", "ending"):
            x, y = getattr(a, name), getattr(b, name)
            assert x is y is None or x.dtype == y.dtype and torch.equal(x, y), name
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_torch(pairs, family):
    ours, theirs = pairs[family]
    ids = tokens(3, 60)
    want = ours(ids)
    assert want.std() > 0.5  # not a model that says the same whatever it reads
    assert_close(theirs(ids.numpy()), want)
    assert {name: tuple(p.shape) for name, p in tree_flatten(theirs.parameters())} == \
        {name: tuple(p.shape) for name, p in ours.named_parameters()}


@pytest.mark.parametrize("family, more", SWITCHES, ids=str)
def test_every_switch_of_a_config_is_obeyed(tmp_path, family, more):
    ours, theirs = both(tmp_path, family, **more)
    ids = tokens(2, 12)
    assert_close(theirs(ids.numpy()), ours(ids))


def test_far_positions_are_turned_as_in_torch():
    """At position 30,000 a period that is wrong in its last bit turns a head by 0.002: the table is the torch one's."""
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))  # [N, heads, T, hd]
    context = mlx_model.Context(periods=mlx_model.rope_table(16, 1e4), offset=mx.array([-2, 30_000]), allowed=None,
                                mask=None, prompt_mask=None, columns=0)
    rope = torch_model.rope_table(torch.arange(4) + torch.tensor([[-2], [30_000]]), 16, 1e4, torch.float64)
    want = torch_model.rotate(x.double().transpose(1, 2), rope).transpose(1, 2)
    assert_close(mlx_model.rotate(mlx_arrays.to_mlx(x), context), want, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaks_nowhere(pairs, family, side):
    """Not through attention, not through positions, not through LFM2's convolution."""
    ours, theirs = pairs[family]
    ids = tokens(3, 9).numpy()
    mask = np.arange(9) < np.array([4, 9, 1])[:, None]
    mask = mask[:, ::-1] if side == "left" else mask
    hidden = np.array(theirs.hidden(ids, mask=mask))
    assert np.isfinite(hidden).all()
    for row, real in enumerate(mask):
        assert_close(hidden[row][real], ours.hidden(torch.tensor(ids[row, real][None]))[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_and_a_cache_change_nothing(pairs, family, padded, side):
    """Two prompts, three rows each, read in five calls, one of them over the edge of a cache's block, one padded: as
    torch reads each row alone."""
    ours, theirs = pairs[family]
    prompts = [tokens(1, 6, seed=1)[0], tokens(1, 3 if padded else 6, seed=2)[0]]
    said = tokens(6, 80, seed=3)
    mask = np.arange(9) < np.array([9, 3, 1, 9, 2, 7])[:, None]
    mask = mask[:, ::-1] if side == "left" else mask
    cache = mlx_model.Cache()
    ids, prompt_mask = mlx_model.pad(prompts)
    theirs.hidden(ids, cache, prompt_mask if padded else None)
    cache.share(3)
    hidden = [theirs.hidden(part.numpy(), cache, mask if padded and i == 2 else None)
              for i, part in enumerate(said.split([1, 1, 9, 60, 9], 1))]
    hidden = np.concatenate([np.array(h) for h in hidden], 1)
    for row in range(6):
        real = np.ones(80, dtype=bool)
        real[2:11] = mask[row] if padded else True
        prompt = prompts[row // 3]
        whole = torch.cat([prompt, said[row][torch.tensor(real)]])[None]
        assert_close(hidden[row][real], ours.hidden(whole)[0, len(prompt):])


@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
def test_rows_leave_the_batch(pairs, family):
    """`keep` drops a whole prompt and rows of another; who stays reads on as if nothing had happened."""
    ours, theirs = pairs[family]
    prompts, said = [tokens(1, n, seed=n)[0] for n in (5, 3, 4)], tokens(6, 6, seed=9)
    cache = mlx_model.Cache()
    theirs.hidden(*mlx_model.pad(prompts)[:1], cache, mlx_model.pad(prompts)[1])
    cache.share(2)
    theirs.hidden(said[:, :3].numpy(), cache)
    cache.keep([0, 2], [1, 4])
    hidden = np.array(theirs.hidden(said[[1, 4], 3:].numpy(), cache))
    for at, (prompt, row) in enumerate(((0, 1), (2, 4))):
        whole = torch.cat([prompts[prompt], said[row]])[None]
        assert_close(hidden[at], ours.hidden(whole)[0, -3:])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_shared_prompts(pairs, family, checkpointing):
    """Of every parameter, relative to its largest: 1e-4. Recomputing layers changes none, and leaves no trace."""
    ours, theirs = pairs[family]
    prompts, said = [tokens(1, n, seed=n)[0] for n in (6, 3)], tokens(6, 8, seed=3)
    mask = np.arange(8) < np.array([8, 2, 5, 1, 8, 7])[:, None]
    weight = torch.randn(6, 8, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor(mask)[..., None]

    cache = torch_model.Cache()
    ours.hidden(*torch_model.pad(prompts)[:1], cache, torch_model.pad(prompts)[1])
    ours.zero_grad()
    (ours.hidden(said, cache.share(3), torch.tensor(mask)) * weight).sum().backward()

    def loss(model):
        cache = mlx_model.Cache()
        model.hidden(*mlx_model.pad(prompts)[:1], cache, mlx_model.pad(prompts)[1])
        return (model.hidden(said.numpy(), cache.share(3), mask) * mlx_model.to_mlx(weight)).sum()

    theirs.checkpointing = checkpointing
    before = dict(tree_flatten(theirs.parameters()))
    found = dict(tree_flatten(nn.value_and_grad(theirs, loss)(theirs)[1]))
    weights = theirs.layers[0].mlp.up_proj.weight
    theirs.hidden(said.numpy())
    assert theirs.layers[0].mlp.up_proj.weight is weights  # and not what a pass was traced with
    theirs.checkpointing = False
    for name, p in ours.named_parameters():
        assert_close(found[name], p.grad, atol=1e-4 * p.grad.abs().max().item())
        assert p.grad.abs().max() > 0.01 and mx.array_equal(dict(tree_flatten(theirs.parameters()))[name], before[name])


def test_adapters_are_those_of_torch(tmp_path):
    """With an adapter, without it, and merged; and a saved folder holds the sum."""
    ours, theirs = both(tmp_path / "base", "qwen3")
    ids, base = tokens(2, 7), np.array(theirs(tokens(2, 7).numpy()))
    lora.add_lora(ours, rank=2, alpha=3.0, targets=["q_proj", "down_proj"])
    modules = dict(theirs.named_modules())
    for name, m in ours.named_modules():
        if getattr(m, "lora_A", None) is not None:
            m.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
            modules[name].lora_A = mlx_model.to_mlx(m.lora_A.detach())
            modules[name].lora_B = mlx_model.to_mlx(m.lora_B.detach())
            modules[name].lora_scale = m.lora_scale
    assert_close(theirs(ids.numpy()), ours(ids))
    assert np.abs(np.array(theirs(ids.numpy())) - base).max() > 0.1
    with theirs.adapters_off():
        assert np.array_equal(np.array(theirs(ids.numpy())), base)
    mlx_model.save(theirs, None, tmp_path / "merged")
    assert_close(theirs(ids.numpy()), torch_model.load(tmp_path / "merged", "cpu")[0](ids))


# --------------------------------------------------------------------------------------------------- the same sampler


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}],
                         ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_the_same_tokens(pairs, family, settings):
    ours, theirs = pairs[family]
    prompts = [tokens(1, n, seed=n)[0] for n in (5, 9, 2)]
    if settings == {"temperature": 0.0}:  # a greedy text need not say its end token: let it end by another
        said = rollout.sample(ours, prompts, G=1, max_new_tokens=9, temperature=0.0)[0].tokens[0].tolist()
        settings = {**settings, "stop_ids": [said[-1]]}
    want = rollout.sample(ours, prompts, G=4, max_new_tokens=24, seed=7, **settings)
    assert_same_groups(want, mlx_model.sample(theirs, prompts, G=4, max_new_tokens=24, seed=7, **settings))
    assert any(group.stopped.any() for group in want)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}], ids=str)
def test_the_embedded_model_says_the_same(embedded, settings):
    """Its real words, to their end; then with a stop text that they hold."""
    ours, theirs, tokenizer, prompts = embedded
    settings = {"G": 3, "max_new_tokens": 40, "seed": 5, "tokenizer": tokenizer, **settings}
    ids = torch.tensor(prompts[1])[None]
    assert_close(theirs(ids.numpy()), ours(ids))
    want = rollout.sample(ours, prompts, **settings)
    assert_same_groups(want, mlx_model.sample(theirs, prompts, **settings))
    settings["stop_text"] = want[0].texts[0][5:8]
    want = rollout.sample(ours, prompts, **settings)
    assert want[0].ending[0] > 0
    assert_same_groups(want, mlx_model.sample(theirs, prompts, **settings))


def test_one_prompt_is_what_it_is_in_a_batch(pairs):
    """A row's tokens do not depend on who else is in the batch."""
    _, theirs = pairs["lfm2"]
    prompts = [tokens(1, n, seed=n)[0] for n in (5, 9)]
    together = mlx_model.sample(theirs, prompts, G=3, max_new_tokens=12, seed=2)
    assert_same_groups(together[1:], mlx_model.sample(theirs, prompts[1:], G=3, max_new_tokens=12, seed=2))


# ------------------------------------------------------------------------------------------------ folders and numbers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_goes_there_and_back(tmp_path, family, dtype):
    """torch -> MLX -> torch, bit for bit, in the precision of the weights; config and tokenizer come along."""
    ours = tiny_model(family, dtype=dtype)
    ours.raw_config = raw_config(family)
    torch_model.save(ours, byte_bpe(), tmp_path / "a")
    theirs, tokenizer = mlx_model.load(tmp_path / "a", BACK[dtype])
    assert {p.dtype for _, p in tree_flatten(theirs.parameters())} == {BACK[dtype]}
    mlx_model.save(theirs, tokenizer, tmp_path / "b")
    back, _ = torch_model.load(tmp_path / "b", "cpu", dtype)
    # as read, not as made: where no file names an end token, its class may
    assert back.config == torch_model.load(tmp_path / "a", "cpu", dtype)[0].config
    for (name, p), (_, q) in zip(ours.named_parameters(), back.named_parameters(), strict=True):
        assert q.dtype == dtype and torch.equal(p, q), name
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()} and "tokenizer.json" in files
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_float32_is_the_default_whatever_the_file_holds(tmp_path):
    ours = tiny_model(dtype=torch.bfloat16)
    ours.raw_config = raw_config()
    torch_model.save(ours, None, tmp_path)
    theirs, _ = mlx_model.load(tmp_path)
    assert theirs.head.dtype == mx.float32
    mlx_model.save(theirs, None, tmp_path / "half", mx.bfloat16)
    assert torch_model.load(tmp_path / "half", "cpu", torch.bfloat16)[0].head.equal(ours.head)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_within_its_rounding(tmp_path, family):
    """8 bits, rounded at every line: MLX is as near to float32 as torch is, and its logits for the draw are float32."""
    ours, _ = both(tmp_path, family)
    narrow, _ = mlx_model.load(tmp_path, mx.bfloat16)
    ids = tokens(4, 30)
    exact, theirs = ours(ids).detach(), torch.tensor(np.array(narrow(ids.numpy()).astype(mx.float32)))
    error = (theirs - exact).pow(2).mean().sqrt()
    torchs = (torch_model.load(tmp_path, "cpu", torch.bfloat16)[0](ids).float() - exact).pow(2).mean().sqrt()
    assert 0 < error < 1.5 * torchs < 0.1 * exact.std()
    logits = mlx_model.to_logits(narrow.hidden(ids.numpy())[:, -1], narrow.head)
    assert logits.dtype == mx.float32 and not mx.array_equal(logits, logits.astype(mx.bfloat16).astype(mx.float32))
    groups = mlx_model.sample(narrow, list(ids), G=2, max_new_tokens=5, seed=1)
    assert groups[0].logp.dtype == torch.float32


def test_arrays_cross_without_a_change():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        there = mlx_model.to_mlx(x.T)
        assert there.dtype == BACK[dtype]
        back = mlx_model.to_torch(there)
        assert back.dtype == dtype and torch.equal(back, x.T)


def test_memory_does_not_grow_with_the_shapes_it_has_seen(pairs):
    """200 samples and readings of different shapes: the memory of the twentieth is that of the last."""
    _, theirs = pairs["lfm2"]
    generator, seen = np.random.default_rng(0), []
    for step in range(200):
        P, G, T = (int(generator.integers(1, most)) for most in (60, 6, 4))
        mlx_model.sample(theirs, [tokens(1, P)[0]], G=G, max_new_tokens=T, seed=step, stop_ids=[])
        mx.eval(theirs.hidden(tokens(G, P).numpy()))
        if step >= 20:
            seen.append((mx.get_active_memory(), mx.get_cache_memory(), psutil.Process().memory_info().rss))
    active, cached, rss = zip(*seen)
    assert max(active) - min(active) < 2 ** 16 and max(cached) < 2 ** 24 and rss[-1] - rss[0] < 2 ** 24


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_is_refused_is_a_sentence(tmp_path, pairs):
    theirs = pairs["qwen2"][1]
    sample = mlx_model.sample
    assert "at least one token" in refusal(ValueError, sample, theirs, [[]], G=1, max_new_tokens=1)
    assert "top_p" in refusal(ValueError, sample, theirs, [[1]], G=1, max_new_tokens=1, top_p=0.0)
    assert "token 40" in refusal(ValueError, sample, theirs, [[40]], G=1, max_new_tokens=1)
    assert "context" in refusal(ValueError, sample, theirs, [[1]], G=1, max_new_tokens=96)
    assert "tokenizer" in refusal(ValueError, sample, theirs, [[1]], G=1, max_new_tokens=1, stop_text="x")
    assert "no folder" in refusal(FileNotFoundError, mlx_model.load, str(tmp_path / "nothing"))
    assert "middle" in refusal(ValueError, theirs.hidden, np.ones((1, 3), int), mask=np.array([[True, False, True]]))
    cache = mlx_model.Cache()
    theirs.hidden(np.array([[1, 2]]), cache)
    assert "shared before" in refusal(ValueError, cache.share(2).share, 2)
    both(tmp_path, "qwen2")
    assert "bfloat16" in refusal(ValueError, mlx_model.load, tmp_path, mx.int8)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    assert "model.safetensors" in refusal(ValueError, mlx_model.load, tmp_path)


def test_a_full_disk_leaves_what_was_saved(tmp_path, pairs):
    mlx_model.save(pairs["qwen2"][1], None, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with disk_full_after(10_000):
        assert "untouched" in refusal(OSError, mlx_model.save, pairs["qwen3"][1], None, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("platform, package", [("linux", '"mlx[cpu]"'), ("darwin", "mlx")])
def test_a_missing_mlx_is_a_sentence(platform, package):
    """On Linux `pip install mlx` brings a package that cannot be imported: what to install is said by name."""
    code = (f"import sys, psutil, torch.distributed; sys.modules['mlx.core'] = None; sys.platform = {platform!r}\n"
            f"try: import mlx_model\nexcept ValueError as e: print(e)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip().endswith(f"pip install {package}."), out.stderr
