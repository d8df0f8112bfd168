"""Group Relative Policy Optimization: the rewards of a group in, one step of the policy out.

A prompt q is answered by G sampled completions o_1 .. o_G, and each of them gets a reward r_i, a plain number.

    A_i   = (r_i - mean(r)) / (std(r) + 1e-4)                `advantages`: better or worse than its own group
    rho_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)         `ratio`: how far the policy moved since it sampled
    J     = E[ 1/G sum_i 1/|o_i| sum_t min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i) - beta KL_t ]

(Shao et al. 2024, DeepSeekMath, eq. 3.) `policy_loss` is -J, and `update` takes a step down. Here is why.

**1. How does a gradient pass through sampling, and through a reward that cannot be differentiated?** It does not. We
want a larger J = sum_o pi(o) r(o), and only pi depends on the weights. With grad pi = pi grad log pi,

    grad J = sum_o r(o) grad pi(o) = sum_o pi(o) r(o) grad log pi(o) = E[r grad log pi]

That is a mean over samples (the score function, or REINFORCE). Differentiate log pi(o) = sum_t log pi(o_t | q, o_<t)
and multiply by the reward, which may come from anything: a program, a person. Every token is paid for the whole text.
Only over many texts does a token that helps get more than one that does not. With two words and rewards 1 and 0:

>>> z, r = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 0.0])  # the words' logits, their rewards
>>> p = z.softmax(0).detach()  # [2]; detached: sampling is not differentiated
>>> torch.autograd.grad((z.softmax(0) * r).sum(), z)[0]  # the exact gradient of the expected reward
tensor([ 0.2500, -0.2500])
>>> torch.autograd.grad((p * r * z.log_softmax(0)).sum(), z)[0]  # the mean over samples
tensor([ 0.2500, -0.2500])

**2. Why may one subtract the mean?** E[b grad log pi] = b sum_o grad pi(o) = b grad 1 = 0 for any number b that does
not depend on o. So a baseline b does not change the expected gradient, only its noise:

>>> torch.autograd.grad((p * (r - 100) * z.log_softmax(0)).sum(), z)[0]
tensor([ 0.2500, -0.2500])

A good b is the reward that this prompt brings on average. PPO trains a second network, the critic, to guess it. GRPO
takes the group's mean. It holds r_i itself, which shortens the expected gradient to (G - 1)/G and does not turn it.
(Dividing by the std, which depends on o too, turns it a little.) More prompts or more completions? Take enough
completions that most groups hold both better and worse ones (flat_groups stays low). Then take more prompts.

**3. Old samples.** After the first update on a batch, its samples are those of an older policy. The weight rho makes
their mean one of pi: sum_o pi_old (pi / pi_old) r = sum_o pi r. (The paper weighs each token by its own rho.) Where
pi = pi_old, rho is 1 and grad rho is grad log pi: this is the gradient of step 1 again.

**4. The clip, and why min.** Where rho is far from 1, the old samples say little about the new policy. So a token's
gradient stops once the policy has followed A far enough, but not where the policy went the wrong way. A plain clip
would stop both; the min tells them apart:

    rho   A   min(rho A, clip(rho) A)   gradient by logp
    1.5  +1          1.2                   0    good and already much likelier: enough
    0.5  +1          0.5                 +0.5   good, but it became rarer: take it back
    1.5  -1         -1.5                 -1.5   bad, but it became likelier: take it back
    0.5  -1         -0.8                   0    bad and already much rarer: enough

Does the clip act by default? No: with one update a batch (`--updates 1`) rho is 1, and nothing is clipped.

**5. The KL**, E[log pi - log ref] over the policy's own texts, holds it near `ref_model`, so it keeps its language.
The ref_model is a frozen copy of the policy from the start of the run and does not move. (`--stage-ref previous`: from
the start of this stage.) Under LoRA the first copy takes no memory: it is the policy with its adapters off.

**6. Why is the loss about 0 at step 1, and the gradient not?** Where rho is 1, completion i adds -A_i to the loss, and
the advantages of a group sum to 0. The gradients -A_i grad log pi(o_i) do not, since each o_i is another text. This
holds for grpo and gspo, in which every completion weighs the same. With one update it holds at every step, and what you
read is beta KL. In bnpo, dapo and dr_grpo a long completion weighs more, and cispo's terms are -A_i logp: those losses
show some other number. None of them measures progress: watch the reward, and read the summaries. Two completions, of 1
and of 3 tokens:

>>> logp = torch.tensor([[[-1.0, 0.0, 0.0], [-1.0, -2.0, -3.0]]], requires_grad=True)  # [B=1, G=2, T=3]
>>> mask = torch.tensor([[[True, False, False], [True, True, True]]])
>>> for kind in KINDS:
...     loss, _ = policy_loss(logp, None, None, torch.tensor([[1.0, -1.0]]), mask, kind)
...     print(f"{kind:8}{loss:6.2f}", [round(g, 2) for g in torch.autograd.grad(loss, logp)[0][mask].tolist()])
grpo      0.00 [-0.5, 0.17, 0.17, 0.17]
dr_grpo   0.33 [-0.17, 0.17, 0.17, 0.17]
bnpo      0.50 [-0.25, 0.25, 0.25, 0.25]
dapo      0.50 [-0.25, 0.25, 0.25, 0.25]
gspo      0.00 [-0.5, 0.17, 0.17, 0.17]
cispo    -1.25 [-0.25, 0.25, 0.25, 0.25]

Shapes: B prompts, G completions a prompt, T completion tokens (padded on the right), P prompt tokens, D hidden size;
b of the B prompts and g of the G completions are in one micro-batch.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from model import Cache, Transformer, pad, token_logprobs
from plumbing import ranks
from plumbing.exploded import EXPLODED, step_down
from plumbing.micro_batches import MicroBatch, micro_batches, rewards_of
from plumbing.staleness import importance_weights, weights_seen

ADVANTAGES = ("group", "mean", "batch", "gdpo")
KLS = ("k1", "k2", "k3", "k3_ratio")
# All that the losses differ in. Ratio: each token has its own, or the sequence has one. Surrogate: "clip" stops a
# token's gradient once the ratio has left the band in the direction of A; "weight" clips the factor in front of it, so
# that no token loses its gradient. Reduction: the sum over tokens is divided so that each completion weighs the same,
# or each token, or by a constant. Step 1 divides by no length: the last two keep its direction, the first does not.
# Which one should I take? Start with grpo. In it, a token of a long completion weighs less; dr_grpo and dapo undo that.
# (bnpo is the same number as dapo here. In trl it divides by the tokens of a micro-batch.) gspo and cispo matter from
# --updates 2 on: where the ratio is 1, the gradient that comes from the advantages depends on the reduction alone.
# --- your experiment starts here: a loss is a line of this table, and what is new in it a branch of policy_loss ---
KINDS = {
    #           ratio       surrogate  reduction
    "grpo":    ("token",    "clip",    "completions"),  # Shao et al. 2024, DeepSeekMath
    "dr_grpo": ("token",    "clip",    "constant"),     # Liu et al. 2025, "R1-Zero-like"; with --advantage mean
    "bnpo":    ("token",    "clip",    "tokens"),       # trl's name
    "dapo":    ("token",    "clip",    "tokens"),       # Yu et al. 2025; with --clip-high 0.28 --beta 0
    "gspo":    ("sequence", "clip",    "completions"),  # Zheng et al. 2025
    "cispo":   ("token",    "weight",  "tokens"),       # MiniMax-M1, 2025; trl's epsilon_high is our 1 + clip_high
}


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"There is no {what} '{name}': take one of {', '.join(known)}.")


def advantages(rewards: Tensor, kind: str = "group", weights: Tensor | None = None, floor: float = 0.05) -> Tensor:
    """rewards [B, G] -> advantages [B, G], float32: how much better each completion did than its own group.

    "group": (r - mean) / std, as in the paper, and as in trl 1e-4 is added to the std and the std is the unbiased one
        (divided by G - 1). The biased one (divided by G) would give values larger by sqrt(G / (G - 1)): 7% at G = 8.
    "mean":  r - mean (Dr. GRPO, Liu et al. 2025).
    "batch": r - the group's mean, divided by the std of all B*G rewards + 1e-4 (Liu et al. 2025, "Part I").
    "gdpo":  rewards [B, G, K] and weights [K]: "group" for each of K rewards, their weighted sum, divided by its std
        over the batch + 1e-4 (Liu et al. 2026). So a reward counts by its weight, whatever its spread.

    Why divide by the std? Then the scale of the reward does not matter: the learning rate that fits rewards in [0, 1]
    fits rewards in [0, 100], and an easy prompt teaches as much as a hard one. When not? When a small spread is only
    noise: dividing makes a difference of 0.01 as loud as one of 1. "mean" leaves each its own size. In "gdpo", where a
    reward that hardly varies would be as loud as the rest, no std counts as less than `floor` times the largest of K.

    What if all rewards of a group are equal? It has nothing to say and gets exactly 0, whatever the kind.

    >>> advantages(torch.tensor([[4.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]))  # mean 1 and std 2; then a flat group
    tensor([[ 1.4999, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if kind not in ADVANTAGES:
        raise unknown("advantage", kind, ADVANTAGES)
    if rewards.ndim not in (2, 2 + (kind == "gdpo")) or rewards.shape[1] < 2:
        raise ValueError(f"Rewards of shape {list(rewards.shape)}: GRPO compares completions of one prompt, so it "
                         f"takes [prompts, completions], with at least 2 of these. Raise --group.")
    r = rewards.double().view(*rewards.shape[:2], -1)  # [B, G, K], K = 1 but for gdpo; in float32, 1e8 + 1 is 1e8
    if not r.float().isfinite().all():
        raise ValueError("A reward is NaN or infinite: no advantage can be computed from it. Look at the reward.")
    # The mean of equal floats need not be equal to them, nor 0.1 + 0.2 to 0.3. AdamW makes a whole step of any error.
    flat = r.amax(1, keepdim=True) - r.amin(1, keepdim=True) <= 1e-12 * r.abs().amax(1, keepdim=True)  # [B, 1, K]
    a, std = (r - r.mean(1, keepdim=True)).masked_fill(flat, 0.0), r.std(1, keepdim=True)  # [B, G, K], [B, 1, K]
    weights = r.new_ones(r.shape[2]) if weights is None else weights.to(r)  # [K]
    if kind == "batch":
        std = r.std()  # []
    elif kind == "gdpo":
        std = std.clamp(min=floor * (std * (weights != 0)).square().mean(0).sqrt().max())  # [B, 1, K]
    a = (a if kind == "mean" else a / (std + 1e-4)) @ weights  # [B, G]
    # gdpo: the batch's mean is 0 already, as each group's is. Rounded, because parts that cancel leave errors of 1e-16.
    return (a.round(decimals=12) / (a.std() + 1e-4) if kind == "gdpo" else a).float()


def policy_loss(logp: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor,
                kind: str = "grpo", *, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0,
                kl: str = "k3", max_length: int | None = None, n_completions: int | None = None,
                n_tokens: int | None = None, weights: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, a scalar, and the metrics clip_frac, ratio and kl. A pure function of tensors.

    logp, old_logp, ref_logp [B, G, T]: log-probabilities, in nats, of the sampled tokens under the policy that is
    trained, under the policy before the first step on this batch (None: the same one, so the ratio is 1), and under the
    ref_model (None: no KL). advantages [B, G], or [B, G, T]. mask [B, G, T] bool: True on sampled tokens, the stop too.
    weights [B, G, T]: constants that multiply a token's policy term, and not its KL, where another policy than pi_old
    wrote the samples: min(pi_old / pi_sampler, C), truncated importance sampling (Yao et al. 2025). None: 1.

    `kl` is one of `kl_estimates`. The default here is k3, so that a bare call is the paper's loss and trl's. The
    command line's default is k3_ratio, because its gradient is that of the KL which is logged.

    When a batch is cut into micro-batches, `n_completions` and `n_tokens` are those of the whole batch. Then the losses
    of the micro-batches add up to the loss of the whole, whatever the cut. `max_length`: dr_grpo's constant.
    """
    if kind not in KINDS:
        raise unknown("loss", kind, KINDS)
    if kl not in KLS:
        raise unknown("KL estimator", kl, KLS)
    if beta and ref_logp is None:
        raise ValueError(f"beta is {beta}, but there are no reference log-probabilities: pass ref_logp, or beta=0.")
    ratio_of, surrogate, reduction = KINDS[kind]
    n_completions, n_tokens = n_completions or mask[..., 0].numel(), max(1, n_tokens or int(mask.sum()))
    # Padding may hold anything, even NaN. It is put to 0 here, before any exp sees it.
    logp = torch.where(mask, logp, 0.0)  # [B, G, T]
    old_logp = logp.detach() if old_logp is None else torch.where(mask, old_logp, 0.0)  # [B, G, T]
    w = 1.0 if weights is None else torch.where(mask, weights, 0.0)  # [B, G, T]
    A = torch.where(mask, advantages, 0.0) if advantages.ndim == 3 else advantages[..., None]  # [B, G, T] or [B, G, 1]

    log_ratio = logp - old_logp  # [B, G, T]
    if ratio_of == "sequence":  # the mean over its tokens
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # [B, G, 1]
        if advantages.ndim == 3:  # GSPO-token: the same number, but the gradient of a token is paid by its own A
            log_ratio = log_ratio.detach() + (logp - logp.detach())  # [B, G, T]
    elif ratio_of != "token":
        raise unknown("ratio", ratio_of, ("token", "sequence"))
    ratio = log_ratio.exp()  # [B, G, T], of sequences [B, G, 1]
    high, low = ratio > 1 + clip_high, ratio < 1 - clip_low  # as ratio, bool
    if surrogate == "clip":
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # as ratio
        per_token = -torch.min(ratio * A, clipped * A).expand_as(logp) * w  # [B, G, T]; min: the four cases
        cut = high & (A > 0) | low & (A < 0)  # as ratio: whose gradient is 0
    elif surrogate == "weight":
        per_token = -ratio.clamp(max=1 + clip_high).detach() * A * logp * w  # [B, G, T]
        cut = high  # as ratio: whose weight is clipped
    else:
        raise unknown("surrogate", surrogate, ("clip", "weight"))

    metrics = {"clip_frac": token_mean(cut.float(), mask), "ratio": token_mean(ratio, mask)}
    if ref_logp is not None:
        estimates = kl_estimates(torch.where(mask, ref_logp, 0.0) - logp, ratio)  # [B, G, T] each
        metrics["kl"] = token_mean(estimates["k3"], mask)
        per_token = per_token + beta * estimates[kl]  # [B, G, T]
    per_token = per_token * mask  # [B, G, T]
    if reduction == "completions":
        return (per_token.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / n_completions, metrics
    if reduction == "tokens":
        return per_token.sum() / n_tokens, metrics
    if reduction == "constant":
        return per_token.sum() / (n_completions * (max_length or logp.shape[-1])), metrics
    raise unknown("reduction", reduction, ("completions", "tokens", "constant"))


def kl_estimates(x: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    """x = ref_logp - logp and the ratio, [B, G, T] -> estimates of KL(pi || ref) from the sampled tokens, [B, G, T].

    Which one, and why? As a *number* k1 and k3 are unbiased (Schulman 2020), and k3 has less noise. As a *loss* they
    differ: autograd does not know that the tokens were drawn from pi. On average, each token's prefix taken as given,
    k1 has no gradient, and k3, the paper's, has that of KL(ref || pi), the other KL. k2 has that of KL(pi || ref) while
    pi = pi_old. k3_ratio has it always: its ratio, of tokens, carries the missing term (DeepSeek-V3.2). With gspo: k2.
    """
    k3 = x.expm1() - x  # [B, G, T], e^x - 1 - x; expm1, because e^x - 1 cancels for the small x of a healthy run
    return {"k1": -x, "k2": x ** 2 / 2, "k3": k3, "k3_ratio": ratio * k3}


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, G, T] or [B, G, 1] -> its mean over the sampled tokens, a scalar to look at: without a gradient."""
    return (x.detach().expand_as(mask) * mask).sum() / mask.sum().clamp(min=1)


def group_logprobs(model: Transformer, prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """b prompts of [P_i] tokens, completions tokens and mask [b, g, T] -> (logp, entropy) [b, g, T], 0 on padding.

    The prompt runs through the model once, and all g completions attend to its keys and values. Is the gradient the
    same as with g copies of the prompt? Yes: autograd adds up what the g completions send back to those keys and
    values, and a sum of gradients is the gradient of the sum. It costs P + g T tokens instead of g (P + T).

    Why the temperature? The policy that acted is softmax(logits / temperature), so that one is trained. Why float32?
    In bfloat16 log-probabilities near -5 lie 0.03 apart, so the ratio of two of them may be wrong by 3%.
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


def update(model: Transformer, ref_model: Transformer | None, groups: Sequence, optimizer: torch.optim.Optimizer,
           config, teacher: Transformer | None = None) -> dict[str, float]:
    """One batch of groups, with `rewards` of G floats each -> `config.updates` optimizer steps; returns the metrics.

    config is any object with the fields loss, advantage, clip_low, clip_high, beta, kl, updates, temperature,
    grad_clip, micro_tokens and max_new_tokens. It may have tis and tis_mode, and needs teacher_weight for a teacher.
    Without a ref_model there is no KL.

    The metrics: loss, kl and entropy (nats a token, kl by k3), clip_frac, ratio and grad_norm, of several updates those
    of the last one; flat_groups (share of groups whose rewards are all equal); from before the first step logp_gap (the
    largest difference between the sampler's log-probabilities and ours), teacher_kl (mean), tis_mean, tis_max, tis_ess.

    Raises FloatingPointError when the loss or the gradient is NaN or exploded (the weights are then as they were
    before this optimizer step), or when a weight is not finite after it.
    """
    rewards, weights = rewards_of(groups, by_part=config.advantage == "gdpo")  # [B, G], or [B, G, K] and [K]
    A = advantages(rewards, config.advantage, weights).to(groups[0].tokens.device)  # [B, G]
    flat = (A == 0).all(1)  # [B]
    most = EXPLODED * max(1.0, A.abs().max().item())  # an A of 1e9 may stay: grad_clip shortens its gradient
    beta = config.beta if ref_model is not None else 0.0
    # Without a KL, a batch of flat groups has gradient zero; AdamW would still move by momentum and weight decay.
    learns = beta > 0 or (teacher is not None and config.teacher_weight > 0) or not bool(flat.all())
    # The groups, padded and stacked, in pieces that fit into memory. Under torchrun only the groups of this rank.
    micros = micro_batches(ranks.mine(groups), ranks.mine(A), config.micro_tokens)
    n_tokens = sum(int(g.mask.sum()) for g in groups)
    whole = {"beta": beta, "n_completions": A.numel(), "n_tokens": n_tokens,
             "max_length": config.max_new_tokens or max(g.tokens.shape[1] for g in groups)}
    metrics = {"flat_groups": flat.float().mean().item(), "grad_norm": 0.0, "logp_gap": 0.0}
    for _ in range(config.updates):
        optimizer.zero_grad(set_to_none=True)
        means: dict[str, float] = defaultdict(float)
        for m in micros:
            with torch.set_grad_enabled(learns):
                loss, seen = micro_batch_loss(model, ref_model, m, config, whole, teacher)
            if learns:
                loss.backward()  # the gradients of the micro-batches add up, as their losses do
            share = int(m.mask.sum()) / n_tokens
            means["loss"] += loss.item()
            for name, value in seen.items():
                means[name] += value.item() * share
        means = ranks.summed(means, model.parameters() if learns else ())  # and the gradients of all ranks
        if not abs(means["loss"]) < most:  # NaN is not smaller than anything
            raise FloatingPointError(f"The loss is {means['loss']}: a log-probability or the KL exploded")
        metrics |= means
        if not learns:
            break
        metrics["grad_norm"] = step_down(model, optimizer, config.grad_clip, most)  # clip_grad_norm_, optimizer.step()
    metrics |= {"logp_gap": ranks.largest(max(m.logp_gap for m in micros)), **weights_seen(micros)}
    optimizer.zero_grad(set_to_none=True)  # gradients are as large as the weights, and the sampler wants the room
    return metrics


def micro_batch_loss(model: Transformer, ref_model: Transformer | None, m: MicroBatch, config,
                     whole: dict, teacher: Transformer | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the metrics of one micro-batch. `whole` is what it has to know of the whole batch."""
    logp, entropy = group_logprobs(model, m.prompts, m.tokens, m.mask, config.temperature)  # [b, g, T] each
    seen = {"entropy": entropy.sum() / m.mask.sum()}
    old_logp = m.old_logp  # [b, g, T], or None in the first pass: the model is still the one that sampled
    if old_logp is None:
        # Kept for the second update on; with one update old_logp is logp, detached: the ratio is 1. Why not take the
        # sampler's own logp? It was computed token by token, so it is rounded differently, and under top_k or top_p it
        # is that of another distribution. It serves as an alarm: where the gap is large, one of the two is wrong.
        m.old_logp = logp.detach()  # [b, g, T]
        m.logp_gap = (m.old_logp - m.sampler_logp).abs().max().item()
        if getattr(config, "tis", 0):
            m.weights = importance_weights(m.old_logp, m.sampler_logp, m.mask, config)  # [b, g, T]
        if whole["beta"] and ref_model is not None:
            with torch.no_grad(), ref_model.adapters_off():
                m.ref_logp, _ = group_logprobs(ref_model, m.prompts, m.tokens, m.mask, config.temperature)  # [b, g, T]
        if teacher is not None:
            with torch.no_grad():  # at the policy's temperature: then only a policy equal to the teacher has a KL of 0
                teacher_logp, _ = group_logprobs(teacher, m.prompts, m.tokens, m.mask, config.temperature)  # [b, g, T]
            # As an advantage, log teacher - log pi makes the loss's gradient that of KL(pi || teacher), by token.
            gain, w = teacher_logp - m.old_logp, config.teacher_weight  # [b, g, T]
            m.advantages = (1 - w) * m.advantages[..., None] + w * gain  # [b, g, T]
            seen["teacher_kl"] = token_mean(-gain, m.mask)
    loss, metrics = policy_loss(logp, old_logp, m.ref_logp, m.advantages, m.mask, kind=config.loss, kl=config.kl,
                                clip_low=config.clip_low, clip_high=config.clip_high, weights=m.weights, **whole)
    return loss, metrics | seen

# Next: train.py, the loop that calls `update`
