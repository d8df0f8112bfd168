"""A run that does not fit says so before its first step, and says what would fit."""

import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import tiny_model

import eval as evaluation
import grpo
from config import Config
from lora import add_lora
from model import load
from plumbing import memory
from plumbing.posts import load_posts
from plumbing.rehearsal import rehearse_largest_step

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; from plumbing import memory; "
           "n = int(sys.argv.pop(1)); memory.available = lambda: n; ")
TRAIN = PRELUDE + "import train; sys.exit(train.main(sys.argv[1:]))"
LARGE = ("--prompts", "8", "--group", "64", "--max-new-tokens", "60", "--stages", "length:1", "--eval-posts", "2",
         "--device", "cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such limits, and glibc's heap")


def python(code: str, *args, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, text=True, capture_output=True)


def test_what_is_left_is_the_machine_s_or_the_container_s(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000, available=4000, free=100))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=3000, free=1000))

    def with_files(**files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text + "\n", encoding="utf-8")
        return memory.available(tmp_path)

    assert memory.available(tmp_path / "none") == 5000
    assert with_files(memory__max="max") == 5000
    assert with_files(memory__max="3000", memory__current="1000") == 2000
    assert with_files(memory__max="90000") == 5000  # more than the machine has left


def test_version_1_of_containers_limits_is_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=1000))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("3000\n", encoding="utf-8")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1000\n", encoding="utf-8")
    assert memory.available(tmp_path) == 2000
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n", encoding="utf-8")  # there is none
    assert memory.available(tmp_path) == 5000


def test_this_machine_says_what_is_left():
    assert 0 < memory.available() <= psutil.virtual_memory().total + psutil.swap_memory().total


def test_a_system_that_says_nothing_is_not_limited(monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", nowhere)
    assert memory.available() is None and memory.cap_memory("cpu") == 0


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_where_the_system_knows_no_such_limit_none_is_set(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(memory, "resource", None)  # whoever asks it fails
    assert memory.cap_memory("cpu") == 0


@linux
@pytest.mark.parametrize("threads", [1, 16])  # 16 stacks are 128 MiB, which a first large tensor would not find
def test_taking_too_much_is_an_exception(threads):
    code = PRELUDE + (f"torch.set_num_threads({threads}); "
                      "memory.cap_memory('cpu'); kept = torch.ones(50 << 18)\n"  # 50 of 100 MiB
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
    runs with gradients, or a pass over several tokens begins or ends, and not while words are sampled.

    What was imported, and in which order, leaves holes in the heap. They are filled first, with blocks as large as the
    small ones, or those would go there and not between the large ones."""
    code = ("import sys; sys.path[:0] = ['.', 'tests']; import torch; from plumbing import memory\n"
            "from helpers import tiny_model\n"
            "model, ids = tiny_model(), torch.ones(1, 3, dtype=torch.long)\n"
            "if sys.argv[1] == 'tidy': memory.tidy(model)\n"
            "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
            "model(ids).sum().backward()\n"
            "if sys.argv[1] != 'tidy': del [torch.ones(4 << 20)][:]\n"  # glibc's threshold grows to 16 MiB
            "holes = [torch.ones(1 << 10) for _ in range(20_000)]\n"
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


def test_each_system_has_a_peak_of_its_own(monkeypatch, tmp_path):
    """Windows: psutil's. Elsewhere without /proc, or where that names no peak: getrusage's, bytes on macOS and
    KiB on the others."""
    monkeypatch.setattr(sys, "platform", "win32")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=2 ** 29, peak_wset=2 ** 30))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert memory.peak("cpu") == 1.0
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=2 ** 31))
    monkeypatch.setattr(memory, "resource", usage)
    monkeypatch.setattr(memory, "Path", lambda name: Path("nowhere"))
    for system, gib in (("darwin", 2.0), ("freebsd14", 2048.0)):
        monkeypatch.setattr(sys, "platform", system)
        assert memory.peak("cpu") == gib
    status = tmp_path / "status"
    monkeypatch.setattr(memory, "Path", lambda name: status)
    for text, gib in (("VmRSS:\t    512 kB\n", 2048.0), ("VmHWM:\t 3145728 kB\nVmRSS:\t    512 kB\n", 3.0)):
        status.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "platform", "linux")
        assert memory.peak("cpu") == gib


# ------------------------------------------------------------------------------------------- the rehearsal by itself


def rehearse(sample=lambda: None, learn=lambda n: None, **more):
    sizes = {"prompts": 2, "prompt_tokens": 3, "new_tokens": 6, "micro_tokens": 100, "checkpointing": False}
    memory.rehearse(torch.nn.Linear(5, 3), sample, learn, **sizes | more)


def test_the_micro_batch_is_halved_down_to_one_completion():
    tried = []
    with pytest.raises(memory.Full, match="Not even one completion, 3 \\+ 6 tokens"):
        rehearse(learn=lambda n: tried.append(n) or full())
    assert tried == [100, 50, 25, 12, 9]
    rehearse(learn=lambda n: None)  # the first size fits: nobody is told anything


def test_who_checkpoints_is_not_told_to():
    def small(n):
        if n > 30:
            full()

    with pytest.raises(memory.Full, match="--micro-tokens 25 does, and --checkpointing makes room for more"):
        rehearse(learn=small)
    with pytest.raises(memory.Full, match=r"--micro-tokens 25 does\.$"):
        rehearse(learn=small, checkpointing=True)


@pytest.mark.parametrize("dtype, adapters, checkpointing, prompts, says", [
    (torch.float32, False, False, 2, ["--lean, or --lora 16", "a lower --prompts, or --max-prompt, which leaves long "
                                      "posts out, or --lean", "--checkpointing, or --lean, or --lora 16, or --max-p"]),
    (torch.bfloat16, False, True, 1, ["--lora 16", "--max-prompt, which leaves long posts out",
                                      "--lora 16, or --max-prompt"]),
    (torch.bfloat16, True, True, 1, ["a smaller model", "--max-prompt, which leaves long posts out", "--max-prompt"])])
def test_nobody_is_advised_to_take_what_he_has(dtype, adapters, checkpointing, prompts, says, monkeypatch):
    model = tiny_model("qwen2").to(dtype)
    if adapters:
        add_lora(model, 2, 4.0)

    def complaint(**parts):
        parts = {"sample": lambda: None, "learn": lambda n: None} | parts
        with pytest.raises(memory.Full) as caught:
            memory.rehearse(model, **parts, prompts=prompts, prompt_tokens=3, new_tokens=6, micro_tokens=9,
                            checkpointing=checkpointing)
        return str(caught.value)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "ones_like", full)
        optimizer = complaint()
    for said, advice in zip((optimizer, complaint(sample=full), complaint(learn=full)), says):
        assert f": take {advice}" in said


def test_onednn_has_words_of_its_own():
    assert memory.is_full(RuntimeError("could not create a primitive"))
    assert not memory.is_full(RuntimeError("could not create a primitive descriptor for a matmul"))


def test_no_gradient_outlives_a_part_even_one_that_fails():
    model = torch.nn.Linear(5, 3)
    seen = []

    def learn(n):
        seen.append(model.weight.grad is None)
        model.weight.sum().backward()
        if n > 30:
            full()

    with pytest.raises(memory.Full):
        memory.rehearse(model, lambda: model.weight.sum().backward(), learn, prompts=2, prompt_tokens=3, new_tokens=6,
                        micro_tokens=100, checkpointing=False)
    assert seen == [True] * 3 and model.weight.grad is None


def test_while_it_learns_two_moments_of_what_is_trained_are_held(monkeypatch):
    held, real = [], torch.ones_like
    monkeypatch.setattr(torch, "ones_like", lambda p: held.append(weakref.ref(x := real(p))) or x)
    alive = []
    rehearse(sample=lambda: alive.append(sum(x() is not None for x in held)),
             learn=lambda n: alive.append(sum(x() is not None for x in held)))
    assert len(held) == 6 and alive == [4, 4]  # two parameters: two moments and a gradient each, then the moments


# ------------------------------------------------------------------------------------------- the rehearsal of a run


def config(**more):
    return SimpleNamespace(**({"group": 4, "max_new_tokens": 6, "micro_tokens": 100, "checkpointing": False} | more))


@pytest.mark.parametrize("lora", [False, True])
def test_a_rehearsal_leaves_no_trace(lora):
    model = tiny_model("qwen2")
    if lora:
        add_lora(model, 2, 4.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ref_model = model if lora else tiny_model("qwen2").requires_grad_(False)
    state = torch.get_rng_state()
    rehearse_largest_step(model, ref_model, [[1, 2], [3]], config(), free=0, grpo=grpo)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def full(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("fails, says", [
    ("torch.ones_like", "two moments and the gradient.*--lean"),
    ("grpo.pad", "Sampling after 2 prompts of up to 3 tokens.*--max-prompt"),
    ("grpo.group_logprobs", "Not even one completion, 3 \\+ 6 tokens.*--checkpointing"),
])
def test_each_part_that_does_not_fit_is_named(fails, says, monkeypatch):
    model = tiny_model("qwen2")
    monkeypatch.setattr(fails, full)
    with pytest.raises(memory.Full, match=says):
        rehearse_largest_step(model, None, [[1, 2, 3], [4]], config(), free=0, grpo=grpo)


def test_the_longest_micro_batch_comes_first_and_is_halved(monkeypatch):
    """Prompts of 3 and 1 tokens, 4 completions of 6: in the order of sizes tried, the rows that learn together."""
    seen, real = [], grpo.group_logprobs

    def small(model, prompts, tokens, mask):
        seen.append(([len(p) for p in prompts], tokens.shape[1]))
        return real(model, prompts, tokens, mask) if tokens.shape[:2].numel() < 2 else full()

    monkeypatch.setattr(grpo, "group_logprobs", small)
    with pytest.raises(memory.Full, match="--micro-tokens 13 does, and --checkpointing"):
        rehearse_largest_step(tiny_model("qwen2"), None, [[4], [1, 2, 3]], config(micro_tokens=54), free=0, grpo=grpo)
    assert seen == [([3, 1], 4), ([3], 4), ([3], 1)]  # tried: 54, 27, 13; one row has 9


def test_another_error_is_not_taken_for_a_full_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(grpo, "group_logprobs", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        rehearse_largest_step(tiny_model("qwen2"), None, [[1, 2, 3]], config(), free=0, grpo=grpo)


def test_the_ref_model_is_rehearsed_too_and_a_fifth_is_kept_aside(monkeypatch):
    seen, real, empty = [], grpo.group_logprobs, torch.empty
    monkeypatch.setattr(grpo, "group_logprobs", lambda model, *args: seen.append(model) or real(model, *args))
    monkeypatch.setattr(torch, "empty", lambda *size, **more: seen.append(size) or empty(*size, **more))
    policy, ref_model = tiny_model("qwen2"), tiny_model("qwen2").requires_grad_(False)
    seen.clear()
    rehearse_largest_step(policy, ref_model, [[1, 2, 3]], config(), free=1000, grpo=grpo)
    assert seen == [(200,), ref_model, policy]


def test_the_smallest_limit_that_holds_counts(tmp_path, monkeypatch):
    """A job's group in a user's group, of which the outer one is the tighter; version 2, then version 1."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=1000))
    monkeypatch.setattr(memory, "ULIMITS", [])
    for root, line, limit, use, files in (("two", "0::/user/job", "memory.max", "memory.current", "inactive_file"),
                                          ("one/memory", "4:memory:/user/job", "memory.limit_in_bytes",
                                           "memory.usage_in_bytes", "total_inactive_file")):
        top = tmp_path / root.partition("/")[0]
        (tmp_path / root / "user" / "job").mkdir(parents=True)
        (top / "own").write_text(f"1:cpu:/elsewhere\n{line}\n", encoding="utf-8")

        def limited(group: str, most: str, used: int, root=root, limit=limit, use=use) -> None:
            (tmp_path / root / group / limit).write_text(f"{most}\n", encoding="utf-8")
            (tmp_path / root / group / use).write_text(f"{used}\n", encoding="utf-8")

        assert memory.available(top, top / "own") == 5000
        limited("user/job", "3000", 500)
        assert memory.available(top, top / "own") == 2500
        limited("user", "3500", 1500)  # others of this user have taken 1000
        assert memory.available(top, top / "own") == 2000
        # Of what they hold, 300 are files that were read and can be dropped.
        (tmp_path / root / "user/memory.stat").write_text(f"anon 9\n{files} 300\n", encoding="utf-8")
        assert memory.available(top, top / "own") == 2300
        limited(".", "2000", 1900)  # in a container the root is the container's
        assert memory.available(top, top / "own") == 100
        limited(".", "2000", 2100)
        assert memory.available(top, top / "own") == 0


@linux
@pytest.mark.parametrize("limit", ["-v", "-d"])
def test_the_shell_s_limit_counts(limit):
    """`ulimit -v` counts address space, `ulimit -d` data; both in KiB. What a process has of it already is not free."""
    code = "from plumbing import memory; import psutil; print(memory.available(), memory.cap_memory('cpu'))"
    shell = f"ulimit {limit} 12000000; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, text=True, capture_output=True, check=True)
    free, capped = map(int, done.stdout.split())
    assert 0 < free < 12_000_000 << 10 and capped == pytest.approx(free, rel=0.01)


# ------------------------------------------------------------------------------------------- evaluation


def test_batches_are_halved_where_they_do_not_fit():
    """Ten items, of which three fit at a time: 8 do not, 4 do not, 2 do. Each is done once, in its order."""
    tried = []

    def run(some):
        tried.append(len(some))
        return [2 * x for x in some] if len(some) <= 3 else full()

    assert memory.in_batches(list(range(10)), 8, run) == [2 * x for x in range(10)]
    assert tried == [8, 4, 2, 2, 2, 2, 2]


def test_not_even_one_is_a_sentence_and_another_error_is_itself():
    with pytest.raises(memory.Full, match="Not even one summary.*--lean.*--max-prompt"):
        memory.in_batches([1, 2, 3], 64, full)
    with pytest.raises(ZeroDivisionError):
        memory.in_batches([1, 2, 3], 64, lambda some: 1 // 0)


def test_an_evaluation_in_smaller_batches_says_the_same(monkeypatch):
    model, tokenizer = load("tiny")
    posts = load_posts("tiny", "val")[:9]
    config = Config(target=6)
    whole = evaluation.evaluate(model, tokenizer, posts, config)
    real, sizes = evaluation.sample, []

    def small(model, prompts, **more):
        sizes.append(len(prompts))
        return real(model, prompts, **more) if len(prompts) < 4 else full()

    monkeypatch.setattr(evaluation, "sample", small)
    again = evaluation.evaluate(model, tokenizer, posts, config)
    assert again["summaries"] == whole["summaries"] and sizes == [9, 5, 3, 3, 3]
