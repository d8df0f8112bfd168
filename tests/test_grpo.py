"""GRPO, as a lesson: what an advantage is, what the clip does, which KL has which gradient, and what one update does.

Three kinds of oracle, and no opinions: numbers small enough to do by hand, trl's own loss on the same tensors, and a
slow update written out below in Python loops that a reader can check against the paper line by line.
"""

import copy
import doctest
import inspect
import itertools
import re
import statistics
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers import OUR_LOSSES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import grpo
from config import Config
from grpo import ADVANTAGES, KINDS, KLS, advantages, group_logprobs, micro_batches, policy_loss, update
from model import Transformer, read_config
from rollout import Group, sample

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

# The same examples on every run, so that a red test is red for the next person too.
search = settings(max_examples=100, deadline=None, derandomize=True, database=None)
V, STOP = 50, 7
LOSSES = tuple(KINDS)  # those of a fork too


def close(a, b, atol=1e-12):
    assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(grpo)
    assert results.attempted >= 9 and results.failed == 0


# ------------------------------------------------------------------------------------------------------ the derivation


def expected_loss_gradient(z, rewards_of, G, kind="mean"):
    """The mean, over all possible groups of G one-token completions and by their probability, of the loss's gradient.

    No luck and no formula: every group that can be sampled is made, scored and given to `advantages` and `policy_loss`.
    """
    log_p = z.log_softmax(0)  # [V]
    total = 0.0
    for words in itertools.product(range(len(z)), repeat=G):
        words = tensor(words)  # [G]
        A = advantages(rewards_of(words)[None], kind).double()  # [1, G]
        loss, _ = policy_loss(log_p[words][None, :, None], None, None, A, torch.ones(1, G, 1, dtype=torch.bool))
        total = total + log_p[words].sum().exp().detach() * loss
    return torch.autograd.grad(total, z)[0]


@pytest.mark.parametrize("G", [2, 3, 5])
def test_the_mean_of_the_samples_is_the_gradient_of_the_expected_reward(G):
    """Steps 1 and 2 of the derivation, to the last digit: no reward was differentiated, and the gradient is right.

    The group's mean holds the completion's own reward, which shortens the gradient to (G - 1) / G and does not turn it.
    """
    z = tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)  # logits of three words
    r = tensor([1.0, 3.0, -0.5])  # [V]
    (exact,) = torch.autograd.grad((z.softmax(0) * r).sum(), z)
    close(expected_loss_gradient(z, lambda words: r[words], G), -exact * (G - 1) / G, 1e-6)


def test_a_baseline_changes_no_expected_gradient():
    """The same for rewards that are all 7 higher; a group of equal rewards adds nothing, whatever their level."""
    z = tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    r = tensor([1.0, 3.0, -0.5])
    for kind in ADVANTAGES:
        close(expected_loss_gradient(z, lambda words: r[words] + 7, 3, kind),
              expected_loss_gradient(z, lambda words: r[words], 3, kind), 1e-5)
    assert (expected_loss_gradient(z, lambda words: torch.full((3,), 7.0), 3) == 0).all()


@pytest.mark.parametrize("kind", OUR_LOSSES)
def test_which_losses_read_zero_while_their_gradient_is_not(kind):
    """Step 6 of the derivation. Where the ratio is 1, grpo and gspo read 0 whatever was said.

    Losses in which a long completion weighs more do so only where all are equally long, and cispo never. The gradient
    is there in every case: a loss of 0 does not say that nothing is learnt.
    """
    for lengths, zero in (([4, 1, 2, 4], {"grpo", "gspo"}), ([4, 4, 4, 4], {*OUR_LOSSES} - {"cispo"})):
        mask = (torch.arange(4) < tensor(lengths)[:, None])[None]  # [1, 4, 4]
        logp = torch.linspace(-4, -1, 16, dtype=torch.float64).reshape(1, 4, 4).requires_grad_()
        loss, _ = policy_loss(logp, None, None, advantages(tensor([[3.0, 1, 0, 7]])).double(), mask, kind)
        assert (abs(loss.item()) < 1e-7) == (kind in zero)
        assert torch.autograd.grad(loss, logp)[0].abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    """Rewards 4, 0, 0, 0: mean 1, deviations 3, -1, -1, -1, squares 12 in all, so the unbiased std is sqrt(12/3) = 2.

    The biased one would be sqrt(12/4) = 1.73 and every step 15% larger: a learning rate that fits one convention does
    not fit the other. In the batch 4, 0, 0, 0 of two groups the same 2 is the std of everybody's rewards.
    """
    one = tensor([[4.0, 0, 0, 0]])
    close(advantages(one), tensor([[3.0, -1, -1, -1]]) / 2.0001, 1e-6)
    close(advantages(one, "mean"), tensor([[3.0, -1, -1, -1]]), 0)
    close(advantages(tensor([[4.0, 0], [0, 0]]), "batch"), tensor([[2.0, -2], [0, 0]]) / 2.0001, 1e-6)


def test_epsilon_keeps_small_differences_small():
    """1e-4 joins the std. Rewards that differ by 4e-4 have std 2e-4, and get 3e-4 / (2e-4 + 1e-4) = 1, not 1.5.

    A group that agrees to the fourth digit is shrunk: normalisation does not shout where the reward whispers.
    """
    close(advantages(tensor([[4e-4, 0, 0, 0]])), tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]), 1e-5)
    assert advantages(tensor([[1e-6, 0, 0, 0]])).abs().max() < 0.01


def test_advantages_of_a_group_sum_to_zero_and_rank_as_the_rewards():
    """An advantage only moves probability from one completion of a prompt to another."""
    rewards = tensor([[3.0, 1, 2, 9], [5, 5, 5, 6]])
    for kind in ADVANTAGES:
        a = advantages(rewards, kind)
        close(a.sum(1), torch.zeros(2), 1e-5)
        assert all((x[:, None] < x).equal(r[:, None] < r) for x, r in zip(a, rewards))


@search
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6), st.integers(2, 17),
       st.sampled_from(ADVANTAGES))
def test_equal_rewards_say_exactly_nothing(r, G, kind):
    """Exactly 0.0, not nearly: then "no policy gradient" can be tested with ==, and a step without news left out."""
    a = advantages(torch.full((2, G), r), kind)
    assert (a == 0).all()
    assert (advantages(torch.cat([torch.full((1, G), r), torch.arange(G)[None] * 0.5]), kind)[0] == 0).all()


def test_the_mean_of_equal_floats_need_not_be_equal_to_them():
    """Why the zeros above have to be put there: subtracting the mean leaves a rounding error, and the std is no larger.

    If this ever fails, torch's mean has become exact and the line in `advantages` is only a precaution.
    """
    rest = [(torch.full((1, G), r) - torch.full((1, G), r).mean()).abs().max()
            for G in range(2, 17) for r in (0.1, 0.3, 0.7, 1.1, -64.3, 1234.567)]
    assert max(rest) > 0


rewards = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(lambda shape: st.lists(
    st.lists(st.integers(-16, 16), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]))


@search
@given(rewards, st.sampled_from(ADVANTAGES), st.integers(-50, 50), st.randoms(use_true_random=False))
def test_advantages_do_not_see_order_or_level(rows, kind, shift, random):
    """Completions of a group have no order, and a reward that is 50 higher for everybody is the same reward."""
    r = tensor(rows) / 8
    B, G = r.shape
    i, j = tensor(random.sample(range(B), B)), tensor(random.sample(range(G), G))
    a = advantages(r, kind)
    close(advantages(r[i][:, j], kind), a[i][:, j], 1e-5)
    close(advantages(r + shift, kind), a, 1e-5)
    if kind != "batch":  # that one divides by the std of all rewards, which sees the distance between groups
        close(advantages(r + shift * torch.arange(B)[:, None], kind), a, 1e-5)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("constant", [1e3, 1e4, 1e7, 1e8, -1e9])
def test_a_constant_in_the_reward_is_no_news_however_large(kind, constant):
    """Bytes, microseconds, or a bonus that all get. float32 near 1e8 comes in steps of 8: its differences would be
    other ones, or none. By hand, for the first kind: mean 3/16, std sqrt(0.432...)."""
    r = [-0.5, 0.25, 0.0, 1.0]
    std = statistics.stdev(r) + 1e-4 if kind != "mean" else 1.0
    if kind == "gdpo":  # divided once more, by the std of the batch, which is now almost 1
        std *= (std - 1e-4) / std + 1e-4
    expected = tensor([[(x - 0.1875) / std for x in r]])
    close(advantages(tensor([[constant + x for x in r]], dtype=torch.float64), kind), expected, 1e-5)
    close(advantages(tensor([r]), kind), expected, 1e-5)


def test_a_constant_changes_nothing_in_an_update():
    """From the plain floats of a reward to the weights: nothing on the way rounds them."""
    def learnt(constant, kind):
        groups = random_groups()
        for g in groups:
            g.rewards = [constant + x for x in (-0.5, 0.25, 0.0, 1.0)]
            g.parts, g.weights = {"it": g.rewards, "other": [0.0, constant, constant, 0.0]}, {"it": 1.0, "other": 0.0}
        return step(groups, Config(beta=0.0, advantage=kind))[0]
    for kind in ("group", "gdpo"):
        close(learnt(1e8, kind), learnt(0.0, kind), 1e-7)


def test_what_only_rounding_tells_apart_is_flat():
    """0.1 + 0.2 and 0.3. As an advantage of 1e-13 it would be a whole step of AdamW, which sees no sizes."""
    for kind in ADVANTAGES:
        assert (advantages(tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64), kind) == 0).all()
    parts = tensor([[[0.1, 0.3], [0.3, 0.1]]], dtype=torch.float64)  # [1, G, K]: two rewards that cancel each other out
    assert (advantages(parts, "gdpo", tensor([1.0, 1.0])) == 0).all()


def test_each_group_is_its_own_baseline():
    """An easy prompt (all rewards high) must not make its completions look good. "batch" shares a std, but no mean."""
    easy, hard = tensor([[9.0, 10, 10, 11]]), tensor([[0.0, 0, 1, 1]])
    for kind in ("group", "mean"):
        close(advantages(torch.cat([easy, hard]), kind), torch.cat([advantages(easy, kind), advantages(hard, kind)]))
    assert advantages(torch.cat([easy, hard]), "batch").sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("bad, says", [
    (tensor([[1.0], [2.0]]), "at least 2"), (tensor([1.0, 2.0]), "at least 2"),
    (tensor([[1.0, float("nan")]]), "NaN or infinite"), (tensor([[1.0, float("inf")]]), "NaN or infinite"),
    (tensor([[0.0, 1e300]], dtype=torch.float64), "NaN or infinite"),
], ids=["one completion", "no groups", "nan", "inf", "beyond float32"])
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_rewards_that_cannot_be_compared_are_refused_with_a_sentence(bad, says, kind):
    """One completion has nobody to be better than, and one NaN would spread to its whole group, then to the weights."""
    with pytest.raises(ValueError, match=says):
        advantages(bad, kind)


# ------------------------------------------------------------------------------------------- gdpo: reward by reward


def test_what_summing_first_cannot_tell_apart():
    """The paper's example: two rewards of 0 or 1. One group knows 0 0 and 1 0, the other 0 0 and 1 1: the first wins
    one of the two, the second both. Their sums are 0 1 and 0 2, which "group" makes the same: -0.71, 0.71.

    By hand: each reward that varies has std 0.707, so its two values become -0.707 and 0.707; the other one is 0. Sums:
    -0.707, 0.707 and -1.414, 1.414. All four have the std sqrt((2 * 0.5 + 2 * 2) / 3) = 1.291: +-0.548 and +-1.095.
    """
    parts = tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])  # [B, G, K]
    first, second = advantages(parts.sum(-1))
    close(first, second, 1e-4)
    close(advantages(parts, "gdpo", tensor([1.0, 1.0])), tensor([[-0.5477, 0.5477], [-1.0954, 1.0954]]), 5e-4)
    # And within a group: 4 0 and 0 4 tie as sums, below 3 3, though the second reward hardly ever is above 0.
    group = tensor([[[4.0, 0], [0, 4], [3, 3], [4, 0], [4, 0], [0, 0]]])  # [1, G, K]
    large, rare = advantages(group.sum(-1))[0, :2]
    assert large == rare
    large, rare = advantages(group, "gdpo", tensor([1.0, 1.0]))[0, :2]
    assert rare > large + 0.1


def trl_advantages(parts, weights):
    """The lines of trl's trainer for normalize_then_sum, run as they stand in the installed version."""
    trl = pytest.importorskip("trl", reason="trl is for Python 3.11 and later")
    text = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    lines = re.search(r'"normalize_then_sum":\n(.*?)\n        else:', text, re.S)[1]
    B, G, K = parts.shape
    names = {
        "self": SimpleNamespace(reward_funcs=[None] * K, reward_weights=weights), "torch": torch, "device": "cpu",
        "rewards_per_func": parts.reshape(B * G, K), "num_generations": G,
        "unscorable_mask": torch.zeros(B * G, dtype=torch.bool), "nanstd": inspect.getmodule(trl.GRPOTrainer).nanstd,
    }
    exec(textwrap.dedent(lines), names)
    return names["advantages"].view(B, G)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [1.0, 3.0, -0.5], [0.0, 2.0]])
def test_without_a_floor_gdpo_is_trl_s_normalize_then_sum(weights):
    g = torch.Generator().manual_seed(1)
    parts = torch.randn(5, 8, len(weights), dtype=torch.float64, generator=g)  # [B, G, K]
    parts[:, :, 0] *= 1e-3
    parts[2] = parts[2, :1]  # a group that agrees in everything
    parts[3, :, 0] = 0.7  # and one that agrees in one reward
    want = trl_advantages(parts, tensor(weights, dtype=torch.float64))
    close(advantages(parts, "gdpo", tensor(weights), floor=0.0), want, 1e-6)
    if len(weights) == 1:
        close(advantages(parts[..., 0], "gdpo", floor=0.0), want, 1e-6)  # [B, G] is one reward


def test_a_reward_that_hardly_varies_whispers():
    """A std of a thousandth of the other's: divided by itself it would be noise as loud as the other. It counts as a
    twentieth, so the noise has a fiftieth of a say. Scaled alike, all stays; and one that agrees says exactly 0."""
    x, noise = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))  # [B, G] each
    parts = torch.stack([x, 1e-3 * noise], -1)  # [B, G, K]
    one, even = advantages(x, "gdpo"), tensor([1.0, 1.0])
    assert (advantages(parts, "gdpo", even) - one).abs().max() < 0.06
    assert (advantages(parts, "gdpo", even, floor=0.0) - one).abs().max() > 0.5
    close(advantages(1e3 * parts, "gdpo", even), advantages(parts, "gdpo", even), 2e-3)
    close(advantages(parts, "gdpo", 7 * even), advantages(parts, "gdpo", even), 2e-3)  # so do weights
    close(advantages(torch.stack([x, 0.3 + 0 * x], -1), "gdpo", even), one, 0)
    close(advantages(parts * tensor([1e6, 1.0]), "gdpo", tensor([0.0, 1.0])), advantages(1e-3 * noise, "gdpo"), 1e-6)


@search
@given(rewards, st.sampled_from([[1.0, 1.0], [3.0, -1.0], [0.0, 1.0]]), st.floats(-1e3, 1e3), st.integers(0, 2**31))
def test_gdpo_sees_no_level_no_common_scale_and_no_order(rows, weights, shift, seed):
    x = tensor(rows, dtype=torch.float64) / 8
    g = torch.Generator().manual_seed(seed)
    parts, w = torch.stack([x, torch.randn(x.shape, dtype=torch.float64, generator=g)], -1), tensor(weights)
    a = advantages(parts, "gdpo", w)
    close(a.sum(1), torch.zeros(len(a)), 1e-4)
    assert a.double().std() < 1.0001 and a.isfinite().all()
    close(advantages(parts + shift * tensor([1.0, -2.0]), "gdpo", w), a, 1e-5)
    order = torch.randperm(x.shape[1], generator=g)
    close(advantages(parts[:, order], "gdpo", w), a[:, order], 1e-5)
    close(advantages(parts.flip(-1), "gdpo", w.flip(-1)), a, 1e-5)
    close(advantages(parts, "gdpo", -w), -a, 1e-5)


def test_an_update_by_gdpo_takes_the_parts_and_not_the_sum():
    groups, start = random_groups(), tiny_model()
    for g in groups:
        g.parts = {"much": [9.0, -3.0, 2.0, 5.0], "little": (0.1 * torch.randn(4)).tolist()}
        g.weights = {"little": 2.0, "much": 1.0}
    parts = torch.stack([tensor([g.parts["little"], g.parts["much"]]).T for g in groups])  # [B, G, K]
    wanted = advantages(parts, "gdpo", tensor([2.0, 1.0]))
    config = Config(beta=0.0, advantage="gdpo", grad_clip=1e9)
    by_gdpo, _ = step(groups, config)
    for g, a in zip(groups, wanted):
        g.rewards = a.tolist()  # as "mean" leaves them
    close(by_gdpo, step(groups, Config(beta=0.0, advantage="mean", grad_clip=1e9))[0], 1e-7)
    assert (by_gdpo - parameters_to_vector(start.parameters())).abs().max() > 1e-3
    groups[0].weights = {}
    with pytest.raises(ValueError, match="`parts`.*`weights`.*task.score"):
        step(groups, config)


@pytest.mark.parametrize("kind", sorted({*ADVANTAGES} - {"gdpo"}))
def test_only_gdpo_takes_rewards_apart(kind):
    with pytest.raises(ValueError, match="shape .1, 2, 2.*at least 2"):
        advantages(torch.zeros(1, 2, 2), kind)


# ----------------------------------------------------------------------------------------------- the clip, by quadrants


def one_token(rho, A, **more):
    """Loss, its gradient by logp, and the metrics, of a single token whose ratio is rho."""
    logp = tensor(rho, dtype=torch.float64).log().sub(2).reshape(1, 1, 1).requires_grad_()  # old_logp is -2
    old = torch.full_like(logp, -2)
    loss, seen = policy_loss(logp, old.detach(), None, tensor([[A]], dtype=torch.float64),
                             torch.ones(1, 1, 1, dtype=torch.bool), **more)
    loss.backward()
    return loss.item(), logp.grad.item(), seen["clip_frac"].item()


@pytest.mark.parametrize("A, rho, loss, gradient, cut", [
    (+1, 1.5, -1.2, 0.0, 1),  # good and already much likelier: enough
    (+1, 0.5, -0.5, -0.5, 0),  # good but it became rarer: a mistake of an earlier step, take it back
    (-1, 1.5, 1.5, 1.5, 0),  # bad but it became likelier: a mistake as well
    (-1, 0.5, 0.8, 0.0, 1),  # bad and already much rarer: enough
    (+1, 1.1, -1.1, -1.1, 0), (-1, 1.1, 1.1, 1.1, 0), (+1, 0.9, -0.9, -0.9, 0), (-1, 0.9, 0.9, 0.9, 0),
    (+2, 1.0, -2.0, -2.0, 0), (-2, 1.0, 2.0, 2.0, 0), (0, 9.0, 0.0, 0.0, 0),
])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "gspo"])
def test_the_clip_stops_only_who_went_far_enough_in_the_right_direction(kind, A, rho, loss, gradient, cut):
    """d loss / d logp is -rho A inside the band and on the wrong side of it, and 0 where the step was made already.

    The minimum in the objective is what tells the two sides apart: a plain clip would also stop the two mistakes.
    """
    assert one_token(rho, A, kind=kind) == pytest.approx((loss, gradient, cut), abs=1e-12)


@pytest.mark.parametrize("A, rho, loss, gradient, cut", [
    (+1, 1.25, -1.25, -1.25, 0), (+1, 1.3, -1.28, 0.0, 1), (-1, 0.85, 0.9, 0.0, 1), (-1, 0.95, 0.95, 0.95, 0)])
def test_the_two_sides_of_the_band_are_set_apart(A, rho, loss, gradient, cut):
    """DAPO's "clip higher": rare good tokens may grow by 28% a batch, so that exploration does not die out."""
    assert one_token(rho, A, clip_low=0.1, clip_high=0.28) == pytest.approx((loss, gradient, cut), abs=1e-12)


@pytest.mark.parametrize("A, rho, weight, cut", [
    (1, 1.5, 1.2, 1), (-1, 1.5, 1.2, 1), (1, 0.5, 0.5, 0), (-1, 0.5, 0.5, 0), (1, 1.1, 1.1, 0)])
def test_cispo_clips_the_weight_and_never_the_gradient(A, rho, weight, cut):
    """Its gradient is -weight A with weight = min(rho, 1 + clip_high): rare words keep teaching."""
    logp = torch.tensor(rho, dtype=torch.float64).log().item() - 2
    assert one_token(rho, A, kind="cispo") == pytest.approx((-weight * A * logp, -weight * A, cut), abs=1e-12)


def test_clip_frac_counts_the_stopped_tokens_and_no_padding():
    """Four quadrants, two of them stopped; the padding behind them looks far out of the band and is not counted."""
    rho = tensor([[[1.5, 0.5, 99.0], [1.5, 0.5, 99.0]]])
    mask = tensor([[[True, True, False]] * 2])
    _, seen = policy_loss(rho.log(), torch.zeros(1, 2, 3), None, tensor([[1.0, -1.0]]), mask)
    assert seen["clip_frac"] == 0.5 and seen["ratio"].item() == pytest.approx(1.0)


def test_gspo_has_one_ratio_a_sequence():
    """Log-ratios 0.3 and -0.1 have mean 0.1: both tokens get the gradient -exp(0.1) A / 2, whatever their own ratio.

    A third place is padding: the mean is over the two that were sampled.
    """
    logp = tensor([[[0.3, -0.1, 5.0]]], dtype=torch.float64, requires_grad=True)
    mask = tensor([[[True, True, False]]])
    loss, _ = policy_loss(logp, torch.zeros(1, 1, 3), None, tensor([[1.0]]), mask, "gspo")
    loss.backward()
    rho = tensor(0.1, dtype=torch.float64).exp()
    close(loss, -rho, 1e-8)
    close(logp.grad, tensor([[[-rho / 2, -rho / 2, 0]]]), 1e-8)


@pytest.mark.parametrize("kind", OUR_LOSSES)
def test_without_an_old_policy_the_ratio_is_one_and_the_gradient_is_reinforce(kind):
    """On the first step after sampling rho is 1 in value but not in gradient: d loss / d logp = -A, over a divisor.

    Leaving out the pass that would compute old_logp costs nothing: passing it gives the same loss, to the bit.
    """
    x = ragged_batch(kind)
    x.update(old_logp=None, ref_logp=None, beta=0.0)
    loss, gradient, seen = loss_and_gradient(x)
    divisor = {"grpo": x["mask"].sum(-1, keepdim=True) * 6, "gspo": x["mask"].sum(-1, keepdim=True) * 6,
               "dr_grpo": tensor(6 * 11)}.get(kind, x["mask"].sum())
    close(gradient, -x["advantages"][..., None] * x["mask"] / divisor)
    assert seen["clip_frac"] == 0 and seen["ratio"] == 1
    x.update(old_logp=x["logp"].detach())
    again, same_gradient, _ = loss_and_gradient(x)
    assert again == loss and same_gradient.equal(gradient)


# ------------------------------------------------------------------------------ the KL estimators, in exact expectation


def expected_kl(estimator, theta, ref, old=None, kind="grpo"):
    """Sum over all V outcomes of p(v) times the loss of having sampled v: no luck in it.

    p(v) is detached, because sampling is not differentiated. What is left is what the loss function itself carries.
    `old` are the logits of a policy that sampled, where that is not theta.
    """
    logp, ref_logp = theta.log_softmax(-1), ref.log_softmax(-1)
    p = (theta if old is None else old).detach().softmax(-1)
    total = 0.0
    for v in range(len(theta)):
        at = [q[v].reshape(1, 1, 1) for q in (logp, ref_logp)]
        before = None if old is None else old.log_softmax(-1)[v].reshape(1, 1, 1)
        loss, _ = policy_loss(at[0], before, at[1], torch.zeros(1, 1), torch.ones(1, 1, 1, dtype=torch.bool), kind,
                              beta=1.0, kl=estimator)
        total = total + p[v] * loss
    (gradient,) = torch.autograd.grad(total, theta)
    return total.detach(), gradient


def exact_kl(theta, ref, reverse=False):
    log_p, log_q = theta.log_softmax(-1), ref.log_softmax(-1)
    value = (log_q.exp() * (log_q - log_p) if reverse else log_p.exp() * (log_p - log_q)).sum()
    return value.detach(), torch.autograd.grad(value, theta)[0]


@pytest.fixture
def dice():
    """A policy and a frozen one over five tokens, far enough apart to tell the two KLs from each other."""
    torch.manual_seed(0)
    return torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)


def test_k1_and_k3_have_the_value_of_the_kl(dice):
    """Both are unbiased as numbers, so each may be logged; k2 is not, it is only close when the KL is small."""
    exact, _ = exact_kl(*dice)
    for estimator in ("k1", "k3", "k3_ratio"):
        close(expected_kl(estimator, *dice)[0], exact)
    assert abs(expected_kl("k2", *dice)[0] - exact) > 0.05


def test_k1_as_a_loss_does_nothing(dice):
    """E[d logp] = sum p d log p = d sum p = d 1 = 0: the most natural estimator has no gradient at all, only noise."""
    close(expected_kl("k1", *dice)[1], torch.zeros(5))


@pytest.mark.parametrize("estimator", ["k2", "k3_ratio"])
def test_k2_and_k3_ratio_have_the_gradient_of_the_kl(dice, estimator):
    """These two pull the policy along the true gradient of KL(pi || ref)."""
    close(expected_kl(estimator, *dice)[1], exact_kl(*dice)[1])


def test_k3_has_the_gradient_of_the_other_kl(dice):
    """k3 in the loss minimises KL(ref || pi): it pulls pi to cover ref, where KL(pi || ref) lets it choose a mode."""
    gradient = expected_kl("k3", *dice)[1]
    close(gradient, exact_kl(*dice, reverse=True)[1])
    assert (gradient - exact_kl(*dice)[1]).abs().max() > 0.05


def test_k3_ratio_stays_exact_when_the_samples_are_old(dice):
    """The ratio is an importance weight as well: value and gradient hold for samples of another policy; k2 has neither.
    """
    theta, ref = dice
    old = theta.detach() + tensor([0.5, -0.5, 0.3, 0.0, -0.4])
    value, gradient = expected_kl("k3_ratio", theta, ref, old)
    close(value, exact_kl(*dice)[0])
    close(gradient, exact_kl(*dice)[1])
    assert (expected_kl("k2", theta, ref, old)[1] - gradient).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------- the same as in trl


def ragged_batch(kind="grpo", B=2, G=3, T=5, beta=0.3, kl="k3"):
    """Arguments of policy_loss in float64: ragged completions (one of one token), ratios in and out of the band."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -normal(B, G, T).abs()
    lengths = tensor([T, 1, 3, 2, T, 4][:B * G]).view(B, G, 1)
    return {"logp": logp.requires_grad_(), "old_logp": logp.detach() + 0.3 * normal(B, G, T),
            "ref_logp": logp.detach() + 0.5 * normal(B, G, T), "advantages": normal(B, G),
            "mask": torch.arange(T) < lengths, "kind": kind, "clip_low": 0.2, "clip_high": 0.28, "beta": beta, "kl": kl,
            "max_length": 11}


def loss_and_gradient(x, leaf=None):
    """policy_loss and its gradient by x["logp"] (or by the leaf that it was cut from)."""
    loss, seen = policy_loss(**x)
    (gradient,) = torch.autograd.grad(loss, x["logp"] if leaf is None else leaf)
    return loss.detach(), gradient, seen


def trl_loss(x):
    """trl's own method, run on a stand-in for its trainer that has the attributes the method reads and nothing else.

    -> (loss, its gradient by x["logp"], what trl logs), for arguments of `policy_loss`.

    The log-probabilities that trl would get from its model are ours, so the loss is compared and nothing around it.
    """
    trl = pytest.importorskip("trl", reason="trl is for Python 3.11 and later")  # takes some seconds, once
    kind, (B, G, T) = x["kind"], x["logp"].shape
    rows = {name: x[name] if x[name] is None else x[name].reshape(B * G, T)
            for name in ("logp", "old_logp", "ref_logp", "mask")}
    weighted = x.get("weights") is not None
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows["logp"], torch.zeros(B * G, T), None),
        loss_type="grpo" if kind == "gspo" else kind, beta=x["beta"], epsilon_low=x["clip_low"],
        epsilon_high=x["clip_high"] + (kind == "cispo"),  # trl's cispo bound is the ratio itself
        importance_sampling_level="sequence" if kind == "gspo" else "token", max_completion_length=x["max_length"],
        args=SimpleNamespace(use_bias_correction_kl=x["kl"] == "k3_ratio", delta=None, steps_per_generation=1,
                             sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=weighted, _entropy_bonus_enabled=False,
        vllm_importance_sampling_correction=True,
        _metrics={"train": defaultdict(list)})
    ids = torch.zeros(B * G, 1, dtype=torch.long)
    value = trl.GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids.expand(-1, T),
        "completion_mask": rows["mask"].long(), "advantages": x["advantages"].flatten(),
        "old_per_token_logps": rows["old_logp"], "ref_per_token_logps": rows["ref_logp"],
        "num_items_in_batch": rows["mask"].sum(),
        "importance_sampling_ratio": x["weights"].reshape(B * G, T) if weighted else None})
    return value.detach(), torch.autograd.grad(value, x["logp"])[0], trainer._metrics["train"]


@pytest.mark.parametrize("beta, kl", [(0.0, "k3"), (0.3, "k3"), (0.3, "k3_ratio")])
@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_trls(kind, stale, beta, kl):
    """Value and gradient, with and without an old policy, without a KL and with both that trl knows.

    trl is what most published runs used; a fork of this file can therefore be compared with them, number by number.
    """
    x = ragged_batch(kind, beta=beta, kl=kl)
    if not stale:
        x["old_logp"] = None
    if not beta:
        x["ref_logp"] = None
    loss, gradient, seen = loss_and_gradient(x)
    want, want_gradient, metrics = trl_loss(x)
    close(loss, want)
    close(gradient, want_gradient)
    assert gradient[x["mask"]].abs().max() > 0 and (gradient[~x["mask"]] == 0).all()
    if KINDS[kind][:2] == ("token", "clip"):  # elsewhere trl counts something else: sequences, one side, or nothing
        assert seen["clip_frac"].item() == pytest.approx(metrics["clip_ratio/region_mean"][0])
    if beta and kl == "k3":  # what is logged is k3 even where the loss holds its product with the ratio
        assert seen["kl"].item() == pytest.approx(metrics["kl"][0])


@pytest.mark.parametrize("beta, kl", [(0.0, "k3"), (0.3, "k3_ratio")])
@pytest.mark.parametrize("kind", LOSSES)
def test_weights_count_as_in_trl(kind, beta, kl):
    """Each token's policy term is multiplied, and the KL is not. What stands on padding does not matter."""
    x = ragged_batch(kind, beta=beta, kl=kl) | {"weights": torch.rand(2, 3, 5, dtype=torch.float64) * 2}
    want, want_gradient, _ = trl_loss(x)
    x["weights"] = x["weights"].masked_fill(~x["mask"], torch.nan)
    loss, gradient, _ = loss_and_gradient(x)
    close(loss, want)
    close(gradient, want_gradient)
    plain, plain_gradient, _ = loss_and_gradient(x | {"weights": None})
    ones, ones_gradient, _ = loss_and_gradient(x | {"weights": torch.ones(2, 3, 5, dtype=torch.float64)})
    assert plain != loss and ones == plain and (ones_gradient == plain_gradient).all()


# ----------------------------------------------------------------------------------- what the loss must not depend on

every_loss = pytest.mark.parametrize("kind", LOSSES)
every_kl = pytest.mark.parametrize("kl", KLS)


@every_loss
@every_kl
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_padding_may_hold_anything(kind, kl, junk):
    """Multiplying by a mask does not remove a NaN (0 x NaN is NaN), nor its gradient: padding has to be replaced."""
    clean = ragged_batch(kind, kl=kl)
    dirty = clean | {n: torch.where(clean["mask"], clean[n], junk).detach() for n in ("logp", "old_logp", "ref_logp")}
    dirty["logp"].requires_grad_()
    (loss, gradient, seen), (same, same_gradient, same_seen) = loss_and_gradient(clean), loss_and_gradient(dirty)
    assert loss == same and gradient.equal(same_gradient) and (gradient[~clean["mask"]] == 0).all()
    assert seen == same_seen


@every_loss
def test_wider_padding_changes_nothing(kind):
    """A row must not weigh less because its neighbour in the batch is longer: divisors are counts of real tokens.

    dr_grpo divides by a length on purpose, the one at which completions are cut, so that one is passed in.
    """
    x = ragged_batch(kind)
    loss, gradient, _ = loss_and_gradient(x)
    leaf = x["logp"]
    wide = x | {n: torch.nn.functional.pad(x[n], (0, 4)) for n in ("logp", "old_logp", "ref_logp", "mask")}
    same, same_gradient, _ = loss_and_gradient(wide, leaf)
    close(same, loss)
    close(same_gradient, gradient)


@every_loss
def test_order_of_prompts_and_completions_changes_nothing(kind):
    """A batch is a set."""
    x = ragged_batch(kind)
    loss, gradient, _ = loss_and_gradient(x)
    i, j = tensor([1, 0]), tensor([2, 0, 1])
    mixed = x | {n: x[n][i][:, j] for n in ("logp", "old_logp", "ref_logp", "mask", "advantages")}
    same, same_gradient, _ = loss_and_gradient(mixed, x["logp"])
    close(same, loss)
    close(same_gradient, gradient)


@every_loss
@every_kl
def test_micro_batch_losses_add_up(kind, kl):
    """However the six rows are cut, and each piece trimmed to its own longest row, the sum is the loss of the whole.

    The mean of the pieces' means is something else as soon as pieces differ in size or length.
    """
    x = ragged_batch(kind, kl=kl)
    loss, gradient, _ = loss_and_gradient(x)
    whole = {"n_completions": 6, "n_tokens": int(x["mask"].sum())}
    total = 0.0
    for b, rows in ((0, [0]), (0, [1, 2]), (1, [0]), (1, [1]), (1, [2])):
        T = int(x["mask"][b, rows].sum(-1).max())
        piece = {n: x[n][b:b + 1, rows, :T] for n in ("logp", "old_logp", "ref_logp", "mask")}
        piece["advantages"] = x["advantages"][b:b + 1, rows]
        total = total + policy_loss(**(x | piece | whole))[0]
    close(total, loss)
    close(torch.autograd.grad(total, x["logp"])[0], gradient)


@pytest.mark.parametrize("call, known", [
    (lambda: advantages(torch.zeros(1, 2), "rank"), ADVANTAGES),
    (lambda: policy_loss(**(ragged_batch() | {"kind": "ppo"})), LOSSES),
    (lambda: policy_loss(**(ragged_batch() | {"kl": "k4"})), KLS)])
def test_an_unknown_name_is_answered_with_the_known_ones(call, known):
    """A typo must not train for a night with something else."""
    with pytest.raises(ValueError, match="There is no .*" + ", ".join(known)):
        call()


@pytest.mark.parametrize("row, what, known", [
    (("word", "clip", "tokens"), "ratio 'word'", "token, sequence"),
    (("token", "clap", "tokens"), "surrogate 'clap'", "clip, weight"),
    (("sequence", "clip", "words"), "reduction 'words'", "completions, tokens, constant"),
    (("", "", ""), "ratio ''", "token, sequence")])
def test_a_loss_of_unknown_parts_is_refused(monkeypatch, row, what, known):
    """A line that a forker adds to the table never falls into whichever branch comes last."""
    monkeypatch.setitem(KINDS, "mine", row)
    with pytest.raises(ValueError, match=f"There is no {what}: take one of {known}"):
        policy_loss(**ragged_batch("mine"))


def test_a_loss_is_a_line_of_the_table(monkeypatch):
    """A new kind is put together from known parts, and those of an old kind give that kind's number."""
    assert len(set(KINDS.values())) == len(KINDS) - 1  # bnpo and dapo are one and the same
    for kind, row in list(KINDS.items()):
        monkeypatch.setitem(KINDS, "mine", row)
        same, wanted = loss_and_gradient(ragged_batch("mine")), loss_and_gradient(ragged_batch(kind))
        assert same[0] == wanted[0] and same[1].equal(wanted[1]) and same[2] == wanted[2]
    monkeypatch.setitem(KINDS, "mine", ("sequence", "weight", "constant"))
    assert all(loss_and_gradient(ragged_batch("mine"))[0] != loss_and_gradient(ragged_batch(k))[0] for k in LOSSES)


def test_the_numbers_of_a_loss_are_given_by_name():
    """Of five numbers in a row, two are swapped sooner or later. A bare call is the paper's loss: k3, clip 0.2."""
    x = ragged_batch()
    first = [x[n] for n in ("logp", "old_logp", "ref_logp", "advantages", "mask")]
    with pytest.raises(TypeError, match="positional"):
        policy_loss(*first, "grpo", 0.2, 0.28)
    loss, _ = policy_loss(*first, beta=0.3)
    assert loss == policy_loss(*first, "grpo", clip_low=0.2, clip_high=0.2, beta=0.3, kl="k3")[0]
    assert loss != policy_loss(*first, beta=0.3, kl="k3_ratio")[0]


def test_a_kl_without_a_reference_is_refused():
    """A beta that has nothing to pull to would silently be a beta of 0."""
    with pytest.raises(ValueError, match="no reference"):
        policy_loss(**(ragged_batch() | {"ref_logp": None}))


# ------------------------------------------------------------------------------------------- one prompt, one forward


def tiny_model(seed=0, dtype=torch.float64, family="qwen2"):
    """Two random layers of width 32 with grouped-query attention, biases and a tied head; lfm2: a convolution first."""
    torch.manual_seed(seed)
    raw = {"model_type": family, "layer_types": ["conv" if family == "lfm2" else "full_attention", "full_attention"],
           "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": STOP,
           "max_position_embeddings": 64}
    model = Transformer(read_config(raw, "tiny"))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.15)  # otherwise it only ever repeats its last token
    return model.to(dtype)


def drifted(model, by=0.05):
    """A relative of the model, as a policy is of its ref_model: the KL between them is a few tenths."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in other.parameters():
            p += by * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return other


def random_groups(P=(3, 9, 5), lengths=((4, 1, 2, 4), (6, 3, 6, 2), (1, 2, 1, 1)), seed=0):
    """Groups as the sampler makes them: prompts and completions of all lengths, some of a single token."""
    g = torch.Generator().manual_seed(seed)
    groups = []
    for p, n in zip(P, lengths):
        mask = torch.arange(max(n)) < tensor(n)[:, None]  # [G, T]
        tokens = torch.randint(V, mask.shape, generator=g) * mask
        groups.append(Group(torch.randint(V, (p,), generator=g), tokens, mask, -3.0 * mask, torch.ones(len(n)) > 0,
                            [""] * len(n), torch.randn(len(n), generator=g)))
    return groups


def full_copy(model, prompt, completion, temperature=1.0):
    """Oracle: prompt and one completion as one plain text through the model -> (logp, entropy), each [n]."""
    logits = model(torch.cat([prompt, completion])[None])[0] / temperature  # [P + n, V]
    log_p = logits.log_softmax(-1)[len(prompt) - 1:-1]  # a position predicts the token behind it
    return log_p.gather(1, completion[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def gradients(model):
    found = parameters_to_vector([p.grad for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("lengths", [((4, 1, 2, 4), (6, 3, 6, 2), (1, 2, 1, 1)), ((1, 1), (1, 1), (1, 1)),
                                     ((5, 2), (4, 4), (3, 1))], ids=["ragged", "T=1", "G=2"])
@pytest.mark.parametrize("P", [(3, 9, 5), (4, 4, 4), (1, 2, 1)], ids=["ragged", "equal", "short"])
@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_a_shared_prompt_gives_the_gradient_of_full_copies(family, P, lengths):
    """The prompt runs once, its keys and values serve G rows, and every row's gradient reaches it.

    Values and parameter gradients (through prompt, completions and the tied head) equal those of G plain copies. With
    weights on each token, so that no error can hide behind another one.
    """
    model, groups = tiny_model(family=family), random_groups(P, lengths)
    T = max(g.tokens.shape[1] for g in groups)
    tokens, mask = (torch.stack([torch.nn.functional.pad(getattr(g, n), (0, T - g.tokens.shape[1])) for g in groups])
                    for n in ("tokens", "mask"))
    weight = torch.randn(mask.shape, dtype=torch.float64)
    logp, entropy = group_logprobs(model, [g.prompt for g in groups], tokens, mask, temperature=0.7)
    assert (logp[~mask] == 0).all() and (entropy[~mask] == 0).all()
    (logp * weight).sum().backward()
    ours, theirs = gradients(model), 0.0
    for b, g in enumerate(groups):
        for i, n in enumerate(g.mask.sum(1)):
            want, want_entropy = full_copy(model, g.prompt, g.tokens[i, :n], 0.7)
            close(logp[b, i, :n], want, 1e-10)
            close(entropy[b, i, :n], want_entropy, 1e-10)
            theirs = theirs + (want * weight[b, i, :n]).sum()
    theirs.backward()
    close(ours, gradients(model), 1e-10)


def test_the_stop_token_is_trained():
    """In a length task the decision to stop is the one that matters, and it is a token like any other.

    The sampler's mask holds it, its log-probability gets the gradient -A / (completions x length), and an update makes
    stopping at once likelier where it was rewarded and rarer where it was punished.
    """
    model, prompt = tiny_model(), tensor([1, 2, 3])
    (group,) = sample(model, [prompt], 16, 6, stop_ids=range(0, V, 2), seed=3)
    group.rewards = torch.arange(16.0)
    A = advantages(group.rewards[None])
    logp, _ = group_logprobs(model, [prompt], group.tokens[None], group.mask[None])
    logp.retain_grad()
    policy_loss(logp, None, None, A, group.mask[None])[0].backward()
    assert group.stopped.sum() >= 4 and group.mask.sum(1)[group.stopped].max() > 1
    for i in group.stopped.nonzero()[:, 0]:
        n = int(group.mask[i].sum())
        assert group.tokens[i, n - 1] % 2 == 0
        close(logp.grad[0, i, n - 1], -A[0, i] / (16 * n), 1e-8)
        assert (logp.grad[0, i, n:] == 0).all()

    for sign in (+1, -1):  # rows: stop at once, or say one other word
        model = tiny_model()
        says = Group(prompt, tensor([[STOP], [STOP], [4], [5]]), torch.ones(4, 1) > 0, torch.zeros(4, 1),
                     tensor([True, True, False, False]), [""] * 4, sign * tensor([1.0, 1, 0, 0]))
        before = full_copy(model, prompt, tensor([STOP]))[0].item()
        update(model, None, [says], torch.optim.SGD(model.parameters(), lr=0.1), Config())
        assert sign * (full_copy(model, prompt, tensor([STOP]))[0].item() - before) > 0.01


# ------------------------------------------------------------------------------------------------------ micro-batches

shapes = st.tuples(st.integers(2, 6), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1,
                                               max_size=6), st.integers(8, 60))


@settings(search, max_examples=300)
@given(shapes)
def test_micro_batches_hold_every_row_once_and_no_more_than_fits(shape):
    """A group of G rows with a prompt of P and completions of T costs P + G T, and padding costs like text.

    Every row is there once, with its own prompt, mask and advantage; longest first; within the limit unless one row
    alone is over it; and no group is cut, each piece paying for the prompt again, where all of them fit whole.
    """
    G, sizes, limit = shape
    groups = []
    for i, (P, T) in enumerate(sizes):
        mask = torch.arange(T) < torch.arange(G)[:, None] % T + 1  # [G, T]
        name = 10 * i + torch.arange(1.0, G + 1)[:, None]  # a number for each row, found again below
        groups.append(Group(torch.full((P,), i), (name * mask).long(), mask, name * mask, mask[:, 0], [""] * G))
    A = torch.arange(1.0, G + 1) + 10 * torch.arange(len(sizes))[:, None]  # [B, G]: the row's number again
    seen, costs = [], []
    for m in micro_batches(groups, A, limit):
        b, g, T = m.mask.shape
        assert b * (max(map(len, m.prompts)) + g * T) <= limit or b == g == 1
        for k, prompt in enumerate(m.prompts):
            i = int(prompt[0])
            assert len(prompt) == sizes[i][0] and g == G or max(P for P, _ in sizes) + G * max(
                T for _, T in sizes) > limit
            costs.append(len(prompt) + g * sizes[i][1])
            for row in range(g):
                number = int(m.advantages[k, row])
                want = groups[number // 10]
                assert i == number // 10
                for name, have in (("tokens", m.tokens), ("mask", m.mask), ("logp", m.sampler_logp)):
                    own = getattr(want, name)[number % 10 - 1]
                    assert have[k, row, :len(own)].equal(own) and not have[k, row, len(own):].any()
                seen.append(number)
    assert sorted(seen) == sorted(A.flatten().int().tolist())
    assert costs == sorted(costs, reverse=True)


# --------------------------------------------------------------------------------------------- one update, by the book


def naive_update(model, ref_model, groups, config, lr):
    """GRPO as the papers write it: full copies, one row and one token at a time, plain gradient descent.

    Returns what the last step saw: the loss, the norm of its gradient, mean KL, share of clipped tokens.
    """
    A = advantages(torch.stack([g.rewards for g in groups]), config.advantage).double()
    rows = [(g.prompt, g.tokens[i, :int(g.mask[i].sum())], A[b, i]) for b, g in enumerate(groups)
            for i in range(len(g.mask))]
    lengths = [len(completion) for _, completion, _ in rows]
    with torch.no_grad():
        old = [full_copy(model, p, o, config.temperature)[0] for p, o, _ in rows]
        ref = [full_copy(ref_model, p, o, config.temperature)[0] for p, o, _ in rows]
    for _ in range(config.updates):
        loss, kls, cut = 0.0, 0.0, 0
        for (p, o, a), before, there in zip(rows, old, ref):
            logp, n, tokens = full_copy(model, p, o, config.temperature)[0], len(o), []
            for t in range(n):
                rho = (logp[t] - before[t]).exp()
                if config.loss == "gspo":
                    rho = (sum(logp[s] - before[s] for s in range(n)) / n).exp()
                over, under = bool(rho > 1 + config.clip_high), bool(rho < 1 - config.clip_low)
                stopped = (over and bool(a > 0)) or (under and bool(a < 0))
                if config.loss == "cispo":
                    stopped = over
                    term = -(1 + config.clip_high if over else rho.detach()) * a * logp[t]
                elif stopped:
                    term = -(1 + config.clip_high if over else 1 - config.clip_low) * a
                else:
                    term = -rho * a
                x = there[t] - logp[t]
                k3 = x.exp() - x - 1
                kl = {"k1": -x, "k2": x ** 2 / 2, "k3": k3, "k3_ratio": rho * k3}[config.kl]
                tokens.append(term + config.beta * kl)
                kls, cut = kls + k3.item(), cut + stopped
            if config.loss in ("grpo", "gspo"):
                loss = loss + sum(tokens) / n / len(rows)
            elif config.loss == "dr_grpo":
                loss = loss + sum(tokens) / (len(rows) * config.max_new_tokens)
            else:
                loss = loss + sum(tokens) / sum(lengths)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum((s ** 2).sum() for s in slopes).sqrt()
        with torch.no_grad():
            for w, s in zip(model.parameters(), slopes):
                w -= lr * s * min(1.0, config.grad_clip / (norm.item() + 1e-6))  # torch adds the 1e-6
    return {"loss": loss.item(), "grad_norm": norm.item(), "kl": kls / sum(lengths), "clip_frac": cut / sum(lengths)}


def step(groups, config, ref_model=None, lr=1.0, start=0):
    """One update of a fresh tiny model with plain gradient descent -> (its weights, metrics)."""
    model = tiny_model(start)
    metrics = update(model, ref_model, groups, torch.optim.SGD(model.parameters(), lr=lr), config)
    return parameters_to_vector(model.parameters()).detach(), metrics


@pytest.mark.parametrize("kind, kl, updates", [(kind, "k3_ratio", 2) for kind in OUR_LOSSES]
                         + [("grpo", kl, 3) for kl in KLS[:3]])
def test_an_update_is_what_the_papers_say(kind, kl, updates):
    """Steps on one batch, with a KL to another model: from the second on the ratio is off 1 and the clip is at work.

    In the third step the old policy is still the one before the first, and not the one before the second. The weights
    equal those of the loops above, so everything between rewards and weights is right at once: which policy is the old
    one, temperature, mask, divisor, KL, gradient clipping.
    """
    groups, ref_model, start = random_groups(), drifted(tiny_model()), tiny_model()
    config = Config(loss=kind, kl=kl, beta=0.1, updates=updates, temperature=0.7, clip_high=0.28, grad_clip=0.9,
                    max_new_tokens=9, micro_tokens=40,
                    advantage={"dr_grpo": "mean", "dapo": "batch"}.get(kind, "group"))
    slow = copy.deepcopy(start)
    want = naive_update(slow, ref_model, groups, config, lr=0.05)
    fast, metrics = step(groups, config, ref_model, lr=0.05)
    close(fast, parameters_to_vector(slow.parameters()).detach(), 1e-9)
    assert {n: metrics[n] for n in want} == pytest.approx(want, abs=1e-7)
    assert 0 < metrics["clip_frac"] < 0.7 and metrics["flat_groups"] == 0
    assert (fast - parameters_to_vector(start.parameters())).abs().max() > 1e-3


@pytest.mark.parametrize("kind, max_new_tokens", [(kind, 9) for kind in LOSSES] + [("dr_grpo", 0)])
def test_an_update_does_not_depend_on_the_memory_it_may_use(kind, max_new_tokens):
    """micro_tokens is a question of memory: one batch, group after group, or row after row, the step is the same.

    Otherwise a run could not be repeated on a smaller machine. dr_grpo's divisor is the length where completions are
    cut; where that is not told (0), it still may not be the padding of whatever piece a row happens to be in.
    """
    groups, ref_model = random_groups(), drifted(tiny_model())
    results = [step(groups, Config(loss=kind, beta=0.1, updates=2, max_new_tokens=max_new_tokens, micro_tokens=m,
                                   grad_clip=1e9), ref_model, lr=0.2) for m in (10 ** 9, 40, 1)]
    pieces = [len(micro_batches(groups, torch.zeros(3, 4), m)) for m in (10 ** 9, 40, 1)]
    assert pieces[0] == 1 < pieces[1] < pieces[2] == 12
    for weights, metrics in results[1:]:
        close(weights, results[0][0], 1e-10)
        assert metrics == pytest.approx(results[0][1], abs=1e-6)


def test_an_update_takes_any_object_with_the_fields_that_it_names():
    """So another program's settings will do. The names are read from the docstring, and one missing field is missed."""
    listed = re.search(r"with the fields ([\w\s,]+)\.", update.__doc__)[1]
    names = re.split(r",\s+|\s+and\s+", listed)
    values = {name: getattr(Config(), name) for name in names}
    groups, ref_model = random_groups(), drifted(tiny_model())
    close(step(groups, SimpleNamespace(**values), ref_model)[0], step(groups, Config(), ref_model)[0], 0)
    for name in names:
        with pytest.raises(AttributeError, match=name):
            step(groups, SimpleNamespace(**{n: v for n, v in values.items() if n != name}), ref_model)


def test_rewards_may_be_plain_floats_or_a_tensor():
    """Whoever scores a group needs no torch; integers will do as well."""
    plain, tensors = random_groups(), random_groups()
    for a, b, whole in zip(plain, tensors, ([1, 0, 2, 5], [0.5, 0.25, 0, -1], [3, 3, 3, 3])):
        a.rewards, b.rewards = whole, tensor(whole, dtype=torch.float64)
    assert step(plain, Config())[0].equal(step(tensors, Config())[0])
    assert step(plain, Config())[1] == step(tensors, Config())[1]


@every_loss
def test_an_update_does_not_depend_on_the_order_of_groups(kind):
    """Nor of the rows in a group: a batch is a set all the way down to the weights."""
    groups, config = random_groups(), Config(loss=kind, updates=2, max_new_tokens=9)
    mixed = [Group(g.prompt, g.tokens[[2, 0, 3, 1]], g.mask[[2, 0, 3, 1]], g.logp[[2, 0, 3, 1]], g.stopped, g.texts,
                   g.rewards[[2, 0, 3, 1]]) for g in (groups[i] for i in (1, 2, 0))]
    close(step(mixed, config)[0], step(groups, config)[0], 1e-6)  # advantages are float32


@pytest.mark.parametrize("updates", [1, 2])
def test_a_batch_with_nothing_to_learn_moves_no_weight(updates):
    """Gradient zero is not step zero: AdamW would still decay the weights and follow its momentum.

    The optimizer is warm, so it would; the weights stay the same to the bit. With a KL there is something to learn.
    """
    model, ref_model = tiny_model(), drifted(tiny_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    groups = random_groups()
    update(model, None, groups, optimizer, Config(beta=0.0))
    before = parameters_to_vector(model.parameters()).clone()
    flat = random_groups()
    for g in flat:
        g.rewards = torch.full((4,), 0.1)
    metrics = update(model, ref_model, flat, optimizer, Config(beta=0.0, updates=updates))
    assert parameters_to_vector(model.parameters()).equal(before)
    assert metrics["flat_groups"] == 1 and metrics["grad_norm"] == 0 and metrics["entropy"] > 0
    update(model, ref_model, flat, optimizer, Config(beta=0.1, updates=updates))
    assert not parameters_to_vector(model.parameters()).equal(before)


@every_loss
def test_a_flat_group_beside_others_adds_no_gradient(kind):
    """Whatever the flat group said, the weights come out the same; it only counts in the divisor, as everywhere.

    With two groups of the same shape that halves the step: many flat groups are a smaller learning rate in disguise,
    which is why their share is a metric.
    """
    config = Config(loss=kind, beta=0.0, max_new_tokens=9, grad_clip=1e9)
    shape = {"P": (4, 4), "lengths": ((3, 2, 1, 3), (3, 2, 1, 3))}
    one, other = random_groups(**shape), random_groups(**shape, seed=5)
    one[1].rewards, other[1].rewards = torch.full((4,), 0.1), torch.full((4,), 0.7)
    weights, metrics = step(one, config)
    close(step([one[0], other[1]], config)[0], weights)
    alone, _ = step(one[:1], config, lr=0.5)
    close(alone, weights)
    assert metrics["flat_groups"] == 0.5 and metrics["grad_norm"] > 0


def test_sampler_and_trainer_agree_before_the_first_step():
    """logp_gap is the alarm of this file: sampler and trainer are two computations of one number.

    Right after sampling they differ by float32 rounding. One that samples at temperature 0.7 and trains at 1.0 is off
    by whole nats, and would train a policy that never acted; nothing else in the log would show it.
    """
    model = tiny_model(dtype=torch.float32)
    prompts = [tensor(p) for p in ([1, 2, 3], [4] * 9, [5])]
    groups = sample(model, prompts, G=4, max_new_tokens=8, temperature=0.7, seed=1)
    for g in groups:
        g.rewards = g.lengths.float()
    stand_still = torch.optim.SGD(model.parameters(), lr=0.0)
    gaps = [update(model, None, groups, stand_still, Config(temperature=t, micro_tokens=m))["logp_gap"]
            for t, m in ((0.7, 10 ** 6), (0.7, 1), (1.0, 10 ** 6))]
    assert 0 < max(gaps[:2]) < 1e-5
    assert gaps[2] > 0.3


def test_logp_gap_finds_a_single_wrong_number():
    """It is the largest difference and not a mean: one shifted token among thousands is a bug, not noise."""
    groups = sample(tiny_model(), [tensor([1, 2, 3])], G=4, max_new_tokens=8, seed=1)
    groups[0].rewards = torch.arange(4.0)
    assert step(groups, Config())[1]["logp_gap"] < 1e-5
    groups[0].logp[2, 0] += 0.5
    assert step(groups, Config())[1]["logp_gap"] == pytest.approx(0.5, abs=1e-5)
    # It compares the policies before the first step. Later ones have moved, as they should.
    assert step(groups, Config(updates=3), lr=0.2)[1]["logp_gap"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("flat", [False, True], ids=["learning", "flat"])
def test_a_broken_loss_never_reaches_the_weights(beta, flat):
    """One NaN, stepped on, is in every weight. The run stops with a sentence and the weights as they were."""
    model, groups = tiny_model(), random_groups()
    for g in groups:
        g.rewards = torch.zeros(4) if flat else g.rewards
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    before = parameters_to_vector(model.parameters()).clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(FloatingPointError, match="The loss is"):
        update(model, drifted(tiny_model()), groups, optimizer, Config(beta=beta))
    assert_close(parameters_to_vector(model.parameters()), before, rtol=0, atol=0, equal_nan=True)


def test_a_loss_that_explodes_is_stopped_while_it_is_still_finite():
    model, groups = tiny_model(), random_groups()
    before = parameters_to_vector(model.parameters()).clone()
    with pytest.raises(FloatingPointError, match=r"The loss is [\d.]+: .* exploded"):
        update(model, drifted(tiny_model()), groups, torch.optim.SGD(model.parameters(), lr=1.0), Config(beta=1e9))
    assert parameters_to_vector(model.parameters()).equal(before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e12])
def test_a_broken_gradient_never_reaches_the_weights(broken):
    """A finite loss may have a gradient that is not, or that explodes. The norm of the whole tells."""
    model = tiny_model()
    before = parameters_to_vector(model.parameters()).clone()
    model.norm.weight.register_hook(lambda g: g * broken)
    with pytest.raises(FloatingPointError, match="gradient's norm is"):
        update(model, None, random_groups(), torch.optim.SGD(model.parameters(), lr=1.0), Config())
    assert parameters_to_vector(model.parameters()).equal(before)


def test_a_gradient_is_not_exploded_because_the_rewards_are_large():
    """Rewards of 1e9 without a division: the loss and its gradient are of that size, and the clip takes it out."""
    def learnt(size):
        groups = random_groups()
        for g in groups:
            g.rewards = [size * x for x in (-0.5, 0.25, 0.0, 1.0)]
        return step(groups, Config(beta=0.0, advantage="mean", grad_clip=1e-3))
    weights, metrics = learnt(1e9)
    close(weights, learnt(1.0)[0], 1e-6)
    assert metrics["grad_norm"] > 1e6


def test_an_update_moves_probability_to_what_was_rewarded():
    """The point of it all: after one step the completions above their group's mean are likelier, the others rarer."""
    model, groups = tiny_model(), random_groups(P=(4,), lengths=((3, 2, 3, 1),))
    groups[0].rewards = tensor([1.0, 0.0, 1.0, 0.0])
    g = groups[0]

    def odds():
        return group_logprobs(model, [g.prompt], g.tokens[None], g.mask[None])[0][0].sum(1).detach()

    before = odds()
    update(model, None, groups, torch.optim.SGD(model.parameters(), lr=0.05), Config())
    assert ((odds() - before) > 0).equal(g.rewards > 0)
