"""Groups to look at: of a dozen steps a run keeps two groups token by token, in groups.jsonl, for report.html.

With them stand the log-probabilities of every token before and after the update, and what each of the losses does to
the token. On policy every ratio is 1 and the losses differ in little but their divisors. After the update they do not:
that is where the clip acts. A second update on the same batch (--updates 2) would begin there.

    {"step", "stage", "loss", "rewards": [B][G], "groups": [{"prompt", "completions": [{"tokens": [T],
     "before", "after", "ref": [T] nats, "kl": [2][T], "weights": {loss: [2][T]}, "reward", "advantage", ...}]}]}

With a teacher each token has an advantage of its own, and "advantage" is their mean.

The 2 is for before and after. A weight is minus the loss's gradient by the token's log-probability, times the tokens
of the batch. So 1 is what a token of advantage 1 gets where all tokens weigh the same. Above 0 the token becomes
likelier, below 0 rarer, and at 0 the loss leaves it alone.

Shapes: B prompts, G completions a prompt, T completion tokens, P prompt tokens.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer
from torch import Tensor

from plumbing import ranks
from plumbing.log import Log, say
from plumbing.micro_batches import rewards_of
from plumbing.report import write_report

# What bounds the file: 12 * 2 * 400 tokens of about 150 bytes are 1.5 MB, whatever the run; the default run keeps 1 MB.
STEPS, GROUPS, COMPLETIONS, TOKENS, CHARS = 12, 2, 8, 400, 4000


def steps_to_keep(total: int) -> set[int]:
    """Steps of a run, counted from 1, the first and the last among them. A resumed run keeps the same ones.

    >>> sorted(steps_to_keep(5)), sorted(steps_to_keep(221))[:3]
    ([1, 2, 3, 4, 5], [1, 21, 41])
    """
    return {1 + i * (total - 1) // (STEPS - 1) for i in range(STEPS)}


@contextmanager
def keeping_groups(log: Log, step: int, groups: Sequence, *, model, ref_model, tokenizer, grpo,
                   teacher=None) -> Iterator[None]:
    """Around the scoring of a step's groups and the update on them: where it fails, their texts are kept (`Log`); where
    it does not, now and then what it came to.

    `grpo`: the module, or whatever has its group_logprobs, policy_loss, kl_estimates, advantages and KINDS. It costs
    three forward passes over two groups (with a teacher four), in a dozen steps of a run. No weight and no random
    number is touched. What fails in here does not end the run.
    """
    shown = groups[:GROUPS] if ranks.first() and step in steps_to_keep(log.total) else []
    before = [attempt(logprobs, model, group, log.config, grpo) for group in shown]  # [1, G, T] each
    # Under LoRA the ref_model is the policy itself without its adapters.
    ref = [ref_model and attempt(reference_logprobs, ref_model, group, log.config, grpo) for group in shown]  # as they
    its = [teacher and attempt(logprobs, teacher, group, log.config, grpo) for group in shown]  # as before
    with log.keeping(step, groups):
        yield
    if shown and None not in before and not (teacher and None in its):
        attempt(keep, log, step, groups=groups, before=before, ref=ref, its=its, model=model, tokenizer=tokenizer,
                grpo=grpo)


def attempt(do: Callable, *args, **named):
    """do(...), or None and a sentence: hours of training do not fail because of a page to look at."""
    try:
        return do(*args, **named)
    except Exception as e:  # a forker's loss or tokenizer, memory, the disk: it can fail in many ways
        say(f"A group could not be kept for report.html ({(str(e) or type(e).__name__).splitlines()[0]}).")
        return None


@torch.no_grad()
def logprobs(model, group, config, grpo) -> Tensor:
    """-> [1, G, T], on the CPU; as many rows at once as --micro-tokens allows."""
    G, T = group.mask.shape
    rows = max(1, (config.micro_tokens - len(group.prompt)) // T)
    parts = [grpo.group_logprobs(model, [group.prompt], group.tokens[None, i:i + rows], group.mask[None, i:i + rows],
                                 config.temperature)[0].float().cpu() for i in range(0, G, rows)]  # [1, rows, T] each
    return torch.cat(parts, 1)  # [1, G, T]


def reference_logprobs(ref_model, group, config, grpo) -> Tensor:
    with ref_model.adapters_off():
        return logprobs(ref_model, group, config, grpo)


def keep(log: Log, step: int, *, groups: Sequence, before: list, ref: list, its: list, model, tokenizer: Tokenizer,
         grpo) -> None:
    """A line of groups.jsonl, and the report with it: who looks at a run while it goes on sees them at once."""
    config, stage = log.config, next(stage.number for stage in log.stages if step <= stage.end)
    rewards, weights = rewards_of(groups, by_part=config.advantage == "gdpo")  # [B, G], or [B, G, K] and [K]
    A = grpo.advantages(rewards, config.advantage, weights).float().cpu()  # [B, G], as in the update
    whole = {"n_completions": A.numel(), "n_tokens": sum(int(group.mask.sum()) for group in groups),
             "max_length": config.max_new_tokens or max(group.mask.shape[1] for group in groups)}
    beta = config.beta if ref[0] is not None else 0.0
    row = {"step": step, "stage": stage, "loss": config.loss, "beta": beta, "updates": config.updates,
           "kinds": {kind: list(parts) for kind, parts in grpo.KINDS.items()},
           "rewards": [[rounded(r) for r in group.rewards] for group in groups[:32]], "groups": []}
    for i, (old, ref_logp, of_teacher) in enumerate(zip(before, ref, its)):
        new = logprobs(model, groups[i], config, grpo)  # [1, G, T]
        a = A[i:i + 1]  # [1, G]
        if of_teacher is not None:
            w = config.teacher_weight
            a = (1 - w) * a[..., None] + w * (of_teacher - old)  # [1, G, T], as in the update
        row["groups"].append(group_of(groups[i], tokenizer, old=old, new=new, ref=ref_logp, A=a, beta=beta,
                                      whole=whole, config=config, grpo=grpo))
    with open(log.folder / "groups.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    write_report(log.folder)


def group_of(group, tokenizer: Tokenizer, *, old: Tensor, new: Tensor, ref: Tensor | None, A: Tensor, beta: float,
             whole: dict, config, grpo) -> dict:
    """One prompt and its completions; `old`, `new` and `ref` [1, G, T], A [1, G] or [1, G, T]."""
    mask = group.mask[None].cpu()  # [1, G, T]
    of_all = A if A.ndim == 2 else (A * mask).sum(-1) / mask.sum(-1).clamp(min=1)  # [1, G]
    moments = [(old, old), (new, old)]  # (logp, old_logp) before the update and after it
    settings = {"clip_low": config.clip_low, "clip_high": config.clip_high, **whole}
    weights = {kind: [weights_of(grpo, x, y, None, A, mask, kind=kind, **settings)[0] for x, y in moments]
               for kind in grpo.KINDS}  # [G, T] each; without the KL, which is the same in all of them
    kl = None
    if ref is not None:
        kl = [grpo.kl_estimates(ref - x, (x - y).exp())["k3"][0] for x, y in moments]  # [G, T] each
    if beta:
        settings |= {"beta": beta, "kl": config.kl, "kind": config.loss}
        weights["with KL"] = [weights_of(grpo, x, y, ref, A, mask, **settings)[0] for x, y in moments]
    # Where there are more completions than can be shown: the best, the worst, and some between them.
    order = sorted(range(len(group.rewards)), key=lambda g: -group.rewards[g])
    if len(order) > COMPLETIONS:
        order = [order[i * (len(order) - 1) // (COMPLETIONS - 1)] for i in range(COMPLETIONS)]
    most = TOKENS // len(order)
    completions = []
    for g in order:
        n = int(mask[0, g].sum())
        T = min(n, most)
        completions.append({
            "number": g + 1, "reward": rounded(group.rewards[g]), "advantage": rounded(of_all[0, g].item()),
            "parts": {name: rounded(values[g]) for name, values in group.parts.items()}, "all": n,
            "stopped": bool(group.stopped[g]), "tokens": pieces(tokenizer, group.tokens[g, :T].tolist()),
            "before": floats(old[0, g, :T]), "after": floats(new[0, g, :T]),
            "ref": None if ref is None else floats(ref[0, g, :T]),
            "kl": kl and [floats(moment[g, :T]) for moment in kl],
            "weights": {name: [floats(moment[g, :T], 3) for moment in both] for name, both in weights.items()}})
    return {"prompt": shorten(tokenizer.decode(group.prompt.tolist(), skip_special_tokens=False)),
            "completions": completions}


def weights_of(grpo, logp: Tensor, old: Tensor, ref: Tensor | None, A: Tensor, mask: Tensor, **settings) -> Tensor:
    """What a loss does to every token [1, G, T]: minus its gradient by logp, times the tokens of the batch.

    `policy_loss` itself says it, through autograd, and no second copy of its formulas. The other arguments are its own.
    """
    logp = logp.detach().clone().requires_grad_()  # [1, G, T]
    loss, _ = grpo.policy_loss(logp, old, ref, A, mask, **settings)
    gradient, = torch.autograd.grad(loss, logp)  # [1, G, T]
    return -gradient * settings["n_tokens"]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. A letter of several tokens stands with the last of them.

    Not token by token: many tokenizers drop the space before a first word, and half a letter is no text.
    """
    found, said = [], ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=False)
        if text.endswith("\ufffd") and n < len(ids):
            found.append("")
            continue
        found.append(text[len(said):])
        said = text
    return found


def shorten(text: str) -> str:
    """Long texts without their middle.

    >>> len(shorten("x" * 5000))
    4006
    """
    return text if len(text) <= CHARS else f"{text[:CHARS // 2]} [..] {text[-CHARS // 2:]}"


def floats(x: Tensor, digits: int = 4) -> list[float | None]:
    return [rounded(value, digits) for value in x.tolist()]


def rounded(x: float, digits: int = 4) -> float | None:
    """A few digits, and none below 1e-5: what one reads. None where it is no number.

    >>> rounded(-0.123456), rounded(12345.6), rounded(1.2e-7)
    (-0.1235, 12350.0, 0.0)
    """
    return float(f"{round(float(x), 5):.{digits}g}") + 0.0 if math.isfinite(x) else None
