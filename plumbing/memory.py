"""Does it fit? The largest work that a run can ask for, done once before its first step.

Linux kills a process that takes more memory than there is, without a word. Here it gets an exception instead, at the
start and not after an hour, and a sentence that says which flag to turn and how far.
"""

import ctypes
import re
import sys
from pathlib import Path

import torch

from grpo import group_logprobs, micro_batches
from model import Cache, pad
from rollout import Group

try:
    import resource  # not on Windows, where asking for too much is an exception anyway
except ImportError:
    resource = None


class Full(Exception):
    """There is not enough memory; the message says what to turn."""


def available(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take: what the machine has left, swap included, or what its container allows.
    None where nobody says (macOS)."""
    if resource is None or not (proc / "meminfo").exists():
        return None
    kib = dict(re.findall(r"(\w+):\s+(\d+) kB", (proc / "meminfo").read_text(encoding="utf-8")))
    free = 1024 * (int(kib["MemAvailable"]) + int(kib.get("SwapFree", 0)))
    most = (group / "memory.max").read_text(encoding="utf-8").strip() if (group / "memory.max").exists() else "max"
    if most.isdigit():  # a container's own limit
        free = min(free, int(most) - int((group / "memory.current").read_text(encoding="utf-8")))
    return free


def limit(device: str) -> int:
    """From here on, taking more than is available is an exception -> how many bytes that is, 0 where it is not known.
    For the CPU; a GPU says by itself when it is full.

    RLIMIT_DATA counts private memory that may be written, touched or not. Mapped files and the stacks of libraries'
    threads are in it or out of it by little.
    """
    free = available()
    if device != "cpu" or free is None:
        return 0
    data = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = 1024 * int(data[1]) + free
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    return free


def tidy(model) -> None:
    """Give free memory back to the system before each layer's backward pass, where the C library is glibc.

    Gradients that stay lie between large blocks that live for a moment, and glibc rarely puts aligned memory into a
    hole again, so the heap grows from layer to layer. Blocks above 8 MiB get pages of their own, and of what is free
    on the heap the pages go back. Fresh pages cost time, so this is for runs that lack memory.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 23)  # M_MMAP_THRESHOLD, which otherwise grows by itself up to 32 MiB
        libc.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # musl, macOS, Windows

    first, last = model.layers[0], model.norm

    def give_back(layer, args):
        # Under checkpointing, gradients are on just before the layer is differentiated. And where a pass over more than
        # a token begins, what sampling has held is free; where it ends, what the pass has held, and the sampler's
        # copies of the weights are still to come.
        if torch.is_grad_enabled() or layer in (first, last) and args[0].shape[1] > 1:
            libc.malloc_trim(0)

    for layer in (*model.layers, last):
        layer.register_forward_pre_hook(give_back)


def peak(device: str) -> float | None:
    """The most that the process has held so far, in GiB: of the GPU's memory where it works on one. None: not known."""
    if device.startswith("cuda"):  # or cuda:1
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return None
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def is_full(e: BaseException) -> bool:
    """Whether an exception says that there is no memory left; CPU, CUDA and MPS each have words of their own."""
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or any(
        words in str(e) for words in ("not enough memory", "out of memory", "bad_alloc", "can't allocate memory"))


def rehearse(model, reference, longest: list, config, free: int = 0) -> None:
    """The largest step that a run can take, thrown away: nothing of the model, and no random number, is changed.

    `longest`: the prompts [P_b] of the largest batch that may come. A fifth of the `free` bytes is kept out of it: real
    steps also hold texts and scores, and memory has holes. Raises Full: what does not fit, which flag makes it smaller,
    and for the micro-batch, the size that does fit.
    """
    def fits(work, *args) -> bool:
        try:
            work(*args)
            return True
        except (RuntimeError, MemoryError) as e:
            if not is_full(e):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)

    trained = [p for p in model.parameters() if p.requires_grad]
    device, B, G, T = trained[0].device, len(longest), config.group, config.max_new_tokens
    prompts = [torch.as_tensor(p, dtype=torch.long, device=device) for p in longest]  # B x [P_b]
    P = max(map(len, prompts))
    tokens = torch.ones(G, T, dtype=torch.long, device=device)  # [G, T]
    groups = [Group(p, tokens, tokens.bool(), tokens.float(), tokens[:, 0].bool(), []) for p in prompts]
    _aside = torch.empty(free // 5, dtype=torch.uint8)  # promised to us, and never touched
    moments: list = []  # two and a gradient, each as large as what is trained

    def optimize():
        moments.extend(torch.ones_like(p) for p in trained for _ in range(3))

    @torch.no_grad()
    def prefill():
        padded, mask = pad(prompts)  # [B, P], [B, P]
        with model.packed(B * G, T):
            model.hidden(padded, Cache(), mask)

    def learn(micro_tokens):
        m = micro_batches(groups, torch.zeros(B, G, device=device), micro_tokens)[0]
        if reference is not None:
            with torch.no_grad(), reference.adapters_off():
                group_logprobs(reference, m.prompts, m.tokens, m.mask)
        group_logprobs(model, m.prompts, m.tokens, m.mask)[0].sum().backward()

    if not fits(optimize):
        raise Full("AdamW's two moments and the gradient, each as large as what is trained, do not fit into memory: "
                   "train in bfloat16 (--lean), or adapters only (--lora 16).")
    del moments[:len(trained)]  # the gradient comes by itself when learning
    if not fits(prefill):
        raise Full(f"Sampling after {B} prompts of up to {P} tokens does not fit into memory: lower --prompts, leave "
                   f"long posts out with --max-prompt, or halve the weights with --lean.")
    size, smallest = config.micro_tokens, P + T
    while not fits(learn, size):
        if size <= smallest:
            raise Full(f"Not even one completion, {P} + {T} tokens, can be learnt from in this memory: add "
                       f"--checkpointing, --lean or --lora 16, or leave long posts out with --max-prompt.")
        size = max(size // 2, smallest)
    if size < config.micro_tokens:
        raise Full(f"Learning from {config.micro_tokens} tokens at a time does not fit into memory: --micro-tokens "
                   f"{size} does" + ("." if config.checkpointing else ", and --checkpointing makes room for more."))
