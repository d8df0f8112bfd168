"""Why a loss or a gradient is not a number any more, or one that leads nowhere: advice that helps, and no other."""

import torch


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
