"""Each rule on curves that show just its symptom, and on the gallery's real runs; healthy runs are left alone."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import Config, parse_stages
from plumbing.log import Log
from plumbing.symptoms import RULES, symptoms
from studies.break_it import results

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
    ("All rewards are equal", "beside a reward of 1e+13", run(both={"flat_groups": 1.0, "reward": 1e13}), {}),
    ("All rewards are equal", "the reward is 0 for all", run(both={"flat_groups": 1.0, "reward": 0.0, "kl": 0.0}), {}),
    ("All rewards are equal", "rounding of a mean", run(both={"reward_std": 0.0}), {}),
    ("Did anything train?", "exactly 0 in every step", run(both={"grad_norm": 0.0, "kl": 0.0}), {}),
    ("The reward is flat", "reward_std is 2e-06", run(both={"reward_std": 2e-6}), {}),
    ("Suddenly it writes !!!!", "The entropy is 0.0003 nats",
     run(last={"entropy": 3e-4, "distinct": 0.0, "flat_groups": 1.0, "length": 80.0}), {}),
    ("A perfect reward, and nonsense", "distinct 0.34 -> 0.10", run(last={"distinct": 0.1}), {}),
    ("A perfect reward, and nonsense", "entropy 0.30 -> 1.70", run(last={"entropy": 1.7}), {}),
    ("A perfect reward, and nonsense", "invented 0.01 -> 0.91", run(last={"invented": 0.91}), {}),
    ("A perfect reward, and nonsense", "templated 0.08 -> 0.90, repetition 0.02 -> 0.60",
     run(last={"templated": 0.9, "repetition": 0.6}), {}),
    ("A perfect reward, and nonsense", "flat_groups 0.00 -> 1.00", run(last={"flat_groups": 1.0, "grad_norm": 0.0}),
     {}),
    ("The KL is NaN, or in the billions", "The KL is 3.2 nats", run(last={"kl": 3.2}), {}),
    ("The KL is NaN, or in the billions", "is 0.2 nats a token under --beta 1", run(last={"kl": 0.2}), {"beta": 1.0}),
    ("Every completion is cut off", "cut at 80: they do not end", run(both={"length": 80.0}), {}),
    ("The length is wrong", "is 12 tokens and --target is 40: give length", run(last={"length": 12.0}), {}),
    ("The length is wrong", "char_length counts characters",
     run(both={"reward/char_length": -0.1}, last={"length": 9.0}), {}),
    ("Did anything train?", "The KL is 5e-04 nats a token after 220 steps", run(both={"kl": 5e-4}), {}),
    ("Did anything train?", "The KL is 5e-03 nats a token", run(both={"kl": 5e-3, "reward": 0.1}), {}),
    ("The reward is flat", "under --beta 1: it holds", run(both={"kl": 0.01}), {"beta": 1.0}),
])
def test_each_symptom_is_named_and_nothing_else(heading, words, rows, config):
    line, = said(rows, **config)
    assert words in line and line.endswith(f'See docs/symptoms.md, "{heading}".')


def test_no_more_than_three_lines_the_surest_first():
    lines = said(run(both={"logp_gap": 9.0, "grad_norm": 0.0}, last={"kl": 9.0, "distinct": 0.0, "length": 80.0}))
    assert [line.partition(" ")[0] for line in lines] == ["logp_gap", "grad_norm", "distinct"]


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


# What the runs of the gallery are told, and those that are healthy. Of the others the curves may show it or not.
NAMED = {
    "one end token of two": "Every completion is cut off", "every completion cut": "All rewards are equal",
    "sampled at 0.7": "Sampler and trainer do not agree", "top-k samples": "Sampler and trainer do not agree",
    "characters for tokens": "The length is wrong", "tiny eps": "All rewards are equal",
    "bf16 without rounding": "Did anything train?", "lean, lr 1e-6": "Did anything train?",
    "k1 as a loss": "The KL is NaN, or in the billions", "k3 upside down": "The KL is NaN, or in the billions",
    "k3 as a loss": "The reward is flat", "KL too strong": "The reward is flat",
    "max for min": "The KL is NaN, or in the billions",
    "gradient of zero": "Did anything train?", "reward always 0": "All rewards are equal",
    "every reward 0.7": "All rewards are equal", "KL off": "A perfect reward, and nonsense",
    "lr ten times too high": "The KL is NaN, or in the billions",
    "lr a hundred times too high": "Suddenly it writes !!!!", "lr ten times too low": "Did anything train?",
    "1e13 more": "All rewards are equal", "a factor of 1e-5": "The reward is flat",
}
HEALTHY = ("healthy", "length only", "rouge_l only", "four updates", "100 more")


@pytest.mark.parametrize("name", [*NAMED, *HEALTHY])
def test_the_real_runs_of_the_gallery(name):
    for result in results(name):
        if result["ended"]:  # with an error, whose sentence says what to change
            continue
        rows = [{"stage": 1, **dict(zip(result["curves"], values))} for values in zip(*result["curves"].values())]
        lines = said(rows, **{**result["config"], "max_new_tokens": 80})
        if name in NAMED:
            assert any(NAMED[name] in line for line in lines), (result["config"]["seed"], lines)
        else:
            assert lines == [], (result["config"]["seed"], lines)
