"""The loss, the optimizer and the update in MLX are those of torch: same weights, same tokens, same numbers."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import OUR_LOSSES, few, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import grpo
import model as torch_model
from lora import add_lora
from plumbing.adamw import spare_norms
from plumbing.device import Lies
from plumbing.micro_batches import micro_batches
from rollout import Group

mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install \"mlx[cpu]\"", exc_type=ImportError)
from mlx.utils import tree_flatten  # noqa: E402

import mlx_grpo  # noqa: E402
from plumbing.mlx_windows import from_torch  # noqa: E402


def to_mlx(x):  # None stays
    return None if x is None else mx.array(x.detach().numpy())


def close(mine, theirs, rtol=1e-5, atol=1e-6):
    """An MLX array and a torch tensor hold the same numbers."""
    np.testing.assert_allclose(np.array(mine), theirs.detach().numpy(), rtol=rtol, atol=atol)


class Frozen:
    """A model that is nothing but its output matrix, `head`."""

    @classmethod
    def trainable_parameters(cls):
        return {"head": cls.head}


# --- log-probabilities and loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [0, 7, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_their_gradients_are_those_of_torch(words, temperature):
    """By slices that divide the vocabulary or not; with logits so large that exp would overflow without care."""
    generator = torch.Generator().manual_seed(0)
    h = (5 * torch.randn(2, 6, 8, generator=generator)).requires_grad_()  # [B, T, D]
    W = (5 * torch.randn(50, 8, generator=generator)).requires_grad_()  # [V, D]
    targets = torch.randint(0, 50, (2, 6), generator=generator)  # [B, T]
    weight = torch.randn(2, 6, generator=generator)  # [B, T]

    class Head(Frozen):
        head = W

    logp, entropy = torch_model.token_logprobs(Head, h, targets, temperature)
    wanted = torch.autograd.grad((logp * weight).sum(), (h, W))

    def loss_of(h, W):
        Head.head = W
        mine, spread = mlx_grpo.token_logprobs(Head, h, to_mlx(targets), temperature, words)
        return (mine * to_mlx(weight)).sum() + 0 * spread.sum(), mine, spread

    (_, mine, spread), found = mx.value_and_grad(loss_of, argnums=(0, 1))(to_mlx(h), to_mlx(W))
    close(mine, logp, atol=1e-4)
    close(spread, entropy, atol=1e-4)
    for a, b in zip(found, wanted):
        close(a, b, rtol=1e-4, atol=1e-4)


def test_logits_are_float32_also_of_a_bfloat16_model():
    """In bfloat16 two log-probabilities near -5 lie 0.03 apart."""
    generator = torch.Generator().manual_seed(1)
    h, W = torch.randn(9, 16, generator=generator), torch.randn(300, 16, generator=generator)  # [M, D], [V, D]
    h, W = h.bfloat16().float(), W.bfloat16().float()
    targets = torch.arange(9) * 30  # [M]

    class Narrow(Frozen):
        head = to_mlx(W).astype(mx.bfloat16)

    mine, _ = mlx_grpo.token_logprobs(Narrow, to_mlx(h).astype(mx.bfloat16), to_mlx(targets))
    assert mine.dtype == mx.float32
    close(mine, (h @ W.T).log_softmax(-1)[torch.arange(9), targets], atol=1e-5)


def test_the_logits_never_exist_whole():
    """Forward and backward together take a fraction of [M, V]: what is not asked for is not kept."""
    M, D, V = 256, 8, 60_000

    class Head(Frozen):
        head = mx.zeros((V, D))

    h, targets = mx.ones((M, D)), mx.zeros(M, dtype=mx.int32)
    mx.eval(h, targets, Head.head)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    def loss_of(h, W):
        Head.head = W
        return mlx_grpo.token_logprobs(Head, h, targets, words=1000)[0].sum()

    mx.eval(mx.value_and_grad(loss_of, argnums=(0, 1))(h, Head.head))
    assert mx.get_peak_memory() - before < M * V * 4 / 4


def losses_agree(seed, kind, kl, *, old, beta, constant=None, by_token=False):
    generator = torch.Generator().manual_seed(seed)
    B, G, T = 2, 3, 5

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, T + 1, (B, G), generator=generator)
    mask = torch.arange(T) < lengths[..., None]  # [B, G, T]
    logp = (draw(B, G, T) - 3).masked_fill(~mask, torch.nan).requires_grad_()  # [B, G, T]: padding may hold anything
    old_logp = logp.detach() + 0.4 * draw(B, G, T) if old else None  # ratios inside the band and outside
    ref_logp = logp.detach() + draw(B, G, T)  # [B, G, T]
    A = draw(B, G, T).masked_fill(~mask, torch.nan) if by_token else draw(B, G)  # [B, G, T] or [B, G]
    settings = {"clip_low": 0.2, "clip_high": 0.28, "beta": beta, "kl": kl, "max_length": constant}
    loss, metrics = grpo.policy_loss(logp, old_logp, ref_logp, A, mask, kind, **settings)
    wanted, = torch.autograd.grad(loss, logp)

    def loss_of(x):
        return mlx_grpo.policy_loss(x, to_mlx(old_logp), to_mlx(ref_logp), to_mlx(A), to_mlx(mask), kind, **settings)

    (mine, seen), found = mx.value_and_grad(loss_of)(to_mlx(logp))
    close(mine, loss)
    assert seen.keys() == metrics.keys()
    for name, value in metrics.items():
        close(seen[name], value)
    close(found, torch.where(mask, wanted, 0.0))


@pytest.mark.parametrize("kind", OUR_LOSSES)
def test_every_loss_and_its_gradient_are_those_of_torch(kind):
    """All kinds with all KL estimators, on the first update of a batch (no old_logp) and on later ones."""
    for kl, old, beta in itertools.product(grpo.KLS, (False, True), (0.0, 0.3)):
        losses_agree(1, kind, kl, old=old, beta=beta)
    losses_agree(2, kind, "k3", old=True, beta=0.1, constant=40)
    for old in (False, True):
        losses_agree(3, kind, "k3_ratio", old=old, beta=0.1, by_token=True)


@few
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(sorted(OUR_LOSSES)))
def test_losses_agree_on_any_numbers(seed, kind):
    losses_agree(seed, kind, "k3_ratio", old=True, beta=0.05)


def test_the_exponent_of_the_kl_is_the_right_way_round():
    """By hand: p = (1/2, 1/2), q = (1/4, 3/4). The mean of k3 over p is KL(p || q) = ln 2 - ln 3 / 2 = 0.1438; with the
    exponent turned round it would be 0.1895."""
    p, q = mx.array([0.5, 0.5]), mx.array([0.25, 0.75])
    x = (mx.log(q) - mx.log(p))[None, None]  # [B=1, G=1, T=2]
    estimates = mlx_grpo.kl_estimates(x, mx.ones(x.shape))
    assert estimates["k1"].mean().item() == pytest.approx(0.14384, abs=1e-5)
    assert estimates["k3"].mean().item() == pytest.approx(0.14384, abs=1e-5)


def test_the_ratio_is_to_the_old_policy_and_not_to_the_reference():
    """By hand: old = logp - ln 1.1, the reference is somewhere else. The ratio is 1.1, and the loss -1.1 A."""
    logp, mask = mx.array([[[-1.0]]]), mx.array([[[True]]])  # [1, 1, 1] each
    loss, seen = mlx_grpo.policy_loss(logp, logp - float(np.log(1.1)), logp - 7.0, mx.array([[2.0]]), mask)
    assert loss.item() == pytest.approx(-2.2) and seen["ratio"].item() == pytest.approx(1.1)


@pytest.mark.parametrize("wrong, says", [({"kind": "ppo"}, "no loss 'ppo'"), ({"kl": "k9"}, "no KL estimator 'k9'"),
                                         ({"beta": 0.1}, "no reference log-probabilities")])
def test_what_grpo_refuses_is_refused_here(wrong, says):
    x = mx.zeros((1, 2, 3))
    with pytest.raises(ValueError, match=says):
        mlx_grpo.policy_loss(x, None, None, mx.zeros((1, 2)), x == 0, **wrong)
    with pytest.raises(ValueError, match="temperature above 0"):
        mlx_grpo.token_logprobs(None, x, x, temperature=0)


# --- update -----------------------------------------------------------------------------------------------------------

FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")
SETTINGS = {"loss": "grpo", "advantage": "group", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.1, "kl": "k3_ratio",
            "updates": 1, "temperature": 0.8, "grad_clip": 1.0, "micro_tokens": 10_000, "max_new_tokens": 6}


def settings(**more):
    return SimpleNamespace(**SETTINGS | more)


def policy(family="qwen2", lora=0, checkpointing=False, seed=0):
    """A torch model with all that is trained away from zero, so that every factor of an adapter has a gradient."""
    model = tiny_model(family, seed)
    if lora:
        add_lora(model, lora, 2.0 * lora)
        randomise_adapters(model)
    model.checkpointing = checkpointing
    return model


def randomise_adapters(model):
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.1, generator=generator)


def in_mlx(model):
    return from_torch(copy.deepcopy(model), mlx_grpo.Transformer)


def some_groups(seed=0, B=2, G=3, P=5, T=6):
    """B prompts of different lengths with G completions of different lengths, and rewards that are not equal."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for b in range(B):
        lengths = torch.randint(1, T + 1, (G,), generator=generator)  # [G]
        lengths[0] = T
        mask = torch.arange(T) < lengths[:, None]  # [G, T]
        ids = torch.randint(3, 40, (G, T), generator=generator).masked_fill(~mask, 0)  # [G, T]
        prompt = torch.randint(3, 40, (P - b,), generator=generator)  # [P - b]
        logp = -3 * torch.rand(G, T, generator=generator) * mask  # [G, T]
        groups.append(Group(prompt=prompt, tokens=ids, mask=mask, logp=logp, stopped=lengths < T, texts=[""] * G,
                            rewards=torch.rand(G, generator=generator).tolist(),
                            parts={name: torch.rand(G, generator=generator).tolist() for name in ("one", "other")},
                            weights={"one": 1.0, "other": 2.0}))
    return groups


def adamw(model, lr=1e-2, weight_decay=0.1):
    return torch.optim.AdamW(spare_norms(p for p in model.parameters() if p.requires_grad), lr, (0.9, 0.99), 1e-8,
                             weight_decay)


def whole_of(groups, beta=0.1):
    rewards = torch.tensor([g.rewards for g in groups])  # [B, G]
    A = grpo.advantages(rewards)  # [B, G]
    n_tokens = sum(int(g.mask.sum()) for g in groups)
    return A, {"beta": beta, "n_completions": A.numel(), "n_tokens": n_tokens, "max_length": 6}


def gradient_of(model, ref_model, groups, config, micro_tokens=10_000):
    """In MLX: {name: the gradient of the whole batch}."""
    A, whole = whole_of(groups, config.beta)
    gradient = {}
    for m in micro_batches(groups, A, micro_tokens):
        mlx_grpo.learn(model, ref_model, mlx_grpo.in_mlx(m), config, whole, gradient)
    return gradient


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [0, 2])
def test_the_gradient_of_an_update_is_that_of_torch(family, lora):
    """Of every parameter, with a KL to another model, relative to the parameter's largest gradient."""
    model, groups, config = policy(family, lora), some_groups(), settings()
    ref_model = model if lora else tiny_model(family, seed=7)
    A, whole = whole_of(groups)
    grpo.micro_batch_loss(model, ref_model, micro_batches(groups, A, 10_000)[0], config, whole)[0].backward()
    mine = in_mlx(model)
    found = gradient_of(mine, mine if lora else in_mlx(ref_model), groups, config)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        assert np.abs(np.array(found[name]) - g.numpy()).max() <= 1e-4 * g.abs().max().item() + 1e-7, name


@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
@pytest.mark.parametrize("lora", [0, 2])
def test_checkpointing_and_micro_batches_change_no_gradient(family, lora):
    groups, config = some_groups(B=3), settings()
    plain = in_mlx(policy(family, lora))
    ref_model = in_mlx(tiny_model(family, seed=7))
    wanted = gradient_of(plain, ref_model, groups, config)
    mine = in_mlx(policy(family, lora, checkpointing=True))
    for micro_tokens in (10_000, 12):
        found = gradient_of(mine, ref_model, groups, config, micro_tokens)
        for name, g in wanted.items():
            np.testing.assert_allclose(np.array(found[name]), np.array(g), rtol=0, atol=1e-4 * mx.abs(g).max().item())


def test_a_micro_batch_leaves_the_model_as_it_was_and_no_graph():
    """The very arrays, and not those that the gradient was traced with; and a batch in pieces takes less memory than
    whole, which it does not where a piece's graph is kept until the last."""
    groups, peaks = some_groups(B=6, P=40, T=20), []
    mine = in_mlx(policy())
    before = mlx_grpo.trained(mine)
    for micro_tokens in (10_000, 110):
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        gradient_of(mine, mine, groups, settings(), micro_tokens)
        peaks.append(mx.get_peak_memory() - held)
    assert all(before[name] is array for name, array in mlx_grpo.trained(mine).items())
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("lora, kind, advantage", [(0, "grpo", "gdpo"), (2, "gspo", "batch"), (0, "cispo", "group")])
def test_the_metrics_of_an_update_are_those_of_torch(lora, kind, advantage):
    """Three batches, two steps on each: all metrics, and the weights within what AdamW makes of rounding."""
    model = policy(lora=lora)
    ref_model = model if lora else tiny_model(seed=7)
    mine = in_mlx(model)
    ref_mine = mine if lora else in_mlx(ref_model)
    optimizer, config = adamw(model), settings(loss=kind, advantage=advantage, kl="k2", updates=2)
    optimizer_mine = mlx_grpo.AdamW(optimizer, {p: name for name, p in model.named_parameters()})
    for seed in range(3):
        groups = some_groups(seed)
        wanted = grpo.update(model, ref_model, groups, optimizer, config)
        found = mlx_grpo.update(mine, ref_mine, groups, optimizer_mine, config)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    for name, p in model.named_parameters():
        if p.requires_grad:
            off = np.abs(np.array(mlx_grpo.trained(mine)[name]) - p.detach().numpy())
            assert np.quantile(off, 0.99) < 1e-3, name  # 6 steps of 0.01


def test_three_steps_of_adamw_are_those_of_torch():
    """The same gradients: the same weights to the last digits, with decay on matrices only."""
    model = policy()
    mine = in_mlx(model)
    optimizer = adamw(model)
    optimizer_mine = mlx_grpo.AdamW(optimizer, {p: name for name, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    for lr in (1e-2, 5e-3, 1e-2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 10 ** -torch.rand(1, generator=generator) ** 3
        for groups in (optimizer.param_groups, optimizer_mine.param_groups):
            for group in groups:
                group["lr"] = lr
        optimizer_mine.step(mine, {name: to_mlx(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
    for name, p in model.named_parameters():
        close(mlx_grpo.trained(mine)[name], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_moves(family, lora, checkpointing):
    """And nothing else. Log-probabilities computed outside of what is differentiated would move nothing."""
    model = policy(family, lora, checkpointing)
    mine = in_mlx(model)
    before = dict(tree_flatten(mine.parameters()))
    optimizer = mlx_grpo.AdamW(adamw(model, weight_decay=0), {p: name for name, p in model.named_parameters()})
    mlx_grpo.update(mine, None, some_groups(), optimizer, settings(beta=0.0))
    after = dict(tree_flatten(mine.parameters()))
    still = {name for name in before if mx.array_equal(before[name], after[name])}
    assert still == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert before.keys() == after.keys() and len(before) > len(still)


def test_the_norm_of_a_large_gradient_keeps_its_digits():
    """A million numbers of 1/1000, added in float32 one after the other, would lack half a thousandth of their sum."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2048, 512, generator=generator) * 1e-3
    model = SimpleNamespace(trainable_parameters=lambda: {"w": mx.ones(1)})
    optimizer = SimpleNamespace(step=lambda *_: None)
    norm = mlx_grpo.step_down(model, optimizer, {"w": to_mlx(gradient)}, 1.0, 1e6)
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-5)


def test_equal_rewards_move_nothing_and_a_broken_loss_leaves_the_weights():
    model, groups = policy(), some_groups()
    mine = in_mlx(model)
    before = mlx_grpo.trained(mine)
    optimizer = mlx_grpo.AdamW(adamw(model), {p: name for name, p in model.named_parameters()})
    for group in groups:
        group.rewards = [0.5] * 3
    metrics = mlx_grpo.update(mine, None, groups, optimizer, settings(beta=0.0))
    assert (metrics["flat_groups"], metrics["grad_norm"], optimizer.t) == (1.0, 0.0, 0)
    mlx_grpo.set_weights(mine, {"norm.weight": mx.full(32, float("nan"))})
    with pytest.raises(FloatingPointError, match="The loss is nan"):
        mlx_grpo.update(mine, None, some_groups(), optimizer, settings(beta=0.0))
    mlx_grpo.set_weights(mine, {"norm.weight": before["norm.weight"]})
    after = mlx_grpo.trained(mine)
    assert optimizer.t == 0 and all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_scored_after_its_prompt_and_at_the_samplers_temperature(family):
    """Its first token has a log-probability too, and it is that of the whole text, brute force. What the sampler
    says of its own ids is the same: nothing was decoded and encoded again, nothing scored at another temperature."""
    model = tiny_model(family)
    mine = in_mlx(model)
    prompts = [[5, 6, 7, 8], [9, 4]]
    groups = mlx_grpo.sample(mine, prompts, G=3, max_new_tokens=5, temperature=0.7, seed=1)
    for group in groups:
        tokens, mask = to_mlx(group.tokens)[None], to_mlx(group.mask)[None]  # [1, G, T]
        logp, _ = mlx_grpo.group_logprobs(mine, [group.prompt], tokens, mask, 0.7)  # [1, G, T]
        close(logp[0], group.logp, atol=1e-4)
        for ids, real, found in zip(group.tokens, group.mask, np.array(logp[0])):
            text = torch.cat([group.prompt, ids[real]])  # [P + n]
            wanted = (model(text[None])[0] / 0.7).log_softmax(-1)[len(group.prompt) - 1:-1]  # [n, V]
            close(found[real.numpy()], wanted.gather(1, ids[real][:, None])[:, 0], atol=1e-4)


def test_two_hundred_steps_end_with_the_memory_of_the_twentieth():
    """Of shapes that change all the time: no graph is kept, and no compiled shape."""
    model = policy()
    mine = in_mlx(model)
    optimizer = mlx_grpo.AdamW(adamw(model, lr=1e-4), {p: name for name, p in model.named_parameters()})
    held = []
    for step in range(200):
        groups = some_groups(step, P=4 + step % 7, T=2 + step % 5)
        mlx_grpo.update(mine, mine, groups, optimizer, settings(beta=0.01, updates=1 + step % 2))
        held.append(mx.get_active_memory() + mx.get_cache_memory())
    assert mx.get_cache_memory() < 1e5  # and what is free is the system's
    assert held[-1] <= 1.02 * held[19]  # a block may be a little larger than its array


# --- a machine that is wrong ------------------------------------------------------------------------------------------


def check(model):
    mlx_grpo.check_mlx(model, [5, 6, 7, 8], mlx_grpo.Transformer, mlx_grpo.sample, mlx_grpo.group_logprobs,
                       grpo.group_logprobs)


@pytest.mark.parametrize("family, lora", [("qwen3", 0), ("lfm2", 2)])
def test_a_gpu_is_asked_whether_it_computes_what_torch_does(family, lora):
    """Nobody had a Mac: so a run there begins with this. It leaves the policy as it was."""
    model = policy(family, lora)
    before = {name: p.clone() for name, p in model.named_parameters()}
    check(model)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("where, name, lie, says", [
    (mx.fast, "rope", lambda real: lambda x, *args, **more: real(x, *args, **more) * 1.01, "sampler's log-prob"),
    (mx, "value_and_grad", lambda real: lambda f: lambda x: (real(f)(x)[0], {k: 2 * g for k, g in x.items()}),
     "gradient differs")])
def test_a_gpu_that_lies_is_named(where, name, lie, says, monkeypatch):
    monkeypatch.setattr(where, name, lie(getattr(where, name)))
    with pytest.raises(Lies, match=f"with MLX .*{says}.*Take --backend torch"):
        check(policy())
