"""Each rung by numbers that can be worked out; the noise of a gradient by a toy whose variance is known."""

import subprocess
from dataclasses import fields, replace

import pytest
import torch
from helpers import gradients, tiny_model
from test_fork import git

import grpo
import train
from config import Config, check
from plumbing.edits import edited
from plumbing.folder import read_json, write_text
from plumbing.log import read_lines
from plumbing.noise import cosine, noise
from rewards import parse
from rollout import sample
from studies import ladder
from studies.ladder import FRESH, LATER, OLD, RUNGS, STD, Run, gradient

REWARDS = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # [B=2, G=2]
FOUR_CASES = torch.tensor([[1.0, 1.0, -1.0, -1.0]])  # [B=1, G=4]: A of ratio 1.5, 0.5, 1.5, 0.5
FEW = ("--stages", "length:2", "--prompts", "2", "--group", "2", "--eval-posts", "2")


def loss_of(name, logp, old_logp, A):
    """policy_loss of completions of one token, with a rung's flags and edits -> (loss, gradient by logp [G])."""
    config, mask = Run(name, 0).config, torch.ones(*A.shape, 1, dtype=torch.bool)
    logp = logp.view(*A.shape, 1).requires_grad_()
    with edited(RUNGS[name].edits):
        loss, _ = grpo.policy_loss(logp, old_logp.view_as(logp), None, A, mask, config.loss,
                                   clip_low=config.clip_low, clip_high=config.clip_high)
    return loss.item(), torch.autograd.grad(loss, logp)[0].flatten()


# --- what a rung is ---------------------------------------------------------------------------------------------------


def test_rungs_differ_in_what_is_learnt_from_a_batch_and_in_nothing_else():
    """The same posts, the same pay, the same number of batches; and each is held against one that is not itself."""
    free = {"loss", "advantage", "tis", "clip_low", "clip_high", "beta", "kl", "updates", "overlong"}
    for name, rung in RUNGS.items():
        config = Run(name, 0).config
        check(config)
        differ = {f.name for f in fields(Config) if getattr(config, f.name) != getattr(Config(), f.name)}
        assert differ <= free | {"stages"} and config.stages == ("rouge_l + 4*length:50",), name
        if rung.beside:
            beside = RUNGS[rung.beside]
            assert (rung.flags, rung.edits, rung.fork) != (beside.flags, beside.edits, beside.fork)
    assert len({Run(name, 0).result for name in RUNGS}) == len(RUNGS) and Run("SAPO", 0).config.loss == "sapo"


@pytest.mark.parametrize("name, want", [
    ("no baseline", [[1, 2], [3, 6]]),
    ("the batch's mean", [[-2, -1], [0, 3]]),  # the mean of all four is 3
    ("the group's mean", [[-0.5, 0.5], [-1.5, 1.5]]),
    ("divided by the std", [[-0.7071, 0.7071], [-0.7071, 0.7071]])])  # std 0.7071 and 2.1213
def test_four_baselines_by_hand(name, want):
    with edited(RUNGS[name].edits):
        found = grpo.advantages(REWARDS, Run(name, 0).config.advantage)
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-4)


def test_two_more_for_all_is_two_more_for_all():
    texts, lengths = ["a b", "a c"], [5, 8]
    plain, parts = parse("length")(texts, lengths, "a b", 10)
    with edited(RUNGS["no baseline, 2 more for all"].edits):
        more, same = parse("length")(texts, lengths, "a b", 10)
    assert plain == [-0.5, -0.2] and more == [1.5, 1.8] and parts == same


def test_the_clip_and_what_is_learnt_without_it():
    """The four cases of grpo.py: without a clip all of them flow, each with -rho A."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    loss, slope = loss_of("four updates", ratio.log(), torch.zeros(4), FOUR_CASES)
    assert loss == pytest.approx(0, abs=1e-6) and (4 * slope).tolist() == pytest.approx([-1.5, -0.5, 1.5, 0.5])
    loss, slope = loss_of("four updates, clipped", ratio.log(), torch.zeros(4), FOUR_CASES)
    assert loss == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert (4 * slope).tolist() == pytest.approx([0, -0.5, 1.5, 0])


def test_dppos_trust_region_by_hand():
    """A token counts by how much probability it has moved, where PPO asks by what factor."""
    moves = [  # p_old, p, A, whether its gradient flows
        (0.5, 0.75, 1, False), (0.5, 0.65, 1, True), (0.5, 0.75, -1, True),
        (0.9, 0.6, -1, False), (0.9, 0.75, -1, True), (0.9, 0.6, 1, True),
        (0.01, 0.05, 1, True), (0.05, 0.01, -1, True)]  # five times as likely, or a fifth: PPO's clip stops both
    old, new, A, flows = map(torch.tensor, zip(*moves))
    _, slope = loss_of("DPPO", new.log(), old.log(), A[None].float())
    torch.testing.assert_close(len(moves) * slope, -new / old * A * flows)
    _, slope = loss_of("four updates, clipped", new.log(), old.log(), A[None].float())
    assert (slope[-2:] == 0).all()


def test_a_stale_sampler_gets_new_weights_with_every_tenth_batch(tmp_path, monkeypatch):
    """The gap between its log-probabilities and the trainer's is rounding then, and a change of weights in between."""
    monkeypatch.chdir(tmp_path)
    flags = ["--stages", "length:11", *FEW[2:], "--beta", "0", "--warmup", "0", "--run", "r"]
    with edited(RUNGS["stale samples"].edits):
        assert train.main(flags) == 0
    fresh = [row["logp_gap"] < 1e-4 for row in read_lines(tmp_path / "runs" / "r" / "metrics.jsonl")]
    assert fresh == [True] + 9 * [False] + [True]


def test_importance_weights_are_cut_at_two(batch):
    """A sampler that found each token a third as likely: the weights would be 3, and the gradient is twice as long."""
    model, groups = batch
    old, _ = states(model)
    shifted = [replace(group, logp=group.logp - 1.0986) for group in groups]  # log 3
    found = [gradient(grpo.update, model, None, shifted, Run(name, 0).config, (old,))
             for name in ("stale samples", "truncated importance weights")]
    torch.testing.assert_close(found[1], 2 * found[0], rtol=0, atol=1e-5)
    assert found[0].norm() > 0.01


def test_the_fork_in_memory_is_the_fork_that_git_makes(tmp_path):
    files = ladder.forked("A loss: SAPO")
    page = (ladder.ROOT / "docs" / "fork.md").read_text(encoding="utf-8")
    diff = page.partition("## A loss: SAPO")[2].partition("```diff\n")[2].partition("```")[0]
    write_text(tmp_path / "fork.diff", diff)
    for path in files:
        write_text(tmp_path / path, (ladder.ROOT / path).read_text(encoding="utf-8"))
    git(tmp_path, "apply", "fork.diff")
    assert list(files) == ["grpo.py"] and "sapo" in files["grpo.py"]
    assert all((tmp_path / path).read_text(encoding="utf-8") == text for path, text in files.items())
    with pytest.raises(ValueError, match="not once"):
        ladder.replaced("a b a", "a", "c", "here")


# --- the noise of a gradient ------------------------------------------------------------------------------------------


def test_noise_has_no_bias():
    """Of 2,000 times 6 gradients with mean (2, 0, 0, 0) and variances 1, 4, 9, 16: signal 4 and spread 30."""
    torch.manual_seed(0)
    mean, std = torch.tensor([2.0, 0, 0, 0]), torch.tensor([1.0, 2, 3, 4])
    found = [noise(mean + std * torch.randn(6, 4)) for _ in range(2000)]
    signal, spread = (torch.tensor([each[what] for each in found]) for what in ("signal", "spread"))
    for values, want in ((signal, 4), (spread, 30)):
        error = values.std() / 2000 ** 0.5
        assert error < 0.5 and abs(values.mean() - want) < 3 * error
    # |mean of the six|^2 is what one might take for the signal. It would be 4 + 30 / 6 on average.


def test_noise_and_its_error_by_brute_force():
    torch.manual_seed(1)
    x = 1 + torch.randn(5, 3)  # [M, W]

    def by_hand(x):
        pairs = [float(x[m] @ x[n]) for m in range(len(x)) for n in range(len(x)) if m != n]
        signal = sum(pairs) / len(pairs)
        return signal, float(((x - x.mean(0)) ** 2).sum() / (len(x) - 1)) / signal

    found, (signal, ratio) = noise(x), by_hand(x)
    assert found["signal"] == pytest.approx(signal, rel=1e-4) and found["noise"] == pytest.approx(ratio, rel=1e-4)
    left = torch.tensor([by_hand(torch.cat([x[:k], x[k + 1:]]))[1] for k in range(5)])
    assert found["error"] == pytest.approx(float((0.8 * (left - left.mean()) ** 2).sum()) ** 0.5, rel=1e-3)
    assert noise(7 * x)["noise"] == pytest.approx(ratio, rel=1e-4)  # a larger loss is no noisier


def test_the_cosine_leaves_out_the_noise_that_both_share():
    """Means (1, 0, ..) and (0, 1, 0, ..) are at right angles, although the batches' noise is the same in both."""
    torch.manual_seed(2)
    shared, one, other = torch.randn(400, 8), torch.zeros(8), torch.zeros(8)
    one[0], other[1] = 1.0, 1.0
    found, error = cosine(one + shared, other + shared)
    assert abs(found) < 3 * error < 0.3
    assert cosine(one + shared, 3 * (one + shared))[0] == pytest.approx(1, abs=1e-4)
    naive = torch.cosine_similarity((one + 5 * shared[:9]).mean(0), (other + 5 * shared[:9]).mean(0), dim=0)
    assert naive > 0.5  # what one would see with few batches
    x, y = 1 + torch.randn(4, 3), 1 + torch.randn(4, 3)
    by_hand = {pair: sum(float(pair[0][m] @ pair[1][n]) for m in range(4) for n in range(4) if m != n)
               for pair in ((x, y), (x, x), (y, y))}
    assert cosine(x, y)[0] == pytest.approx(by_hand[x, y] / (by_hand[x, x] * by_hand[y, y]) ** 0.5, rel=1e-4)
    # In two dimensions, at 45 degrees; and what the error promises: two thirds of the time it is no larger.
    draws = [cosine(one + torch.randn(60, 8), one + other + torch.randn(60, 8)) for _ in range(200)]
    errors = torch.tensor([value for value, _ in draws]) - 0.5 ** 0.5
    assert abs(errors.mean()) < 0.02 and 0.7 < torch.tensor([e for _, e in draws]).mean() / errors.std() < 1.4


@pytest.fixture(scope="module")
def batch():
    """A model, and two groups of three that it wrote, with rewards."""
    model = tiny_model()
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6, 7])]
    groups = sample(model, prompts, 3, 6, stop_ids=[2], seed=1)
    for group, rewards in zip(groups, ([-0.2, 0.5, 0.3], [0.0, -1.0, 0.4])):
        group.rewards, group.parts, group.weights = rewards, {"length": rewards}, {"length": 1.0}
    return model, groups


def states(model, by=0.02):
    """The model's weights, and some that are a little farther on."""
    old = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(3)
    return old, {name: p + by * torch.randn_like(p) for name, p in old.items()}


def test_the_gradient_is_that_of_the_loss_at_the_newer_weights(batch):
    """By hand: old_logp at the older weights, one policy_loss at the newer ones. And no weight is changed by it."""
    model, groups = batch
    old, new = states(model)
    config = replace(Run("four updates, clipped", 0).config, max_new_tokens=6)
    found = gradient(grpo.update, model, None, groups, config, (old, new))
    assert all(torch.equal(p, new[name]) for name, p in model.state_dict().items())

    T = max(g.mask.shape[1] for g in groups)
    tokens, mask = (torch.stack([torch.nn.functional.pad(getattr(g, name), (0, T - g.mask.shape[1])) for g in groups])
                    for name in ("tokens", "mask"))  # [2, 3, T] each
    prompts = [g.prompt for g in groups]
    A = grpo.advantages(torch.tensor([g.rewards for g in groups], dtype=torch.float64))
    model.load_state_dict(old)
    old_logp = grpo.group_logprobs(model, prompts, tokens, mask)[0].detach()
    model.load_state_dict(new)
    loss, seen = grpo.policy_loss(grpo.group_logprobs(model, prompts, tokens, mask)[0], old_logp, None, A, mask)
    want = torch.cat([g.flatten() for g in gradients(model, loss).values()])
    assert seen["clip_frac"] > 0.1 and want.norm() > 0.01
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    model.load_state_dict(old)


@pytest.mark.parametrize("name", [name for name, rung in RUNGS.items() if rung.first])
def test_rungs_that_differ_later_are_one_at_the_first_update(name, batch):
    """Where the ratio is 1 and nothing has moved from the ref_model. Then the table may say "as", and must later on."""
    model, groups = batch
    old, _ = states(model)
    found = []
    for each in (RUNGS[name].first, name):
        with ladder.update_of(RUNGS[each]) as update:
            found.append(gradient(update, model, model, groups, Run(each, 0).config, (old,)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert found[0].norm() > 0.01 and not ladder.measured(name, FRESH)


def test_each_update_is_measured_where_it_differs():
    """At the old samples, those that take several updates or old samples for new ones; else where the first differs."""
    assert {name for name in RUNGS if ladder.measured(name, OLD)} == {
        name for name, rung in RUNGS.items() if "4" in rung.flags or ladder.STALE in rung.edits}
    assert {name for name in RUNGS if ladder.measured(name, LATER) and not ladder.measured(name, FRESH)} == {
        "with a KL", "k3", "k3 times the ratio"}


def test_the_direction_that_others_are_held_against_is_that_of_the_mean_reward():
    """One token of three may be said, twice: all nine completions with their probabilities, and grad sum p r by hand.

    The group's mean holds each completion itself, which leaves (G - 1) / G of it. One mean per completion turns it.
    """
    z = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)  # logits; the first token ends
    logp = z.log_softmax(0)
    completions = [(0,), *((a, b) for a in (1, 2) for b in (0, 1, 2))]
    p = torch.stack([logp[list(c)].sum().exp() for c in completions])
    r = torch.tensor([0.9, -0.5, 0.2, 0.4, 0.1, -0.3, 0.6], dtype=torch.float64)
    want = torch.autograd.grad((p * r).sum(), z, retain_graph=True)[0]
    T, found = 2, {}
    rows = torch.stack([torch.nn.functional.pad(logp[list(c)], (0, T - len(c))) for c in completions])  # [7, T]
    mask = torch.tensor([[True, len(c) == 2] for c in completions])
    for name in (ladder.DIRECTION, "the group's mean"):
        config, total = Run(name, 0).config, 0
        for i in range(7):
            for j in range(7):  # a group of two
                A = grpo.advantages(r[[i, j]][None], config.advantage).double()
                loss, _ = grpo.policy_loss(rows[[i, j]][None], None, None, A, mask[[i, j]][None], config.loss,
                                           max_length=1)
                total = total - p[i].detach() * p[j].detach() * loss
        found[name] = torch.autograd.grad(total, z, retain_graph=True)[0]
    torch.testing.assert_close(found[ladder.DIRECTION], want / 2, rtol=0, atol=1e-7)
    assert torch.cosine_similarity(found["the group's mean"], want, dim=0) < 0.98


# --- runs and the page ------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A writer of made-up results, in folders of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "results")

    def write(name, seed, rouge_l, length=0.0, ended=""):
        row = {"reward/rouge_l": rouge_l, "reward/length": length, "reward": 99.0, "rouge_l": rouge_l,
               "within_10pct": 0.25, "invented": 0.5, "twice": 0.0}
        run = Run(name, seed)
        write_text(run.result, ladder.json.dumps({**run.decides, "ended": ended, "val": [row, row], "curves": {}}))
        return run

    return write


def test_the_table_of_runs_by_hand(results):
    """The reward is what all are paid, whatever else a rung pays; differences are taken seed by seed."""
    for seed, more in enumerate((0.1, 0.3)):
        results(STD, seed, 0.5 + seed, -0.05)
        results("GDPO", seed, 0.5 + seed + more, -0.05)
    results("SAPO", 0, 0.5, ended="A weight is not finite in step 7")
    table = ladder.held_out_table()
    assert "| before | | 0.300 | 25.0% | 0.500 | 50.0% | 0.0% | |\n" in table
    assert "(#divided-by-the-std) | 2 | 0.800 (0.300..1.300) | 25.0% (25.0%..25.0%) | 1.000 (0.500..1.500) |" in table
    assert "| +0.200 (+0.100..+0.300), *divided by the std* |\n" in table
    assert "| [SAPO](#sapo) | 1; A weight is not finite in step 7 | - | - | - | - | - |  |\n" in table
    assert "DAPO" not in table


def test_the_table_of_noise_by_hand(results):
    found = {"signal": 1.0, "spread": 3.0, "noise": 3.0, "error": 0.25, "cosine": 0.5, "cosine_error": 0.125}
    for name, place, more in ((STD, FRESH, {}), ("GSPO", OLD, {"signal": -1.0}), ("SAPO", OLD, {"batches": 1})):
        kept = {**Run(name, 0).decides, "batches": ladder.BATCHES, **found, **more}
        write_text(ladder.noise_file(name, place), ladder.json.dumps(kept))
    table = ladder.noise_table()
    assert "| [divided by the std](#divided-by-the-std) | 3 ± 0.25, cos 0.50 ± 0.12 |  |  |\n" in table
    assert "| [GSPO](#gspo) | as *divided by the std* | as *divided by the std* | not seen above the noise |\n" in table
    assert "| [SAPO](#sapo) | as *divided by the std* | as *divided by the std* |  |\n" in table  # of other batches


def test_a_result_of_another_edit_or_another_setting_is_none(results, monkeypatch):
    run = results("DPPO", 0, 0.5)
    assert ladder.result_of(run)["val"][0]["twice"] == 0
    rung = RUNGS["DPPO"]
    for other in (rung._replace(edits=rung.edits[:1]), rung._replace(flags=(*rung.flags, "--lr", "1e-3")),
                  rung._replace(fork="A loss: SAPO")):
        monkeypatch.setitem(RUNGS, "DPPO", other)
        assert ladder.result_of(run) is None


def test_a_rung_of_a_fork_trains_for_real_and_not_twice(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    write_text(tmp_path / "docs" / "ladder.md", "# Words\n\n## Held out\n\nold\n")
    write_text(tmp_path / "docs" / "fork.md", (ladder.ROOT / "docs" / "fork.md").read_text(encoding="utf-8"))
    monkeypatch.setattr(ladder, "SHARED", FEW)
    monkeypatch.setattr(ladder, "RUNGS", {"SAPO": RUNGS["SAPO"]._replace(beside="")})
    root = ladder.ROOT
    kept = ladder.do(Run("SAPO", 0), 1)
    assert read_json(tmp_path / "runs" / "ladder-SAPO-0" / "config.json")["loss"] == "sapo"
    assert len(kept["curves"]["grad_norm"]) == 2 and len(kept["val"]) == 2
    assert not {"lengths", "summary", "document"} & kept["val"][0].keys()
    (tmp_path / "grpo.py").write_bytes((root / "grpo.py").read_bytes())
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    write_text(Run("SAPO", 0).result, ladder.json.dumps({**kept, "val": [{**row, "reward/rouge_l": 0.5}
                                                                         for row in kept["val"]]}))
    assert ladder.main(["run", "--seeds", "1", "--jobs", "1"]) == 0, capsys.readouterr().err
    text = (tmp_path / "docs" / "ladder.md").read_text(encoding="utf-8")
    assert text.startswith("# Words\n\n## Held out\n\n| rung |") and "\nold\n" not in text and "### SAPO" in text


def test_the_page_is_what_the_results_say():
    """Whoever changes a sentence or a result makes the page anew: python -m studies.ladder tables."""
    text = (ladder.ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
    head, heading, rest = text.partition("## Held out\n\n")
    assert heading + rest == ladder.make_page()
