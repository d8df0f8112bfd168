"""The worked forks of docs/fork.md: each is applied to a copy of the tree, checked, and trained with.

Each section has one diff and one block of commands; both are taken from there, so that the page cannot drift from the
code. A fork's mathematics has an oracle, and its run must learn.
"""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import pytest
import torch
from helpers import edit_json, randomise, refusal
from test_grpo import ragged_batch, trl_loss

import model as unforked

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "fork.md"
OUR_MODULES = {path.stem for path in ROOT.glob("*.py")} | {"plumbing"}


def forks() -> dict[str, tuple[str, list[list[str]]]]:
    """{heading: (diff, its commands as lists of words)}"""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        diffs = re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S)
        shells = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
        if diffs or shells:
            assert len(diffs) == len(shells) == 1, section[:80]
            found[section.partition("\n")[0]] = diffs[0], [shlex.split(line) for line in shells[0].splitlines()]
    return found


FORKS = forks()


def git(folder: Path, *words: str) -> None:
    """In a folder that is no repository; where one lies above it, git would look for files from its root on."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", *words], cwd=folder, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """heading -> a copy of the tree with that fork in it, as the page says to make it."""
    made: dict[str, Path] = {}

    def of(heading: str) -> Path:
        if heading not in made:
            folder = tmp_path_factory.mktemp("fork") / "crisp"
            for room in ("plumbing", "studies", "tiny", "tests"):
                shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
            for path in (path for path in ROOT.iterdir() if path.is_file()):
                shutil.copy(path, folder)
            (folder / "fork.diff").write_text(FORKS[heading][0], encoding="utf-8", newline="\n")
            git(folder, "apply", "fork.diff")
            (folder / "fork.diff").unlink()
            made[heading] = folder
        return made[heading]

    return of


@contextmanager
def inside(folder: Path):
    """In here `import grpo` brings the fork's file. Afterwards the project's own modules are back."""
    def ours():
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in OUR_MODULES}

    before = ours()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(folder: Path, *flags: str) -> list[dict]:
    """The lines of metrics.jsonl of a run in a fork."""
    done = subprocess.run([sys.executable, "train.py", "--eval-posts", "8", *flags, "--run", "r"], cwd=folder,
                          capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stderr
    return rows_of(folder / "runs" / "r" / "metrics.jsonl")


def command(heading: str) -> list[str]:
    """The flags of the first train.py of a section."""
    return next(words[2:] for words in FORKS[heading][1] if words[:2] == ["python", "train.py"])


def rises(rows: list[dict], key: str, by: float, n: int = 4) -> bool:
    """Whether the mean of the last n steps is larger than that of the first n, by so much."""
    return mean(row[key] for row in rows[-n:]) > mean(row[key] for row in rows[:n]) + by


# --- every fork -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heading", FORKS)
def test_a_fork_is_short_and_touches_what_it_says(heading, tree):
    """git passes over files in silence where it takes a folder for a part of another repository."""
    diff, _ = FORKS[heading]
    assert len(diff.splitlines()) < 60
    touched = set(re.findall(r"^\+\+\+ b/(.*)$", diff, re.M))
    folder = tree(heading)
    for path in (path for path in folder.rglob("*") if path.is_file() and "runs" not in path.parts):
        name = path.relative_to(folder).as_posix()
        same = (ROOT / name).exists() and (ROOT / name).read_bytes() == path.read_bytes()
        assert same == (name not in touched) or "__pycache__" in name, name


def test_all_forks_go_together(tmp_path):
    """`git apply docs/fork.md`: no two of them need the same lines."""
    for name in {name for diff, _ in FORKS.values() for name in re.findall(r"^--- a/(.*)$", diff, re.M)}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "apply", str(PAGE))
    assert "olmo2" in (tmp_path / "plumbing" / "model_config.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("heading", FORKS)
def test_the_commands_of_a_fork_are_ones_that_it_takes(heading, tree):
    """Real parser, real checks, in the fork: without it, its names are unknown."""
    with inside(tree(heading)):
        config = importlib.import_module("config")
        read_arguments = importlib.import_module("plumbing.cli").read_arguments
        for words in FORKS[heading][1]:
            if words[:2] == ["python", "train.py"]:
                settings, _, given = read_arguments(config.Config, words[2:], "")
                config.check(settings)
                config.parse_stages(settings.stages)
                assert given.keys() <= {field.name for field in dataclasses.fields(settings)}


# --- a reward ---------------------------------------------------------------------------------------------------------

REWARD = "A reward: reading level"


def test_the_grade_by_hand(tree):
    """0.39 words/sentences + 11.8 syllables/words - 15.59, syllables counted by ear."""
    with inside(tree(REWARD)):
        rewards = importlib.import_module("rewards")
    assert rewards.grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 * 6 / 6 - 15.59)
    assert rewards.grade("The banana is a yellow fruit!") == pytest.approx(0.39 * 6 + 11.8 * 9 / 6 - 15.59)
    assert rewards.grade("A banana. It is yellow?") == pytest.approx(0.39 * 5 / 2 + 11.8 * 8 / 5 - 15.59)
    assert rewards.grade("") == rewards.grade("81 ...") == 20  # silence is not easy
    totals, parts = rewards.parse("2*easy")(["He lost. He won.", "He lost, and then he won."], [5, 7], "", 5)
    assert totals[0] > totals[1] == 2 * parts["easy"][1] == pytest.approx(-0.2 * (0.39 * 6 + 11.8 - 15.59))


def test_a_policy_learns_to_write_for_lower_grades(tree):
    rows = train(tree(REWARD), *command(REWARD), "--stages", "length + 2*easy:12")
    assert rises(rows, "reward/easy", by=0.1)


# --- a task -----------------------------------------------------------------------------------------------------------

TASK = "A task with a verifiable answer"


@pytest.fixture(scope="module")
def letters(tree) -> Path:
    """That fork, with the data that its first command makes."""
    maker, _ = FORKS[TASK][1]
    subprocess.run([sys.executable, *maker[1:]], cwd=tree(TASK), check=True)
    return tree(TASK)


def test_who_copies_or_guesses_is_right_in_a_third(letters):
    """The answers are right, each place holds them equally often, and no held-out set of letters is trained on."""
    seen = {}
    for split in ("train", "test"):
        lists = rows_of(letters / "letters" / f"{split}.jsonl")
        places: Counter = Counter()
        for row in lists:
            order = row["document"].split()
            assert row["summary"] == sorted(order)[0] and len(set(order)) == 3
            places[order.index(row["summary"])] += 1
        assert places == dict.fromkeys(range(3), len(lists) / 3)
        seen[split] = {frozenset(row["document"]) for row in lists}
        assert len(lists) == 6 * len(seen[split])
    assert (len(seen["train"]), len(seen["test"])) == (96, 24) and not seen["train"] & seen["test"]


def test_a_policy_learns_to_sort(letters):
    """The page's own command with two thirds of its steps; held out and greedy, before and after."""
    train(letters, *command(TASK), "--stages", "accuracy:80", "--eval-posts", "144")
    before, after = rows_of(letters / "runs" / "r" / "eval.jsonl")
    assert before["n"] == 144 and before["reward/accuracy"] < 0.4 and after["reward/accuracy"] > 0.75
    for row in rows_of(letters / "runs" / "r" / "samples.jsonl"):
        assert row["reward/accuracy"] == (row["summary"] == min(row["document"].split()))


# --- a loss -----------------------------------------------------------------------------------------------------------

LOSS = "A loss: SAPO"


@pytest.mark.parametrize("rho, A, loss, slope", [
    (1.0, 1.0, -2.0, -1.0), (1.0, -1.0, 2 / 1.05, 1.0),  # sigmoid(0) = 1/2, and the slope of a ratio
    (2.0, 1.0, -2.924234, -1.572895),  # sigmoid(1) = 0.731059; 4 * 0.731059 * 0.268941 * 2
    (2.0, -1.0, 2.822001, 1.536220)])  # sigmoid(1.05) = 0.740775; 4 * 0.740775 * 0.259225 * 2
def test_the_gate_by_hand(tree, rho, A, loss, slope):
    """One token: loss -4/tau sigmoid(tau (rho - 1)) A, and its slope by logp, where d rho / d logp = rho."""
    with inside(tree(LOSS)):
        grpo = importlib.import_module("grpo")
    logp = torch.tensor([[[rho]]]).log().requires_grad_()  # [1, 1, 1]
    value, seen = grpo.policy_loss(logp, torch.zeros(1, 1, 1), None, torch.tensor([[A]]),
                                   torch.ones(1, 1, 1, dtype=torch.bool), "sapo")
    assert value.item() == pytest.approx(loss, abs=1e-5) and seen["clip_frac"] == 0
    assert torch.autograd.grad(value, logp)[0].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("beta, kl", [(0.0, "k3"), (0.3, "k3"), (0.3, "k3_ratio")])
def test_sapo_is_trls(tree, beta, kl):
    """Value and gradient on random tensors, ratios far from 1."""
    with inside(tree(LOSS)):
        grpo = importlib.import_module("grpo")
    x = ragged_batch("sapo", beta=beta, kl=kl)
    loss, _ = grpo.policy_loss(**x)
    want, want_gradient, _ = trl_loss(x)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, x["logp"])[0], want_gradient, rtol=0, atol=1e-12)
    assert ((x["logp"] - x["old_logp"])[x["mask"]].abs() > 0.1).any()


def test_at_ratio_one_sapo_has_the_gradient_of_grpo(tree):
    """For the slope of the gate is 1 there. So is it in the derivation's table, which the fork has a line in."""
    with inside(tree(LOSS)):
        grpo = importlib.import_module("grpo")
    gradients = []
    for kind in ("grpo", "sapo"):
        x = {**ragged_batch(kind, beta=0.0), "old_logp": None, "ref_logp": None}
        gradients.append(torch.autograd.grad(grpo.policy_loss(**x)[0], x["logp"])[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)
    lines = dict(re.findall(r"^(\w+) +-?\d\.\d\d (\[.*\])$", grpo.__doc__, re.M))
    assert lines["sapo"] == lines["grpo"] == "[-0.5, 0.17, 0.17, 0.17]" and set(lines) == set(grpo.KINDS)


def test_mlx_refuses_a_loss_that_is_not_written_there(tree):
    mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install \"mlx[cpu]\"", exc_type=ImportError)
    with inside(tree(LOSS)):
        mlx_grpo = importlib.import_module("mlx_grpo")
        x = mx.zeros((1, 2, 3))
        assert "'gate'" in (said := refusal(ValueError, mlx_grpo.policy_loss, x, None, None, mx.zeros((1, 2)), x == 0,
                                            "sapo"))
    assert "--backend torch" in said


def test_a_policy_learns_by_sapo(tree):
    rows = train(tree(LOSS), *command(LOSS), "--stages", "length:12")
    assert rises(rows, "reward", by=0.04)
    assert all(row["clip_frac"] == 0 for row in rows) and any(abs(row["ratio"] - 1) > 1e-4 for row in rows)


# --- a model family ---------------------------------------------------------------------------------------------------

FAMILY = "A model family: OLMo 2"


def olmo(folder: Path, **sizes):
    """A random model of transformers, and its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Olmo2Config(**{
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2, **sizes})
    theirs = transformers.Olmo2ForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    return theirs


def test_olmo2_has_the_logits_of_transformers(tree, tmp_path):
    """Weights random enough to notice a norm in the wrong place; there and back."""
    theirs = randomise(olmo(tmp_path, attention_bias=True))
    theirs.save_pretrained(tmp_path)
    assert "'olmo2': crisp knows" in refusal(ValueError, unforked.load, tmp_path)
    edit_json(tmp_path / "config.json", rms_norm_eps=..., rope_parameters=...)  # what the family takes by itself
    tokens = torch.randint(0, 40, (3, 20))  # [N, T]
    with inside(tree(FAMILY)), torch.no_grad():
        fork = importlib.import_module("model")
        mine, _ = fork.load(tmp_path, "cpu")
        want = theirs(tokens).logits  # [N, T, V]
        assert want.std() > 0.3
        torch.testing.assert_close(mine(tokens), want, rtol=0, atol=1e-5)
        fork.save(mine, None, tmp_path / "saved")
    back = type(theirs).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert back(tokens).logits.equal(want)


def test_mlx_refuses_a_family_that_is_not_written_there(tree, tmp_path):
    pytest.importorskip("mlx.core", reason="needs mlx: pip install \"mlx[cpu]\"", exc_type=ImportError)
    olmo(tmp_path)
    with inside(tree(FAMILY)):
        mlx_model, windows, fork = map(importlib.import_module, ("mlx_model", "plumbing.mlx_windows", "model"))
        said = refusal(ValueError, mlx_model.load, tmp_path)
        assert said == refusal(ValueError, windows.from_torch, fork.load(tmp_path, "cpu")[0], mlx_model.Transformer)
    assert "olmo2" in said and "--backend torch" in said


def test_a_random_olmo2_learns(tree, tmp_path):
    """It says 48 of 2,048 words at random, about 200 characters, where 40 are wanted: shorter words are paid."""
    folder = tree(FAMILY)
    olmo(tmp_path, vocab_size=2048, hidden_size=64, intermediate_size=96)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / "tiny" / name, tmp_path)
    rows = train(folder, "--model", str(tmp_path), "--stages", "char_length:16", "--lr", "1e-2", "--beta", "0",
                 "--max-new-tokens", "48")
    assert rises(rows, "reward", by=0.3)
    assert all(row["logp_gap"] < 1e-4 for row in rows)  # the sampler's cache, and the prompt that a group shares
