"""AdamW in MLX, to the letter of torch's, and bfloat16 weights that do not forget small updates (plumbing/adamw.py)."""

import torch
from torch import Tensor

from plumbing import adamw
from plumbing.mlx_arrays import mx, nn, to_mlx, tree_flatten

# What a torch optimizer calls its moments m and v.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), adamw.AdamW: ("m", "v")}


def trained(model: nn.Module) -> dict[str, mx.array]:
    """The parameters that are trained, by name; a fresh dictionary."""
    return dict(tree_flatten(model.trainable_parameters()))


def set_weights(model: nn.Module, arrays: dict[str, mx.array]) -> None:
    """From here on these are the model's parameters of those names."""
    model.load_weights(list(arrays.items()), strict=False)


class AdamW:
    """torch.optim.AdamW's formulas (plumbing/adamw.py shows them), from where a torch optimizer is: its settings, its
    moments, the number of steps it took."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]):
        """`names`: of the parameters that the optimizer was made for."""
        self.keys = MOMENTS[type(optimizer)]
        self.param_groups = [{**group, "params": [names[p] for p in group["params"]]}
                             for group in optimizer.param_groups]
        self.t = 0  # steps taken
        self.moments: dict[str, tuple[mx.array, ...]] = {}  # m and v of each parameter, as it
        for p, state in optimizer.state.items():
            self.t = int(state["step"])
            self.moments[names[p]] = tuple(to_mlx(state[key].cpu()) for key in self.keys)

    def step(self, model: nn.Module, gradient: dict[str, mx.array], shrink: float = 1.0) -> None:
        """One step along `shrink` times the gradient, which is used up: MLX writes new weights where old ones lay, if
        nobody holds those any more."""
        self.t += 1
        weights, number = trained(model), 0  # number: of the parameter, over all groups
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for name in group["params"]:
                number += 1
                g, w = gradient.pop(name).astype(mx.float32) * shrink, weights[name]  # each as the parameter
                m, v = (x.astype(mx.float32) for x in self.moments.get(name) or [mx.zeros_like(w)] * 2)
                m = m + (1 - b1) * (g - m)
                v = b2 * v + (1 - b2) * g * g
                scale = mx.sqrt(v) / (1 - b2 ** self.t) ** 0.5 + group["eps"]
                new = w.astype(mx.float32) * (1 - group["lr"] * group["weight_decay"])
                new = new - group["lr"] / (1 - b1 ** self.t) * m / scale
                if w.dtype == mx.bfloat16:
                    key = mx.random.key((group["seed"] * 1_000_003 + self.t * 10_007 + number) % 2 ** 63)
                    new, m, v = (round_at_random(x, k) for x, k in zip((new, m, v), mx.random.split(key, 3)))
                weights[name], self.moments[name] = new, (m, v)
        set_weights(model, weights)
        del weights, w, g, m, v, new, scale
        mx.eval(trained(model), self.moments)


def round_at_random(x: mx.array, key: mx.array) -> mx.array:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact (plumbing/adamw.py)."""
    bits = mx.random.randint(0, 2 ** 16, x.shape, mx.uint32, key=key)  # as x
    return ((x.view(mx.uint32) + bits) & 0xFFFF0000).view(mx.float32).astype(mx.bfloat16)
