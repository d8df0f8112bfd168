"""The table by hand, its daggers and its columns; that no run is done twice, and that test posts choose nothing."""

import itertools
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from metrics import distinct, own_shares
from plumbing import tables
from plumbing.folder import read_json
from plumbing.once import side_by_side
from plumbing.tables import Column
from rewards import parse
from studies import rewards_grid as grid
from studies.rewards_grid import LENGTHS, Run, configurations, measure, result_of, sets
from train import parse_stages

# -------------------------------------------------------------------------------------------------------------- table


def run_of(lengths, rouge, kl=0.1, words=("a b", "a b", "c d", "e f"), **more):
    """What is kept of a run with these lengths and ROUGE-L values."""
    n = len(lengths)
    texts = list(itertools.islice(itertools.cycle(words), n))
    scores = {"length": list(lengths), "rouge_l": list(rouge), "meteor": [r / 2 for r in rouge],
              "bleu": [r / 4 for r in rouge], "invented": [0.0] * n, "names": [2] * n, "twice": [0.0] * n,
              "distinct": own_shares(texts)}
    return {"config": {"target": more.pop("target", 30)}, "kl": kl, "posts": n, "scores": scores | more}


def table(results, baseline="length only"):
    return tables.table({name: measure(runs) for name, runs in results.items()}, LENGTHS, baseline)


def test_the_columns_by_hand():
    values = measure([run_of([30, 32, 33, 60], [0.1, 0.2, 0.3, 0.4], invented=[0, 0.5, 0, 1]),
                      run_of([30, 30, 30, 30], [0.5] * 4)])
    assert values["within_2"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert values["within_10pct"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert values["nothing_invented"].tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert values["meteor"][0].tolist() == [0.05, 0.1, 0.15, 0.2]
    assert values["distinct"].mean() == pytest.approx(distinct(["a b", "a b", "c d", "e f"])) == 0.75
    assert values["kl"].shape == (2, 1)
    near_twenty = measure([run_of([17, 18, 22, 23], [0.5] * 4, target=20)])  # 10% of 20 are 2 tokens as well
    assert near_twenty["within_2"].tolist() == near_twenty["within_10pct"].tolist() == [[0, 1, 1, 0]]


def test_with_budgets_a_post_is_one_unit():
    """Two budgets of three posts: six summaries, but three posts; each budget has a column of its own."""
    values = measure([run_of([9] * 6, [0.5] * 6, budget=[0.1] * 3 + [0.2] * 3, over=[1, 0, 1, 0, 0, 1])])
    assert values["over"].tolist() == [[0.5, 0, 1]]
    assert values["over@0.1"].tolist() == [[1, 0, 1]] and values["over@0.2"].tolist() == [[0, 0, 1]]


def test_a_dagger_marks_what_differs_from_length_only_on_the_same_posts():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.6, size=60)  # posts differ far more than configurations do: only pairing shows it
    results = {"untrained": [run_of([20] * 60, hard, kl=None)],
               "length only": [run_of([30] * 60, hard)] * 2,
               "better": [run_of([30] * 60, hard + 0.02)],
               "equal": [run_of([30] * 60, hard + rng.normal(0, 0.02, size=60))]}
    rows = dict(line[2:].split(" | ", 1) for line in table(results).splitlines()[2:])
    rouge = {name: row.split(" | ")[5] for name, row in rows.items()}
    assert "†" in rouge["better"] and "†" not in rouge["equal"] + rouge["untrained"] + rouge["length only"]
    assert "†" not in rows["untrained"]  # though not one of its lengths is near 30: it is no configuration
    assert rows["untrained"].endswith("- |")  # a model that was not trained has no KL
    assert rows["length only"].startswith("2 | 100% (100..100) | 100% (100..100) | 30.0 (30.0..30.0) | 0.0 (0.0..0.0)")


@pytest.fixture
def cells(monkeypatch):
    """{title: cell} of the table's row of a configuration; not its intervals, which take the time."""
    def of(runs, baseline):
        titles, _, _, row = table({"length only": baseline, "it": runs}).splitlines()
        return dict(zip(titles.strip("| ").split(" | "), row.strip("| ").split(" | ")[1:]))

    monkeypatch.setattr(tables, "interval", lambda *_: (0.0, 0.0))
    return of


@pytest.mark.parametrize("posts, mark", [(7, ""), (10, "†")])
def test_a_dagger_is_holms(cells, posts, mark):
    """The same gain on each of P posts has p = 2 / 2^P; times the ten columns that are tested 0.16 for 7, 0.02 for 10.
    """
    assert sum(column.tested for column in LENGTHS.values()) == 10
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
    assert values["spread"].startswith("2.0 ") and values["length"].startswith("35.0 ") and values["seeds"] == "2"


def test_a_column_that_a_configuration_lacks_is_a_dash():
    ones = np.ones((1, 3))
    text = tables.table({"a": {"x": ones}, "b": {"x": ones, "y": ones}}, {"x": Column("X"), "y": Column("Y")}, "a",
                        untested=["b"])
    assert text.splitlines()[2:] == ["| a | 1 | 1.000 (1.000..1.000) | - |",
                                     "| b | 1 | 1.000 (1.000..1.000) | 1.000 (1.000..1.000) |"]


# -------------------------------------------------------------------------------------------------------- what is run


def test_the_configurations_are_the_published_grid():
    configs = configurations(first=40, steps=100)
    assert configs["length only"] == ["length:100"] and configs["joint bleu"] == ["length+bleu:100"]
    assert configs["staged, length off, meteor"] == ["length:40", "meteor:60"]
    assert configs["staged, length on, meteor"] == ["length:40", "length+meteor:60"]
    for heavy in ("rouge_l", "rouge_l+meteor+bleu"):
        assert configs[f"joint, 3 x length, {heavy}"] == [f"3*length+{heavy}:100"]
        assert configs[f"staged, 3 x length on, {heavy}"] == ["length:40", f"3*length+{heavy}:60"]
    assert len(configs) == 26 and len({tuple(stages) for stages in configs.values()}) == 26
    for name, stages in configs.items():
        read = parse_stages(tuple(stages))
        assert read[-1].end == 100  # all of them get the same number of steps
        assert ("length" in read[-1].reward.names) == ("off" not in name)
        assert len(read) == (2 if "staged" in name else 1)
    assert parse(configs["joint rouge_l+bleu"][0].rpartition(":")[0]).names == ("length", "rouge_l", "bleu")


VAL = {"within_10pct": 0.5, "rouge_l": 0.5, "invented": 0.1}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder for results, and a function that puts one there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results")

    def put(run, **val):
        run.result.parent.mkdir(parents=True, exist_ok=True)
        kept = run_of([40] * 3, [0.5] * 3) | {"config": vars(run.config), "model": grid.embedded(*grid.SPLITS),
                                              "val": VAL | val}
        run.result.write_text(json.dumps(kept), encoding="utf-8")
    return put


@pytest.fixture
def tuned(results):
    for runs in grid.tuning(40, 100).values():
        for run in runs:
            results(run, rouge_l=0.9 if (run.config.lr, run.config.beta) == (6e-4, 0.2) else 0.5,
                    # A reward of its own that is higher, and false, is not what is wanted.
                    invented=0.9 if run.config.beta == 0.05 else 0.1, reward=1 / run.config.beta)


def test_each_family_is_tuned_on_val_by_what_is_wanted(results):
    tried = grid.tuning(40, 100)
    assert set(tried) == {*grid.FAMILIES} and {len(runs) for runs in tried.values()} == {9}
    assert {run.seed for runs in tried.values() for run in runs}.isdisjoint(range(5))
    assert all(run.config.advantage == ("gdpo" if name == "gdpo" else "group") for name, runs in tried.items()
               for run in runs)
    for number, run in enumerate(tried["joint"]):
        assert grid.chosen("joint", 40, 100) == ()  # not before the last one is there
        results(run, within_10pct=0.5 + (number == 5) / 10)
    best = tried["joint"][5].config
    assert grid.chosen("joint", 40, 100) == ("--lr", str(best.lr), "--beta", str(best.beta))
    results(tried["joint"][2], rouge_l=0.7)
    assert grid.chosen("joint", 40, 100)[1] == str(tried["joint"][2].config.lr)
    results(tried["joint"][2], rouge_l=0.7, invented=0.4)  # true is worth as much as near
    assert grid.chosen("joint", 40, 100)[1] == str(best.lr)
    # The lowest of the learning rates was best, and a middle weight of the KL.
    assert [grid.at_edge(("--lr", lr, "--beta", beta)) for lr, beta in (("0.0006", "0.1"), ("0.0003", "0.1"))] == [
        "", " (--lr at the edge of what was tried)"]
    assert grid.at_edge(("--lr", "0.0012", "--beta", "0.05")) == " (--lr and --beta at the edge of what was tried)"
    assert grid.at_edge(()) == ""
    assert [grid.family(name) for name in ("joint bleu", "joint, 3 x length, rouge_l", "staged, length on, bleu")] == [
        "joint", "joint, 3 x length", "staged, length on"]


def test_who_gets_how_many_seeds(tuned):
    everything = sets(40, 100)
    seeds = {name: [run.seed for run in everything["grid"] if run.name == name] for name in configurations(40, 100)}
    five = [name for name, each in seeds.items() if each == [0, 1, 2, 3, 4]]
    assert len(five) == 13 and "length only" in five and "joint rouge_l+meteor+bleu" not in five
    assert all(each == [0, 1, 2] for name, each in seeds.items() if name not in five)
    for name, expected in {"default": {"untrained": 1, "default": 5, "lean": 3}, "gdpo": {}}.items():
        assert {run.name: 1 + run.seed for run in everything[name]} == expected
    assert {1 + run.seed for run in everything["squish"] if run.name != "untrained"} == {1, 2, 3}
    assert {(run.name, run.config.target) for run in everything["t20"]} == {
        (name, 20) for name in ("untrained", *configurations(40, 100)) if name == "length only" or name == "untrained"
        or name.endswith(" rouge_l")}
    runs = [run for each in everything.values() for run in each]
    assert len({run.result for run in runs}) == len({run.folder for run in runs}) == len(runs)
    for run in runs:
        parse_stages(run.config.stages)  # each is a run that train.py takes
        assert run.result.name.startswith(tuple("abcdefghijklmnopqrstuvwxyz3"))
    joint = next(run for run in everything["grid"] if run.name == "joint bleu")
    assert (joint.config.lr, joint.config.beta) == (6e-4, 0.2)  # what was chosen for its family


def test_gdpo_is_tried_on_the_four_that_val_likes_best(tuned, results):
    runs = sets(40, 100)["grid"]
    liked = ["joint bleu", "joint rouge_l+bleu", "staged, length off, meteor+bleu", "staged, length on, bleu"]
    assert not grid.best(runs)
    for run in runs:
        # A single reward cannot be taken apart, however good it is.
        results(run, rouge_l=0.9 if run.name == "length only" else 0.5 + (run.name in liked) / 10)
    assert sorted(grid.best(runs)) == liked
    gdpo = sets(40, 100)["gdpo"]
    assert {run.name for run in gdpo} == {*liked} and {run.config.advantage for run in gdpo} == {"gdpo"}
    assert {run.config.beta for run in gdpo} == {0.2}


# --------------------------------------------------------------------------------------------------------------- runs

FLAGS = ("--stages", "length:2", "bleu:1", "--target", "20")


def test_a_result_counts_for_its_settings_and_its_model_only(results, monkeypatch):
    run = Run("x", "a name", 7, FLAGS)
    assert result_of(run) is None
    results(run)
    assert result_of(run)["posts"] == 3
    for other in (Run("x", "a name", 7, (*FLAGS, "--beta", "0.3")), Run("x", "a name", 8, FLAGS)):
        assert result_of(other) is None and other.folder != run.folder
    kept = read_json(run.result)
    del kept["config"]["overlong"], kept["config"]["rollouts"]  # settings that are newer than the result: both were off
    run.result.write_text(json.dumps(kept), encoding="utf-8")
    assert result_of(run) and result_of(Run("x", "a name", 7, (*FLAGS, "--overlong", "5"))) is None
    folder = run.folder
    monkeypatch.setattr(grid, "embedded", lambda *_: "another model")
    assert result_of(run) is None and run.folder != folder


@pytest.fixture
def commands(results, monkeypatch):
    """The commands that `train` gives. In place of a run, their folder gets what a finished one leaves: two stages."""
    given = []

    def run(command, stdout, **_):
        given.append(command[2:])
        stdout.write("A line.\n")
        folder = Path("runs") / command[3]
        (folder / "config.json").write_text("{}", encoding="utf-8")
        rows = [json.dumps({"step": i, "stage": i, **VAL}) + "\n" for i in range(3)]
        (folder / "eval.jsonl").write_text("".join(rows), encoding="utf-8")
        kl = [*range(100, 111), None, *range(1, 10)]  # of 21 steps: the last ten are a skipped one and 1 to 9
        rows = [json.dumps({"step": i, "stage": 1, "kl": k, "seconds": 2.0}) + "\n" for i, k in enumerate(kl, 1)]
        (folder / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(grid.subprocess, "run", run)
    return given


def test_a_run_is_begun_gone_on_with_measured_and_then_left_alone(commands, monkeypatch, capsys):
    run, asked = Run("x", "a name", 7, FLAGS), []

    def evaluate(model, tokenizer, posts, config, scorers):
        asked.append((model, [post.id for post in posts], config.target, scorers))
        row = {"summary": "Tom won. Tom won.", "length": 5, "invented": 1 / 3, "missing": True}
        return {"summaries": [{"id": post.id, **row} for post in posts]}

    monkeypatch.setattr(grid, "load", lambda folder: (folder, "its tokenizer"))
    monkeypatch.setattr(grid, "evaluate", evaluate)
    args = SimpleNamespace(jobs=1, posts=2)
    grid.train(run, 1)  # ... and then it was killed
    grid.do([run], args, 1)
    grid.do([run], args, 1)
    begun = ["--run", run.folder.name, *FLAGS, "--seed", "7"]
    assert commands == [begun, ["--run", run.folder.name, "--resume"]]
    assert (run.folder / "log.txt").read_text(encoding="utf-8") == "A line.\n" * 2
    assert asked == [(run.folder / "model", ["test-0", "test-1"], 20, [])]
    kept = read_json(run.result)
    assert (kept["kl"], kept["seconds"], kept["posts"], kept["val"]["rouge_l"]) == (5, 42, 2, 0.5)
    assert kept["scores"] == {"length": [5, 5], "invented": [0.3333] * 2, "missing": [1, 1], "distinct": [0.3, 0.3],
                              "twice": [1, 1]} and "Tom" not in run.result.read_text(encoding="utf-8")
    assert capsys.readouterr().out.count("0 of 1 runs to do") == 1
    grid.do([run], SimpleNamespace(jobs=1, posts=3), 1)  # more posts: measured anew
    assert read_json(run.result)["posts"] == 3
    grid.do([Run("x", "untrained", 0, FLAGS), Run("tune", "y", 9, FLAGS)], args, 1)
    assert [model for model, *_ in asked[2:]] == [grid.TINY]  # not trained; and tuning sees no test post
    assert "scores" not in read_json(Run("tune", "y", 9, FLAGS).result)


def test_a_run_without_an_evaluation_of_each_stage_is_not_finished(commands):
    run = Run("x", "a name", 7, ("--stages", "length:2", "bleu:1", "meteor:1"))
    with pytest.raises(RuntimeError, match="x-a-name-7-.* was stopped before its end"):
        grid.train(run, 1)


def test_a_run_that_failed_says_why(results):
    with pytest.raises(RuntimeError, match="ended with an error: train.py: --lr"):
        grid.train(Run("x", "a name", 0, (*FLAGS, "--lr", "-1")), 1)


def test_the_command_waits_for_what_it_needs_and_makes_tables_of_results_alone(results, monkeypatch, capsys):
    monkeypatch.setattr(grid, "do", lambda runs, args, threads: done.extend((run.name, run.seed) for run in runs))
    done = []
    assert grid.main(["run", "--sets", "grid", "gdpo"]) == 0
    said = capsys.readouterr().out
    assert done == [("untrained", 0)] and "grid waits for python -m studies.rewards_grid tune." in said
    assert "gdpo waits for the grid." in said and "There is no result yet" in said
    done.clear()
    assert grid.main(["run", "--sets", "default", "--only", "nothing", "--seeds", "2"]) == 0
    assert done == [("untrained", 0), ("default", 0), ("default", 1)]  # baselines are always there
    for run in sets(40, 100)["default"]:
        results(run)
    monkeypatch.setattr(grid.subprocess, "run", None)
    monkeypatch.setattr(grid, "evaluate", None)
    capsys.readouterr()
    assert grid.main(["tables"]) == 0
    said = capsys.readouterr().out
    assert "## default" in said and "| lean | 3 | 100% (100..100)" in said and "9 of 9 runs" in said


def test_it_trains_and_measures_for_real(results, monkeypatch, capsys):
    """Two steps, a joint and a staged run: what train.py and evaluate really leave is what is kept."""
    monkeypatch.setattr(grid, "configurations", lambda first, steps: {
        "length only": ["length:2"], "staged, length on, bleu": ["length:1", "length+bleu:1"]})
    monkeypatch.setattr(grid, "chosen", lambda *_: ("--eval-posts", "2", "--prompts", "2", "--group", "2"))
    command = ["run", "--sets", "grid", "--seeds", "1", "--posts", "3", "--jobs", "1"]
    assert grid.main(command) == 0
    said = capsys.readouterr().out
    assert said.count(" s\n") == 3 and "| staged, length on, bleu | 1 |" in said
    kept = read_json(grid.RESULTS / "grid" / "staged-length-on-bleu-0.json")
    assert kept["kl"] >= 0 and {len(column) for column in kept["scores"].values()} == {3}
    monkeypatch.setattr(grid.subprocess, "run", None)  # no run is begun again
    assert grid.main(command) == 0
    assert capsys.readouterr().out.partition("## grid")[2] == said.partition("## grid")[2]


def test_after_an_error_nothing_new_is_begun():
    """What runs then is awaited; the rest of the queue is left, and a night of runs ends with the first mistake."""
    begun = []

    def work(job):
        begun.append(job)
        if job == 0:
            raise RuntimeError("the first one fails")
        time.sleep(0.05)

    with pytest.raises(RuntimeError, match="the first one fails"):
        side_by_side(work, range(20), 2)
    assert 0 in begun and len(begun) < 10
