"""Why a loss or a gradient is not a number any more, or one that leads nowhere: advice that helps, and no other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer

from plumbing.checkpoint import load_checkpoint

EXPLODED = 1e6  # normal losses are below 1 and normal gradients below 100 (times the advantages, if those are large)


def step_down(model: torch.nn.Module, optimizer: torch.optim.Optimizer, largest_norm: float, most: float) -> float:
    """Shorten the gradient to `largest_norm` and take the optimizer's step -> the norm it had; `most` is an error."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest_norm).item()
    if not norm < most:
        raise FloatingPointError(f"The gradient's norm is {norm}")
    # Weights are float32, too: a step of 1e-6 is lost on a bfloat16 weight of 0.02, whose neighbours are 1e-4 away.
    optimizer.step()
    if not torch.stack([p.sum() for p in parameters]).isfinite().all():  # faster than each element's own isfinite
        raise FloatingPointError("A weight is not finite after the optimizer's step")
    return norm


@contextmanager
def explained(folder: Path, model: torch.nn.Module, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, *,
              groups: Sequence, config, step: int, save: Callable) -> Iterator[None]:
    """Around the update of step + 1: if it explodes, the weights of the last checkpoint go into model/ by `save`, and
    the FloatingPointError says where they are and what to change."""
    try:
        yield
    except FloatingPointError as e:
        advice = remedy(model, [r for group in groups for r in group.rewards], config, first=step == 0)
        good, place = load_checkpoint(folder, model, optimizer), folder / "model"
        if good == 0:
            raise FloatingPointError(f"{e} in step {step + 1}, before the first checkpoint: start again with "
                                     f"{advice}.") from e
        save(model, tokenizer, place)
        raise FloatingPointError(f"{e} in step {step + 1}. The weights of step {good}, which are good, are in {place}: "
                                 f"go on from them with --model {place} and {advice}.") from e


def remedy(model: torch.nn.Module, rewards: list[float], config, first: bool) -> str:
    """What to change, as the end of "go on with ...". `first`: the update was the first of all, on loaded weights.

    Call it before other weights are put into the model.
    """
    if config.temperature < 0.05:
        return f"a higher --temperature than {config.temperature}, by which all logits are divided"
    most = max(map(abs, rewards))
    if most > 1e12:
        return f"a smaller reward: its values reach {most:.0e}"
    # Where no step was taken, --lr had no part in it.
    if first and config.updates == 1 and all(bool(p.isfinite().all()) for p in model.parameters()):
        return "another --model, or without --lean: this one's own log-probabilities break the first step"
    return "a lower --lr"
