"""Several processes that learn together, started by torchrun: docs/machines.md, "Gradients over machines".

Each process is a rank, with a model and an optimizer of its own. The posts of a step are split over the ranks: each
samples and scores its part, tells the others, and so every rank has the whole batch of groups. Advantages, divisors and
shares are therefore those of one process. Then each rank learns from its own groups, the gradients are summed, and all
take the same step: the weights stay equal to the last bit, which is looked at before each checkpoint. Rank 0 alone
writes files and speaks; the others only say why they end.

Where torchrun's variables are not set, nothing here does anything. All is sent as plain numbers or as JSON: nothing is
unpickled. Gradients go by NCCL where each rank has a GPU of its own, all else by gloo, which knows the CPU only.

How ranks meet, and how one that dies is missed, stands in world.py.

Shapes: B prompts, G completions of each, N = B*G rows, T completion tokens.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plumbing.command import several
from plumbing.memory import is_full
from plumbing.world import Lost, World, first_line

BUCKET = 2 ** 20  # numbers of the gradient that are sent at a time: 4 MiB

_world: World | None = None


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of torchrun's ranks, if it was started by it. Raises Lost, where it does not find the
    others, and ValueError."""
    global _world
    if not several():
        yield
        return
    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError("This torch was built without torch.distributed, or without gloo: start one process, without "
                         "torchrun.")
    world, out = World(), sys.stdout
    world.meet()
    _world = world
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            if world.rank:
                sys.stdout = nowhere
            yield
        exchange("bye")  # none leaves before all have done their last
        world.over.set()
        dist.destroy_process_group()
    except BaseException as e:
        world.end(first_line(e))
        raise
    finally:
        world.over.set()
        _world, sys.stdout = None, out


def take_own_gpu(local: int) -> None:
    """"cuda" is from here on the GPU of this rank's number on its machine."""
    if local >= torch.cuda.device_count():
        raise ValueError(f"There are fewer GPUs here ({torch.cuda.device_count()}) than processes: start one for each "
                         f"GPU, or let them share one (--device cuda:0).")
    torch.cuda.set_device(local)


def count() -> int:
    return _world.size if _world else 1


def first() -> bool:
    """Whether this process writes and speaks."""
    return not _world or _world.rank == 0


def on_this_machine() -> int:
    """How many ranks share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _world else 1


def share(n: int) -> range:
    """Which of n things are this rank's."""
    rank = _world.rank if _world else 0
    return range(n * rank // count(), n * (rank + 1) // count())


def mine(things: Any) -> Any:
    """This rank's part of a sequence or tensor."""
    own = share(len(things))
    return things[own.start:own.stop]


def largest_share(longest: Sequence) -> Sequence:
    """Prompts of a whole batch, shortest first -> the largest part of it that a rank may get."""
    return longest[len(longest) - math.ceil(len(longest) / count()):]


# --- what is exchanged ------------------------------------------------------------------------------------------------


@contextmanager
def waiting() -> Iterator[None]:
    """Around a call of torch.distributed: where it fails, a rank is gone."""
    try:
        yield
    except RuntimeError as e:
        raise Lost(_world.why(e) if _world else str(e)) from e


def gather(flat: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
    """[n_r] of each rank r -> all of them; n_r may differ. `sizes`: the n_r, where they are known."""
    if sizes is None:
        found = [torch.zeros(1, dtype=torch.long) for _ in range(count())]  # [1] each
        with waiting():
            dist.all_gather(found, torch.tensor([len(flat)]))
        sizes = [int(n) for n in found]
    padded = flat.new_zeros(max(sizes))  # [largest n_r]: gloo wants them of one size
    padded[:len(flat)] = flat
    parts = [torch.empty_like(padded) for _ in sizes]  # [largest n_r] each
    with waiting():
        dist.all_gather(parts, padded)
    return [part[:n] for part, n in zip(parts, sizes)]


def exchange(value: Any) -> list:
    """What each rank says, in their order; anything that JSON knows."""
    if not _world:
        return [value]
    said = torch.frombuffer(bytearray(json.dumps(value, default=float).encode()), dtype=torch.uint8)  # [bytes]
    return [json.loads(bytes(part.numpy())) for part in gather(said)]


def all_do(work: Callable[[], Any]) -> list:
    """What work() returns on each rank. Where it fails on one it fails on all, so that none waits for another: for
    want of memory with MemoryError, for a server's with ConnectionError, else with Lost."""
    value, failure, kind = None, None, ""
    try:
        value = work()
    except Exception as e:
        failure, kind = e, "memory" if is_full(e) else "server" if isinstance(e, ConnectionError) else "other"
    answers = exchange([value, kind, str(failure)])
    if failure:
        raise failure
    for rank, (_, kind, said) in enumerate(answers):
        if kind:
            raise {"memory": MemoryError, "server": ConnectionError}.get(kind, Lost)(f"Rank {rank}: {said}")
    return [answer[0] for answer in answers]


def stop_together(stop) -> None:
    """All ranks stop after the same step, which ends here: whichever was asked (`cli.Stop`)."""
    if _world:
        stop.asked = stop.asked or any(exchange(stop.heard))


def agree(what: str, value: Any, advice: str) -> None:
    """Lost where a rank says something else than rank 0."""
    for rank, said in enumerate(answers := exchange(value)):
        if said != answers[0]:
            raise Lost(f"Rank {rank} and rank 0 have different {what}: {said} and {answers[0]}. {advice}.")


def same_settings(config, resume: bool, given: dict, folder=None) -> dict:
    """The settings of rank 0, for all; {"folder", "config"}. ValueError where ranks were given different flags, or
    several processes cannot do what is asked for."""
    flags = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if name != "device"}
    answers = exchange([{**flags, "resume": resume}, {"folder": str(folder), "config": vars(config)}])
    for rank, (said, _) in enumerate(answers):
        if other := sorted(name for name in said.keys() | answers[0][0].keys()
                           if said.get(name) != answers[0][0].get(name)):
            raise ValueError(f"Rank {rank} was started with another --{other[0].replace('_', '-')} than rank 0: give "
                             f"all ranks the same command.")
    found = answers[0][1]
    settings = found["config"]
    for wrong, says in (
            (settings["backend"] == "mlx", "--backend mlx learns in one process: start it without torchrun"),
            (bool(settings["rollouts"]), "--rollouts and torchrun do not go together: let one process ask the servers, "
                                         "or let the ranks sample"),
            (settings["prompts"] < count(), f"--prompts {settings['prompts']} cannot be split over {count()} ranks: "
                                            f"each needs a post, so start fewer")):
        if wrong and _world:
            raise ValueError(says + ".")
    if _world:
        _world.run = settings["run"]
        if torch.cuda.is_available() and given.get("device", settings["device"]) in ("", "cuda"):
            take_own_gpu(_world.local)
    return found


# --- sampling and scoring ---------------------------------------------------------------------------------------------


def sharing(act: Callable, split: Callable) -> Callable:
    """A function that is called as `act`, of whose prompts each rank answers a part; all get all groups. `act` itself
    where there is one process. `split` is that of rollout.py.

    The groups are those of one process, in float32: `act` keys a row's random numbers by its prompt, its place in the
    group, and how often the prompt came before in the batch. So a rank also answers what equals a prompt of its own
    and stands before it in another's part, and throws that away.
    """
    if not _world:
        return act

    def shared(model, prompts: Sequence, *, G: int, **settings) -> list:
        prompts = [torch.as_tensor(p, dtype=torch.long).cpu() for p in prompts]  # B x [P_b]
        own, rows = share(len(prompts)), torch.zeros(0, 3)  # rows [N_r, 3T + 2], of this rank

        def answer() -> tuple[int, int]:
            nonlocal rows
            keys = [p.numpy().tobytes() for p in prompts]
            before = [i for i in range(own.start) if keys[i] in {keys[j] for j in own}]
            some = [prompts[i] for i in (*before, *own)]
            groups = act(model, some, G=G, **settings)[len(before):] if own else []
            T = max((g.tokens.shape[1] for g in groups), default=0)
            if groups:
                rows = torch.cat([rows_of(g, T) for g in groups])  # [N_r, 3T + 2]
            return len(groups) * G, T

        sizes = all_do(answer)
        parts = gather(rows.double().flatten(), [n * (3 * T + 2) for n, T in sizes])  # [N_r * (3T_r + 2)] each
        widest, found = max(T for _, T in sizes), []
        for part, (n, T) in zip(parts, sizes):
            *wide, stopped, ending = part.view(n, 3 * T + 2).split([T, T, T, 1, 1], 1)  # 3 x [N_r, T], 2 x [N_r, 1]
            found.append([torch.nn.functional.pad(x, (0, widest - T)) for x in wide] + [stopped, ending])
        device = model.embed_tokens.weight.device
        tokens, mask, logp, stopped, ending = (torch.cat(x).to(device, dtype) for x, dtype in zip(
            zip(*found), (torch.long, torch.bool, torch.float32, torch.bool, torch.long)))  # [N, T], [N, 1]
        return split(prompts, G, settings.get("tokenizer"), tokens=tokens, mask=mask, logp=logp, stopped=stopped[:, 0],
                     ending=ending[:, 0] if settings.get("stop_text") else None)

    return shared


def rows_of(group, T: int) -> Tensor:
    """All that is sent of a group [G, 3T + 2]: tokens, mask, logp, stopped, ending."""
    ending = torch.zeros_like(group.stopped) if group.ending is None else group.ending  # [G]
    wide = [torch.nn.functional.pad(x.cpu().double(), (0, T - x.shape[1]))
            for x in (group.tokens, group.mask, group.logp)]  # [G, T] each; float64 holds token ids exactly
    return torch.cat([*wide, group.stopped[:, None].cpu().double(), ending[:, None].cpu().double()], 1)


def scored(work: Callable, groups: Sequence, tasks: Sequence) -> list:
    """work(group, task) of all groups, and what it sets in them: rewards, parts and weights. Each rank does its part:
    a model may measure the reward, or a server."""
    if not _world:
        return [work(group, task) for group, task in zip(groups, tasks)]

    def own() -> list:
        return [[work(group, task), group.rewards, group.parts, group.weights]
                for group, task in zip(mine(groups), mine(tasks))]

    found = []
    for group, (value, *said) in zip(groups, (row for rows in all_do(own) for row in rows)):
        group.rewards, group.parts, group.weights = said
        found.append(value)
    return found


# --- learning ---------------------------------------------------------------------------------------------------------


def summed(means: dict[str, float], parameters: Iterable[Tensor]) -> dict[str, float]:
    """This rank's share of each mean -> the means; the gradients of the parameters become their sums over all ranks.

    In float32, whatever the gradients are, and a few MB at a time, so that nothing large is made.
    """
    if not _world:
        return means
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and _world.nccl is None:  # does each rank have a GPU of its own?
        device = gradients[0].device
        _world.nccl = all(exchange(device.type == "cuda" and device.index == _world.local))
    bucket: list[Tensor] = []
    for piece in (piece for gradient in gradients for piece in gradient.view(-1).split(BUCKET)):
        if sum(map(len, bucket)) + len(piece) > BUCKET:
            sum_bucket(bucket)
            bucket = []
        bucket.append(piece)
    if bucket:
        sum_bucket(bucket)
    total = torch.tensor(list(means.values()), dtype=torch.float64)  # [means]
    with waiting():
        dist.all_reduce(total)
    return dict(zip(means, total.tolist()))


def sum_bucket(pieces: list[Tensor]) -> None:
    """Flat pieces of gradients become their sums over all ranks."""
    flat = torch.cat([piece.float() for piece in pieces])  # [numbers]
    flat = flat if _world and _world.nccl else flat.cpu()  # gloo takes no tensor of a GPU, Apple's included
    with waiting():
        dist.all_reduce(flat)
    for piece, total in zip(pieces, flat.split([len(piece) for piece in pieces])):
        piece.copy_(total)


def largest(value: float) -> float:
    return max(exchange(value))


def check_same_weights(named: Mapping[str, Tensor], step: int) -> None:
    """Lost where the ranks have learnt different things, be it in one bit."""
    if not _world:
        return
    found = hashlib.sha256()
    for name, p in named.items():
        found.update(name.encode())
        found.update(p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    agree(f"weights after step {step}", found.hexdigest()[:16],
          "The checkpoint before is good. All ranks need the same torch and the same kind of machine: go on with "
          "--resume on such")
