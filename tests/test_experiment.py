"""The experiment's arithmetic, against enumeration and textbook formulas; and that no work is done twice."""

import doctest
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import experiment
from experiment import configurations, holm, interval, measure, run_folder, sign_flip, table
from rewards import distinct, parse
from train import parse_stages


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(experiment)
    assert results.attempted >= 1 and results.failed == 0


# ---------------------------------------------------------------------------------------------------------- statistics


def test_sign_flip_is_the_share_of_all_sign_patterns_that_reach_the_observed_sum():
    difference = np.array([0.5, 1.0, -0.25, 2.0, 0.75, 0.1, 0.0, -0.6])
    patterns = np.array(list(itertools.product((-1, 1), repeat=len(difference))))  # all 256
    exact = np.mean(np.abs(patterns @ difference) >= abs(difference.sum()) - 1e-9)
    assert sign_flip(difference, draws=40_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip(-difference) == sign_flip(difference)  # two-sided
    assert sign_flip(difference * 1e-6) == sign_flip(difference)  # no scale


def test_sign_flip_finds_what_is_there_and_nothing_where_there_is_nothing():
    assert sign_flip(np.full(40, 0.01)) == 1 / 10_000  # the smallest p that 9,999 drawn patterns can give
    assert sign_flip(np.zeros(40)) == 1.0
    assert sign_flip(np.tile([1.0, -1.0], 20)) == 1.0
    noise = [sign_flip(np.random.default_rng(seed).normal(size=50), draws=999) for seed in range(200)]
    assert np.mean(np.array(noise) < 0.05) == pytest.approx(0.05, abs=0.04)  # false alarms come at their rate


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; never falling: the last becomes 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_the_interval_is_the_textbooks_where_the_textbook_has_one():
    """One seed and many posts: mean +- 1.96 standard errors."""
    values = np.random.default_rng(3).normal(5, 2, size=(1, 400))
    low, high = interval(values)
    error = values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_the_interval_knows_that_seeds_differ():
    """Equal posts within a seed: only the seeds vary, and 2,000 posts do not make that certain."""
    values = np.array([[0.2], [0.5], [0.8]]).repeat(2000, axis=1)
    assert interval(values) == (pytest.approx(0.2), pytest.approx(0.8))
    same_posts = np.random.default_rng(0).normal(size=(1, 100)).repeat(3, axis=0)  # three seeds that agree on each post
    assert interval(same_posts) == pytest.approx(interval(same_posts[:1]), abs=0.03)  # are no more posts than one


# -------------------------------------------------------------------------------------------------------------- table


def run_of(lengths, rouge, kl=0.1, words=("a b", "a b", "c d", "e f")):
    return {"target": 30, "kl": kl, "summaries": [
        {"summary": w, "length": n, "rouge_l": r, "meteor": r / 2, "bleu": r / 4}
        for n, r, w in zip(lengths, rouge, itertools.cycle(words))]}


def test_the_columns_by_hand():
    values = measure([run_of([30, 32, 33, 60], [0.1, 0.2, 0.3, 0.4]), run_of([30, 30, 30, 30], [0.5] * 4)])
    assert values["within_2"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert values["within_10pct"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert values["meteor"][0].tolist() == [0.05, 0.1, 0.15, 0.2]
    assert values["distinct"].mean() == pytest.approx(distinct(["a b", "a b", "c d", "e f"])) == 0.75
    assert values["kl"].shape == (2, 1)


def test_a_dagger_marks_what_differs_from_length_only_on_the_same_posts():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.6, size=60)  # posts differ far more than configurations do: only pairing shows it
    results = {"untrained": [run_of([20] * 60, hard, kl=None)],
               "length only": [run_of([30] * 60, hard)],
               "better": [run_of([30] * 60, hard + 0.02)],
               "equal": [run_of([30] * 60, hard + rng.normal(0, 0.02, size=60))]}
    rows = dict(line[2:].split(" | ", 1) for line in table(results, "length only").splitlines()[2:])
    rouge = {name: row.split(" | ")[4] for name, row in rows.items()}
    assert "†" in rouge["better"] and "†" not in rouge["equal"] + rouge["untrained"] + rouge["length only"]
    assert rows["untrained"].endswith("- |")  # a model that was not trained has no KL
    assert rows["length only"].startswith("100% (100..100) | 100% (100..100) | 30.0 (30.0..30.0) | 0.0 (0.0..0.0)")


# --------------------------------------------------------------------------------------------------------------- runs


def test_the_configurations_are_the_published_grid():
    configs = configurations(first=40, steps=100)
    assert len(configs) == 26 and len({tuple(stages) for stages in configs.values()}) == 26
    assert sum("3 x" not in name for name in configs) == 22
    for name, stages in configs.items():
        read = parse_stages(tuple(stages))
        assert read[-1].end == 100  # all of them get the same number of steps
        assert ("length" in read[-1].reward.names) == ("off" not in name)
        assert len(read) == (2 if "staged" in name else 1)
    assert parse(configs["joint rouge_l+bleu"][0].rpartition(":")[0]).names == ("length", "rouge_l", "bleu")
    assert len({run_folder('exp', name, seed) for name in configs for seed in (0, 1)}) == 52


@pytest.fixture
def short(tmp_path, monkeypatch):
    """An experiment of two configurations and two steps each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "configurations", lambda first, steps: {
        "length only": ["length:2"], "staged, length on, bleu": ["length:1", "length+bleu:1"]})
    return ["--seeds", "1", "--posts", "3", "--jobs", "2"]


def test_it_trains_measures_and_does_nothing_twice(short, capsys, monkeypatch):
    assert experiment.main(short) == 0
    said = capsys.readouterr().out
    assert said.count(" s\n") == 2 and "| staged, length on, bleu |" in said
    assert Path("runs/exp.md").read_text() in said
    assert len(list(Path("runs").glob("exp-*-0"))) == 2
    first = json.loads(Path("runs/exp-staged-length-on-bleu-0/test.json").read_text())
    assert len(first["summaries"]) == 3 and first["kl"] >= 0
    monkeypatch.setattr(experiment.subprocess, "run", None)  # no run is begun again
    assert experiment.main(short) == 0
    assert capsys.readouterr().out.splitlines()[2:-2] == said.splitlines()[4:-2]


def test_a_run_that_was_stopped_is_gone_on_with_and_one_that_failed_says_why(short, capsys, monkeypatch):
    real = experiment.subprocess.run
    monkeypatch.setattr(experiment.subprocess, "run", lambda command, **more: real(command + ["--lr", "-1"], **more))
    assert experiment.main(short) == 1
    assert "ended with an error: train.py: --lr" in capsys.readouterr().err
    folder = run_folder("exp", "length only", 0)
    assert not (folder / "test.json").exists()
    monkeypatch.setattr(experiment.subprocess, "run", real)
    assert experiment.main(short) == 0 and (folder / "test.json").exists()


def test_an_experiment_of_another_target_needs_another_name(short, capsys):
    assert experiment.main([*short, "--only", "nothing"]) == 0
    assert [path.name for path in Path("runs").glob("exp-*-0")] == ["exp-length-only-0"]  # the baseline is always there
    assert experiment.main([*short, "--only", "nothing", "--target", "20"]) == 1
    assert "test.json is of 3 posts and target 30: delete it" in capsys.readouterr().err
    (Path("runs") / "exp-length-only-0" / "test.json").unlink()
    (Path("runs") / "exp-untrained" / "test.json").unlink()
    assert experiment.main([*short, "--only", "nothing", "--target", "20"]) == 1
    assert "another target: take another --name" in capsys.readouterr().err
