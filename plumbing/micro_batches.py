"""A batch of groups in pieces that fit into memory. It changes no result: `policy_loss` divides by the whole batch.

Shapes: G completions a prompt, T completion tokens, P prompt tokens; b prompts and g of their G completions are in one
micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MicroBatch:
    """Completions that go through the model together, and what the first pass over them finds out."""

    prompts: list[Tensor]  # b x [P_i]
    tokens: Tensor  # [b, g, T]
    mask: Tensor  # [b, g, T] bool
    sampler_logp: Tensor  # [b, g, T]
    advantages: Tensor  # [b, g]; from a teacher [b, g, T]
    old_logp: Tensor | None = None  # [b, g, T] of the policy before the first step on this batch
    ref_logp: Tensor | None = None  # [b, g, T] of the frozen policy that the KL holds to
    weights: Tensor | None = None  # [b, g, T] of --tis: what the samples of other weights count
    logp_gap: float = 0.0  # largest difference between the sampler's log-probabilities and the trainer's


def rewards_of(groups: Sequence, by_part: bool) -> tuple[Tensor, Tensor | None]:
    """The rewards of B groups as [B, G] and None; or, part by part, as [B, G, K] and the parts' weights [K]."""
    if not by_part:
        return torch.stack([torch.as_tensor(g.rewards, dtype=torch.float64) for g in groups]), None
    weights = groups[0].weights  # {name: number}, the same for all groups of a batch
    if not weights:
        raise ValueError("gdpo compares reward by reward, so each group needs its `parts` {name: G numbers} and their "
                         "`weights` {name: number}: let task.score fill them in, or take another --advantage.")
    parts = [[group.parts[name] for name in weights] for group in groups]
    return (torch.tensor(parts, dtype=torch.float64).mT,  # of [B, K, G]
            torch.tensor(list(weights.values()), dtype=torch.float64))  # [K]


def micro_batches(groups: Sequence, advantages: Tensor, micro_tokens: int) -> list[MicroBatch]:
    """Groups and their advantages [B, G] -> pieces of at most `micro_tokens` tokens, padding included, longest first.

    Longest first: a run that will not fit into memory fails on its first step and not on its hundredth. A group that
    is too large by itself is cut into equal parts, each with its own copy of the prompt. A single row always goes.
    """
    G = len(groups[0].mask)
    size = [(len(g.prompt), g.tokens.shape[1]) for g in groups]  # (P, T)
    worst_P, worst_T = max(P for P, _ in size), max(T for _, T in size)
    rows = max((g for g in range(1, G + 1) if G % g == 0 and worst_P + g * worst_T <= micro_tokens), default=1)
    order = sorted(range(len(groups)), key=lambda i: (-size[i][0] - rows * size[i][1], i))
    pieces: list[list[tuple[int, int]]] = [[]]  # of (group, its first row)
    for item in ((i, first) for i in order for first in range(0, G, rows)):
        longer = [*pieces[-1], item]
        P, T = max(size[i][0] for i, _ in longer), max(size[i][1] for i, _ in longer)
        if pieces[-1] and len(longer) * (P + rows * T) > micro_tokens:
            pieces.append([item])
        else:
            pieces[-1] = longer
    return [_stack(groups, advantages, piece, rows) for piece in pieces]


def _stack(groups: Sequence, advantages: Tensor, piece: list[tuple[int, int]], rows: int) -> MicroBatch:
    """`rows` rows of each group in the piece, padded with 0 and False to the longest of them."""
    T = max(groups[i].tokens.shape[1] for i, _ in piece)

    def padded(name: str) -> Tensor:
        parts = [getattr(groups[i], name)[first:first + rows] for i, first in piece]  # b x [g, T_i]
        return torch.stack([torch.nn.functional.pad(p, (0, T - p.shape[1])) for p in parts])  # [b, g, T]

    return MicroBatch(
        prompts=[groups[i].prompt for i, _ in piece], tokens=padded("tokens"), mask=padded("mask"),
        sampler_logp=padded("logp"),
        advantages=torch.stack([advantages[i, first:first + rows] for i, first in piece]))  # [b, g]
