"""Several processes that learn together do what one does; and where one of them ends, all end with a sentence.

All of it is done once, by ranks_at_work.py: real processes, gloo, 127.0.0.1. The tests read what came of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
from plumbing import ranks
from plumbing.command import NEEDED

ROOT = Path(__file__).parent.parent
TIMINGS = {"seconds", "tokens_per_s"}
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                       reason="this torch was built without torch.distributed, or without gloo"),
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the ranks are forked here")]


def environment():
    """Ours, but for what a torchrun around the tests would have set."""
    kept = {k: v for k, v in os.environ.items() if k not in (*NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, ROOT / "tests" / "ranks_at_work.py", folder], env=environment(), cwd=ROOT,
                   check=True, timeout=1800)
    return folder


def said(work, job, rank) -> str:
    return (work / f"{job}-{rank}.txt").read_text(encoding="utf-8")


def ended(work, job) -> list:
    return json.loads((work / "done.json").read_text(encoding="utf-8"))[job]["codes"]


def rows(folder, name="metrics") -> list[dict]:
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in text.splitlines()]


def weights(folder) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("job", ["updates", "updates3"])
def test_the_update_of_several_ranks_is_that_of_one_process(work, job):
    """Every loss with every advantage, groups of different lengths, a rank with nothing to learn, four groups on three
    ranks, several updates, adapters. A plain step of SGD without a clip: what is compared is the gradient."""
    assert not any(ended(work, job)), said(work, job, 0) + said(work, job, 1)
    found = json.loads(said(work, job, 0))
    assert job != "updates" or len(found) > len(grpo.KINDS) * len(grpo.ADVANTAGES)
    for name, case in found.items():
        if isinstance(case, dict):
            assert case["off"] <= 1e-6 and case["metrics"] <= 3e-6 and case["names"] and case["alike"], (name, case)
            assert case["moved"] > 1e-3 or name == "no KL, all flat", (name, case)


def test_bfloat16_gradients_are_rounded_once_after_the_sum(work):
    assert json.loads(said(work, "updates", 1))["bfloat16"] and json.loads(said(work, "updates3", 2))["bfloat16"]


def test_what_fails_on_one_rank_fails_on_all_with_an_error_that_is_understood(work):
    mine, other = (json.loads(said(work, "updates", rank)) for rank in (1, 0))
    assert [mine[kind] for kind in ("memory", "server", "other")] == [
        ["MemoryError", "full"], ["ConnectionError", "away"], ["KeyError", "'x'"]]
    assert [other[kind] for kind in ("memory", "server", "other")] == [
        ["MemoryError", "Rank 1: full"], ["ConnectionError", "Rank 1: away"], ["Lost", "Rank 1: 'x'"]]


@pytest.mark.parametrize("name", ["two", "three"])
def test_a_run_of_several_ranks_is_that_of_one_process(work, name):
    """The same words, rewards and evaluations, and what was learnt within rounding. Four posts in batches of three: the
    same post comes twice in a batch, on different ranks; so its random numbers must know of the other."""
    assert ended(work, "one") == [0] and not any(ended(work, name)), said(work, name, 0)
    one, several = work / "runs" / "one", work / "runs" / name
    assert len(rows(one)) == len(rows(several)) == 6
    for a, b in zip(rows(one), rows(several)):
        assert a.keys() == b.keys()
        for key in a:  # "gap" is a largest rounding error
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5) if key != "logp_gap" else b[key] < 1e-4, key
            assert a[key] == b[key] or key in ("loss", "kl", "entropy", "grad_norm", "ratio", "clip_frac", "logp_gap")
    assert all(rows(one, log) == rows(several, log) for log in ("eval", "samples"))
    assert [row["rewards"] for row in rows(one, "groups")] == [row["rewards"] for row in rows(several, "groups")]


def test_the_first_rank_writes_and_speaks_and_the_others_do_not(work):
    assert said(work, "two", 1) == "" == said(work, "three", 2) and "Done in" in said(work, "two", 0)
    assert len(rows(work / "runs" / "two", "eval")) == 3
    assert {p.name for p in (work / "runs" / "two").rglob("*")} == {p.name for p in (work / "runs" / "one").rglob("*")}
    assert json.loads((work / "runs" / "two" / "config.json").read_text(encoding="utf-8"))["ranks"] == 2
    assert "ranks" not in json.loads((work / "runs" / "one" / "config.json").read_text(encoding="utf-8"))


def test_a_killed_rank_ends_the_run_and_it_goes_on_bit_for_bit(work):
    assert ended(work, "killed") == [1, -9]
    said_by = said(work, "killed", 0)
    assert "Rank 1 is gone without a word" in said_by and "--run killed --resume" in said_by
    assert "Traceback" not in said_by
    assert not any(ended(work, "killed-again")), said(work, "killed-again", 0)
    assert "Resumed after step 2" in said(work, "killed-again", 0)
    two, killed = work / "runs" / "two", work / "runs" / "killed"
    assert weights(killed) == weights(two)
    assert all(rows(killed, name) == rows(two, name) for name in ("metrics", "eval", "samples"))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(work):
    assert ended(work, "stopped") == [0, 0], said(work, "stopped", 0) + said(work, "stopped", 1)
    assert "Stopped after step" in said(work, "stopped", 0)
    assert "train.py --run stopped --resume (on each of the 2 ranks)\n" in said(work, "stopped", 0)
    assert not any(ended(work, "stopped-again")), said(work, "stopped-again", 0)
    assert weights(work / "runs" / "stopped") == weights(work / "runs" / "two")


@pytest.mark.parametrize("job", ["frozen", "asleep"])
def test_a_rank_that_only_falls_silent_ends_the_run_too(work, job):
    """Whether the other one waits for it or is at work."""
    assert ended(work, job)[0] == 1
    assert "Rank 1 is gone without a word" in said(work, job, 0) and "--resume" in said(work, job, 0)


def test_another_number_of_ranks_goes_on_and_says_so(work):
    assert ended(work, "frozen-again") == [0], said(work, "frozen-again", 0)
    assert "was computed by 2 processes so far: by 1 it goes on within rounding" in said(work, "frozen-again", 0)
    assert len(rows(work / "runs" / "frozen")) == 6


def test_machines_without_a_common_disk(work):
    """The other one keeps nothing, so it cannot go on."""
    assert ended(work, "elsewhere") == [0, 0], said(work, "elsewhere", 0)
    assert weights(work / "runs" / "elsewhere") == weights(work / "runs" / "two")
    assert not list((work / "other machine").iterdir())
    assert ended(work, "elsewhere-again") == [1, 1]
    assert "Rank 1 and rank 0 have different numbers of steps done: 0 and 6. All machines need to see" in said(
        work, "elsewhere-again", 0)


def test_ranks_that_have_learnt_different_things_do_not_go_on(work):
    assert ended(work, "apart") == [1, 1]
    for rank in (0, 1):
        assert "Rank 1 and rank 0 have different weights after step 2" in said(work, "apart", rank)
    assert not (work / "runs" / "apart" / "checkpoint" / "state.pt").exists()


def test_a_server_that_one_rank_misses_ends_all_with_a_checkpoint(work):
    assert ended(work, "no-server") == [1, 1]
    assert "Rank 1: The judge is away. All 1 steps are kept" in said(work, "no-server", 0)
    assert (work / "runs" / "no-server" / "checkpoint" / "state.pt").exists()


def test_an_exploded_loss_of_one_rank_is_everybodys(work):
    assert ended(work, "exploded") == [1, 1]
    assert "The loss is nan" in said(work, "exploded", 0) and "The weights of step 3, which are good" in said(
        work, "exploded", 0)


@pytest.mark.parametrize("job, sentence", [
    ("mlx", "--backend mlx learns in one process: start it without torchrun."),
    ("rollouts", "--rollouts and torchrun do not go together"),
    ("few", "--prompts 1 cannot be split over 2 ranks"),
    ("unlike", "Rank 1 was started with another --beta than rank 0"),
    ("taken", "runs/one is there already")])
def test_what_cannot_work_is_refused_on_all_ranks(work, job, sentence):
    assert ended(work, job) == [1, 1]
    assert sentence in said(work, job, 0) and sentence in said(work, job, 1)  # in the last as rank 0's last words
    assert "Traceback" not in said(work, job, 0) + said(work, job, 1)
    assert not (work / "runs" / "x").exists()


def test_torchrun_itself(tmp_path):
    """The command of the documentation: the embedded default for three steps. ("--": torchrun would read --run.)"""
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--",
                              str(ROOT / "train.py"), "--stages", "length:2", "rouge_l+length:1", "--eval-posts", "4",
                              "--run", "r"],
                             cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("Done in") == 1
    assert len(rows(tmp_path / "runs" / "r")) == 3 and len(rows(tmp_path / "runs" / "r", "eval")) == 3
    assert (tmp_path / "runs" / "r" / "model" / "model.safetensors").exists()


def test_alone_nothing_is_exchanged():
    assert ranks.count() == 1 and ranks.first() and ranks.exchange("x") == ["x"]
    assert ranks.mine([1, 2, 3]) == [1, 2, 3] and ranks.largest(0.5) == 0.5
    act = object()
    assert ranks.sharing(act, None) is act
    means = {"loss": 1.0}
    assert ranks.summed(means, [torch.nn.Parameter(torch.zeros(2))]) is means


def test_every_post_is_some_ranks_and_the_largest_share_is_rehearsed(monkeypatch):
    for size in (2, 3, 4):
        parts = []
        for rank in range(size):
            monkeypatch.setattr(ranks, "_world", type("World", (), {"rank": rank, "size": size}))
            parts.append(ranks.share(10))
        assert [i for part in parts for i in part] == list(range(10))
        assert max(map(len, parts)) == len(ranks.largest_share(range(10))) and ranks.largest_share(range(10))[-1] == 9
