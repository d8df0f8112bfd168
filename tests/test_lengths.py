"""Four rewards for a length: their weights and their signal by hand, the tables from results, a run for real."""

import doctest
from statistics import fmean

import numpy as np
import pytest

from plumbing.folder import read_json, write_text
from studies import lengths
from studies.lengths import FORMS, Run, flat, half_way, make_tables, weights

# Two groups of four lengths at a target of 40: one on target, one in which all miss, on one side.
SAMPLED = [[38, 40, 42, 44], [20, 20, 28, 28]]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A writer of made-up results, in folders of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lengths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(lengths, "PAGE", tmp_path / "page.md")

    def write(form, target=40, seed=0, sampled=SAMPLED, n=40, curve=(0.5,) * 10):
        run = Run(form, target, seed)
        scores = {"length": [n, 20, 40], "rouge_l": [0.5] * 3, "meteor": [0.25] * 3, "invented": [0.0] * 3}
        write_text(run.result, lengths.json.dumps({
            "config": lengths.as_json(run.config), "model": lengths.embedded(*lengths.SPLITS), "sampled": sampled,
            "scores": scores, "curve": [*curve], "wordnet": True, "ended": "", "seconds": 1}))
        return run

    return write


def test_worked_examples_hold():
    assert doctest.testmod(lengths).failed == 0
    assert half_way([0.5] * 12, begin=0.2) == 12  # it never was: the last step stands for "later"


def test_a_reward_is_silent_where_it_pays_all_of_a_group_alike():
    """The binary one about a group of hits and a group of misses, the saturating one about the hits."""
    found = {form: flat(form, SAMPLED, 40).tolist() for form in FORMS}
    assert found == {"linear": [0, 0], "binary": [1, 1], "saturating": [1, 0], "exponential": [0, 0]}


def test_weights_make_all_of_them_equally_loud(results):
    """std within groups: linear sqrt((var(0, .05, .05, .1) + var(.5, .5, .3, .3)) / 2), and so on; to two digits."""
    results("untrained", sampled=[[38, 40, 42, 44], [20, 20, 28, 40]])
    linear = ((0.005 / 3) + (2 * 0.175 ** 2 + 0.025 ** 2 + 0.325 ** 2) / 3) / 2
    binary = 0.25 / 2  # 0, 0, 0, 1 in the second group: 3/16 * 4/3; and nothing in the first
    found = weights(40)
    assert found["linear"] == 4.0 and found["binary"] == pytest.approx(4 * (linear / binary) ** 0.5, abs=0.05)
    spread = {form: lengths.paid(form, SAMPLED, 40).std(axis=1, ddof=1) for form in FORMS}
    assert spread["saturating"][0] == 0 < spread["exponential"][1] < spread["exponential"][0]


def test_a_result_of_another_weight_is_none(results):
    """The untrained model's groups set the weights. Where they are others, the run is not that run."""
    sampled = [[38, 40, 42, 44], [20, 20, 28, 40]]
    results("untrained", sampled=sampled)
    run = results("binary")
    assert lengths.result_of(run) and "1.9*length_binary:80" in run.flags[1]
    results("untrained", sampled=[[10, 40, 42, 44], [20, 20, 28, 40]])
    assert lengths.result_of(run) is None
    Run("untrained", 40, 0).result.unlink()
    assert lengths.result_of(run) is None  # its weight is not known


def test_the_tables_by_hand(results, tmp_path, capsys):
    sampled = [[38, 40, 42, 44], [20, 20, 28, 40]]
    results("untrained", sampled=sampled)
    for seed, n in enumerate((40, 44)):
        results("linear", seed=seed, n=n)
        results("binary", seed=seed, sampled=sampled, curve=[0.5] * 5 + [1.0] * 10)
    text = make_tables()
    assert text.count("Target 40:") == 1 and "Target 20" not in text
    # Flat: of the untrained groups one, of those at the end one; half way from 5/8 to 1 lie four hits of five.
    line, = (line for line in text.splitlines() if line.startswith("| binary, 1.9 x | 2 | 50%"))
    cells = line.split(" | ")
    assert [cell.partition(" ")[0] for cell in cells[2:6]] == ["50%", "50%", "9", "67%"]
    assert "| linear, 4 x | 2 | 0% (0..0) | 0% (0..0) | 10 (10..10) | 50%" in text  # 40 and 40 of 40, 20; 44 is 4 off
    (tmp_path / "page.md").write_text(f"# A\n\n{lengths.BEGIN}old\n{lengths.END}\n# B\n", encoding="utf-8")
    assert lengths.main(["tables"]) == 0 and "4 of 24 runs" in capsys.readouterr().out
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == f"# A\n\n{lengths.BEGIN}{text}\n{lengths.END}\n# B\n"
    assert lengths.main(["tables"]) == 0 and (tmp_path / "page.md").read_text(encoding="utf-8") == page


def test_it_trains_for_real_and_not_twice(results, tmp_path, monkeypatch, capsys):
    for name, value in {"STEPS": 2, "POSTS": 2, "GROUPS": 2, "TARGETS": (40,), "FORMS": {
            "linear": "length", "exponential": "length_exp"}}.items():
        monkeypatch.setattr(lengths, name, value)
    flags = Run.flags.fget
    monkeypatch.setattr(Run, "flags", property(lambda run: [*flags(run), "--prompts", "2", "--group", "2"]))
    monkeypatch.setattr(lengths, "to_its_end", lambda command, *_: lengths.main(command[3:]) and "an error")
    (tmp_path / "page.md").write_text(f"{lengths.BEGIN}{lengths.END}", encoding="utf-8")
    command = ["run", "--seeds", "1", "--jobs", "1"]
    assert lengths.main(command) == 0, capsys.readouterr().err
    kept = read_json(Run("exponential", 40, 0).result)
    assert len(kept["curve"]) == 2 and np.array(kept["sampled"]).shape == (2, 2) and fmean(kept["scores"]["length"]) > 5
    assert "document" not in kept["scores"] and "summary" not in str(kept["scores"])
    monkeypatch.setattr(lengths, "to_its_end", None)
    assert lengths.main(command) == 0  # no run is begun again


def test_the_page_is_what_the_results_say():
    """Whoever has new results makes the tables anew: python -m studies.lengths tables."""
    _, begin, rest = lengths.PAGE.read_text(encoding="utf-8").partition(lengths.BEGIN)
    assert begin and rest.partition(lengths.END)[0] == make_tables() + "\n"
