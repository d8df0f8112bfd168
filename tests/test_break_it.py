"""Each mistake of the gallery by a number that can be worked out; and that the story is as it was when one is over."""

import contextlib
import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import byte_bpe, tiny_model

import grpo
import rollout
import task
import train
from config import Config
from model import load
from plumbing import once
from plumbing.edits import Edit, edited
from plumbing.folder import read_json, write_text
from plumbing.micro_batches import micro_batches
from plumbing.posts import TINY, load_posts
from rewards import parse
from studies import break_it
from studies.break_it import GALLERY, Entry, Run

SICK = [name for name, entry in GALLERY.items() if entry.says]
LONG = torch.tensor([[[-1.0, -2.0, -3.0], [-1.5, -2.5, 0.0]]])  # [B=1, G=2, T=3] log-probabilities
MASK = torch.tensor([[[True, True, True], [True, True, False]]])
A = torch.tensor([[1.0, -1.0]])


def by_mistake(name):
    return edited(GALLERY[name].edits)


# --- edits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in GALLERY.items() if entry.edits])
def test_an_edit_is_made_and_taken_back(name):
    functions = [inspect.unwrap(edit.function) for edit in GALLERY[name].edits]
    before = [f.__code__ for f in functions]
    with pytest.raises(KeyError), by_mistake(name):
        assert all(f.__code__ is not code for f, code in zip(functions, before))
        raise KeyError  # whatever the run ends with
    assert all(f.__code__ is code for f, code in zip(functions, before))


def test_an_edit_of_words_that_are_gone_is_refused():
    for old in ("no such words", "ratio"):
        with pytest.raises(ValueError, match="the story has changed"), edited([Edit(grpo.policy_loss, old, "")]):
            pass


def test_every_mistake_says_what_it_is_and_stands_beside_another_run():
    for name in SICK:
        entry, beside = GALLERY[name], GALLERY[GALLERY[name].beside]
        assert entry.says and entry.why and entry.mend and entry.look in (*break_it.CURVES, "moved", "reward/rouge_l")
        assert (entry.flags, entry.edits) != (beside.flags, beside.edits)
        assert Run(name, 0).decides["config"]["stages"][0].endswith(":50")
    assert len({Run(name, 0).result for name in GALLERY}) == len(GALLERY) and set(break_it.PANELS) <= set(SICK)


# --- masks and tokens -------------------------------------------------------------------------------------------------


def test_the_stop_token_alone_leaves_the_loss(monkeypatch):
    model, seen = tiny_model(), []
    loss = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *args, **more: seen.append(args[4]) or loss(*args, **more))
    tokens = torch.tensor([[5, 6, 2], [7, 2, 0], [8, 9, 4]])  # 2 is the end; the last one was cut
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    groups = [SimpleNamespace(prompt=torch.tensor([3, 4]), tokens=tokens, mask=mask, logp=torch.zeros(3, 3))]
    config = SimpleNamespace(temperature=1.0, loss="grpo", kl="k3", clip_low=0.2, clip_high=0.2)
    for edits in ((), GALLERY["stop token left out"].edits):
        batch, = micro_batches(groups, torch.zeros(1, 3), 1000)
        with edited(edits):
            grpo.micro_batch_loss(model, None, batch, config, {"beta": 0.0})
    assert seen[0].tolist() == [mask.tolist()]
    assert seen[1].tolist() == [[[True, True, False], [True, False, False], [True, True, True]]]


def test_a_guessed_mask_lacks_the_end_and_counts_one_too_few():
    tokens = torch.tensor([[5, 6, 2], [7, 2, 0]])  # 2 is the end
    mask = torch.tensor([[True, True, True], [True, True, False]])
    made = {"tokens": tokens, "mask": mask, "logp": torch.zeros(2, 3), "stopped": torch.tensor([True, True]),
            "ending": None}
    group, = rollout.split([torch.tensor([3])], 2, None, **made)
    assert group.lengths.tolist() == [2, 1]
    with by_mistake("mask guessed from pad"):
        group, = rollout.split([torch.tensor([3])], 2, None, **made)
    assert group.mask.tolist() == [[True, True, False], [True, False, False]] and group.lengths.tolist() == [1, 0]


def test_text_that_is_encoded_again_has_other_ids():
    tokenizer = byte_bpe()
    whole = tokenizer.encode("post").ids
    spelt = [i for letter in "post" for i in tokenizer.encode(letter).ids]
    assert len(whole) < len(spelt) == 4 and tokenizer.decode(spelt) == "post"
    made = {"tokens": torch.tensor([[*spelt, 2]]), "mask": torch.ones(1, 5, dtype=torch.bool),
            "logp": torch.zeros(1, 5), "stopped": torch.tensor([True]), "ending": None}
    with by_mistake("text encoded again"):
        group, = rollout.split([torch.tensor([3])], 1, tokenizer, **made)
    assert group.tokens.tolist() == [[*whole, 2]] and group.mask.all() and group.texts == ["post"]


def test_a_sampler_that_knows_the_other_end_token_never_stops():
    model, tokenizer = load(TINY)
    prompt = task.tokenize(tokenizer, load_posts("tiny", "val")[0], "chatml", 40)
    healthy, = rollout.sample(model, [prompt], 2, 80, tokenizer=tokenizer)
    with by_mistake("one end token of two"):
        group, = rollout.sample(model, [prompt], 2, 80, tokenizer=tokenizer)
    assert healthy.stopped.all() and not group.stopped.any() and group.lengths.tolist() == [80, 80]
    for row, mask, good in zip(healthy.tokens, healthy.mask, group.tokens):  # the answer was good, and then went on
        assert row[mask].tolist() == good[:mask.sum()].tolist() and row[mask][-1] == 2


@pytest.mark.parametrize("name, key, value", [("sampled at 0.7", "temperature", 0.7), ("top-k samples", "top_k", 3),
                                              ("every completion cut", "max_new_tokens", 12)])
def test_the_sampler_is_asked_for_something_else(name, key, value, monkeypatch, tmp_path):
    asked = {}

    def act(*args, **more):
        asked.update(more)
        raise KeyError

    monkeypatch.setattr(task, "tasks_of", lambda *_: [])
    run = {"model": None, "ref_model": None, "tokenizer": None, "posts": [], "scorers": (), "total": 1, "log": None,
           "optimizer": SimpleNamespace(param_groups=[]), "stop": None, "act": act, "learn": None}
    config = Config(template="plain", temperature=1.0, max_new_tokens=80)
    with by_mistake(name), pytest.raises(KeyError):
        train.run_stage(config, tmp_path, SimpleNamespace(end=1), 0, **run)
    assert asked[key] == value and asked["G"] == 8


def test_the_gap_of_a_top_k_sample_is_the_mass_that_was_left_out():
    """The sampler's p is the trainer's, divided by what the three likeliest tokens have."""
    model, prompt = tiny_model(), torch.tensor([3, 4, 5])
    group, = rollout.sample(model, [prompt], 4, 1, top_k=3, stop_ids=[])
    logp, _ = grpo.group_logprobs(model, [prompt], group.tokens[None], group.mask[None])
    mass = model(prompt[None])[0, -1].softmax(-1).topk(3).values.sum()
    torch.testing.assert_close(group.logp - logp[0], -mass.log().expand(4, 1), rtol=0, atol=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_max_for_min_by_the_four_cases():
    """The table of grpo.py, upside down: it stops who went the wrong way and lets go on who went too far."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5]).view(1, 4, 1)
    arguments = (ratio.log(), torch.zeros(1, 4, 1), None, torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
                 torch.ones(1, 4, 1, dtype=torch.bool))
    assert grpo.policy_loss(*arguments)[0].item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    with by_mistake("max for min"):
        assert grpo.policy_loss(*arguments)[0].item() == pytest.approx(-(1.5 + 0.8 - 1.2 - 0.5) / 4)


def test_max_for_min_is_harmless_with_one_update():
    found = []
    for edits in ((), GALLERY["max for min"].edits):
        logp = LONG.clone().requires_grad_()
        with edited(edits):
            grpo.policy_loss(logp, None, None, A, MASK)[0].backward()
        found.append(logp.grad)
    assert torch.equal(*found) and found[0].abs().sum() > 0


def test_k3_upside_down_is_chi_square_less_kl():
    """The mean over what the policy p draws, of a p and a ref q that are written down."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    kl, chi_square = (p * (p / q).log()).sum(), (p ** 2 / q).sum() - 1

    def mean():
        return (p * grpo.kl_estimates(q.log() - p.log(), torch.ones(3).double())["k3"]).sum()

    torch.testing.assert_close(mean(), kl)
    with by_mistake("k3 upside down"):
        torch.testing.assert_close(mean(), chi_square - kl)
    torch.testing.assert_close(mean(), kl)  # and the story is as it was


def test_k1_pulls_nowhere_and_k3_at_the_other_kl():
    """Exact gradients by the logits: sum_o p(o) grad estimate(o), with nothing differentiated through p."""
    z, q = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True), torch.tensor([0.2, 0.3, 0.5])
    logp, q = z.log_softmax(0), q.double()
    p = logp.detach().exp()
    made = grpo.kl_estimates(q.log() - logp, (logp - logp.detach()).exp())

    def gradient(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]

    torch.testing.assert_close(gradient((p * made["k1"]).sum()), torch.zeros(3).double())
    torch.testing.assert_close(gradient((p * made["k3"]).sum()), gradient((q * (q.log() - logp)).sum()))
    torch.testing.assert_close(gradient((p * made["k3_ratio"]).sum()), gradient((logp.exp() * (logp - q.log())).sum()))


def test_a_ratio_with_nothing_detached_has_a_gradient_of_exactly_zero():
    logp = LONG.clone().requires_grad_()
    with by_mistake("gradient of zero"):
        loss, seen = grpo.policy_loss(logp, None, None, A, MASK)
    loss.backward()
    assert torch.equal(logp.grad, torch.zeros(1, 2, 3)) and seen["ratio"] == 1  # every number looks alive
    grpo.policy_loss(logp, None, None, A, MASK)[0].backward()
    assert logp.grad[MASK].abs().min() > 0


def test_tiny_eps_makes_an_advantage_of_rounding():
    """The mean of eight float32 0.7 is 6e-8 too low, and their std is nearly 0: all of them are praised."""
    equal = torch.full((4, 8), 0.7, dtype=torch.float64)
    assert grpo.advantages(equal).tolist() == [[0.0] * 8] * 4
    with by_mistake("tiny eps"):
        assert grpo.advantages(equal).unique().numel() == 1 and grpo.advantages(equal).abs().min() > 0.5


def test_a_bfloat16_weight_forgets_a_step_that_an_adamw_of_ours_makes_by_chance():
    """At 0.1 two bfloat16 numbers lie 5e-4 apart: one in about 500 weights should move by a step of 1e-6."""
    changed = {}
    for name, edits in (("ours", ()), ("torch's", GALLERY["bf16 without rounding"].edits)):
        model = torch.nn.Linear(200, 200, bias=False).bfloat16()
        torch.nn.init.constant_(model.weight, 0.1)
        with edited(edits):
            optimizer = train.make_optimizer(Config(lean=True, lr=1e-6), model)
        before, model.weight.grad = model.weight.detach().clone(), torch.ones(200, 200).bfloat16()
        optimizer.step()
        changed[name] = (model.weight != before).float().mean().item()
    assert changed["torch's"] == 0 and changed["ours"] == pytest.approx(1e-6 / 2 ** -11, rel=0.4)


# --- rewards ----------------------------------------------------------------------------------------------------------


def advantages_of(expression="length", name=None):
    with by_mistake(name) if name else contextlib.nullcontext():
        totals, _ = parse(expression)(["a b"] * 4, [20, 30, 40, 60], "a b", 40)
        return grpo.advantages(torch.tensor([totals], dtype=torch.float64))


def test_a_constant_is_harmless_up_to_where_it_swallows_the_differences():
    plain = advantages_of()
    torch.testing.assert_close(advantages_of(name="100 more"), plain, rtol=0, atol=1e-6)
    assert advantages_of(name="1e13 more").tolist() == [[0.0] * 4]
    assert plain.abs().min() > 0


def test_a_factor_is_harmless_down_to_eps():
    """std is that of -0.5, -0.25, 0, -0.5, times the factor f; an advantage is f * d / (f * std + 1e-4)."""
    d = torch.tensor([-0.5, -0.25, 0.0, -0.5]) + 0.3125
    for f in (100, 1e-5):
        torch.testing.assert_close(advantages_of(f"{f}*length"), (f * d / (f * d.std() + 1e-4))[None])
    assert advantages_of("1e-5*length").abs().max() < 0.05 * advantages_of().abs().max()


def test_characters_are_not_tokens():
    (total,), _ = parse("char_length")(["ten chars."], [4], "", 10)
    assert total == 0 and parse("length")(["ten chars."], [4], "", 10)[0] == [-0.6]


# --- runs, tables, figures --------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A writer of made-up results, in folders of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(break_it, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(break_it, "ROOT", tmp_path)

    def write(name, seed=0, value=0.5, **more):
        curves = {curve: [9.0] * 40 + [value] * 10 for curve in (*break_it.CURVES, "reward/rouge_l")}
        val = [{"within_10pct": 0.2, "rouge_l": 0.7}, {"within_10pct": value, "rouge_l": 0.8}]
        run = Run(name, seed)
        result = {**run.decides, "ended": "", "curves": curves, "val": val, "moved": value, "seconds": 9, **more}
        write_text(run.result, break_it.json.dumps(result))
        return run

    return write


def test_a_result_of_another_edit_or_another_setting_is_none(results, monkeypatch):
    run = results("k3 upside down")
    assert break_it.result_of(run)["moved"] == 0.5
    entry = GALLERY[run.name]
    for other in (entry._replace(edits=(entry.edits[0]._replace(new="k3 = x.expm1() + x"),)),
                  entry._replace(flags=(*entry.flags, "--lr", "1e-3"))):
        monkeypatch.setitem(GALLERY, run.name, other)
        assert break_it.result_of(run) is None


def test_the_page_by_hand(results):
    """Means of the last ten steps over the seeds, least and most; what has not been run is not there."""
    for seed, value in enumerate((0.2, 0.4)):
        results("healthy", seed, value)
    results("stop token left out", 0, 0.5)
    results("lr ten times too high", 0, 0.1, ended="A weight is not finite in step 7")
    results("k1 as a loss", 0, 3.0)  # nothing stands beside it yet
    page = break_it.make_page()
    assert ("(#stop-token-left-out) | `reward/rouge_l` | 0.3 (0.2..0.4) -> 0.5 | 30% (20%..40%) -> 50% | "
            "0.8 (0.8..0.8) -> 0.8 | 1 |" in page)
    assert "| `kl` | 0.3 (0.2..0.4) -> 0.1 | 30% (20%..40%) -> - | " in page and "| [k1 as" not in page
    assert "-> - | 1; A weight is not finite in step 7 |" in page
    assert "- m.advantages, m.mask,\n+ m.advantages, m.mask & " in page
    assert "python train.py --stages" in page and "### k1 as" in page


def test_figures_and_tables_are_made_of_results_alone(results, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "break-it.md").write_text("# Words\n\n## The numbers\n\nold\n", encoding="utf-8")
    assert break_it.main(["figures"]) == 1 and "no result to draw" in capsys.readouterr().err
    results("healthy")
    results("KL off", value=1.0)
    results("length only")
    assert break_it.main(["tables"]) == break_it.main(["figures"]) == 0
    text = (tmp_path / "docs" / "break-it.md").read_text(encoding="utf-8")
    assert text.startswith("# Words\n\n## The numbers\n\n| mistake |") and "| [KL off]" in text
    assert "\nold\n" not in text
    assert (tmp_path / "figures" / "break_it.png").stat().st_size > 5000


def in_this_process(command, stdout, **_):
    """subprocess.run, without the seconds that a new Python takes."""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
        return SimpleNamespace(returncode=break_it.main(command[3:]))


def test_it_trains_for_real_and_not_twice(results, tmp_path, monkeypatch, capsys):
    few = ("--stages", "length:2", "--prompts", "2", "--group", "2", "--eval-posts", "2")
    monkeypatch.setattr(break_it, "GALLERY", {
        "healthy": Entry(few), "zero": GALLERY["gradient of zero"]._replace(flags=few, look="grad_norm")})
    monkeypatch.setattr(once.subprocess, "run", in_this_process)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "break-it.md").write_text("## The numbers\n\n", encoding="utf-8")
    command = ["run", "--seeds", "1", "--jobs", "1"]
    assert break_it.main(command) == 0, capsys.readouterr().err
    healthy, sick = (read_json(Run(name, 0).result) for name in ("healthy", "zero"))
    assert sick["curves"]["grad_norm"] == [0.0, 0.0] and sick["moved"] == 0 and len(sick["val"]) == 2
    assert healthy["moved"] > 0.9 and all(norm > 0 for norm in healthy["curves"]["grad_norm"])
    assert "lengths" not in sick["val"][0] and not re.search("summary|document", str(sick["val"]))
    monkeypatch.setattr(once.subprocess, "run", None)
    assert break_it.main(command) == 0  # no run is begun again


def test_healthy_runs_of_squish_have_curves_too(results, monkeypatch, capsys):
    """They have no wanted length, so no share of it, and adapters in place of weights."""
    few = ("--stages", "squish:2", "--lora", "2", "--prompts", "2", "--group", "2", "--eval-posts", "2")
    monkeypatch.setattr(break_it, "GALLERY", {"SQUISH": Entry(few)})
    monkeypatch.setattr(break_it, "HEALTHY", {"SQUISH": [3], "default": [4]})
    monkeypatch.setattr(once.subprocess, "run", in_this_process)
    assert break_it.main(["healthy", "--jobs", "1", "--only", "SQ"]) == 0, capsys.readouterr().err
    curves = read_json(Run("SQUISH", 3).result)["curves"]
    assert len(curves["kl"]) == len(curves["reward/squish"]) == 2 and "within_10pct" not in curves


def test_a_run_that_explodes_is_a_result_and_one_that_was_stopped_is_not(results, monkeypatch):
    def dies(last):
        def run(command, stdout, **_):
            stdout.write(f"some line\n{last}\n")
            (Run("healthy", 0).folder / "metrics.jsonl").write_text(row, encoding="utf-8")
            return SimpleNamespace(returncode=1)

        return run

    row = break_it.json.dumps({"step": 1, "stage": 1, **dict.fromkeys(break_it.CURVES, math.pi)}) + "\n"
    monkeypatch.setattr(once.subprocess, "run", dies("train.py: The gradient's norm is nan in step 3, before the "
                                                         "first checkpoint: start again with a lower --lr."))
    kept = break_it.do(Run("healthy", 0), 1)
    assert kept["ended"] == "The gradient's norm is nan in step 3" and kept["curves"]["kl"] == [3.142]
    monkeypatch.setattr(once.subprocess, "run", dies("Killed"))
    with pytest.raises(RuntimeError, match="did not reach its end: Killed"):
        break_it.do(Run("healthy", 0), 1)


def test_the_page_is_what_the_results_say():
    """Whoever changes a sentence or a result makes the page anew: python -m studies.break_it tables."""
    text = (break_it.ROOT / "docs" / "break-it.md").read_text(encoding="utf-8")
    assert text.partition("## The numbers\n\n")[2] == break_it.make_page()
