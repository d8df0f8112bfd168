"""`train.py --backend mlx`: the same run as with torch, and a run that changes its backend on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import edit_json
from loopback_vllm import Vllm
from safetensors.torch import load_file
from test_train import ROOT, SMALL, small  # noqa: F401

import train
from lora import load_adapters
from model import load

mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install \"mlx[cpu]\"", exc_type=ImportError)
from plumbing.mlx_adamw import round_at_random  # noqa: E402

FEW = [*SMALL[:SMALL.index("--stages")], "--run", "r"]


@pytest.fixture
def run(small, tmp_path, monkeypatch):  # noqa: F811
    """A run in a folder of its own: run(name, flags, ...) -> runs/r of it."""
    def run(name, *flags, stop_at=None):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        flags = flags if "--resume" in flags else [*FEW, "--model", str(small), *flags]
        monkeypatch.setattr(train, "Stop", lambda _: Stopping(Path("runs/r/metrics.jsonl"), stop_at))
        assert train.main([*flags, "--run", "r"]) == 0
        return tmp_path / name / "runs" / "r"

    return run


class Stopping:
    """Ctrl-C at a certain step."""

    def __init__(self, log, step):
        self.log, self.step, self.at_end = log, step, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for end in self.at_end:
            end()

    @property
    def asked(self):
        return self.step is not None and len(rows(self.log)) == self.step


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def agree(mine, theirs, atol):
    """Two runs: the same numbers in every line but for rounding, the same summaries, weights within `atol`."""
    for name in ("metrics", "eval"):
        a, b = rows(mine / f"{name}.jsonl"), rows(theirs / f"{name}.jsonl")
        assert len(a) == len(b) > 0
        for one, other in zip(a, b):
            assert one.keys() == other.keys()
            for key in one.keys() - {"seconds", "tokens_per_s", "logp_gap"}:
                assert one[key] == pytest.approx(other[key], rel=1e-2, abs=1e-4), (name, one["step"], key)
    summaries = [[row["summary"] for row in rows(folder / "samples.jsonl")] for folder in (mine, theirs)]
    assert summaries[0] == summaries[1]
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (mine, theirs))
    assert a.keys() == b.keys()
    for name in a:
        assert np.quantile((a[name] - b[name]).abs().numpy(), 0.99) <= atol, name


STAGES = ["--stages", "length:3", "rouge_l+length:3"]


def test_a_run_is_that_of_torch_also_where_it_changes_its_backend(run, capsys):
    """Two stages with a reference model each. All four: torch, MLX, one after the other either way."""
    torchs = run("torch", *STAGES)
    mlxs = run("mlx", *STAGES, "--backend", "mlx")
    agree(mlxs, torchs, atol=2e-3)  # six steps of up to 0.01
    for first, then in (("torch", "mlx"), ("mlx", "torch")):
        begun = run(first + then, *STAGES, "--backend", first, stop_at=4)
        if first == "torch":
            edit_json(begun / "config.json", device="cuda:7")  # of the machine that it was begun on
        capsys.readouterr()
        changed = run(first + then, "--resume", "--backend", then)
        assert f"by {then} it goes on within rounding, and not bit for bit" in capsys.readouterr().out
        agree(changed, torchs, atol=2e-3)
    said = json.loads((mlxs / "config.json").read_text(encoding="utf-8"))
    assert said["backend"] == "mlx" and (mlxs / "curves.png").exists()


def test_a_run_in_mlx_that_was_stopped_is_the_undisturbed_one_to_the_bit(run):
    whole = run("whole", *STAGES, "--backend", "mlx", "--updates", "2")
    run("stopped", *STAGES, "--backend", "mlx", "--updates", "2", stop_at=2)
    agree(run("stopped", "--resume"), whole, atol=0)


def test_adapters_are_trained_and_written(run, small):  # noqa: F811
    """A LoRA run paid by SQUISH, which its own base measures: as torch's, and PEFT's folder holds what was learnt."""
    flags = ["--stages", "squish:2", "--lora", "2", "--max-new-tokens", "46", "--max-document", "60"]
    torchs = run("torch", *flags)
    mlxs = run("mlx", *flags, "--backend", "mlx", "--checkpointing")
    agree(mlxs, torchs, atol=2e-3)
    model, _ = load(small)
    load_adapters(model, mlxs / "adapter")
    merged = dict(model.merged_parameters())
    learnt, _ = load(mlxs)
    for name, p in learnt.named_parameters():
        torch.testing.assert_close(merged[name], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flags", [["--stages", "length:3"], ["--stages", "length:3", "--lora", "2"]])
def test_a_server_writes_for_mlx_as_for_torch(run, small, capsys, flags):  # noqa: F811
    """It gets MLX's weights or adapters after each step, and is not dropped: its words are the policy's."""
    runs = []
    for backend in ("torch", "mlx"):
        server = Vllm(small)
        runs.append(run(backend, *flags, "--backend", backend, "--rollouts", server.url))
        server.close()
        assert len(server.bodies("/v1/completions")) >= 3 * 2 and "is dropped" not in capsys.readouterr().out
        assert max(row["logp_gap"] for row in rows(runs[-1] / "metrics.jsonl")) < 1e-4
    agree(*runs, atol=2e-3)


def test_bfloat16_weights_learn(run):
    """Under --lean weights and moments are bfloat16, rounded at random; adapters stay float32."""
    lean = run("lean", "--stages", "length:3", "--backend", "mlx", "--lean", stop_at=2)
    assert {p.dtype for p in load_file(lean / "model" / "model.safetensors").values()} == {torch.bfloat16}
    state = torch.load(lean / "checkpoint" / "state.pt", weights_only=True)["optimizer"]["state"]
    assert {value["m"].dtype for value in state.values()} == {torch.bfloat16}
    run("lean", "--resume", "--backend", "torch")
    assert [row["step"] for row in rows(lean / "metrics.jsonl")] == [1, 2, 3]


def test_random_rounding_is_right_on_average():
    """bfloat16 has neighbours 1 and 1 + 2^-7: a quarter of the way up, a quarter goes up."""
    x = mx.full(100_000, 1 + 2 ** -9)
    rounded = round_at_random(x, mx.random.key(0))
    assert rounded.dtype == mx.bfloat16 and set(np.unique(np.array(rounded.astype(mx.float32)))) == {1, 1 + 2 ** -7}
    assert (rounded.astype(mx.float32) > 1).mean().item() == pytest.approx(0.25, abs=0.01)


def test_where_mlx_is_missing_it_is_said_what_to_install(tmp_path):
    """Before anything is loaded. Plain `mlx` on Linux installs, and fails at import in the same way."""
    code = "import sys; sys.modules['mlx.core'] = None; import train; sys.exit(train.main(['--backend', 'mlx']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "pip install" in done.stderr and done.stderr.startswith("train.py: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", [["--device", "cpu"], ["--compile"]])
def test_flags_that_do_nothing_in_mlx_are_refused(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--backend", "mlx", *flag]) == 1
    assert "leave out --device and --compile" in capsys.readouterr().err and not list(tmp_path.iterdir())
