"""What a model is worth, as a lesson: intervals, samples, a judge's scores, and whether two runs differ.

Oracles: numbers by hand, the loop's own evaluation, scipy's paired tests, and a judge that is made up.
"""

import doctest
import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

import eval as evaluation
import train
from config import Config
from metrics import distinct
from model import load
from plumbing import compare, power, results
from plumbing.evaluation import say_row
from plumbing.posts import TINY, Post, load_posts
from plumbing.results import by_post, figures, histogram, near, order
from squish import squish
from tests.helpers import edit_json

FEW = ["--n", "4", "--max-new-tokens", "46"]


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two short runs, joint and staged, and one on other posts."""
    folder = tmp_path_factory.mktemp("two")
    small = ["--prompts", "2", "--group", "2", "--eval-posts", "2", "--max-new-tokens", "46", "--lr", "3e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*small, "--run", "joint", "--stages", "rouge_l+length:3"]) == 0
        assert train.main([*small, "--run", "staged", "--stages", "length:1", "rouge_l + length:2", "--seed", "1"]) == 0
        assert train.main([*small, "--run", "paid", "--stages", "meteor:1"]) == 0
    return folder / "runs"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_it_runs_without_a_console(monkeypatch):
    """In a notebook the screen is an object of another kind; where it was closed before the start there is none."""
    for screen in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", screen)
        with pytest.raises(SystemExit) as ended:
            evaluation.main(["--help"])
        assert ended.value.code == 0 and (screen is None or "RUN_OR_MODEL" in screen.getvalue())
        if sys.stdout is not screen:
            sys.stdout.close()  # the null device that stood in for it


def refused(capsys, *args) -> str:
    try:
        assert evaluation.main(list(args)) == 1
    except SystemExit as e:
        assert e.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_worked_examples_in_the_docstrings_hold():
    found = doctest.testmod(results)
    assert found.attempted >= 1 and found.failed == 0


# --- tables -----------------------------------------------------------------------------------------------------------


def row(length, target=100, **more):
    return {"length": length, "target": target, "stopped": True, "reward": 0.0, **more}


def test_shares_of_lengths_by_hand():
    """Exactly 100; 2 off; 5 off; 10 off; 11 over; each boundary counts."""
    rows = [row(n) for n in (100, 102, 95, 110, 111)]
    cells = figures({"summaries": rows, "n": 5, "length_std": 6.0, "distinct": 0.5, "templated": 0.0})
    got = {title: cells[title][0] for title in cells}
    assert [got[title] for title in ("on target", "within 2 tokens", "within 5%", "within 10%", "over the target")] == [
        "20.0%", "40.0%", "60.0%", "80.0%", "60.0%"]
    assert got["length, tokens"] == "103.6" and got["ended by itself"] == "100.0%"
    assert "over budget" not in got and "ROUGE-L" not in got  # what no row has, has no line
    with_budget = row(100, budget=0.1, used=1.09, over=True)
    assert near(with_budget, 0.1) and not near(with_budget, 0.05)
    cells = figures({"summaries": [with_budget] * 5, "n": 5, "length_std": 6.0, "distinct": 0.5, "templated": 0.0})
    assert "on target" not in cells and cells["over budget"][0] == "100.0%"


def test_a_post_counts_once_however_many_samples_and_budgets_it_has():
    """Two budgets of three posts with two samples: 12 rows, in the order in which they are made."""
    rows = [{"budget": b, "post": p, "value": 100 * p + 10 * k + i} for i, b in enumerate((0.1, 0.2)) for p in range(3)
            for k in range(2)]
    assert [r["post"] for r in rows] == order(rows, 3)
    assert by_post(rows, "value", 3).tolist() == [5.5, 105.5, 205.5]
    rows[0]["value"] = rows[4]["value"] = rows[5]["value"] = rows[10]["value"] = rows[11]["value"] = None
    assert by_post(rows, "value", 3)[0] == pytest.approx((10 + 1 + 11) / 3) and math.isnan(by_post(rows, "value", 3)[2])


def test_a_histogram_counts_every_summary_once():
    lengths = np.random.default_rng(0).integers(0, 90, size=300)
    text = histogram([row(int(n), target=30) for n in lengths])
    assert sum(int(line.split("|")[1].replace("#", " ").split()[0]) for line in text.splitlines()) == 300
    assert text.count("<- target") == 1 and len(text.splitlines()) <= 12


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return load(TINY)


def test_samples_are_seeded_and_scored_as_in_training(tiny):
    posts, config = load_posts("tiny", "test")[:3], Config(max_new_tokens=34, stages=("rouge_l+length+distinct:1",))
    one, again, other = (evaluation.evaluate(*tiny, posts, config, samples=4, seed=s, batch=b)
                         for s, b in ((0, 64), (0, 4), (1, 64)))
    assert one == again and one["summaries"] != other["summaries"]
    rows = one["summaries"]
    assert [r["id"] for r in rows] == [p.id for p in posts for _ in range(4)] and one["n"] == 3
    assert len({r["summary"] for r in rows[:4]}) > 1
    # `distinct` compares the members of a group, and each group has four of them.
    assert one["reward/distinct"] == pytest.approx(np.mean([r["reward/distinct"] for r in rows]))
    assert one["reward/distinct"] < 1
    assert one["reward"] == pytest.approx(np.mean([r["reward"] for r in rows]))
    assert one["distinct"] == distinct([r["summary"] for r in rows])
    assert one["stopped"] == np.mean([r["stopped"] for r in rows])
    assert "reward_std" in one and "reward_std" not in evaluation.evaluate(*tiny, posts, config)


def test_cold_samples_are_the_greedy_summaries(tiny):
    posts = load_posts("tiny", "test")[:3]
    greedy = evaluation.evaluate(*tiny, posts, Config(max_new_tokens=34))
    cold = evaluation.evaluate(*tiny, posts, Config(max_new_tokens=34, temperature=1e-4), samples=2)
    assert [r["summary"] for r in cold["summaries"]] == [r["summary"] for r in greedy["summaries"] for _ in range(2)]


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_reference_is_shown_where_there_is_one(capsys):
    posts = [Post("Ann lost a shoe.", "A shoe is gone.", "1"), Post("Tom won a prize.", "", "2")]
    rows = [{"id": post.id, "summary": "Gone.", "length": 2} for post in posts]
    say_row("tiny", {"summaries": rows}, posts, 2)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "    1: 'Gone.' (2 tokens)", "    for 'A shoe is gone.'", "    2: 'Gone.' (2 tokens)"]


def test_the_command_writes_every_summary_and_a_table(runs, capsys):
    name = str(runs / "joint")
    assert evaluation.main([name, "tiny", *FEW, "--samples", "2", "--squish", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "summaries a second" in said and "<- target" in said and "SQUISH@0.3" in said
    posts = load_posts("tiny", "test")[:4]
    greedy, drawn = lines("runs/eval/tiny.jsonl"), lines("runs/eval/tiny_2_sampled.jsonl")
    assert [r["id"] for r in greedy] == [p.id for p in posts] and len(drawn) == 8
    assert [r["document"] for r in drawn] == [p.document for p in posts for _ in range(2)]
    assert greedy[0]["reference"] == posts[0].reference and {"rouge_l", "copy_rate", "stopped"} <= greedy[0].keys()
    expected = squish(*load(TINY), posts[1].document, [greedy[1]["summary"]], 0.3)[0]
    assert greedy[1]["SQUISH@0.3"] == pytest.approx(expected, abs=1e-6)
    table = Path("runs/eval/table.md").read_text(encoding="utf-8").splitlines()
    head = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert head == ["", name, f"{name}, 2 sampled", "tiny", "tiny, 2 sampled"]
    rouge = next(line for line in table if line.startswith("| ROUGE-L |"))
    assert f"{np.mean([r['rouge_l'] for r in greedy]):.3f} (" in rouge


@pytest.mark.parametrize("args, says", [
    (["compare", "tiny"], "two runs"), (["tiny", "--duels", "1"], "--duels"), (["tiny", "--samples", "-1"], "negative"),
    (["tiny", "--judge", "http://127.0.0.1:9/v1", "--n", "1"], "URL#MODEL"),
    (["tiny", "--jobs", "0"], "at least 1"), (["tiny", "--squish", "x", "--n", "1"], "0.05,0.1,200")], ids=str)
def test_what_cannot_work_is_a_sentence(capsys, args, says):
    assert says in refused(capsys, *args)


# --- compare ----------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared(runs, capsys):
    a, b = str(runs / "joint"), str(runs / "staged")
    assert evaluation.main(["compare", a, b, "--n", "6"]) == 0
    said = capsys.readouterr().out
    text = Path("runs/eval/compare.md").read_text(encoding="utf-8")
    for part in (said, text):
        assert "Settings that differ" in part and "Holm" in part
    settings = text[text.index("## Settings"):text.index("## Paired")]
    assert "| stages | rouge_l+length:3 | length:1 rouge_l + length:2 |" in settings and "| seed | 0 | 1 |" in settings
    assert "| run |" not in settings and "| target |" not in settings
    mine, others = (lines(f"runs/eval/{results.file_name(name)}.jsonl") for name in (a, b))
    difference = np.mean([y["rouge_l"] - x["rouge_l"] for x, y in zip(mine, others)])
    line = next(line for line in text.splitlines() if line.startswith("| ROUGE-L |"))
    assert f"| {difference:+.3f} (" in line and line.endswith("| 6 |")
    assert "| reward |" in text  # the same sum, whatever the blanks in it
    assert Path("runs/eval/curves.png").read_bytes().startswith(b"\x89PNG")


def test_rewards_of_different_sums_are_not_compared(runs, capsys):
    assert evaluation.main(["compare", str(runs / "joint"), str(runs / "paid"), *FEW]) == 0
    said = capsys.readouterr().out
    assert "are different sums" in said
    tests = said[said.index("Paired tests"):]
    assert "\nreward " not in tests and "\nMETEOR " in tests


def test_different_posts_and_tokenizers_are_refused_before_anybody_waits(runs, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("somebody waits"))
    shutil.copytree(runs / "joint", "other")
    edit_json(Path("other/config.json"), data="other.jsonl")
    Path("other.jsonl").write_text("".join(json.dumps({"document": f"Post {i}.", "summary": "A post."}) + "\n"
                                           for i in range(20)), encoding="utf-8")
    err = refused(capsys, "compare", str(runs / "joint"), "other")
    assert "different posts (300 and 2" in err and "--data" in err
    shutil.copytree(TINY, "model", ignore=shutil.ignore_patterns("*.py", "*.jsonl*"))
    edit_json(Path("model/tokenizer.json"), normalizer={"type": "Lowercase"})
    err = refused(capsys, "compare", "tiny", "model")
    assert "different tokenizers" in err and "python eval.py tiny model" in err


def measured(values: dict[str, list[float]], **config) -> SimpleNamespace:
    n = len(next(iter(values.values())))
    rows = [row(30, 30, **{key: each[i] for key, each in values.items()}) for i in range(n)]
    return SimpleNamespace(config=Config(**config), posts=[Post(f"d{i}", "r", str(i)) for i in range(n)],
                           results={"": {"summaries": rows, "n": n}})


def test_the_tests_are_scipys_with_holms_correction():
    rng = np.random.default_rng(0)
    a = {"rouge_l": rng.normal(0.4, 0.1, 60).tolist(), "meteor": rng.normal(0.4, 0.1, 60).tolist()}
    b = {"rouge_l": (np.array(a["rouge_l"]) + rng.normal(0.02, 0.05, 60)).tolist(),
         "meteor": (np.array(a["meteor"]) + rng.normal(0.0, 0.05, 60)).tolist()}
    tests = compare.paired({"A": measured(a), "B": measured(b)}, set())
    assert [t["title"] for t in tests] == ["ROUGE-L", "METEOR"]  # all else is equal on every post
    for test, key in zip(tests, ("rouge_l", "meteor")):
        x, y = np.array(a[key]), np.array(b[key])
        theirs = scipy.stats.permutation_test((y - x,), np.mean, permutation_type="samples", n_resamples=9999,
                                              rng=np.random.default_rng(1))
        assert test["p"] == pytest.approx(theirs.pvalue, abs=0.02)
        assert test["difference"] == pytest.approx(np.mean(y - x)) and test["low"] < test["difference"] < test["high"]
    low, high = sorted(t["p"] for t in tests)
    assert sorted(t["holm"] for t in tests) == pytest.approx([min(1, 2 * low), max(high, min(1, 2 * low))])


def test_posts_that_one_of_two_lacks_are_left_out_of_the_test():
    a, b = {"rouge_l": [0.1, 0.2, None, 0.4]}, {"rouge_l": [0.2, None, 0.3, 0.8]}
    test, = compare.paired({"A": measured(a), "B": measured(b)}, set())
    assert test["n"] == 2 and test["difference"] == pytest.approx(0.25)


def test_scores_of_judges_that_were_asked_differently_are_not_compared():
    a, b = measured({"judge/clarity": [0.1, 0.2]}), measured({"judge/clarity": [0.3, 0.3]})
    for one, how in ((a, "weighted at temperature 0.0"), (b, "mean of 8 at temperature 1.0")):
        for each in one.results[""]["summaries"]:
            each["judge"] = {"name": "j", "prompts": "1-x", "how": [how]}
    skip, notes = compare.not_comparable({"A": a, "B": b})
    assert "mean of 8" in notes[0] and "weighted" in notes[0]
    assert compare.paired({"A": a, "B": b}, skip) == [] != compare.paired({"A": a, "B": b}, set())


# --- a judge beside it ------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(monkeypatch):
    """Instead of a server: the more words, the higher the score, of coverage at least; A wins where it is longer."""
    monkeypatch.setenv("OPENAI_API_KEY", "")
    asked = []

    def reply(self, system, user, **more):
        asked.append(user)
        self.count({"prompt_tokens": 1000, "completion_tokens": 100})
        a, b = (part.partition(">\n")[2].partition("\n<")[0] for part in (user.split("<summary-") * 2)[1:4:2])
        if "Verdict" in user:
            parts = user.split("<summary-")
            return {"text": "Verdict: " + ("A" if len(parts[1]) >= len(parts[2]) else "B"), "tokens": None}
        p = {"1": 0.5, str(1 + min(4, len(a) // 30)): 0.5 - 1e-9, "x": 1e-9}
        digit = max(p, key=p.get)
        return {"text": f"So.\nScore: {digit}", "tokens": [("Score", {"Score": 0.0, "x": -9.0}), (":", {":": 0.0}),
                                                          (digit, {t: math.log(v) for t, v in p.items()})]}

    monkeypatch.setattr("plumbing.server.Server.reply", reply)
    return asked


def test_a_judge_stands_beside_the_metrics(judge, capsys):
    pytest.importorskip("openai")
    args = ["tiny", *FEW, "--judge", "http://127.0.0.1:9/v1#j", "--judge-prices", "1,10"]
    assert evaluation.main(args) == 0
    said = capsys.readouterr().out
    assert "judge: composite within 10%" in said or "0 summaries are within 10%" in said
    assert "prompts 1-" in said and "weighted at temperature 0.0 (4 summaries)" in said and "dollars" in said
    rows = lines("runs/eval/tiny.jsonl")
    assert all(r["judge/composite"] == pytest.approx(4 * r["judge/clarity"]) for r in rows)
    n = len(judge)
    assert n == 16 and evaluation.main(args) == 0 and len(judge) == n  # the cache
    assert lines("runs/eval/tiny.jsonl") == rows


def test_the_judge_decides_which_is_better_in_both_orders(judge, runs, capsys):
    pytest.importorskip("openai")
    assert evaluation.main(["compare", str(runs / "joint"), str(runs / "staged"), *FEW, "--duels", "1", "--judge",
                            "http://127.0.0.1:9/v1#j"]) == 0
    text = Path("runs/eval/compare.md").read_text(encoding="utf-8")
    table = text[text.index("## The better"):].splitlines()
    assert "turned by the swap" in table[2] and "%" in table[4]


# --- power ------------------------------------------------------------------------------------------------------------


def test_energy_is_counted_where_the_system_tells_it(tmp_path, monkeypatch):
    """A counter that goes from 5 J to 3605 J: one watt-hour. One that cannot be read tells nothing."""
    monkeypatch.setattr(power, "RAPL", tmp_path)
    monkeypatch.setattr(power, "COMMANDS", {})
    with power.Meter() as meter:
        pass
    assert meter.watt_hours is None and meter.seconds >= 0
    (tmp_path / "intel-rapl:0").mkdir()
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.write_text("5000000\n", encoding="utf-8")
    with power.Meter() as meter:
        counter.write_text("3605000000\n", encoding="utf-8")
    assert meter.watt_hours == pytest.approx(1.0)
