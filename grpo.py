"""Group Relative Policy Optimization: rewards of a group in, one step of the policy out.

    A_i = (r_i - mean(r)) / std(r)                                    how much better than its own group, no critic
    rho_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)                  how far the policy has moved since it sampled
    J = E[ 1/G sum_i 1/|o_i| sum_t min(rho_t A_i, clip(rho_t, 1-eps, 1+eps) A_i) - beta KL(pi || pi_ref) ]

(Shao et al. 2024, DeepSeekMath, eq. 3.) Kept from the paper: the group as baseline, the ratio of tokens, the clip, the
KL inside the loss. Changed by default: the KL term is multiplied by the ratio, which makes its gradient exact
(`--kl k3` is the paper's). What later papers changed, each in one visible line of `policy_loss`: Dr. GRPO (no std, no
1/|o_i|), DAPO (asymmetric clip, all tokens weigh the same), GSPO (one ratio a sequence), CISPO (clip the weight, not
the gradient).

Shapes: B prompts, G completions a prompt, T completion tokens (padded on the right), P prompt tokens, D hidden size;
b of the B prompts and g of the G completions are in one micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Cache, Transformer, pad, token_logprobs

LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo")
KLS = ("k1", "k2", "k3", "k3_ratio")
ADVANTAGES = ("group", "mean", "batch")


def flag(default, help: str, **more):
    """A dataclass field that documents itself: its help is the command line's help."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    """What one update needs to know. `train.Config` adds what a run needs to know."""

    loss: str = flag("grpo", "policy loss: what is clipped, and what a token weighs", choices=LOSSES)
    advantage: str = flag("group", "r - mean, divided by the group's std, by nothing, or by the batch's std",
                          choices=ADVANTAGES)
    clip_low: float = flag(0.2, "the ratio may fall to 1 - this before its gradient stops")
    clip_high: float = flag(0.2, "the ratio may rise to 1 + this before its gradient stops (DAPO: 0.28)")
    beta: float = flag(0.05, "weight of the KL to the reference model; 0 needs no reference")
    kl: str = flag("k3_ratio", "KL estimator in the loss; k2 and k3_ratio have the right gradient", choices=KLS)
    updates: int = flag(1, "optimizer steps on each batch of completions (mu in the paper)")
    temperature: float = flag(1.0, "of the sampler, and therefore of the loss")
    grad_clip: float = flag(1.0, "largest norm of the whole gradient")
    micro_tokens: int = flag(16384, "most tokens of one forward and backward: lower it when memory runs out")
    max_new_tokens: int = flag(0, "where a completion is cut; 0: twice the target")


def advantages(rewards: Tensor, kind: str = "group") -> Tensor:
    """rewards [B, G] -> advantages [B, G], float32: how much better each completion did than its own group.

    "group": (r - mean) / (std + 1e-4), as in the paper. The std is the unbiased one (divided by G - 1) and 1e-4 is
        added, as in trl. The biased one (divided by G) would give values larger by sqrt(G / (G - 1)): 7% at G = 8.
    "mean":  r - mean (Dr. GRPO, Liu et al. 2025): groups whose rewards hardly differ are not blown up.
    "batch": r - the group's mean, divided by the std of all B*G rewards + 1e-4 (Liu et al. 2025, "Part I").

    A group with equal rewards has nothing to say and gets exactly 0. The mean of equal floats need not be equal to
    them, and dividing a rounding error by 1e-4 would make an advantage of it.

    >>> advantages(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), "mean")
    tensor([[-0.5000,  0.5000],
            [ 0.0000,  0.0000]])
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"There is no advantage '{kind}': take one of {', '.join(ADVANTAGES)}.")
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"GRPO compares completions of the same prompt, so a group needs at least 2 of them; rewards "
                         f"have shape {list(rewards.shape)} where [prompts, completions] is wanted. Raise --group.")
    rewards = rewards.float()  # [B, G]
    if not rewards.isfinite().all():
        raise ValueError("A reward is NaN or infinite: no advantage can be computed from it. Look at the reward.")
    a = rewards - rewards.mean(1, keepdim=True)  # [B, G]
    if kind == "group":
        a = a / (rewards.std(1, keepdim=True) + 1e-4)
    elif kind == "batch":
        a = a / (rewards.std() + 1e-4)
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # [B, 1]
    return a.masked_fill(flat, 0.0)


def policy_loss(logp: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor,
                kind: str = "grpo", clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0, kl: str = "k3",
                max_length: int | None = None, n_completions: int | None = None, n_tokens: int | None = None,
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, a scalar, and what to look at. A pure function of tensors.

    logp, old_logp, ref_logp [B, G, T]: log-probabilities, in nats, of the sampled tokens under the policy that is
    trained, the one that sampled (None: the same one, so the ratio is 1 by construction) and the reference (None: no
    KL). advantages [B, G]. mask [B, G, T] bool: True on sampled tokens, the stop token included.

    Per token:  L_t = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + beta KL_t
        gspo:   rho = exp(mean_t log rho_t), one for the sequence (Zheng et al. 2025)
        cispo:  L_t = -stop_gradient(min(rho_t, 1 + clip_high)) A logp_t, so that no token loses its gradient
                (MiniMax-M1, 2025; trl's epsilon_high is our 1 + clip_high)
    Over tokens:
        grpo, gspo:         mean over completions of each one's mean over tokens
        bnpo, dapo, cispo:  sum over all tokens / number of tokens in the batch
        dr_grpo:            sum over all tokens / (completions x max_length)

    KL_t estimates KL(pi || ref) from the sampled token, with x = ref_logp - logp (Schulman 2020). As a *number* k1 and
    k3 are unbiased, k3 with less noise, and k2 is close while the policies are. As a *loss* they differ, because
    autograd sees the log-probabilities but not that the tokens were drawn from them:
        k1 = -x                 its expected gradient is zero: it does nothing
        k2 = x^2 / 2            the exact gradient of KL(pi || ref)
        k3 = e^x - x - 1        the gradient of KL(ref || pi), the other KL (the paper and most code use this one)
        k3_ratio = rho k3       exact again, for ratios of tokens: the ratio carries the missing term (DeepSeek-V3.2)

    When a batch is cut into micro-batches, `n_completions` and `n_tokens` are those of the whole batch: then the
    micro-batch losses add up to the loss of the whole, whatever the cut.
    """
    for name, value, known in (("loss", kind, LOSSES), ("KL estimator", kl, KLS)):
        if value not in known:
            raise ValueError(f"There is no {name} '{value}': take one of {', '.join(known)}.")
    if beta and ref_logp is None:
        raise ValueError(f"beta is {beta}, but there are no reference log-probabilities: pass ref_logp, or beta=0.")
    T = logp.shape[-1]
    n_completions = n_completions or logp.shape[0] * logp.shape[1]
    n_tokens = max(1, n_tokens or int(mask.sum()))
    # Padding may hold anything, even NaN: it is put to 0 here, before any exp sees it.
    logp = torch.where(mask, logp, 0.0)  # [B, G, T]
    old_logp = logp.detach() if old_logp is None else torch.where(mask, old_logp, 0.0)  # [B, G, T]
    A = advantages[..., None]  # [B, G, 1]

    log_ratio = logp - old_logp  # [B, G, T]
    if kind == "gspo":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # [B, G, 1]
    ratio = log_ratio.exp()  # [B, G, T], gspo [B, G, 1]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        per_token = -ratio.clamp(max=1 + clip_high).detach() * A * logp  # [B, G, T]
    else:
        per_token = -torch.min(ratio * A, clipped * A).expand_as(logp)  # [B, G, T]

    def token_mean(x):
        return (x.detach().expand_as(mask) * mask).sum() / mask.sum().clamp(min=1)

    high, low = ratio > 1 + clip_high, ratio < 1 - clip_low  # [B, G, T] or [B, G, 1]
    cut = high if kind == "cispo" else high & (A > 0) | low & (A < 0)
    metrics = {"clip_frac": token_mean(cut.float()), "ratio": token_mean(ratio)}
    if ref_logp is not None:
        x = torch.where(mask, ref_logp, 0.0) - logp  # [B, G, T]
        k3 = x.expm1() - x  # expm1: e^x - 1 cancels for the small x of a healthy run
        metrics["kl"] = token_mean(k3)
        per_token = per_token + beta * {"k1": -x, "k2": x ** 2 / 2, "k3": k3, "k3_ratio": ratio * k3}[kl]

    per_token = per_token * mask  # [B, G, T]
    if kind in ("grpo", "gspo"):
        loss = (per_token.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / n_completions
    elif kind in ("bnpo", "dapo", "cispo"):
        loss = per_token.sum() / n_tokens
    else:
        loss = per_token.sum() / (n_completions * (max_length or T))
    return loss, metrics


def group_logprobs(model: Transformer, prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """b prompts of [P_i] tokens, completions tokens and mask [b, g, T] -> (logp, entropy) [b, g, T], 0 on padding.

    The prompt runs through the model once for all g completions, with gradients: they attend to its keys and values,
    and what each of them asks of the prompt adds up there. The same gradient as g copies of prompt + completion, for
    P + g T tokens of work instead of g (P + T).
    """
    b, g, T = tokens.shape
    padded, prompt_mask = pad(prompts)  # [b, P], [b, P]
    cache = Cache()
    h = model.hidden(padded, cache, None if bool(prompt_mask.all()) else prompt_mask)  # [b, P, D]
    # The prompt's last state predicts the first token of every completion; the last token predicts nothing.
    last = h[torch.arange(b, device=h.device), prompt_mask.sum(1) - 1]  # [b, D]
    states = last[:, None, None].expand(b, g, 1, -1)  # [b, g, 1, D]
    if T > 1:
        cache.share(g)
        rest = model.hidden(tokens[..., :-1].reshape(b * g, T - 1), cache)  # [b*g, T-1, D]
        states = torch.cat([states, rest.view(b, g, T - 1, -1)], 2)  # [b, g, T, D]
    logp, entropy = token_logprobs(model, states[mask], tokens[mask], temperature)  # [sampled tokens] each
    zeros = logp.new_zeros(b, g, T)  # [b, g, T]
    return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)


@dataclass
class MicroBatch:
    """Completions that go through the model together, and what the first pass over them finds out."""

    prompts: list[Tensor]  # b x [P_i]
    tokens: Tensor  # [b, g, T]
    mask: Tensor  # [b, g, T] bool
    sampler_logp: Tensor  # [b, g, T]
    advantages: Tensor  # [b, g]
    old_logp: Tensor | None = None  # [b, g, T] of the policy before the first step on this batch
    ref_logp: Tensor | None = None  # [b, g, T]


def micro_batches(groups: Sequence, advantages: Tensor, micro_tokens: int) -> list[MicroBatch]:
    """Cut a batch of groups so that each piece holds at most `micro_tokens` tokens, padding included, longest first.

    Longest first: a run that will not fit into memory fails on its first step and not on its hundredth. A group that
    is too large by itself is cut into equal parts, each with its own copy of the prompt; a single row always goes.
    """
    G = len(groups[0].mask)
    size = [(len(g.prompt), g.tokens.shape[1]) for g in groups]  # (P, T)
    worst_P, worst_T = max(P for P, _ in size), max(T for _, T in size)
    rows = max((g for g in range(1, G + 1) if G % g == 0 and worst_P + g * worst_T <= micro_tokens), default=1)
    order = sorted(range(len(groups)), key=lambda i: (-size[i][0] - rows * size[i][1], i))
    items = [(i, at) for i in order for at in range(0, G, rows)]
    cuts: list[list[tuple[int, int]]] = [[]]
    for item in items:
        now = [*cuts[-1], item]
        P, T = max(size[i][0] for i, _ in now), max(size[i][1] for i, _ in now)
        if cuts[-1] and len(now) * (P + rows * T) > micro_tokens:
            cuts.append([item])
        else:
            cuts[-1] = now
    result = []
    for cut in cuts:
        T = max(size[i][1] for i, _ in cut)

        def stack(name, cut=cut, T=T):
            parts = [getattr(groups[i], name)[at:at + rows] for i, at in cut]
            return torch.stack([torch.nn.functional.pad(p, (0, T - p.shape[1])) for p in parts])  # [b, g, T]

        result.append(MicroBatch([groups[i].prompt for i, _ in cut], stack("tokens"), stack("mask"), stack("logp"),
                                 torch.stack([advantages[i, at:at + rows] for i, at in cut])))
    return result


EXPLODED = 1e6  # normal losses are below 1 and normal gradients below 100: what is larger by so much leads nowhere


def update(model: Transformer, reference: Transformer | None, groups: Sequence, optimizer: torch.optim.Optimizer,
           config: Config) -> dict[str, float]:
    """One batch of groups (with `rewards` [G] each) -> `config.updates` optimizer steps, and the metrics of the batch.

    The metrics: loss, kl (k3, nats a token), entropy (nats a token), clip_frac, ratio, grad_norm, flat_groups (share
    of groups whose rewards are all equal), logp_gap (largest difference between the sampler's log-probabilities and
    ours); with several updates, those of the last one. Without a reference (None) there is no KL, whatever
    `config.beta` says; under LoRA the model is its own reference. Raises FloatingPointError when the loss or the
    gradient is NaN or above EXPLODED (the weights are then as they were before this optimizer step), or when a weight
    is not finite after it.
    """
    A = advantages(torch.stack([torch.as_tensor(g.rewards) for g in groups]), config.advantage)  # [B, G]
    flat = (A == 0).all(1)  # [B]
    micros = micro_batches(groups, A.to(groups[0].tokens.device), config.micro_tokens)
    n_completions = A.numel()
    n_tokens = sum(int(m.mask.sum()) for m in micros)
    max_length = config.max_new_tokens or max(g.tokens.shape[1] for g in groups)  # one for all micro-batches
    beta = config.beta if reference is not None else 0.0
    # Without a KL, a batch of flat groups has gradient zero; AdamW would still move by momentum and weight decay.
    learns = beta > 0 or not bool(flat.all())
    parameters = [p for p in model.parameters() if p.requires_grad]
    metrics = {"flat_groups": flat.float().mean().item(), "grad_norm": 0.0, "logp_gap": 0.0}
    for epoch in range(config.updates):
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for m in micros:
            with torch.set_grad_enabled(learns):
                logp, entropy = group_logprobs(model, m.prompts, m.tokens, m.mask, config.temperature)
                if epoch == 0:
                    if beta:
                        # Under LoRA the reference is the policy itself without its adapters: no second copy.
                        with torch.no_grad(), reference.adapters_off():
                            m.ref_logp, _ = group_logprobs(reference, m.prompts, m.tokens, m.mask, config.temperature)
                    gap = (logp.detach() - m.sampler_logp).abs().max().item()
                    metrics["logp_gap"] = max(metrics["logp_gap"], gap)
                loss, seen = policy_loss(logp, m.old_logp, m.ref_logp, m.advantages, m.mask, config.loss,
                                         config.clip_low, config.clip_high, beta, config.kl,
                                         max_length, n_completions, n_tokens)
            if not loss.abs() < EXPLODED:  # NaN is not smaller than anything
                raise FloatingPointError(f"The loss is {loss.item()}: a log-probability or the KL exploded")
            if learns:
                loss.backward()
            if config.updates > 1 and epoch == 0:
                m.old_logp = logp.detach()
            share = int(m.mask.sum()) / n_tokens
            seen["entropy"] = entropy.sum() / m.mask.sum()
            sums["loss"] = sums.get("loss", 0.0) + loss.item()
            for name, value in seen.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        metrics.update(sums)
        if not learns:
            break
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip).item()
        if not metrics["grad_norm"] < EXPLODED:
            raise FloatingPointError(f"The gradient's norm is {metrics['grad_norm']}")
        optimizer.step()
        if not torch.stack([p.sum() for p in parameters]).isfinite().all():  # faster than each element's own isfinite
            raise FloatingPointError("A weight is not finite after the optimizer's step")
    optimizer.zero_grad(set_to_none=True)  # gradients are as large as the weights, and the sampler wants the room
    return metrics
