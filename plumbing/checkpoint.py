"""What a run is when nobody runs it: weights, moments and a step number, written whole or not at all."""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch

from plumbing.folder import file_parameters, write_file


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """All that a run is: weights, moments, step. Posts and completions follow from the seed and the step."""
    trained = {name: p for name, p in file_parameters(model).items() if p.requires_grad}  # of LoRA, the adapters only
    state = {"step": step, "model": trained, "optimizer": optimizer.state_dict()}
    write_file(folder / "checkpoint" / "state.pt", lambda part: torch.save(state, part))


@contextmanager
def kept_when_alone(folder: Path, model, optimizer, step: int):
    """Inside, a server may stay away. Then the run ends, but not without a checkpoint of the `step` steps it has."""
    try:
        yield
    except ConnectionError as e:
        save_checkpoint(folder, model, optimizer, step)
        raise ConnectionError(f"{e} All {step} steps are kept: when the server is back, go on with "
                              f"python train.py --run {folder.name} --resume") from e


def read_state(path: Path, device) -> dict:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a broken pickle raises whatever it likes
        raise ValueError(f"{path} cannot be read ({e}): delete {path.parent} to start this run again.") from e


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Bring model and optimizer to where the run was left; returns the step. 0 where it never came to a checkpoint."""
    path = folder / "checkpoint" / "state.pt"
    if not path.exists():
        return 0
    state = read_state(path, model.embed_tokens.weight.device)
    try:
        read_trained(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except (RuntimeError, KeyError, ValueError) as e:
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
