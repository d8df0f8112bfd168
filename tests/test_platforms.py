"""It runs where parts of torch and of the system are missing: what a Mac and Windows lack is taken away here.

The wheel of torch for Apple silicon has no oneDNN and no FBGEMM, macOS no /proc and no mallopt, Windows no `resource`,
no SIGKILL and another encoding. Each test runs in a process of its own, from whose beginning on they are gone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TAKEN_AWAY = """
import builtins, ctypes, os, signal

if hasattr(signal, "SIGKILL"):
    del signal.SIGKILL

def without_proc(call):
    def asked(path, *args, **more):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "there is no such place here", str(path))
        return call(path, *args, **more)
    return asked

def no_library(name, *args, **more):
    raise TypeError("CDLL needs a name")

os.stat, os.listdir, builtins.open = map(without_proc, (os.stat, os.listdir, builtins.open))
import io
io.open = builtins.open
import pathlib
if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 keeps functions of its own
    pathlib._NormalAccessor.stat, pathlib._NormalAccessor.open = map(staticmethod, (os.stat, io.open))

import psutil  # its part for Linux needs `resource`, its parts for other systems do not
sys.modules["resource"] = None  # importing it is an ImportError

import torch, torch._ops
ctypes.CDLL = no_library
GONE = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise", "linear_prepack_fp16",
        "linear_dynamic_fp16")
asked = torch._ops._OpNamespace.__getattr__

def without_operators(namespace, name):
    if name in GONE:
        raise AttributeError(f"'_OpNamespace' object has no attribute '{name}'")
    return asked(namespace, name)

torch._ops._OpNamespace.__getattr__ = without_operators
torch._C._get_qengine = lambda: 0  # "none"
torch._C._has_mkldnn = False
torch.set_num_threads(1)
assert torch.backends.quantized.engine == "none" and not torch.backends.mkldnn.is_available()
assert not os.path.exists("/proc/meminfo")
"""


def python(code: str, *args: str, cwd: Path, first: str = TAKEN_AWAY) -> str:
    """What the code prints, in a process that begins with `first`."""
    code = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{first}\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, text=True, encoding="utf-8",
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flags", [[], ["--lean"], ["--lora", "4", "--stages", "squish:2", "--budgets", "0.3"]],
                         ids=["float32", "bfloat16", "squish"])
def test_the_default_learns_for_two_steps(flags, tmp_path):
    stages = [] if "--stages" in flags else ["--stages", "length:1", "rouge_l+length:1"]
    flags = ["--run", "r", "--eval-posts", "2", "--device", "cpu", *stages, *flags]
    out = python("import train; sys.exit(train.main(sys.argv[1:]))", *flags, cwd=tmp_path)
    assert "Done in" in out
    rows = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and rows[1]["grad_norm"] > 0
    assert max(row["logp_gap"] for row in rows) < (0.3 if "--lean" in flags else 1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil asks no /proc")
def test_memory_of_which_nothing_is_known_is_not_limited(tmp_path):
    asked = "from plumbing import memory; print(memory.available(), memory.cap_memory('cpu'), memory.peak('cpu'))"
    assert python(asked, cwd=tmp_path) == "None 0 None\n"


SAMPLE = """
import torch
from helpers import tiny_model
from grpo import group_logprobs
from rollout import sample

for dtype in (torch.float32, torch.bfloat16):
    model = tiny_model(vocab_size=9000, dtype=dtype)  # so large that its head would be packed
    group, = sample(model, [[1, 2, 3]], 4, 20, stop_ids=[])
    with torch.no_grad():
        logp, _ = group_logprobs(model, [group.prompt], group.tokens[None], group.mask[None])
    print(dtype, (logp[0] - group.logp).abs().max().item(), group.tokens.tolist())
"""


def test_sampling_is_the_same_without_fast_products(tmp_path):
    """In float32 the very tokens that this machine's own products give; in bfloat16 the trainer's log-probabilities."""
    bare = [line.split(maxsplit=2) for line in python(SAMPLE, cwd=tmp_path).splitlines()]
    whole = [line.split(maxsplit=2) for line in python(SAMPLE, cwd=tmp_path, first="").splitlines()]
    (kind, gap, tokens), (kind16, gap16, _) = bare
    assert kind == "torch.float32" and float(gap) < 1e-4 and tokens == whole[0][2]
    assert kind16 == "torch.bfloat16" and float(gap16) < 0.3


def test_the_tests_hold_whatever_this_shell_has_set():
    """A hub that is switched off, servers elsewhere, a rank whose others never come, a folder without WordNet: a few
    tests, each of which one of these would fail."""
    odd = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "RANK", "LOCAL_RANK"), "1")
    odd |= {"HF_ENDPOINT": "http://nowhere.invalid", "OPENAI_BASE_URL": "http://nowhere.invalid/v1",
            "OPENAI_API_KEY": "odd", "JUDGE_MODEL": "odd", "EMBEDDING_MODEL": "odd", "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WNSEARCHDIR": str(ROOT), "HF_HOME": str(ROOT / "LICENSE")}
    some = ["test_hub.py::test_files_that_are_whole_survive_a_failed_download", "test_words.py", "test_symptoms.py",
            "-k", "survive or words_that_nobody or says_it_at_its_end"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some], cwd=ROOT / "tests",
                          env=os.environ | odd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-3000:]
