"""Several ranks on this machine, as torchrun would start them, but forked: torch is imported once for all.

    python tests/ranks_at_work.py FOLDER      # does all JOBS; what each rank said and did is in FOLDER/JOB-RANK.txt

test_ranks.py runs this once and looks at the results.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers import tiny_model, tokens

import grpo
import lora
import task
import train
from plumbing import ranks, world
from plumbing.log import Log

world.BEAT = 0.5  # seconds; SILENCE is shortened only where somebody is to fall silent: tests may be slow
FEW = ["--prompts", "3", "--group", "4", "--target", "6", "--eval-posts", "3", "--lr", "1e-3", "--save-every", "2",
       "--print-every", "1", "--stages", "length:3", "rouge_l+length:3", "--max-posts", "4"]


# --- updates ----------------------------------------------------------------------------------------------------------


def groups_of(rewards, seed=0):
    """Groups of 3 completions after prompts of 2, 3, .. tokens; the last ones write much more than the first ones."""
    dice = torch.Generator().manual_seed(seed)
    found = []
    for b, paid in enumerate(rewards):
        T = 2 + 3 * b
        lengths = torch.randint(1, T + 1, (3,), generator=dice)
        lengths[0] = T
        mask = torch.arange(T) < lengths[:, None]
        found.append(SimpleNamespace(
            prompt=tokens(1, 2 + b, seed=seed + b)[0], tokens=tokens(3, T, seed=seed + 10 + b) * mask, mask=mask,
            logp=torch.full((3, T), -3.0) * mask, rewards=list(paid), weights={"a": 1.0, "b": 0.5},
            parts={"a": [1.5 * r for r in paid], "b": [-r for r in paid]}))
    return found


SPREAD = [[1.0, 0.0, 3.0], [0.0, 2.0, 2.5], [1.0, 5.0, 2.0], [0.5, 0.25, 4.0]]
HALF_FLAT = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.0, 5.0, 2.0], [0.5, 0.25, 4.0]]  # all of the first rank's are flat
FLAT = [[1.0, 1.0, 1.0]] * 4
CASES = {f"{loss}, {kind}": {"loss": loss, "advantage": kind} for loss in grpo.KINDS for kind in grpo.ADVANTAGES}
CASES |= {"a rank's groups all flat": {"rewards": HALF_FLAT}, "half flat, dapo": {"rewards": HALF_FLAT, "loss": "dapo"},
          "two updates": {"updates": 2, "loss": "gspo", "kl": "k2"}, "no KL, all flat": {"rewards": FLAT, "beta": 0.0},
          "small micro-batches": {"micro_tokens": 12}, "three groups": {"rewards": SPREAD[:3]},
          "adapters": {"lora": 4}}


def learn(case):
    """-> (how far each weight moved, the metrics)."""
    settings = {"loss": "grpo", "advantage": "group", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.1, "kl": "k3_ratio",
                "updates": 1, "temperature": 1.0, "grad_clip": 1e9, "micro_tokens": 60, "max_new_tokens": 0,
                "rewards": SPREAD, "lora": 0} | case
    model, ref_model = tiny_model(), tiny_model(seed=1)
    if settings["lora"]:
        lora.add_lora(model, settings["lora"], 8.0, [], 0)
        ref_model = model
    trained = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in trained])
    optimizer = torch.optim.SGD(trained, 0.1)  # and no clip: a gradient that is twice too large shows
    metrics = grpo.update(model, ref_model, groups_of(settings["rewards"]), optimizer, SimpleNamespace(**settings))
    return torch.cat([p.detach().flatten() for p in trained]) - before, metrics


def updates(rank):
    """Each update by one process and by several: {case: largest difference of a weight, of a metric}."""
    cases = dict(list(CASES.items())[::3 if os.environ["WORLD_SIZE"] == "3" else 1])
    alone = {name: learn(case) for name, case in cases.items()}
    said = {}
    with ranks.joined():
        for name, case in cases.items():
            moved, metrics = learn(case)
            want, wanted = alone[name]
            said[name] = {"off": (moved - want).abs().max().item(), "moved": want.abs().max().item(),
                          "metrics": max(abs(metrics[k] - v) / max(1, abs(v)) for k, v in wanted.items()),
                          "names": sorted(metrics) == sorted(wanted),
                          "alike": len(set(ranks.exchange(moved.numpy().tobytes().hex()))) == 1}
        one_fails(said, rank)
        said["bfloat16"] = summed_in_float32(rank)
    print(json.dumps(said))


def one_fails(said, rank):
    """What fails on one rank fails on all, with the kind of error that the caller knows."""
    for name, error in (("memory", MemoryError("full")), ("server", ConnectionError("away")), ("other", KeyError("x"))):
        def work(error=error):
            if rank == 1:
                raise error
        try:
            ranks.all_do(work)
        except Exception as e:
            said[name] = [type(e).__name__, str(e)]


def summed_in_float32(rank):
    """bfloat16 gradients, in several buckets: rounded once, after the sum."""
    every = [torch.randn(700, 5, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(ranks.count())]
    p = torch.nn.Parameter(torch.zeros(700, 5, dtype=torch.bfloat16))
    p.grad = every[rank].clone()
    size, ranks.BUCKET = ranks.BUCKET, 1000
    ranks.summed({"loss": 1.0}, [p])
    ranks.BUCKET = size
    return bool((p.grad == sum(x.float() for x in every).bfloat16()).all())


# --- whole runs -------------------------------------------------------------------------------------------------------


def run(rank, *more, name="r", few=FEW):
    return train.main([*few, "--run", name, *more])


def at_step(n, do):
    """Call do() once step n is logged."""
    before = Log.step

    def step(self, number, *args):
        before(self, number, *args)
        if number == n:
            do()

    Log.step = step


def killed(rank):
    if rank == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return run(rank, name="killed")


def frozen(rank):
    """A rank that lives and does nothing: a machine that sleeps, a cable that was pulled."""
    if rank == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    else:
        at_step(3, lambda: setattr(world, "SILENCE", 2.0))
    return run(rank, name="frozen")


def frozen_while_we_work(rank):
    if rank == 1:
        at_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    else:
        at_step(1, lambda: (setattr(world, "SILENCE", 2.0), time.sleep(600)))
    return run(rank, name="asleep")


def stopped(rank):
    """A signal that reaches one rank only."""
    if rank == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return run(rank, name="stopped")


def apart(rank):
    """A machine that computes something else."""
    if rank == 1:
        before = train.grpo.update

        def update(model, *args):
            line = before(model, *args)
            next(model.parameters()).data[0, 0] += 1e-6
            return line

        train.grpo.update = update
    return run(rank, name="apart")


def no_server(rank):
    """A reward's server that one rank cannot reach in step 2."""
    if rank == 1:
        before, asked = task.score_group, []

        def score_group(group, *args, **named):
            asked.append(group)
            if len(group.texts) > 1 and sum(len(g.texts) > 1 for g in asked) > 2:
                raise ConnectionError("The judge is away.")
            return before(group, *args, **named)

        task.score_group = score_group
    return run(rank, name="no-server")


def exploded(rank):
    """The loss of one rank is NaN: all say so, and none waits for another."""
    if rank == 1:
        before, seen = grpo.policy_loss, []

        def policy_loss(*args, **named):
            seen.append(1)
            loss, metrics = before(*args, **named)
            return loss * (float("nan") if len(seen) == 4 else 1.0), metrics

        grpo.policy_loss = policy_loss
    return run(rank, name="exploded")


def elsewhere(rank, *flags):
    """Two machines without a common disk."""
    if rank == 1:
        os.makedirs("other machine", exist_ok=True)
        os.chdir("other machine")
    return train.main([*flags, "--run", "elsewhere"])


JOBS = {  # name: (ranks, what each does)
    "updates": (2, updates), "updates3": (3, updates),
    "one": (1, lambda rank: run(rank, name="one")), "two": (2, lambda rank: run(rank, name="two")),
    "three": (3, lambda rank: run(rank, name="three")),
    "killed": (2, killed), "killed-again": (2, lambda rank: train.main(["--run", "killed", "--resume"])),
    "stopped": (2, stopped), "stopped-again": (2, lambda rank: train.main(["--run", "stopped", "--resume"])),
    "frozen": (2, frozen), "asleep": (2, frozen_while_we_work),
    "frozen-again": (1, lambda rank: train.main(["--run", "frozen", "--resume"])),
    "elsewhere": (2, lambda rank: elsewhere(rank, *FEW)),
    "elsewhere-again": (2, lambda rank: elsewhere(rank, "--resume")),
    "apart": (2, apart), "no-server": (2, no_server), "exploded": (2, exploded),
    "mlx": (2, lambda rank: run(rank, "--backend", "mlx", name="x")),
    "rollouts": (2, lambda rank: run(rank, "--rollouts", "http://127.0.0.1:9", name="x")),
    "few": (2, lambda rank: run(rank, "--prompts", "1", name="x")),
    "unlike": (2, lambda rank: run(rank, "--beta", str(0.1 + rank), name="x")),
    "taken": (2, lambda rank: run(rank, name="one")),
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(name, rank, n, work, port):
    sink = os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if n > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 70
    try:
        code = work(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def do(name):
    """-> {"codes": [exit code of each rank], "seconds": until all but frozen ones have ended}."""
    n, work = JOBS[name]
    port, begun, left, codes = free_port(), time.monotonic(), {}, {}
    for rank in range(n):
        pid = os.fork()
        if not pid:
            child(name, rank, n, work, port)
        left[pid] = rank
    while left and time.monotonic() - begun < 240:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif name in ("frozen", "asleep") and list(left.values()) == [1]:
            break
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    for pid, rank in left.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank] = "killed in the end"
    return {"codes": [codes[rank] for rank in range(n)], "seconds": seconds}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    chosen = sys.argv[2:] or list(JOBS)
    done = {}
    for job in chosen:
        done[job] = do(job)
        Path("done.json").write_text(json.dumps(done), encoding="utf-8")
