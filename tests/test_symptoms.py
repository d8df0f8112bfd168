"""Each rule on curves that show just its symptom, and on the gallery's real runs; healthy runs are left alone."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import Config, parse_stages
from plumbing.folder import read_json
from plumbing.log import Log
from plumbing.symptoms import RULES, symptoms
from studies.break_it import GALLERY, HEALTHY, Run, result_of, results

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"target": 40, "beta": 0.1, "lean": False, "max_new_tokens": 80}
# The default's first ten steps and its last ten, as docs/read-your-run.md has them.
BEGIN = {"reward": -0.25, "reward_std": 0.18, "reward/length": -0.25, "length": 42.3, "within_10pct": 0.33, "kl": 0.01,
         "entropy": 0.30, "distinct": 0.34, "templated": 0.08, "repetition": 0.023, "invented": 0.012,
         "flat_groups": 0.0, "grad_norm": 0.35, "logp_gap": 2e-5}
END = BEGIN | {"reward": 0.52, "reward_std": 0.31, "reward/length": -0.06, "length": 41.0, "within_10pct": 0.88,
               "kl": 0.10, "entropy": 0.14, "distinct": 0.22, "templated": 0.06, "repetition": 0.012, "invented": 0.005,
               "grad_norm": 0.32}


def run(first=(), last=(), both=(), steps=220):
    """Rows of a healthy run, with some numbers of its first and of its last steps changed."""
    ends = BEGIN | dict(both) | dict(first), END | dict(both) | dict(last)
    return [{"step": i + 1, "stage": 1, **ends[i >= steps // 2]} for i in range(steps)]


def said(rows, **config):
    return symptoms(rows, SimpleNamespace(**CONFIG | config))


def test_a_healthy_run_and_a_short_one_are_left_alone():
    assert said(run()) == []
    assert said(run(both={"logp_gap": 9.0}, steps=19)) == [] != said(run(both={"logp_gap": 9.0}, steps=20))
    lean = run(both={"logp_gap": 0.4})  # the most that the default run had in bfloat16, at any token
    assert said(lean, lean=True) == [] and "logp_gap is 0.4" in said(lean)[0]
    assert said(run(both={"kl": 5e-4}, steps=30)) == []  # too early to tell
    assert said(run(both={"kl": 5e-3})) == []  # slow, but the reward has risen
    # SQUISH, at the far end of what its healthy runs do: over their budgets at first, no wanted length, short groups.
    squish = run({"length": 25, "flat_groups": 0.33, "reward_std": 0.04, "entropy": 0.64, "distinct": 0.59},
                 {"length": 9, "kl": 0.45, "reward_std": 0.036, "entropy": 0.22, "distinct": 0.32})
    for row in squish:
        del row["within_10pct"], row["reward/length"]
    assert said(squish, max_new_tokens=100) == []
    assert said(run(last={"entropy": 0.40})) == said(run(last={"invented": 0.07})) == []  # one weak sign is none
    assert said(run(both={"reward_std": 0.0}, last={"length": 9.0}))[1:] == []  # nobody was paid for a length
    sure = {"entropy": 0.004, "distinct": 0.13, "flat_groups": 0.9}  # a short task, solved: all eight write one text
    assert said(run(last=sure)) == [] != said(run(last=sure, both={"reward": 0.1}))
    no_kl = run(both={"kl": None})
    assert said(no_kl, beta=0.0) == []


def test_older_lines_without_a_number_are_no_error():
    rows = run()
    for row in rows:
        del row["invented"], row["distinct"]
    assert said(rows) == []


@pytest.mark.parametrize("heading, words, rows, config", [
    ("Sampler and trainer do not agree", "logp_gap is 2.3,", run(both={"logp_gap": 2.3}), {}),
    ("All rewards are equal", "every completion has 12 tokens",
     run(both={"flat_groups": 1.0, "length": 12.0, "reward_std": 0.0}, last={"grad_norm": 0.0}), {}),
    ("All rewards are equal", "every completion has 12 tokens",
     [*run(both={"flat_groups": 0.95, "length": 11.9}, steps=5),
      *run(both={"flat_groups": 1.0, "length": 12.0}, steps=45)], {}),
    ("All rewards are equal", "beside a reward of 1e+13", run(both={"flat_groups": 1.0, "reward": 1e13}), {}),
    ("All rewards are equal", "the reward is 0 for all", run(both={"flat_groups": 1.0, "reward": 0.0, "kl": 0.0}), {}),
    ("All rewards are equal", "rounding of a mean", run(both={"reward_std": 0.0}), {}),
    ("Did anything train?", "exactly 0 in every step", run(both={"grad_norm": 0.0, "kl": 0.0}), {}),
    ("The reward is flat", "reward_std is 2e-06", run(both={"reward_std": 2e-6}), {}),
    ("Suddenly it writes !!!!", "The entropy is 0.0003 nats",
     run(last={"entropy": 3e-4, "distinct": 0.0, "flat_groups": 1.0, "length": 80.0, "reward": -4.0}), {}),
    ("A perfect reward, and nonsense", "distinct 0.34 -> 0.10", run(last={"distinct": 0.1, "reward": -0.25}), {}),
    ("A perfect reward, and nonsense", "entropy 0.30 -> 1.70", run(last={"entropy": 1.7}), {}),
    ("A perfect reward, and nonsense", "invented 0.01 -> 0.91", run(last={"invented": 0.91}), {}),
    ("A perfect reward, and nonsense", "entropy 0.30 -> 0.40, invented 0.01 -> 0.07",
     run(last={"entropy": 0.40, "invented": 0.07}), {}),
    ("A perfect reward, and nonsense", "templated 0.08 -> 0.90, repetition 0.02 -> 0.60",
     run(last={"templated": 0.9, "repetition": 0.6}), {}),
    ("A perfect reward, and nonsense", "entropy 0.30 -> 0.05", run(last={"entropy": 0.05, "reward": -0.25}), {}),
    ("A perfect reward, and nonsense", "flat_groups 0.00 -> 1.00",
     run(last={"flat_groups": 1.0, "grad_norm": 0.0, "reward": -0.25}), {}),
    ("The KL is NaN, or in the billions", "The KL is 3.2 nats", run(last={"kl": 3.2}), {}),
    ("The KL is NaN, or in the billions", "is 0.07 nats a token under --beta 1", run(last={"kl": 0.07}), {"beta": 1.0}),
    ("Every completion is cut off", "cut at 80: they do not end", run(both={"length": 80.0}), {}),
    ("The length is wrong", "is 12 tokens and --target is 40: give length", run(last={"length": 12.0}), {}),
    ("The length is wrong", "char_length counts characters",
     run(both={"reward/char_length": -0.1}, last={"length": 9.0}), {}),
    ("The length is wrong", "is 9 tokens and --target is 40: give length",
     [{**row, "reward/length_exp": 0.1} for row in run(last={"length": 9.0}) if row.pop("reward/length")], {}),
    ("Did anything train?", "The KL is 5e-04 nats a token after 220 steps", run(both={"kl": 5e-4}), {}),
    ("Did anything train?", "The KL is 5e-03 nats a token", run(both={"kl": 5e-3, "reward": 0.1}), {}),
    ("The reward is flat", "under --beta 1: it holds", run(both={"kl": 0.01}), {"beta": 1.0}),
])
def test_each_symptom_is_named_and_nothing_else(heading, words, rows, config):
    line, = said(rows, **config)
    assert words in line and line.endswith(f'See docs/symptoms.md, "{heading}".')


def test_no_more_than_three_lines_the_surest_first():
    lines = said(run(both={"logp_gap": 9.0, "grad_norm": 0.0}, last={"kl": 9.0, "repetition": 0.9, "length": 80.0}))
    assert [line.partition(" ")[0] for line in lines] == ["logp_gap", "grad_norm", "repetition"]


def test_every_rule_has_its_heading_on_the_page():
    text = (ROOT / "docs" / "symptoms.md").read_text(encoding="utf-8")
    assert {heading for heading, _ in RULES} <= set(re.findall("^## (.*)$", text, re.M))


def test_a_run_says_it_at_its_end(tmp_path, capsys):
    log = Log(tmp_path, Config(max_new_tokens=80), parse_stages(("length:220",)), 0, "target 40 tokens")
    log.append("eval", {"step": 220, "stage": 1, "n": 1, "reward": -0.1, "length": 41.0, "length_std": 2.0,
                        "within_2": 0.5, "within_10pct": 0.9, "distinct": 0.5})
    for rows, found in ((run(), 0), (run(both={"logp_gap": 2.3}, last={"kl": 3.2}), 2)):
        log.rows = rows
        log.finish(seconds=60.0, peak=None)
        out = capsys.readouterr().out
        assert out.count("What the curves say: ") == found and "Done in 1:00" in out
    assert "What the curves say: logp_gap is 2.3" in out.partition("Done in 1:00")[2]


# What the gallery's runs are told, whatever their seed: words of a line. lean, lr 1e-6 is healthy, but for its rate.
NAMED = {
    "mask guessed from pad": "logp_gap is", "one end token of two": "they do not end",
    "every completion cut": "every completion has 12 tokens", "sampled at 0.7": "logp_gap is",
    "top-k samples": "logp_gap is", "characters for tokens": "char_length counts characters",
    "text encoded again": "logp_gap is", "tiny eps": "the rounding of a mean",
    "bf16 without rounding": "the policy has hardly moved", "lean, lr 1e-6": "the policy has hardly moved",
    "k1 as a loss": "look at the estimator", "k3 as a loss": "it holds the policy",
    "k3 upside down": "",  # it ends with an error, whose sentence says what to change
    "gradient of zero": "grad_norm is exactly 0", "reward always 0": "the reward is 0 for all",
    "every reward 0.7": "the reward is 0.7 for all", "KL off": "invented 0.0", "KL too strong": "it holds the policy",
    "lr ten times too high": "the policy has left its reference model",
    "lr a hundred times too high": "one completion has won", "lr ten times too low": "the policy has hardly moved",
    "filler": "invented 0.0", "1e13 more": "a difference is lost", "a factor of 1e-5": "beside the 1e-4",
}
# Nothing is said of these: they are healthy, or their mistake is harmless here, or it shows beside another run only.
SILENT = {
    **dict.fromkeys(("healthy", "length only", "rouge_l only", "four updates"), "healthy"),
    "100 more": "harmless: the mean takes it out",
    "mean per token": "another choice: beside a run with the other one the length differs by two tokens",
    "group of 2": "another choice at equal cost", "group of 32": "another choice at equal cost",
    "one reward wins": "nearly harmless here: the reward that wins helps the other one",
    "stop token left out": "its length is learnt all the same, from the words before; ROUGE-L is 0.04 lower",
    "max for min": "its KL is twice as large, and still far from 1; ROUGE-L is 0.05 lower",
}


def lines_of(result, cut):
    stages = [stage for stage in parse_stages(result["config"]["stages"]) for _ in range(stage.first, stage.end)]
    rows = [{"stage": stage.number, **dict(zip(result["curves"], values))}
            for stage, values in zip(stages, zip(*result["curves"].values()))]
    return said(rows, **{**result["config"], "max_new_tokens": cut})


def test_every_run_of_the_gallery_is_named_or_there_is_a_reason():
    assert {*NAMED} | {*SILENT} == {*GALLERY} - {*HEALTHY} and not {*NAMED} & {*SILENT}


@pytest.mark.parametrize("name", [*NAMED, *SILENT])
def test_the_real_runs_of_the_gallery(name):
    for result in results(name):
        lines = lines_of(result, 80)
        if name == "k3 upside down":
            assert "norm is" in result["ended"]
        elif name in NAMED:
            assert any(NAMED[name] in line for line in lines), (result["config"]["seed"], lines)
        else:
            assert lines == [], (result["config"]["seed"], lines)


@pytest.mark.parametrize("name, cut", [("default", 80), ("target 20", 40), ("target 20, solved", 40), ("SQUISH", 0),
                                       ("SQUISH, larger steps", 0)])
def test_healthy_runs_of_full_length_are_left_alone(name, cut):
    """Made by `python -m studies.break_it healthy`."""
    for seed in HEALTHY[name]:
        assert lines_of(result_of(Run(name, seed)), cut) == [], seed


def test_what_a_healthy_kl_costs():
    """The bound of `runs_away` lies beyond the dearest of the experiments' runs. (What they keep is its mean.)"""
    costs = [read["config"]["beta"] * read["kl"] for path in sorted((ROOT / "studies" / "results").glob("*/*.json"))
             if path.parent.name in ("default", "grid", "gdpo", "squish", "t20", "tune")
             and (read := read_json(path))["kl"] is not None]
    assert len(costs) >= 235 and 0.03 < max(costs) < 0.06 / 1.5
