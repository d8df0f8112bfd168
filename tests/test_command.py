"""The command that goes on with a run: as a shell and torchrun read it, whoever had started the run."""

import ast
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
from plumbing import command
from plumbing.cli import Stop
from plumbing.command import name_of, python, to_resume

ROOT = Path(__file__).resolve().parents[1]
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none"}  # as torchrun sets them
THIRD = RANK | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "3", "GROUP_RANK": "2",
                "MASTER_ADDR": "10.0.0.1"}


@pytest.fixture
def shell(monkeypatch):
    """A shell that finds this Python as python3, and torchrun. Called with variables, it sets them."""
    monkeypatch.setattr(sys, "executable", "/opt/bin/python3")
    monkeypatch.setattr(sys, "argv", ["train.py", "--prompts", "8"])
    monkeypatch.setattr(shutil, "which", {"python3": "/opt/bin/python3", "torchrun": "/opt/bin/torchrun"}.get)
    return lambda variables: [monkeypatch.setenv(*each) for each in variables.items()]


@pytest.mark.parametrize("variables, want", [
    ({}, "python3 train.py --run 'my run' --resume"), ({"WORLD_SIZE": "2"}, "python3 train.py --run 'my run' --resume"),
    (RANK, "torchrun --nproc-per-node 2 -- train.py --run 'my run' --resume"),
    (RANK | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "python3 train.py --run 'my run' --resume"),  # as good
    (THIRD, "torchrun --nproc-per-node 1 --nnodes 3 --node-rank 2 --master-addr 10.0.0.1 --master-port 29400 -- "
            "train.py --run 'my run' --resume (on each machine with its own --node-rank)"),
    ({k: v for k, v in RANK.items() if "TORCH" not in k},
     "python3 train.py --run 'my run' --resume (on each of the 2 ranks)")])
def test_a_run_goes_on_as_it_was_started(shell, variables, want):
    shell(variables)
    assert to_resume("my run") == to_resume(Path("runs/my run")) == want
    assert to_resume("") == want.replace("--run 'my run' ", "")


def test_what_is_advised_is_what_torchrun_understands(shell):
    """Its own parser: without "--" it would take --run for an abbreviation of --run-path."""
    parser = pytest.importorskip("torch.distributed.run").get_args_parser()
    for variables in (RANK, THIRD):
        shell(variables)
        words = shlex.split(to_resume("my run").partition(" (")[0])
        read = parser.parse_args(words[1:])
        assert read.training_script == "train.py" and read.training_script_args == ["--run", "my run", "--resume"]
        assert read.nproc_per_node == variables["LOCAL_WORLD_SIZE"]
        assert read.nnodes.partition(":")[0] == variables["GROUP_WORLD_SIZE"]  # "1:1" where nothing was said
    assert (read.node_rank, read.master_addr, read.master_port) == (2, "10.0.0.1", 29400)


def test_the_variables_are_those_that_torchrun_sets(tmp_path):
    (tmp_path / "train.py").write_text("from plumbing.command import to_resume; print(to_resume('my run'))\n",
                                       encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", "train.py"],
                          cwd=tmp_path, env=dict(command.os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" --nproc-per-node 2 -- train.py --run 'my run' --resume") == 2, done.stdout


def test_this_python_and_this_train_py(shell, monkeypatch):
    """Another Python of that name would lack what is installed here. A path is right wherever one stands."""
    monkeypatch.setattr(shutil, "which", {"python3": "/usr/bin/python3"}.get)
    assert python() == "/opt/bin/python3"
    monkeypatch.setattr(sys, "argv", ["../my crisp/eval.py", "runs/x"])
    assert to_resume("x", ranks=2) == ("/opt/bin/python3 -m torch.distributed.run --nproc-per-node 2 -- "
                                       "'../my crisp/train.py' --run x --resume")
    monkeypatch.setattr(sys, "argv", ["/opt/bin/pytest"])
    assert to_resume("x") == "/opt/bin/python3 train.py --run x --resume"
    monkeypatch.setattr(sys, "platform", "win32")
    assert to_resume("my run") == '/opt/bin/python3 train.py --run "my run" --resume'


def test_what_a_folder_s_run_is_called():
    for folder, name in (("runs/x", "x"), ("runs/a/b", "a/b"), ("/home/runs/crisp/runs/x", "x"), ("elsewhere/x", "x"),
                         ("here/runs", "runs")):
        assert name_of(Path(folder)) == name


def test_a_run_that_is_not_finished_goes_on_with_as_many_processes_as_it_had(shell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/my run")
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    for settings, want in (({}, "python3 train.py --run 'my run' --resume goes on with it.\n"),
                           ({"ranks": 3}, "torchrun --nproc-per-node 3 -- train.py --run 'my run' --resume goes on")):
        (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        assert evaluation.main([str(run)]) == 1
        assert want in capsys.readouterr().err


def test_who_stops_at_once_is_told_how_to_go_on_if_there_is_something(shell, tmp_path):
    for begun in (False, True):
        with Stop(tmp_path / "runs" / "x") as stop:
            stop.ask(signal.SIGTERM, None)
            with pytest.raises(SystemExit) as end:
                stop.ask(signal.SIGINT, None)
        assert ("go on with: python3 train.py --run x --resume" in str(end.value)) == begun
        (tmp_path / "runs" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "x" / "config.json").write_text("{}", encoding="utf-8")


def test_no_other_file_spells_the_command():
    for path in (*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = {node.body[0].value for node in ast.walk(tree) if getattr(node, "body", None)
                and isinstance(node.body, list) and isinstance(node.body[0], ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told:
                assert "train.py --run" not in node.value, (path, node.lineno)
