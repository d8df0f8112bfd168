"""What a run is when nobody runs it: weights, moments and a step number, written whole or not at all.

And what it was begun with: posts, models and WordNet decide its result as much as its settings do, so a run is only
gone on with where they are still the same.
"""

import copy
import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import Optimizer

from plumbing import ranks, words
from plumbing.command import to_resume
from plumbing.folder import file_parameters, read_json, write_file
from plumbing.log import read_lines

LAST, BEFORE = "state.pt", "previous.pt"


def save_checkpoint(folder: Path, model, optimizer: Optimizer, step: int) -> None:
    """All that a run is: weights, moments, step. Posts and completions follow from the seed and the step.

    The checkpoint before it stays. Disks break, and one file is one chance.
    """
    trained = {name: p for name, p in file_parameters(model).items() if p.requires_grad}  # of LoRA, the adapters only
    ranks.check_same_weights(trained, step)
    if not ranks.first():
        return
    for log in folder.glob("*.jsonl"):  # after a power cut the log may be ahead of the checkpoint, but not behind it
        with open(log, "rb+") as f:
            os.fsync(f.fileno())
    state = {"step": step, "model": trained, "optimizer": optimizer.state_dict()}
    last, new = folder / "checkpoint" / LAST, folder / "checkpoint" / "next-state.pt"
    write_file(new, lambda part: torch.save(state, part))
    if last.exists():
        os.replace(last, last.with_name(BEFORE))
    os.replace(new, last)


def find_checkpoint(folder: Path) -> Path | None:
    """The last one; the one before where a kill or a user has taken the last away; None where there is none."""
    return next((path for name in (LAST, BEFORE) if (path := folder / "checkpoint" / name).exists()), None)


def check_that_it_can_go_on(folder: Path) -> None:
    """Refuse a run whose checkpoints were deleted: to begin again at step 0 would empty its logs.

    A run that was killed before its first checkpoint begins again, and comes to the same numbers.
    """
    if find_checkpoint(folder):
        return
    config = read_json(folder / "config.json")
    first = min(config["save_every"], int(config["stages"][0].rpartition(":")[2]))  # step of the first checkpoint
    done = max((row["step"] for name in ("metrics", "eval") for row in read_lines(folder / f"{name}.jsonl")), default=0)
    # The first checkpoint follows the log's line of its step: a kill may come between the two.
    if done > first or any(row["stage"] for row in read_lines(folder / "eval.jsonl")):
        model = f" Its model is in {folder / 'model'}." if (folder / "model").is_dir() else ""
        raise ValueError(f"{folder} has a log of {done} steps, but no checkpoint/{LAST} to go on from: put it back, or "
                         f"start another run. Nothing was changed.{model}")


@contextmanager
def kept_when_alone(folder: Path, model, optimizer: Optimizer, step: int) -> Iterator[None]:
    """Inside, a server may stay away. Then the run ends, but not without a checkpoint of the `step` steps it has."""
    try:
        yield
    except ConnectionError as e:
        save_checkpoint(folder, model, optimizer, step)
        raise ConnectionError(f"{e} All {step} steps are kept: when the server is back, go on with: "
                              f"{to_resume(folder)}") from e


def read_state(path: Path, device: torch.device) -> dict:
    """A file of torch.save. It is a zip archive: its checksums tell whether a bit of it has changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"the checksum of {broken} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a broken pickle raises whatever it likes
        why = (str(e) or type(e).__name__).splitlines()[0]
        before = path.with_name(BEFORE)
        advice = (f"Delete it, and --resume goes on from the one before it, {before.name}"
                  if path.name == LAST and before.exists() else f"Delete {path.parent.parent} to start this run again")
        raise ValueError(f"{path} is damaged ({why}). {advice}.") from e


def load_checkpoint(folder: Path, model, optimizer: Optimizer) -> int:
    """Bring model and optimizer to where the run was left; returns the step. 0 where it never came to a checkpoint."""
    path = find_checkpoint(folder)
    if path is None:
        return 0
    state = read_state(path, model.embed_tokens.weight.device)
    try:
        read_trained(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except (RuntimeError, KeyError, ValueError) as e:
        if len(state.get("optimizer", {}).get("param_groups", ())) == 1 < len(optimizer.param_groups):
            raise ValueError(f"{path} is of a run whose --weight-decay pulled at norms and biases too, as none does "
                             f"now, so it cannot be gone on with: start another run.") from e
        raise ValueError(f"{path} does not belong to the model that config.json names: put that one back, or start "
                         f"another run.") from e


def read_trained(model, state: dict) -> None:
    """Give the parameters that are trained the saved values; KeyError or RuntimeError when they are others."""
    trained = {name: p for name, p in file_parameters(model).items() if p.requires_grad}
    if trained.keys() != state.keys():
        raise KeyError(f"{sorted(trained.keys() ^ state.keys())[0]}")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state[name])


def stage_copy(path: Path, model, begins: bool):
    """The policy as it was when the stage began, frozen: copied and saved then, read again when a run is resumed."""
    copied = copy.deepcopy(model)
    if begins:
        trained = {name: p for name, p in file_parameters(model).items() if p.requires_grad}
        write_file(path, lambda part: torch.save(trained, part))
    else:
        read_trained(copied, read_state(path, model.embed_tokens.weight.device))
    return copied


# --- what a run was begun with ----------------------------------------------------------------------------------------


def made_of(folder: Path, posts: Sequence, held_out: Sequence, prompts: list[list[int]], models: dict) -> dict:
    """What decides a run's result beside its settings, in words and hashes, for config.json.

    `prompts`: some of those that the policy gets, as token ids. `models`: name -> the model, with `None` for one that
    the run does not have; only what is frozen of it counts. ValueError where the folder's run began with something
    else.
    """
    now = {"posts": of_posts(posts), "held-out posts": of_posts(held_out), "prompts": sha256(str(prompts).encode())}
    seen = set()
    for name, model in models.items():
        if model is not None and id(model) not in seen:
            seen.add(id(model))
            now[name] = of_weights(model)
    if any(post.reference for post in (*posts, *held_out)):  # METEOR counts its synonyms
        files = words._wordnet()
        now["WordNet"] = sha256(*(files[name] for name in sorted(files))) if files else "none"
    for name, value in now.items():
        ranks.agree(name, value, "Give all machines the same files")
    begun = read_json(folder / "config.json").get("made_of", {}) if (folder / "config.json").exists() else {}
    changed = [name for name in begun if name in now and begun[name] != now[name]]
    if changed:
        said = "; ".join(f"{name} {begun[name]} then, {now[name]} now" for name in changed)
        raise ValueError(f"{folder} was begun with other {' and '.join(changed)} than there are now ({said}): put the "
                         f"old ones back, or start another run.")
    return now


def sha256(*contents) -> str:
    """The first 16 digits of the hash: what is in config.json should be short enough to compare by eye."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()[:16]


def of_posts(posts: Sequence) -> str:
    return f"{len(posts)} ({sha256(*(repr((p.document, p.reference)).encode() for p in posts))})"


def of_weights(model) -> str:
    """The hash of all that is frozen in a model, to the last bit; a GB takes about half a second."""
    def of_tensor(named: tuple) -> bytes:
        name, p = named
        return sha256(name.encode(), p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()).encode()

    frozen = [(name, p) for name, p in file_parameters(model).items() if not p.requires_grad]
    with ThreadPoolExecutor(4) as pool:
        return sha256(*pool.map(of_tensor, frozen))
