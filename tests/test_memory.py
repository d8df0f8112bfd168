"""A run that does not fit says so before its first step, and says what would fit."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model

from lora import add_lora
from plumbing import memory

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; from plumbing import memory; "
           "n = int(sys.argv.pop(1)); memory.available = lambda: n; ")
TRAIN = PRELUDE + "import train; sys.exit(train.main(sys.argv[1:]))"
LARGE = ("--prompts", "8", "--group", "64", "--max-new-tokens", "60", "--stages", "length:1", "--eval-posts", "2")
linux = pytest.mark.skipif(memory.available() is None, reason="only Linux says how much memory there is")


def python(code: str, *args, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, text=True, capture_output=True)


def meminfo(folder, text):
    (folder / "meminfo").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.skipif(memory.resource is None, reason="Windows has no such limits")
def test_what_is_left_is_the_machine_s_or_the_container_s(tmp_path):
    proc = meminfo(tmp_path, "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\nSwapFree:  1000 kB\n")
    nowhere = tmp_path / "none"
    assert memory.available(proc, nowhere) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert memory.available(proc, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text("1000000\n", encoding="utf-8")
    assert memory.available(proc, tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("900000000\n", encoding="utf-8")  # more than the machine has left
    assert memory.available(proc, tmp_path) == 5000 * 1024
    assert memory.available(nowhere, nowhere) is None


@linux
def test_taking_too_much_is_an_exception():
    code = PRELUDE + ("memory.limit('cpu'); kept = torch.ones(50 << 18)\n"  # 50 of 100 MiB
                      "try: torch.ones(100 << 18)\nexcept RuntimeError as e: print(memory.is_full(e))")
    assert python(code, 100 << 20).stdout == "True\n"
    assert python(code.replace("'cpu'", "'cuda'"), 100 << 20).stdout == ""  # a GPU's driver reserves what it likes


@linux
def test_a_run_too_large_is_refused_with_a_size_that_fits(tmp_path):
    refused = python(TRAIN, 800 << 20, "--run", "a", *LARGE, cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    size = re.fullmatch(r"train.py: Learning from 16384 tokens at a time does not fit into memory: --micro-tokens "
                        r"(\d+) does, and --checkpointing makes room for more.\n", refused.stderr)
    assert size and not (tmp_path / "runs").exists(), refused.stderr
    taken = python(TRAIN, 800 << 20, "--run", "a", "--micro-tokens", size[1], *LARGE, cwd=tmp_path)
    assert taken.returncode == 0, taken.stderr
    assert re.search(r"Done in \d+:\d\d, with at most \d\.\d GiB of memory\.", taken.stdout)


@linux
def test_tidied_memory_goes_back_though_small_things_lie_between():
    """20 blocks of 4 MiB, a small one kept after each. Untidied, the heap keeps all of it; tidied, it goes when a layer
    runs with gradients, or a pass over several tokens begins or ends, and not while words are sampled."""
    code = ("import sys; sys.path[:0] = ['.', 'tests']; import torch; from plumbing import memory\n"
            "from helpers import tiny_model\n"
            "model, ids = tiny_model(), torch.ones(1, 3, dtype=torch.long)\n"
            "if sys.argv[1] == 'tidy': memory.tidy(model)\n"
            "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
            "model(ids).sum().backward()\n"
            "if sys.argv[1] != 'tidy': del [torch.ones(4 << 20)][:]\n"  # glibc's threshold grows to 16 MiB
            "before, small = rss(), []\n"
            "def tear(*_):\n"
            "    large = []\n"
            "    for _ in range(20): large.append(torch.ones(1 << 20)); small.append(torch.ones(1 << 10))\n"
            "if sys.argv[4] == 'before': tear()\n"
            "else: model.layers[-1].register_forward_hook(tear)\n"
            "with torch.no_grad(): model(ids[:, :1])\n"  # a word of a completion: not even worth a look
            "print(rss() - before, end=' ')\n"
            "with torch.set_grad_enabled(sys.argv[2] == 'gradients'): model(ids[:, :int(sys.argv[3])])\n"
            "print(rss() - before)")
    for when in (("gradients", "1", "before"), ("none", "3", "before"), ("none", "3", "within")):
        held = [subprocess.run([sys.executable, "-c", code, how, *when], cwd=ROOT, text=True, capture_output=True,
                               check=True) for how in ("untidy", "tidy")]
        (untidy, still), (waiting, tidy) = (map(int, run.stdout.split()) for run in held)
        assert min(untidy, still, waiting) > 60 and tidy < 10, (when, untidy, still, waiting, tidy)


@linux
def test_a_peak_is_the_process_s_own_and_stays():
    """Not that of the large process which starts it, and also after the memory is gone."""
    large = ("import torch, subprocess, sys; x = torch.ones(1 << 28); sys.exit(subprocess.call(sys.argv[1:]))")
    small = ("import torch; from plumbing.memory import peak\n"
             "print(peak('cpu')); torch.ones(1 << 27); print(peak('cpu'))")
    out = subprocess.run([sys.executable, "-c", large, sys.executable, "-c", small], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout.split()
    before, after = map(float, out)
    assert before < 0.8 and after == pytest.approx(before + 0.5, abs=0.05)


def config(**more):
    return SimpleNamespace(**({"group": 4, "max_new_tokens": 6, "micro_tokens": 100, "checkpointing": False} | more))


@pytest.mark.parametrize("lora", [False, True])
def test_a_rehearsal_leaves_no_trace(lora):
    model = tiny_model("qwen2")
    if lora:
        add_lora(model, 2, 4.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    reference = model if lora else tiny_model("qwen2").requires_grad_(False)
    state = torch.get_rng_state()
    memory.rehearse(model, reference, [[1, 2], [3]], config())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def full(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("fails, says", [
    ("torch.ones_like", "two moments and the gradient.*--lean"),
    ("pad", "Sampling after 2 prompts of up to 3 tokens.*--max-prompt"),
    ("group_logprobs", "Not even one completion, 3 \\+ 6 tokens.*--checkpointing"),
])
def test_each_part_that_does_not_fit_is_named(fails, says, monkeypatch):
    model = tiny_model("qwen2")
    monkeypatch.setattr(f"plumbing.memory.{fails}", full)
    with pytest.raises(memory.Full, match=says):
        memory.rehearse(model, None, [[1, 2, 3], [4]], config())


def test_the_longest_micro_batch_comes_first_and_is_halved(monkeypatch):
    """Prompts of 3 and 1 tokens, 4 completions of 6: in the order of sizes tried, the rows that learn together."""
    seen, real = [], memory.group_logprobs

    def small(model, prompts, tokens, mask):
        seen.append(([len(p) for p in prompts], tokens.shape[1]))
        return real(model, prompts, tokens, mask) if tokens.shape[:2].numel() < 2 else full()

    monkeypatch.setattr(memory, "group_logprobs", small)
    with pytest.raises(memory.Full, match="--micro-tokens 13 does, and --checkpointing"):
        memory.rehearse(tiny_model("qwen2"), None, [[4], [1, 2, 3]], config(micro_tokens=54))
    assert seen == [([3, 1], 4), ([3], 4), ([3], 1)]  # tried: 54, 27, 13; one row has 9


def test_another_error_is_not_taken_for_a_full_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(memory, "group_logprobs", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        memory.rehearse(tiny_model("qwen2"), None, [[1, 2, 3]], config())


def test_the_reference_is_rehearsed_too_and_a_fifth_is_kept_aside(monkeypatch):
    seen, real, empty = [], memory.group_logprobs, torch.empty
    monkeypatch.setattr(memory, "group_logprobs", lambda model, *args: seen.append(model) or real(model, *args))
    monkeypatch.setattr(torch, "empty", lambda *size, **more: seen.append(size) or empty(*size, **more))
    policy, reference = tiny_model("qwen2"), tiny_model("qwen2").requires_grad_(False)
    seen.clear()
    memory.rehearse(policy, reference, [[1, 2, 3]], config(), free=1000)
    assert seen == [(200,), reference, policy]
