"""grpo.py in MLX, Apple's library for its own chips: the same names, in the same order, with the same meanings.

Read grpo.py first: the derivation, the tables and the reasons stand there. What holds no tensor of the model (tables,
advantages, micro-batches) is imported from the torch files. Comments here say only where MLX differs, and why:

1. MLX is lazy: arithmetic makes a graph, and `mx.eval` computes it. So a batch is evaluated where its loss is known.
2. Arrays never change. A step makes new ones, and the model is told which are its parameters now (`put`).
3. Gradients are asked for by a function of the parameters: `mx.value_and_grad(loss_of)(trained)`. Whatever is computed
   outside that function is a constant to it, so the log-probabilities of the policy are computed inside.
4. A boolean mask cannot pick elements. Which ones are meant comes from numpy, as indices.
5. An index that is too large is not refused: it reads whatever lies there. So ids are checked before (rollout.py).

Shapes: those of `grpo.py`; V vocabulary, M positions, n words of one slice.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from grpo import EXPLODED, KINDS, KLS, advantages, unknown
from grpo import group_logprobs as of_torch
from mlx_model import Cache, Transformer, pad, sample
from plumbing.micro_batches import MicroBatch, micro_batches, rewards_of
from plumbing.mlx_adamw import AdamW, set_weights, trained
from plumbing.mlx_arrays import mx
from plumbing.mlx_logprobs import sliced_logprobs
from plumbing.mlx_windows import TakenOver, check_mlx


def token_logprobs(model, hidden: mx.array, targets: mx.array, temperature: float = 1.0,
                   words: int = 0) -> tuple[mx.array, mx.array]:
    """hidden [..., D], targets [...] -> (logp, entropy) in nats, each [...], float32: what `model.token_logprobs` says.

    [..., V] never exists: only the logits of `words` words do, and again in backward (plumbing/logprobs.py).
    """
    if temperature <= 0:
        raise ValueError(f"token_logprobs needs a temperature above 0, not {temperature}: a greedy policy has no logp.")
    rows = hidden.reshape(-1, hidden.shape[-1])  # [M, D]
    words = words or max(1, min(2 ** 13, 2 ** 22 // max(*rows.shape, 1)))  # longer sums would lose digits
    logp, entropy = sliced_logprobs(rows, model.head, targets.reshape(-1), temperature=temperature, words=words,
                                    learns_head=any(p is model.head for p in trained(model).values()))  # [M] each
    return logp.reshape(targets.shape), entropy.reshape(targets.shape)


def policy_loss(logp: mx.array, old_logp: mx.array | None, ref_logp: mx.array | None, advantages: mx.array,
                mask: mx.array, kind: str = "grpo", *, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0,
                kl: str = "k3", max_length: int | None = None, n_completions: int | None = None,
                n_tokens: int | None = None) -> tuple[mx.array, dict[str, mx.array]]:
    """What `grpo.policy_loss` says, line by line. Its gradient comes from `mx.value_and_grad`."""
    if kind not in KINDS:
        raise unknown("loss", kind, KINDS)
    if kl not in KLS:
        raise unknown("KL estimator", kl, KLS)
    if beta and ref_logp is None:
        raise ValueError(f"beta is {beta}, but there are no reference log-probabilities: pass ref_logp, or beta=0.")
    ratio_of, surrogate, reduction = KINDS[kind]
    n_completions = n_completions or mask[..., 0].size
    n_tokens = max(1, n_tokens or mask.sum().item())
    logp = mx.where(mask, logp, 0.0)  # [B, G, T]
    old_logp = mx.stop_gradient(logp) if old_logp is None else mx.where(mask, old_logp, 0.0)  # [B, G, T]
    A = mx.where(mask, advantages, 0.0) if advantages.ndim == 3 else advantages[..., None]  # [B, G, T] or [B, G, 1]

    log_ratio = logp - old_logp  # [B, G, T]
    if ratio_of == "sequence":
        log_ratio = log_ratio.sum(-1, keepdims=True) / mx.maximum(mask.sum(-1, keepdims=True), 1)  # [B, G, 1]
        if advantages.ndim == 3:
            log_ratio = mx.stop_gradient(log_ratio) + (logp - mx.stop_gradient(logp))  # [B, G, T]
    elif ratio_of != "token":
        raise unknown("ratio", ratio_of, ("token", "sequence"))
    ratio = mx.exp(log_ratio)  # [B, G, T], of sequences [B, G, 1]
    high, low = ratio > 1 + clip_high, ratio < 1 - clip_low  # as ratio, bool
    if surrogate == "clip":
        clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)  # as ratio
        per_token = mx.broadcast_to(-mx.minimum(ratio * A, clipped * A), logp.shape)  # [B, G, T]
        cut = high & (A > 0) | low & (A < 0)  # as ratio
    elif surrogate == "weight":
        per_token = -mx.stop_gradient(mx.minimum(ratio, 1 + clip_high)) * A * logp  # [B, G, T]
        cut = high  # as ratio
    else:
        raise ValueError(f"mlx_grpo.py has no surrogate '{surrogate}': write it there too, or take --backend torch.")

    metrics = {"clip_frac": token_mean(cut, mask), "ratio": token_mean(ratio, mask)}
    if ref_logp is not None:
        estimates = kl_estimates(mx.where(mask, ref_logp, 0.0) - logp, ratio)  # [B, G, T] each
        metrics["kl"] = token_mean(estimates["k3"], mask)
        per_token = per_token + beta * estimates[kl]  # [B, G, T]
    per_token = per_token * mask  # [B, G, T]
    if reduction == "completions":
        return (per_token.sum(-1) / mx.maximum(mask.sum(-1), 1)).sum() / n_completions, metrics
    if reduction == "tokens":
        return per_token.sum() / n_tokens, metrics
    if reduction == "constant":
        return per_token.sum() / (n_completions * (max_length or logp.shape[-1])), metrics
    raise unknown("reduction", reduction, ("completions", "tokens", "constant"))


def kl_estimates(x: mx.array, ratio: mx.array) -> dict[str, mx.array]:
    """x = ref_logp - logp and the ratio, [B, G, T] -> estimates of KL(pi || ref), [B, G, T]: `grpo.kl_estimates`."""
    k3 = mx.expm1(x) - x  # [B, G, T], e^x - 1 - x
    return {"k1": -x, "k2": x ** 2 / 2, "k3": k3, "k3_ratio": ratio * k3}


def token_mean(x: mx.array, mask: mx.array) -> mx.array:
    """x [B, G, T] or [B, G, 1] -> its mean over the sampled tokens, a scalar to look at: without a gradient."""
    return (mx.broadcast_to(mx.stop_gradient(x), mask.shape) * mask).sum() / mx.maximum(mask.sum(), 1)


def group_logprobs(model, prompts: Sequence, tokens: mx.array, mask: mx.array,
                   temperature: float = 1.0) -> tuple[mx.array, mx.array]:
    """b prompts of [P_i] tokens, completions tokens and mask [b, g, T] -> (logp, entropy) [b, g, T], 0 on padding.

    The prompt runs through the model once (`grpo.group_logprobs`).
    """
    b, g, T = tokens.shape
    padded, prompt_mask = pad(prompts)  # [b, P], [b, P]
    cache = Cache()
    h = model.hidden(padded, cache, None if prompt_mask.all() else prompt_mask)  # [b, P, D]
    last = mx.array(prompt_mask.sum(1) - 1)  # [b]: whose state predicts the first token of every completion
    states = h[mx.arange(b), last][:, None, None]  # [b, 1, 1, D]
    states = mx.broadcast_to(states, (b, g, 1, h.shape[-1]))  # [b, g, 1, D]
    if T > 1:
        cache.share(g)
        rest = model.hidden(tokens[..., :-1].reshape(b * g, T - 1), cache)  # [b*g, T-1, D]
        states = mx.concatenate([states, rest.reshape(b, g, T - 1, -1)], 2)  # [b, g, T, D]
    at = mx.array(np.flatnonzero(np.array(mask)))  # [sampled tokens]: where they stand among b*g*T
    logp, entropy = token_logprobs(model, states.reshape(b * g * T, -1)[at], tokens.flatten()[at], temperature)
    zeros = mx.zeros(b * g * T)  # [b*g*T]
    return zeros.at[at].add(logp).reshape(b, g, T), zeros.at[at].add(entropy).reshape(b, g, T)


def update(model, ref_model, groups: Sequence, optimizer: AdamW, config) -> dict[str, float]:
    """One batch of groups -> `config.updates` optimizer steps; returns the metrics. All that `grpo.update` promises.

    The groups are those of rollout.py, of torch tensors: a few thousand numbers.
    """
    rewards, weights = rewards_of(groups, by_part=config.advantage == "gdpo")  # [B, G], or [B, G, K] and [K]
    A = advantages(rewards, config.advantage, weights)  # [B, G]
    flat = (A == 0).all(1)  # [B]
    most = EXPLODED * max(1.0, A.abs().max().item())
    beta = config.beta if ref_model is not None else 0.0
    learns = beta > 0 or not bool(flat.all())
    micros = [in_mlx(m) for m in micro_batches(groups, A, config.micro_tokens)]
    n_tokens = sum(m.mask.sum().item() for m in micros)
    whole = {"beta": beta, "n_completions": A.numel(), "n_tokens": n_tokens,
             "max_length": config.max_new_tokens or max(g.tokens.shape[1] for g in groups)}
    metrics = {"flat_groups": flat.float().mean().item(), "grad_norm": 0.0, "logp_gap": 0.0}
    for _ in range(config.updates):
        means: dict[str, float] = defaultdict(float)
        gradient: dict[str, mx.array] = {}
        for m in micros:
            loss, seen = learn(model, ref_model, m, config, whole, gradient if learns else None)
            if not abs(loss) < most:
                raise FloatingPointError(f"The loss is {loss}: a log-probability or the KL exploded")
            share = m.mask.sum().item() / n_tokens
            means["loss"] += loss
            for name, value in seen.items():
                means[name] += value.item() * share
        metrics |= means
        if not learns:
            break
        metrics["grad_norm"] = step_down(model, optimizer, gradient, config.grad_clip, most)
    metrics["logp_gap"] = max(m.logp_gap for m in micros)
    mx.clear_cache()  # MLX keeps what is free for arrays of the same size: the sampler's are of others
    return metrics


def in_mlx(m: MicroBatch) -> MicroBatch:
    """Its tensors as MLX arrays; the prompts stay lists of [P_i] ids."""
    fields = {name: mx.array(getattr(m, name).numpy()) for name in ("tokens", "mask", "sampler_logp", "advantages")}
    return replace(m, **fields)


def learn(model, ref_model, m: MicroBatch, config, whole: dict, gradient: dict | None) -> tuple[float, dict]:
    """-> (loss, metrics) of a micro-batch; its gradient is added to `gradient` (None: nothing is to be learnt)."""
    if whole["beta"] and m.ref_logp is None:
        with ref_model.adapters_off():
            m.ref_logp, _ = group_logprobs(ref_model, m.prompts, m.tokens, m.mask, config.temperature)  # [b, g, T]
            mx.eval(m.ref_logp)

    def loss_of(arrays: dict[str, mx.array]):
        set_weights(model, arrays)  # what the model computes with from here on is what the gradient is taken by
        return micro_batch_loss(model, m, config, whole)

    now = trained(model)
    try:
        if gradient is None:
            (loss, seen, logp), found = loss_of(now), {}
        else:
            (loss, seen, logp), found = mx.value_and_grad(loss_of)(now)
    finally:
        set_weights(model, now)
    if gradient is not None:
        for name, g in found.items():
            gradient[name] = gradient[name] + g if name in gradient else g
    mx.eval(loss, seen, logp, gradient or {})
    if m.old_logp is None:
        m.old_logp = logp  # [b, g, T]
        m.logp_gap = mx.abs(logp - m.sampler_logp).max().item()
    return loss.item(), seen


def micro_batch_loss(model, m: MicroBatch, config, whole: dict) -> tuple[mx.array, dict[str, mx.array], mx.array]:
    """The loss, the metrics and logp [b, g, T] of one micro-batch. `whole`: what it has to know of the whole batch."""
    logp, entropy = group_logprobs(model, m.prompts, m.tokens, m.mask, config.temperature)  # [b, g, T] each
    loss, metrics = policy_loss(logp, m.old_logp, m.ref_logp, m.advantages, m.mask, kind=config.loss, kl=config.kl,
                                clip_low=config.clip_low, clip_high=config.clip_high, **whole)
    return loss, metrics | {"entropy": entropy.sum() / m.mask.sum()}, mx.stop_gradient(logp)


def step_down(model, optimizer: AdamW, gradient: dict[str, mx.array], largest_norm: float, most: float) -> float:
    """Shorten the gradient to `largest_norm` and take the optimizer's step -> the norm it had; `most` is an error."""
    # Row by row: MLX's CPU adds one number after the other, and a million of them would lose digits.
    squares = [g.astype(mx.float32).square().sum(-1).sum() for g in gradient.values()]  # one [] a parameter
    norm = mx.sqrt(mx.stack(squares).sum()).item()
    if not norm < most:
        raise FloatingPointError(f"The gradient's norm is {norm}")
    optimizer.step(model, gradient, min(1.0, largest_norm / (norm + 1e-6)))  # torch's formula
    if not mx.isfinite(mx.stack([p.sum() for p in trained(model).values()])).all().item():
        raise FloatingPointError("A weight is not finite after the optimizer's step")
    return norm


def take_over(model, optimizer: torch.optim.Optimizer, prompt: Sequence[int]) -> tuple[Callable, Callable]:
    """A run's torch model and optimizer -> `sample` and `update` of them, computed in MLX (plumbing/mlx_windows.py).

    Where that is a GPU, it answers the prompt (token ids) first: what differs from torch's CPU ends the run."""
    if mx.default_device() == mx.gpu:
        check_mlx(model, prompt, Transformer, sample, group_logprobs, of_torch)
    taken = TakenOver(model, optimizer, Transformer, sample, update)
    return taken.sample, taken.update

# Next: docs/doing.md, what to do with it
