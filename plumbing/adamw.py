"""AdamW in half the memory: bfloat16 weights and moments that do not forget small updates.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - lr (wd w + m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps))              (Loshchilov & Hutter 2019)

bfloat16 keeps 8 bits of a number: at a learning rate of 1e-6 most updates are smaller than half its last bit, and
rounding to the nearest leaves the weight where it was, for ever. Rounding up or down at random, up with the probability
of the distance, is right on average: the weight moves seldom, but by a whole bit (Gupta et al. 2015, "Deep Learning
with Limited Numerical Precision"). The arithmetic is float32, a slice at a time, so nothing large is made.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SLICE = 2 ** 18  # numbers that are float32 at a time: a mebibyte, small enough to be the same memory every time


def spare_norms(parameters: Iterable[Tensor]) -> list[dict]:
    """The optimizer's groups: weight decay for matrices and convolutions, none for norms and biases.

    So does transformers' Trainer, and published settings mean that. A gain that is pulled to 0 would silence its layer.
    """
    parameters = list(parameters)
    return [{"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for parameters of any floating type; moments have the parameter's own type.

    float32 parameters get what torch.optim.AdamW gives them. The random numbers of a step follow from `seed` and the
    number of the step, so a resumed run rounds as the undisturbed one did.
    """

    def __init__(self, parameters: Iterable, lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8,
                 weight_decay: float = 0.0, seed: int = 0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's may be given a function, for methods that try twice
        number = -1  # of the parameter, over all groups
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                t = state["step"]
                noise = None
                if p.dtype == torch.bfloat16:
                    # One slice's worth for all slices of the parameter: numbers this far apart may round alike.
                    seed = (group["seed"] * 1_000_003 + t * 10_007 + number) % 2 ** 63  # all that torch takes
                    noise = torch.randint(2 ** 16, (3, min(SLICE, p.numel())), device=p.device, dtype=torch.int32,
                                          generator=torch.Generator(p.device).manual_seed(seed))  # [3, slice]
                flat = [x.view(-1) for x in (p, p.grad.contiguous(), state["m"], state["v"])]  # [numel] each
                for w, g, m, v in zip(*(x.split(SLICE) for x in flat)):
                    g32, m32, v32, w32 = g.float(), m.float(), v.float(), w.float()  # views where they are float32
                    m32.lerp_(g32, 1 - b1)
                    v32.mul_(b2).addcmul_(g32, g32, value=1 - b2)
                    w32.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = (v32 / (1 - b2 ** t)).sqrt_().add_(group["eps"])
                    w32.addcdiv_(m32, scale, value=-group["lr"] / (1 - b1 ** t))
                    if noise is not None:
                        for kept, exact, bits in ((m, m32, noise[0]), (v, v32, noise[1]), (w, w32, noise[2])):
                            round_at_random(kept, exact, bits[:len(kept)])


def round_at_random(kept: Tensor, exact: Tensor, bits: Tensor) -> None:
    """kept (bfloat16) = exact (float32, overwritten), up or down with the probability that makes the mean exact.

    bfloat16 is the upper half of a float32. Adding 16 random bits carries into it as often as the lower half is full.
    """
    exact.view(torch.int32).add_(bits).bitwise_and_(-2 ** 16)
    kept.copy_(exact)
