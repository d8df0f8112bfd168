"""Completions that other weights wrote than those that learn from them: how old they are, and what corrects for it.

The groups of a step are those of its own weights, unless servers write them ahead (--ahead 1), or a sampler of yours is
behind. Then the mean over samples is one over the wrong policy. A token that the sampler said with probability
pi_sampler, and the policy before the step would have said with pi_old, counts pi_old / pi_sampler times: that makes the
mean one over pi_old again. With the ratio of a token alone it is so but for the tokens before it, whose ratios are left
out. The product of them all is exact, and a few completions would have all the weight.

Shapes: G completions a prompt, T completion tokens; b prompts and g of their completions in one micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from torch import Tensor

from plumbing import ranks


def importance_weights(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, config) -> Tensor:
    """Log-probabilities by the policy before the step and by the sampler, mask [b, g, T] -> weights [b, g, T].

    `tis_mode` "token": min(exp(old_logp - sampler_logp), tis) of each token (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"; trl's "token_truncate"). "sequence_mask": one number for the
    completion, the product over its tokens, and 0 where that is above `tis` (trl's default, with 3).

    >>> from types import SimpleNamespace
    >>> old, sampler = torch.tensor([[[-1.0, -1.0], [-1.0, -1.0]]]), torch.tensor([[[-1.5, -3.0], [-1.5, -0.9]]])
    >>> for mode in ("token", "sequence_mask"):
    ...     importance_weights(old, sampler, old < 0, SimpleNamespace(tis=2, tis_mode=mode))
    tensor([[[1.6487, 2.0000],
             [1.6487, 0.9048]]])
    tensor([[[0.0000, 0.0000],
             [1.4918, 1.4918]]])
    """
    gap = torch.where(mask, old_logp - sampler_logp, 0.0).detach()  # [b, g, T]
    mode = getattr(config, "tis_mode", "token")
    if mode == "token":
        return gap.exp().clamp(max=config.tis)
    if mode == "sequence_mask":
        ratio = gap.sum(-1, keepdim=True).exp()  # [b, g, 1]
        return ratio.masked_fill(ratio > config.tis, 0.0).expand_as(gap)
    raise ValueError(f"There is no --tis-mode '{mode}': take token or sequence_mask.")


def weights_seen(micros: Sequence) -> dict[str, float]:
    """What is to be said of a batch's weights; {} where there are none. All are over its sampled tokens.

    The effective sample size, as a share: (sum w)^2 / (n sum w^2), 1 where all weigh the same, 1/n where one has all.
    """
    if any(m.weights is None for m in micros):
        return {}
    w = torch.cat([m.weights[m.mask] for m in micros]).double()  # [sampled tokens] of this rank
    ours = [len(w), w.sum().item(), w.square().sum().item(), w.max().item()]
    counts, sums, squares, largest = zip(*ranks.exchange(ours))  # one number a rank each
    spread = sum(counts) * sum(squares)
    return {"tis_mean": sum(sums) / sum(counts), "tis_max": max(largest),
            "tis_ess": sum(sums) ** 2 / spread if spread else 0.0}


def renew(groups: list, step: int, config, write: Callable[[list], list]) -> dict[str, float]:
    """Give each of a step's groups its version, and throw away those that are too old -> the numbers to log, if any.

    A group whose weights are more than --max-age steps old is written anew, by the weights of now: `write(prompts)`. So
    no step is lost, not even one all of whose groups are too old, and none has fewer posts.
    """
    for group in groups:
        group.version = step if group.version is None else group.version
    old = [i for i, group in enumerate(groups) if 0 < config.max_age < step - group.version]
    for i, group in zip(old, write([groups[i].prompt for i in old]) if old else ()):
        groups[i], group.version = group, step
    age = fmean(step - group.version for group in groups)
    found: dict[str, float] = {}
    if age or config.tis or config.ahead or config.max_age:
        found["age"] = age
    if config.max_age:
        found["thrown_away"] = len(old)
    return found


@torch.no_grad()
def weights_of_now(model: torch.nn.Module) -> list[Tensor]:
    """A copy of all that is trained, to be put back by `with_weights`."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@contextmanager
def with_weights(model: torch.nn.Module, kept: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the model has the weights that were kept; afterwards, its own again, the same bits at the same place."""
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p.data for p in trained]
    try:
        for p, weights in zip(trained, kept, strict=True):
            p.data = weights
        yield
    finally:
        for p, weights in zip(trained, own):
            p.data = weights
