"""studies/distill.py: when a policy counts as good as its teacher, who teaches whom, and that results are kept."""

import json
from dataclasses import asdict

import pytest

from config import Config, check, parse_stages
from plumbing.posts import TINY
from studies import distill
from studies.distill import ARMS, TEACHER, Run, make_tables, result_of, steps_until


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Results and runs of its own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "tiny").symlink_to(TINY)
    monkeypatch.chdir(tmp_path)
    for name, path in (("RESULTS", "results"), ("PAGE", "page.md")):
        monkeypatch.setattr(distill, name, tmp_path / path)
    return tmp_path


def keep(run, rewards, **more):
    """A made-up result, {step: reward}."""
    rows = [{"step": s, "reward": r, "length": 40.0, "within_10pct": 0.8, "rouge_l": 0.9, "invented": 0.001}
            for s, r in rewards.items()]
    run.result.parent.mkdir(exist_ok=True)
    model = distill.embedded(*distill.SPLITS)
    run.result.write_text(json.dumps({"config": asdict(run.config), "model": model, "seconds": 1, "evaluations": rows,
                                      **more}), encoding="utf-8")


def test_a_curve_is_read_between_its_points():
    """By hand: from 0.4 at step 10 to 0.6 at step 20, 0.45 is a quarter of the way."""
    curve = {0: -0.1, 10: 0.4, 20: 0.6, 40: 0.5}
    assert steps_until(curve, 0.45) == 12.5 and steps_until(curve, 0.6) == 20 and steps_until(curve, -0.2) == 0
    assert steps_until(curve, 0.61) == float("inf")


@pytest.mark.parametrize("name", ARMS)
def test_every_run_is_one_that_train_takes(name):
    taught, ends, _ = ARMS[name]
    run = Run(name, 1)
    check(run.config)
    stages = parse_stages(run.config.stages)
    assert tuple(stage.end for stage in stages) == ends and (run.config.teacher != "") == taught
    assert stages[-1].reward.expression == parse_stages(Config().stages)[-1].reward.expression
    if name == TEACHER:  # the default run, step for step
        defaults = parse_stages(Config().stages)
        for default in defaults:
            assert {s.reward.expression for s in stages if default.first <= s.first < default.end} == {
                default.reward.expression}
        assert stages[-1].end == defaults[-1].end == distill.TOTAL and run.config.seed == 1
    else:
        assert run.config.seed == 101  # other posts than the teacher's
    if taught:
        assert run.config.teacher == f"runs/{Run(TEACHER, 1).folder.name}" and run.config.beta == 0


def test_the_tables_by_hand(study):
    """The teacher goes from 0 to 1, the student is at 0.5 after 10 steps and at 0.9 after 20: half at step 10, 80% at
    17.5, 90% at 20, 95% never. A seed without its teacher's result does not count."""
    assert "no result yet" in make_tables()
    keep(Run(TEACHER, 0), {0: 0.0, 100: 0.5, 220: 1.0})
    keep(Run("distilled", 0), {0: 0.0, 10: 0.5, 20: 0.9}, teacher_kl=[0.2, 0.1, 0.02])
    keep(Run("distilled", 1), {0: 0.0, 10: 0.6}, teacher_kl=[0.2])
    text = make_tables()
    assert "| GRPO, the teacher | 0.00 | - | - | - | - | - | - | - | 1.00 |" in text
    assert "| distilled | 0.00 | - | 0.50 | 0.90 | - | - | - | - | - |" in text
    assert "| GRPO, the teacher | 100 | 172 | 196 | 208 | 80% | 0.900 | 0.1% | 1 |" in text
    assert "| distilled | 10 | 18 | 20 | never in 1 of 1 | 80% | 0.900 | 0.1% | 1 |" in text
    assert "steps 1 to 5: 0.20; steps 101 to 120: 0.020" in text
    keep(Run(TEACHER, 1), {0: 0.0, 220: 1.0})
    assert "| distilled | 0.00 (0.00..0.00) | - | 0.55 (0.50..0.60) |" in make_tables()


def test_a_result_of_other_settings_is_not_used(study, monkeypatch):
    run = Run("distilled", 0)
    keep(run, {0: 0.0, 10: 0.5})
    assert result_of(run)
    monkeypatch.setitem(ARMS, "distilled", (True, ARMS["distilled"][1], ("--beta", "0", "--lr", "1e-5")))
    assert result_of(run) is None


def test_the_study_runs_keeps_and_makes_its_page(study, monkeypatch, capsys):
    """A teacher of two steps and its student, for real. The second time there is nothing to do; where the teacher's
    folder is gone and a student is to be taught, the teacher is made again."""
    few = ("--eval-posts", "2", "--prompts", "1", "--group", "2")
    monkeypatch.setattr(distill, "ARMS", {TEACHER: (False, (1, 2), few), "distilled": (True, (1, 2), few)})
    monkeypatch.setattr(distill, "TOTAL", 2)
    distill.PAGE.write_text("# Page\n\n## The numbers\n\nold\n", encoding="utf-8")
    assert distill.main(["run", "--seeds", "1", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.index("GRPO, the teacher, seed 0") < out.index("distilled, seed 0") and "2 of 6 runs are in" in out
    result = result_of(Run("distilled", 0))
    assert [row["step"] for row in result["evaluations"]] == [0, 1, 2] and len(result["teacher_kl"]) == 2
    assert "summar" not in json.dumps(result["evaluations"]) and str(study) not in json.dumps(result)
    page = distill.PAGE.read_text(encoding="utf-8")
    assert page.startswith("# Page\n\n## The numbers\n\n| held-out reward") and "old" not in page
    assert distill.main(["run", "--seeds", "1"]) == 0
    assert "1 of 1 runs" not in capsys.readouterr().out
    Run(TEACHER, 0).result.unlink()
    assert distill.main(["run", "--seeds", "1", "--only", "^distilled"]) == 0  # whose result is there
    assert "1 of 1 runs" not in capsys.readouterr().out


def test_a_teacher_that_is_gone_is_made_again(study, monkeypatch):
    done = []
    monkeypatch.setattr(distill, "do", lambda run, threads: (done.append(run), keep(run, {0: 0.0, 220: 1.0})) and {
        "seconds": 1, "ended": ""})
    keep(Run(TEACHER, 0), {0: 0.0, 220: 1.0})
    distill.run_all(["distilled", "half distilled"], seeds=1, jobs=1)
    assert done == [Run(TEACHER, 0), Run("distilled", 0), Run("half distilled", 0)]


def test_a_run_that_ends_too_early_is_an_error_with_its_last_words(study, monkeypatch, capsys):
    few = ("--eval-posts", "2", "--prompts", "0")
    monkeypatch.setattr(distill, "ARMS", {TEACHER: (False, (1,), few)})
    distill.PAGE.write_text("## The numbers\n\n", encoding="utf-8")
    assert distill.main(["run", "--seeds", "1", "--jobs", "1"]) == 1
    assert "did not reach its end: train.py: --prompts must be at least 1" in capsys.readouterr().err
