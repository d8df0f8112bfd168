"""The table by hand, its daggers and its columns; and that no run is done twice."""

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from metrics import distinct
from rewards import parse
from studies import rewards_grid
from studies.rewards_grid import configurations, measure, run_folder, table, train
from train import parse_stages

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
    near_twenty = measure([run_of([17, 18, 22, 23], [0.5] * 4) | {"target": 20}])  # 10% of 20 are 2 tokens as well
    assert near_twenty["within_2"].tolist() == near_twenty["within_10pct"].tolist() == [[0, 1, 1, 0]]


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
    assert "†" not in rows["untrained"]  # though not one of its lengths is near 30: it is no configuration
    assert rows["untrained"].endswith("- |")  # a model that was not trained has no KL
    assert rows["length only"].startswith("100% (100..100) | 100% (100..100) | 30.0 (30.0..30.0) | 0.0 (0.0..0.0)")


@pytest.fixture
def cells(monkeypatch):
    """{title: cell} of the table's row of a configuration; not its intervals, which take the time."""
    def of(runs, baseline):
        titles, _, _, row = table({"length only": baseline, "it": runs}, "length only").splitlines()
        return dict(zip(titles.strip("| ").split(" | "), row.strip("| ").split(" | ")[1:]))

    monkeypatch.setattr(rewards_grid, "interval", lambda *_: (0.0, 0.0))
    return of


@pytest.mark.parametrize("posts, mark", [(7, ""), (9, "†")])
def test_a_dagger_is_holms(cells, posts, mark):
    """The same gain on each of P posts has p = 2 / 2^P; times the six columns that are compared 0.09 for 7, 0.02 for 9.
    """
    baseline = [run_of([33] * posts, [0.5] * posts)] * 2
    better = cells([run_of([30] * posts, [0.6] * posts)] * 2, baseline)
    expected = {"±2": "100%", "ROUGE-L": "0.600", "METEOR": "0.300", "BLEU": "0.150"}
    assert {title: better[title].split()[0] for title in expected} == {k: v + mark for k, v in expected.items()}
    assert all("†" not in value for title, value in better.items() if title not in expected)
    # Two seeds that contradict each other show nothing.
    torn = cells([run_of([33] * posts, [0.6] * posts), run_of([33] * posts, [0.4] * posts)], baseline)
    assert "†" not in "".join(torn.values())


def test_the_spread_is_that_within_a_seed(cells):
    """28 and 32 are 2 from their mean, and so are 38 and 42; that the seeds are ten apart is not for this column."""
    values = cells(*[[run_of([28, 32], [0.5] * 2), run_of([38, 42], [0.5] * 2)]] * 2)
    assert values["spread"].startswith("2.0 ") and values["length"].startswith("35.0 ")


# --------------------------------------------------------------------------------------------------------------- runs


def test_the_configurations_are_the_published_grid():
    configs = configurations(first=40, steps=100)
    assert configs["length only"] == ["length:100"] and configs["joint bleu"] == ["length+bleu:100"]
    assert configs["staged, length off, meteor"] == ["length:40", "meteor:60"]
    assert configs["staged, length on, meteor"] == ["length:40", "length+meteor:60"]
    for heavy in ("rouge_l", "rouge_l+meteor+bleu"):
        assert configs[f"joint, 3 x length, {heavy}"] == [f"3*length+{heavy}:100"]
        assert configs[f"staged, 3 x length on, {heavy}"] == ["length:40", f"3*length+{heavy}:60"]
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
def commands(tmp_path, monkeypatch):
    """The commands that `train` gives. In place of a run, their folder gets what a finished one leaves: two stages."""
    monkeypatch.chdir(tmp_path)
    given = []

    def run(command, stdout, **_):
        given.append(command[2:])
        stdout.write("A line.\n")
        folder = Path("runs") / command[3]
        config = {"stages": ["length:2", "bleu:1"], "target": 20}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        rows = [json.dumps({"step": i, "stage": i}) + "\n" for i in range(3)]
        (folder / "eval.jsonl").write_text("".join(rows), encoding="utf-8")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rewards_grid.subprocess, "run", run)
    return given


def test_a_run_is_begun_with_all_that_it_needs_gone_on_with_and_then_left_alone(commands):
    folder, stages = Path("runs/exp-x-7"), ["length:2", "bleu:1"]
    begun = ["--run", "exp-x-7", "--stages", *stages, "--seed", "7", "--target", "20", "--eval-posts", "32"]
    train(folder, stages, 20, seed=7, threads=1)
    assert commands == [begun]
    train(folder, stages, 20, seed=7, threads=1)  # trained, but not yet tested
    assert commands == [begun, ["--run", "exp-x-7", "--resume"]]
    assert (folder / "log.txt").read_text(encoding="utf-8") == "A line.\n" * 2
    for other in (["length:2", "meteor:1"], 20), (stages, 30):
        with pytest.raises(ValueError, match="other stages or another target"):
            train(folder, *other, seed=7, threads=1)
    (folder / "test.json").touch()
    train(folder, stages, 20, seed=7, threads=1)
    assert len(commands) == 2


def test_a_run_without_an_evaluation_of_each_stage_is_not_finished(commands):
    with pytest.raises(RuntimeError, match="exp-x-7 was stopped before its end"):
        train(Path("runs/exp-x-7"), ["length:2", "bleu:1", "meteor:1"], 20, seed=7, threads=1)


def test_it_is_tested_on_the_first_test_posts_for_its_target_and_not_again(tmp_path, monkeypatch):
    asked = []

    def evaluate(model, tokenizer, posts, config):
        asked.append((model, tokenizer, config.target))
        return {"summaries": [{"id": post.id} for post in posts]}

    monkeypatch.setattr(rewards_grid, "load", lambda folder: (folder, "its tokenizer"))
    monkeypatch.setattr(rewards_grid, "evaluate", evaluate)
    kl = [*range(100, 111), None, *range(1, 10)]  # of 21 steps: the last ten are a skipped one... and 1 to 9
    rows = [json.dumps({"step": step, "stage": 1, "kl": value}) + "\n" for step, value in enumerate(kl, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    first = rewards_grid.test(tmp_path, tmp_path / "model", 4, 20)
    assert asked == [(tmp_path / "model", "its tokenizer", 20)] and (first["target"], first["kl"]) == (20, 5)
    assert [row["id"] for row in first["summaries"]] == ["test-0", "test-1", "test-2", "test-3"]
    assert rewards_grid.test(tmp_path, tmp_path / "model", 2, 20) == first | {"summaries": first["summaries"][:2]}
    for n, target in (5, 20), (4, 30):
        with pytest.raises(ValueError, match="is of 4 posts and target 20: delete it"):
            rewards_grid.test(tmp_path, tmp_path / "model", n, target)
    assert len(asked) == 1


@pytest.fixture
def short(tmp_path, monkeypatch):
    """An experiment of two configurations and two steps each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards_grid, "configurations", lambda first, steps: {
        "length only": ["length:2"], "staged, length on, bleu": ["length:1", "length+bleu:1"]})
    return ["--seeds", "1", "--posts", "3", "--jobs", "2"]


def test_the_runs_are_each_configuration_with_each_seed(short, monkeypatch):
    trained, tested = [], []
    Path("runs").mkdir()
    monkeypatch.setattr(rewards_grid, "train", lambda folder, stages, target, seed, threads: trained.append(
        (folder.name, stages, target, seed)))
    monkeypatch.setattr(rewards_grid, "test", lambda folder, model, n, target: tested.append(
        (folder.name, model, n, target)) or run_of([30] * n, [0.5] * n))
    assert rewards_grid.main([*short, "--jobs", "1", "--seeds", "2", "--target", "20", "--only", "on, bl"]) == 0
    assert trained == [("exp-length-only-0", ["length:2"], 20, 0),
                       ("exp-staged-length-on-bleu-0", ["length:1", "length+bleu:1"], 20, 0),
                       ("exp-length-only-1", ["length:2"], 20, 1),
                       ("exp-staged-length-on-bleu-1", ["length:1", "length+bleu:1"], 20, 1)]
    assert tested == [("exp-untrained", rewards_grid.TINY, 3, 20),
                      *[(name, Path("runs") / name / "model", 3, 20) for name, *_ in trained]]
    trained.clear()
    assert rewards_grid.main([*short, "--jobs", "1", "--seeds", "2", "--fast"]) == 0
    assert [seed for *_, seed in trained] == [0, 0]


def test_it_trains_measures_and_does_nothing_twice(short, capsys, monkeypatch):
    assert rewards_grid.main(short) == 0
    said = capsys.readouterr().out
    assert said.count(" s\n") == 2 and "| staged, length on, bleu |" in said
    assert Path("runs/exp.md").read_text(encoding="utf-8") in said
    assert len(list(Path("runs").glob("exp-*-0"))) == 2
    first = json.loads(Path("runs/exp-staged-length-on-bleu-0/test.json").read_text(encoding="utf-8"))
    assert len(first["summaries"]) == 3 and first["kl"] >= 0
    monkeypatch.setattr(rewards_grid.subprocess, "run", None)  # no run is begun again
    assert rewards_grid.main(short) == 0
    assert capsys.readouterr().out.splitlines()[2:-2] == said.splitlines()[4:-2]


def test_a_run_that_was_stopped_is_gone_on_with_and_one_that_failed_says_why(short, capsys, monkeypatch):
    real = rewards_grid.subprocess.run
    monkeypatch.setattr(rewards_grid.subprocess, "run", lambda command, **more: real(command + ["--lr", "-1"], **more))
    assert rewards_grid.main(short) == 1
    assert "ended with an error: train.py: --lr" in capsys.readouterr().err
    folder = run_folder("exp", "length only", 0)
    assert not (folder / "test.json").exists()
    monkeypatch.setattr(rewards_grid.subprocess, "run", real)
    assert rewards_grid.main(short) == 0 and (folder / "test.json").exists()


def test_an_experiment_of_another_target_needs_another_name(short, capsys):
    assert rewards_grid.main([*short, "--only", "nothing"]) == 0
    assert [path.name for path in Path("runs").glob("exp-*-0")] == ["exp-length-only-0"]  # the baseline is always there
    assert rewards_grid.main([*short, "--only", "nothing", "--target", "20"]) == 1
    assert "test.json is of 3 posts and target 30: delete it" in capsys.readouterr().err
    (Path("runs") / "exp-length-only-0" / "test.json").unlink()
    (Path("runs") / "exp-untrained" / "test.json").unlink()
    assert rewards_grid.main([*short, "--only", "nothing", "--target", "20"]) == 1
    assert "another target: take another --name" in capsys.readouterr().err
