"""Does it fit? The largest step that a run can ask for is done once, before its first step.

Linux kills a process that takes more memory than there is, and says nothing. Here such a process gets an exception
instead: at the start and not after an hour, with a sentence that says which flag to turn and how far.
"""

import ctypes
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]  # Windows, and a module is never None to mypy


class Full(Exception):
    """There is not enough memory; the message says which flag helps."""


CGROUP = Path("/sys/fs/cgroup")  # where Linux writes what a group of processes may take and what it has taken
OWN = Path("/proc/self/cgroup")  # which group this process is in
# The root of the groups; a group's limit and use; what of the use are files that the system drops when it needs room.
GROUPS = (("", "memory.max", "memory.current", "inactive_file"),  # version 2
          ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # version 1
# `ulimit -d`, as it was before `cap_memory` lowered it, and `ulimit -v`: the limit, and psutil's name for its count.
ULIMITS: list[tuple[int, str]] = []
if sys.platform == "linux" and resource is not None:
    ULIMITS = [(limit, name) for limit, name in ((resource.getrlimit(resource.RLIMIT_DATA)[0], "data"),
                                                 (resource.getrlimit(resource.RLIMIT_AS)[0], "vms"))
               if limit != resource.RLIM_INFINITY]


def available(cgroup: Path = CGROUP, own: Path = OWN) -> int | None:
    """Bytes that this process may still take: what the machine has left, swap included, or what the smallest limit
    allows, of those of its container, of the groups around it, and of its shell (`ulimit`). None where the system does
    not say (Linux without /proc)."""
    try:
        free = psutil.virtual_memory().available + psutil.swap_memory().free
    except OSError:
        return None
    rooms: list = [limit - getattr(psutil.Process().memory_info(), name) for limit, name in ULIMITS]
    # A line is "0::/user.slice/job.scope" in version 2 and "4:memory:/docker/1a2b" in version 1. In a container the
    # path may be the one that the host knows: what is not there is passed over, and the root is the container's.
    lines = own.read_text(encoding="utf-8").splitlines() if own.exists() else []
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines if line.count(":") > 1}
    for version, files in zip(("", "memory"), GROUPS):
        root, *names = files
        group = Path(paths.get(version, "/"))
        for each in (group, *group.parents):
            rooms.append(room_of(cgroup / root / str(each).lstrip("/"), *names))
    return max(0, min([free, *(room for room in rooms if room is not None)]))


def room_of(group: Path, limit: str, use: str, files: str) -> int | None:
    """Bytes that a group of processes may still take; None where it has no limit."""
    most = (group / limit).read_text(encoding="utf-8").strip() if (group / limit).exists() else "max"
    if most == "max":
        return None
    stat = (group / "memory.stat").read_text(encoding="utf-8") if (group / "memory.stat").exists() else ""
    droppable = re.search(rf"^{files} (\d+)$", stat, re.MULTILINE)
    return int(most) - int((group / use).read_text(encoding="utf-8")) + (int(droppable[1]) if droppable else 0)


def cap_memory(device: str, processes: int = 1) -> int:
    """From here on, a process on the CPU that takes more than is available gets an exception, also on Linux.

    Returns how many bytes are available, or 0 where no limit was set: a GPU and Windows refuse by themselves, and macOS
    knows no such limit. Nor for "mlx": refused memory, it ends the process without a word. `processes` that begin at
    the same time on this machine get equal parts.

    RLIMIT_DATA counts private memory that may be written, touched or not. Mapped files and the stacks of libraries'
    threads make its count differ from what is in use, but by little.
    """
    np.ones((64, 64)) @ np.ones((64, 64))  # OpenBLAS takes its buffers now: refused them later, it ends the process
    torch.ones(2 ** 22).add_(1)  # torch's threads start: refused a stack later, they end it too
    free = available()
    if device != "cpu" or free is None or sys.platform != "linux":
        return 0
    free //= processes
    soft = psutil.Process().memory_info().data + free
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    return free


def tidy(model) -> None:
    """Give free memory back to the system before each layer's backward pass, where the C library is glibc.

    A layer's backward pass takes large blocks, frees them, and leaves its gradients between them. glibc rarely puts
    aligned memory into such a hole again, so the heap grows from layer to layer. Two settings help. Blocks above 8 MiB
    get pages of their own, which the system has back as soon as they are free. `malloc_trim` gives back the pages of
    the heap's holes. Fresh pages cost time, so only runs that lack memory should do this.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 23)  # M_MMAP_THRESHOLD, which otherwise grows by itself up to 32 MiB
        libc.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # musl, macOS, Windows

    first, last = model.layers[0], model.norm

    def give_back(layer, args):
        # Under checkpointing, gradients are on only while a layer runs again, just before it is differentiated.
        # Without gradients, two moments are worth the time. When a pass over several tokens begins, all that sampling
        # held is free. When it ends, all that the pass held is free, and the sampler has not yet copied the weights.
        if torch.is_grad_enabled() or layer in (first, last) and args[0].shape[1] > 1:
            libc.malloc_trim(0)

    for layer in (*model.layers, last):
        layer.register_forward_pre_hook(give_back)


def peak(device: str) -> float | None:
    """The most memory that this process has held so far, in GiB: the GPU's, if it works on one. None: not known."""
    if device == "mlx" and sys.platform == "darwin":  # where what Metal holds is not all counted as the process's
        from plumbing.mlx_arrays import mx
        return mx.get_peak_memory() / 2 ** 30
    if device.startswith("cuda"):  # or cuda:1
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if device.startswith("mps"):  # what its driver holds now: the most that it held is not counted
        return torch.mps.driver_allocated_memory() / 2 ** 30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2 ** 30
    status = Path("/proc/self/status")
    said = status.read_text(encoding="utf-8") if status.exists() else ""
    if most := re.search(r"VmHWM:\s+(\d+) kB", said):  # Linux, where getrusage also counts who started this process
        return int(most[1]) / 2 ** 20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def in_batches(items: Sequence, size: int, run: Callable[[Sequence], Sequence]) -> list:
    """The results of `run` on up to `size` items at a time: on fewer from where that does not fit into memory.

    Raises Full where not even one does.
    """
    results: list = []
    while len(results) < len(items):
        some = items[len(results):len(results) + size]
        try:
            results += run(some)
        except (RuntimeError, MemoryError) as e:
            if not is_full(e):
                raise
            if len(some) == 1:
                raise Full("Not even one summary of a held-out post fits into memory: halve the weights with --lean, "
                           "or leave long posts out with --max-prompt.") from e
            size = (len(some) + 1) // 2
    return results


def is_full(e: BaseException) -> bool:
    """Whether an exception says that there is no memory left; CPU, oneDNN, CUDA and MPS have words of their own."""
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or str(e) == "could not create a primitive" or any(
        words in str(e) for words in ("not enough memory", "out of memory", "bad_alloc", "can't allocate memory"))


def helps(*flags: str) -> str:
    """Advice, of which the first is the best.

    >>> helps("--lean", "--lora 16"), helps()
    ('take --lean, or --lora 16', 'take a smaller model')
    """
    return "take " + (", or ".join(flags) or "a smaller model")


def rehearse(model: torch.nn.Module, sample: Callable[[], None], learn: Callable[[int], None], *, prompts: int,
             prompt_tokens: int, new_tokens: int, micro_tokens: int, checkpointing: bool, free: int = 0) -> None:
    """Do the largest step of a run once, part by part, and throw it away. Raises Full at the first part that does not
    fit; the message names the flag that makes the part smaller and, for the micro-batch, the size that fits.

    `sample()` runs all `prompts`, of up to `prompt_tokens` tokens. `learn(n)` learns from the largest micro-batch of up
    to n tokens; a completion has up to `new_tokens`. The optimizer's part is done here. Gradients are dropped after
    each part. Of the `free` bytes a fifth stays unused: real steps also hold texts and scores, and memory has holes.
    """
    def fits(part: Callable, *args) -> bool:
        try:
            part(*args)
            return True
        except (RuntimeError, MemoryError) as e:
            if not is_full(e):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)

    weights = list(model.parameters())
    trained = [p for p in weights if p.requires_grad]
    # Who has a flag already is not advised to take it.
    lean = [] if weights[0].dtype == torch.bfloat16 else ["--lean"]
    lora = [] if len(trained) < len(weights) else ["--lora 16"]
    shorter = ["--max-prompt, which leaves long posts out"]
    moments: list[torch.Tensor] = []  # those of AdamW, two for each parameter, and for now a gradient

    def optimize() -> None:
        moments.extend(torch.ones_like(p) for p in trained for _ in range(3))

    _unused = torch.empty(free // 5, dtype=torch.uint8)  # counts as taken, though no page of it is ever touched
    if not fits(optimize):
        raise Full(f"AdamW's two moments and the gradient, each as large as what is trained, do not fit into memory: "
                   f"{helps(*lean, *lora)}.")
    del moments[:len(trained)]  # learning makes the gradient itself
    if not fits(sample):
        fewer = ["a lower --prompts"] if prompts > 1 else []
        raise Full(f"Sampling after {prompts} prompts of up to {prompt_tokens} tokens does not fit into memory: "
                   f"{helps(*fewer, *shorter, *lean)}.")
    size, smallest = micro_tokens, prompt_tokens + new_tokens  # one completion after the longest prompt
    while not fits(learn, size):
        if size <= smallest:
            less = [] if checkpointing else ["--checkpointing"]
            raise Full(f"Not even one completion, {prompt_tokens} + {new_tokens} tokens, can be learnt from in this "
                       f"memory: {helps(*less, *lean, *lora, *shorter)}.")
        size = max(size // 2, smallest)
    if size < micro_tokens:
        raise Full(f"Learning from {micro_tokens} tokens at a time does not fit into memory: --micro-tokens {size} does"
                   + ("." if checkpointing else ", and --checkpointing makes room for more."))
