"""Rebuild it: ten functions of crisp to write yourself, each with a check that says what is wrong.

    python -m studies.rebuild mine          # a copy of the project in mine/, in which ten functions have no body
    python -m studies.rebuild mine check    # which of them hold; in this order each needs only those above it
    cd mine && python train.py              # when all ten hold: your own GRPO, and it learns

What stays of a function is its name, its arguments and its docstring, which says all that it has to do. The copy is
made from the code as it stands, by its syntax tree. A check is a handful of small cases, most of them worked by hand.

Shapes: B prompts, G completions of each, T completion tokens, V vocabulary, D hidden size.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, tensor

from plumbing.cli import open_console

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("plumbing", "studies", "tests", "tiny", "docs", "figures")  # folders that a copy has; and all files beside


class Wrong(Exception):
    """What a check found, in a sentence that says what should be, and why."""


def expect(condition, says: str) -> None:
    if not bool(condition):
        raise Wrong(says)


def same(have, want, says: str, atol: float = 1e-5) -> None:
    """Numbers or tensors, equal to `atol`."""
    have, want = torch.as_tensor(have).detach().double(), torch.as_tensor(want).double()
    expect(have.shape == want.shape, f"{says} It has the shape {list(have.shape)}, and should have {list(want.shape)}.")
    shown = f" It is {rounded(have)}, and should be {rounded(want)}." if want.numel() <= 12 else ""
    expect(torch.allclose(have, want, rtol=0, atol=atol), says + shown)


def rounded(x: Tensor):
    return torch.round(x, decimals=4).tolist()


def refuses(call: Callable, says: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise Wrong(says)


# --- the checks, in the order in which the functions are best written -------------------------------------------------


def length_penalty() -> None:
    from rewards import length_penalty as f
    same(f(64, 64), 0.0, "The wanted length is best and is paid 0.")
    same(f(48, 64), -0.25, "16 tokens short of 64 miss by 16/64: the miss is counted in units of the target, so that "
                           "one learning rate serves all targets.")
    same(f(80, 64), -0.25, "Too long by 16 is as bad as too short by 16: without the absolute value the longest (or "
                           "the shortest) summary would be paid best.")
    same(f(192, 64), -2.0, "There is no worst: a summary of three times the length is paid -2. A floor would make all "
                           "long summaries equal, and equal rewards teach nothing.")
    for target in (-2, 0):
        refuses(lambda target=target: f(3, target), "A target of 0 or below must be refused with a ValueError: divided "
                                                    "by it, a miss would be a prize, or an error about something else.")


def rouge_l() -> None:
    from metrics import rouge_l as f
    same(f("a b", "b a"), 0.5, "A subsequence keeps the order: of \"a b\" and \"b a\" only one word is common. "
                               "Counting common words is ROUGE-1.")
    same(f("a b c d", "a b"), 2 / 3, "F1 is 2pr/(p + r), here with p 1/2 and r 1: recall alone pays for rambling.")
    same(f("a x b", "a b"), 0.8, "A subsequence may have gaps: LCS 2, p 2/3, r 1. Without gaps it is a substring.")
    same(f("a b c", "b c a"), 2 / 3, "Taking the first match there is can spoil longer ones: \"b c\" is common, and "
                                     "\"a\" must be left out. That is what the table of the textbook is for.")
    same(f("The cat sat quietly.", "the cats have sat down again"), 0.6, "The docstring's example: words are stemmed, "
         "LCS 3, p 3/4, r 3/6.")
    same([f("", "a"), f("a", ""), f("a", "b")], [0.0, 0.0, 0.0], "Where nothing is common it is 0, and no error.")


def advantages() -> None:
    from grpo import advantages as f
    r = tensor([[4.0, 0, 0, 0], [2, 2, 2, 6]])  # [B=2, G=4]: means 1 and 3, both with std 2
    same(f(r, "mean"), [[3, -1, -1, -1], [-1, -1, -1, 3]], "The baseline is the mean of a completion's own group. That "
         "of the whole batch would praise answers because their prompt is easy.")
    same(f(r)[0], tensor([3.0, -1, -1, -1]) / 2.0001, "\"group\" divides by the group's std, the unbiased one (of "
         "G - 1) plus 1e-4. By the biased one each step would be larger.")
    same(f(r * 100)[0], tensor([300.0, -100, -100, -100]) / 200.0001, "The scale of a reward goes out with its std.")
    for kind in ("group", "mean", "batch"):
        flat = f(tensor([[0.1 + 0.2] * 5 + [0.3] * 2], dtype=torch.float64), kind)  # [1, 7]
        expect((flat == 0).all(), f"\"{kind}\": equal rewards give exactly 0, also where only rounding tells them "
               f"apart (0.1 + 0.2 and 0.3). AdamW makes a whole step of any error.")
    same(f(r, "batch"), tensor([[3.0, -1, -1, -1], [-1, -1, -1, 3]]) / (r.std() + 1e-4), "\"batch\": the group's mean, "
         "and the std of all rewards of the batch.")
    both = torch.stack([r, 10 * r.flip(1)], -1)  # [2, 4, K=2]
    one = (r - r.mean(1, keepdim=True)) / 2.0001  # [2, 4]
    want = one + 0.5 * one.flip(1)  # [2, 4]
    same(f(both, "gdpo", tensor([1.0, 0.5]), floor=0.0), want / want.std(), "\"gdpo\": each reward by its own std, "
         "then the weighted sum, then the std of the batch.", 1e-3)
    refuses(lambda: f(r, "grpo"), "An unknown kind must be refused with a ValueError that lists the known ones.")


def kl_estimates() -> None:
    from grpo import kl_estimates as f
    x, ratio = tensor([0.0, 1.0, -0.5], requires_grad=True), tensor([1.0, 2.0, 0.5], requires_grad=True)
    found = f(x, ratio)
    expect(set(found) == {"k1", "k2", "k3", "k3_ratio"}, "There are four: k1, k2, k3 and k3_ratio.")
    same(found["k1"], [0, -1, 0.5], "k1 is log pi - log ref, and x is ref_logp - logp: mind the sign.")
    same(found["k2"], [0, 0.5, 0.125], "k2 is x^2 / 2.")
    same(found["k3"], [0, 0.718282, 0.106531], "k3 is e^x - 1 - x with x = ref_logp - logp; it is never negative. With "
                                               "the other sign it estimates the other KL.")
    same(found["k3_ratio"], [0, 1.436564, 0.053265], "k3_ratio is the ratio times k3.")
    (slope,) = torch.autograd.grad(found["k3_ratio"].sum(), ratio, allow_unused=True)
    expect(slope is not None, "k3_ratio must let the gradient through the ratio: it is the term that k3 lacks. Do not "
                              "detach it.")
    same(slope, [0, 0.718282, 0.106531], "The gradient of k3_ratio by the ratio is k3.")


def policy_loss() -> None:
    from grpo import policy_loss as f
    one = torch.ones(1, 1, 1, dtype=torch.bool)  # [1, 1, 1]
    four = {(1.5, 1.0): (-1.2, 0.0), (0.5, 1.0): (-0.5, -0.5), (1.5, -1.0): (1.5, 1.5), (0.5, -1.0): (0.8, 0.0)}
    for (rho, A), (loss, slope) in four.items():
        logp = tensor([[[rho]]]).log().requires_grad_()  # [1, 1, 1]
        have, _ = f(logp, torch.zeros(1, 1, 1), None, tensor([[A]]), one)
        case = f"grpo, a ratio of {rho} and an advantage of {A:+.0f}: the loss is -min(rho A, clip(rho) A)."
        same(have, loss, case + " A max would reward a move away from the old policy.")
        same(torch.autograd.grad(have, logp)[0], [[[slope]]], case + " Its gradient stops only where the token has "
             "gone far enough in the direction of A (the four cases of the derivation).")
    logp = tensor([[[-1.0, torch.nan, 9.0], [-1.0, -2.0, -3.0]]], requires_grad=True)  # [1, 2, 3]
    mask = tensor([[[True, False, False], [True, True, True]]])  # [1, 2, 3]
    A = tensor([[1.0, -1.0]])  # [1, 2]
    same(f(logp, None, None, A, mask)[0], 0.0, "Without old_logp the ratio is 1, and padding counts for nothing, even "
         "where it holds NaN: the mean over each completion's own tokens, then over completions.")
    slopes = {"grpo": [-1 / 2, 1 / 6, 1 / 6, 1 / 6], "dr_grpo": [-1 / 6, 1 / 6, 1 / 6, 1 / 6],
              "bnpo": [-1 / 4, 1 / 4, 1 / 4, 1 / 4], "gspo": [-1 / 2, 1 / 6, 1 / 6, 1 / 6],
              "dapo": [-1 / 4, 1 / 4, 1 / 4, 1 / 4], "cispo": [-1 / 4, 1 / 4, 1 / 4, 1 / 4]}
    for kind, slope in slopes.items():
        loss, _ = f(logp, None, None, A, mask, kind)
        (have,) = torch.autograd.grad(loss, logp) if loss.requires_grad else (torch.zeros_like(logp),)  # [1, 2, 3]
        expect(have.abs().sum() > 0, f"{kind}: the loss has no gradient. Where old_logp is None, the ratio is "
                                     f"exp(logp - logp.detach()): 1, with the gradient of logp.")
        same(have[mask], slope, f"{kind}: what a token weighs is the third column of "
             f"KINDS. The gradient by logp, of completions with 1 and 3 tokens, is not right.")
    old = tensor([[[-1.5, 0.0, 0.0], [-1.0, -2.5, -3.4]]])  # [1, 2, 3]
    both = {"gspo": (-1.2 + 1.349859) / 2, "cispo": (1.2 * 1.0 + 1.0 * -1.0 + 1.2 * -2.0 + 1.2 * -3.0) / 4}
    for kind, want in both.items():
        same(f(logp, old, None, A, mask, kind)[0], want, f"{kind}, with an old policy: see what the comment above "
             f"KINDS says of its ratio and its surrogate.", 1e-4)
    ref = logp.detach() + 1  # [1, 2, 3]
    loss, seen = f(logp, None, ref, A, mask, beta=0.5)
    same(loss, 0.5 * 0.718282, "beta KL is added to each token's loss, before the mean.")
    same(torch.stack([seen["kl"], seen["ratio"], seen["clip_frac"]]), [0.718282, 1, 0],
         "The metrics are means over real tokens.")
    parts = sum(f(logp[:, i:i + 1], None, None, A[:, i:i + 1], mask[:, i:i + 1], "dapo", n_completions=2, n_tokens=4)[0]
                for i in (0, 1))  # []
    same(parts, f(logp, None, None, A, mask, "dapo")[0], "The losses of micro-batches add up to the loss of the whole: "
         "divide by n_completions and n_tokens where they are given, not by what is in this piece.")


def token_logprobs() -> None:
    from model import token_logprobs as f
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(2, 3, 4, generator=draw).requires_grad_()  # [B=2, T=3, D=4]
    model = SimpleNamespace(head=torch.randn(5, 4, generator=draw))  # [V=5, D]
    targets = tensor([[0, 4, 2], [3, 3, 1]])  # [B, T]
    for temperature in (1.0, 0.5):
        log_p = (h @ model.head.T / temperature).log_softmax(-1)  # [B, T, V]
        logp, entropy = f(model, h, targets, temperature)
        same(logp, log_p.gather(-1, targets[..., None])[..., 0].detach(), f"logp at temperature {temperature}: the "
             f"logits are divided by it before the softmax, or another policy than the one that wrote is trained; and "
             f"hidden[t] predicts targets[t], nothing is shifted here.")
        same(entropy, -(log_p.exp() * log_p).sum(-1).detach(), "The entropy is -sum p log p over all words, in nats.")
    expect(logp.requires_grad and not entropy.requires_grad, "logp carries the gradient, and the entropy none: it is "
                                                             "for looking at.")
    bf16 = SimpleNamespace(head=model.head.bfloat16())
    expect(f(bf16, h.detach().bfloat16(), targets)[0].dtype == torch.float32, "The results are float32, also of a "
           "bfloat16 model: near -5 its numbers lie 0.03 apart, and a ratio of two would be wrong by 3%.")
    refuses(lambda: f(model, h, targets, 0.0), "A temperature of 0 must be refused with a ValueError.")


def small_model(vocab: int = 7):
    from model import Transformer, read_config
    torch.manual_seed(0)
    raw = {"model_type": "qwen2", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
           "eos_token_id": 2, "max_position_embeddings": 64}
    model = Transformer(read_config(raw, "a small model")).double()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.3)  # or it would only say its last token again
    return model


def share() -> None:
    from model import Cache, pad
    model, G = small_model(), 3
    for prompts in ([[1, 3, 4], [5, 6, 1]], [[1, 3, 4, 5, 6], [5, 1]]):  # the second time with padding
        tokens, mask = pad([tensor(p) for p in prompts])  # [B, P] each
        cache = Cache()
        model.hidden(tokens, cache, None if bool(mask.all()) else mask)
        read = cache.own
        expect(cache.share(G) is cache, "share returns the cache itself.")
        expect(cache.shared is read, "What has been read so far (own) becomes the prompt (shared), without a copy.")
        expect(cache.own is None and cache.columns == 0, "The rows' own memory begins empty: own None, columns 0. Else "
               "the prompt's tokens would be attended to as if each row had read them again.")
        own = torch.arange(2 * G * 2).view(2 * G, 2) % 7  # [N, 2]
        try:
            have = model.hidden(own, cache)  # [N, 2, D]
        except RuntimeError as e:
            raise Wrong(f"After share({G}) two prompts serve {2 * G} rows, and the next call fails ({e}). Masks go "
                        f"with what they are masks of, and padded prompts' lengths are [B, 1]: each of G rows needs "
                        f"its own.") from e
        for n in range(2 * G):
            plain = model.hidden(torch.cat([tensor(prompts[n // G]), own[n]])[None])[0, -2:]  # [2, D]
            same(have[n], plain.detach(), "A row that shares its prompt must compute what a full copy of both does. "
                 "Positions go on where the prompt ended (lengths), G rows of one prompt stand side by side, and "
                 "nobody may see a prompt's padding (shared_mask).", 1e-8)
    refuses(lambda: cache.share(G), "A cache that is shared twice loses its prompt without a word: refuse it with a "
                                    "ValueError.")


def draw() -> None:
    from rollout import draw as f
    logits = tensor([[0.2, 0.5, 0.3]]).log()  # [1, V]
    noise = tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.99], dtype=torch.float64)  # [6]
    token, logp = f(logits.expand(6, 3), noise, 1.0, 0, 1.0)  # [6], [6]
    same(token, [0, 0, 1, 1, 2, 2], "Words of probability 0.2, 0.5 and 0.3 own [0, 0.2), [0.2, 0.7) and [0.7, 1), in "
                                    "the vocabulary's order. The token is the one in whose interval the number lies.")
    same(logp, tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]).log(), "It comes with its own log-probability.")
    token, logp = f(logits, noise[1:2], 0.5, 0, 1.0)
    same(token, [1], "At temperature 0.5 the probabilities go as their squares, 4 : 25 : 9; 0.19 lies beyond 4/38.")
    same(logp, [-0.418710], "The log-probability is that of the distribution that was sampled, temperature included: "
                            "25/38.")
    token, logp = f(logits, noise[:1], 1.0, 2, 1.0)
    same([token.item(), logp.exp().item()], [1, 0.625], "top_k 2 leaves words 1 and 2, with 0.5/0.8 and 0.3/0.8.")
    token, logp = f(logits, noise[5:], 1.0, 0, 0.6)
    same([token.item(), logp.exp().item()], [2, 0.375], "top_p 0.6 keeps the smallest set that holds as much: 0.5 does "
                                                        "not, so the word that crosses 0.6 stays in.")
    token, logp = f(logits, noise[:1], 0.0, 0, 1.0)
    same([token.item(), logp.exp().item()], [1, 0.5], "Temperature 0 takes the likeliest word, whatever the number.")


def sample() -> None:
    from rollout import sample as f
    model, prompts = small_model(5), [tensor([1, 3, 4]), tensor([4, 3, 0, 1, 3])]  # words 0 to 4, of which 2 stops
    groups = f(model, prompts, 6, 8, seed=1)
    expect(len(groups) == 2 and groups[0].tokens.shape[0] == 6, "There is one Group a prompt, and it has G rows.")
    for group, prompt in zip(groups, prompts):
        expect(group.tokens.shape[1] == group.mask.sum(1).max(), "A group is as wide as its longest completion.")
        for tokens, mask, logp, stopped in zip(group.tokens, group.mask, group.logp, group.stopped):
            n = int(mask.sum())
            expect(mask[:n].all(), "A mask is True from a row's first token to its last, also where the model said "
                                   "token 0: never guess it from token values, padding is 0 too.")
            ends = (tokens == 2).nonzero().flatten().tolist()  # where stop tokens stand
            expect(not ends or ends[0] < n, "The stop token is part of the completion, so the mask is True on it: to "
                                            "stop is a choice like any other, and an untrained one is never learnt.")
            expect(not ends or ends[0] == n - 1, "A row ends with its first stop token: mask and tokens behind it are "
                                                 "False and 0.")
            expect(bool(stopped) == bool(ends) and (stopped or n == 8), "stopped is True where a stop token was said, "
                   "and False where the row was cut at max_new_tokens.")
            text = torch.cat([prompt, tokens[:n]])  # [P+n]
            log_p = model(text[None])[0, :-1].log_softmax(-1).gather(1, text[1:, None])[-n:, 0]  # [n]
            same(logp[:n], log_p.detach(), "logp is what the policy gave each token when it was drawn: that of the "
                 "whole text so far, and of no other row.")
    longest = max(groups, key=lambda group: int(group.stopped.sum()))
    expect(longest.stopped.any(), "No row has stopped by itself, of twelve: is model.config.eos_token_ids asked for?")
    alone = f(model, prompts[1:], 6, 8, seed=1)[0]
    expect(alone.tokens.equal(groups[1].tokens), "A prompt's completions depend on the seed and on itself, whatever "
           "else is in the batch: `random_numbers` has the numbers.")
    expect(not f(model, prompts[1:], 6, 8, seed=2)[0].tokens.equal(alone.tokens), "Another seed, other completions.")


def update() -> None:
    import grpo
    from rollout import Group
    draw = torch.Generator().manual_seed(0)
    groups = []
    for P, rewards in ((3, [1.0, 0.0, 2.0]), (5, [0.0, 3.0, 3.0])):
        mask = torch.arange(4) < tensor([4, 1, 2])[:, None]  # [G=3, T=4]
        tokens = torch.randint(7, (3, 4), generator=draw) * mask  # [G, T]
        groups.append(Group(torch.randint(7, (P,), generator=draw), tokens, mask, 0.0 * mask, mask[:, 0], [""] * 3,
                            rewards))
    ref_model = small_model()
    with torch.no_grad():
        ref_model.embed_tokens.weight.mul_(1.5)
    settings = {"loss": "grpo", "advantage": "group", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "kl": "k3",
                "temperature": 1.0, "updates": 1, "grad_clip": 1e9, "micro_tokens": 9999, "max_new_tokens": 4}

    def step(update: Callable, **changes) -> tuple[Tensor, dict]:
        """The weights of a small model after one call, and what it returned; plain gradient descent, so that no
        step is made equal by AdamW."""
        model = small_model()
        seen = update(model, ref_model, groups, torch.optim.SGD(model.parameters(), 0.5),
                      SimpleNamespace(**settings | changes))
        return torch.cat([p.detach().flatten() for p in model.parameters()]), seen

    def slow(model, ref_model, groups, optimizer, c) -> None:
        """The same by full copies of each text, with policy_loss and advantages as they are in this folder."""
        A = grpo.advantages(tensor([g.rewards for g in groups]), c.advantage)  # [B, G]
        tokens, mask = torch.stack([g.tokens for g in groups]), torch.stack([g.mask for g in groups])  # [B, G, T] each

        def logps(model):
            rows = [torch.cat([g.prompt, own])[None] for g in groups for own in g.tokens]  # N of [1, P+T]
            all_logp = [model(row)[0, -5:-1].div(c.temperature).log_softmax(-1) for row in rows]  # N of [T, V]
            return torch.stack(all_logp).view(*tokens.shape, -1).gather(-1, tokens[..., None])[..., 0]  # [B, G, T]

        old, ref = logps(model).detach(), logps(ref_model).detach()  # [B, G, T] each
        for _ in range(c.updates):
            optimizer.zero_grad()
            grpo.policy_loss(logps(model), old, ref, A, mask, c.loss, beta=c.beta, kl=c.kl, clip_low=c.clip_low,
                             clip_high=c.clip_high, max_length=c.max_new_tokens)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
            optimizer.step()

    for says, changes in (
        ("One step down the gradient of policy_loss, with advantages (not rewards) of each group.", {}),
        ("The temperature of the sampler divides the logits here too.", {"temperature": 0.7}),
        ("beta pulls the policy to the ref_model, whose log-probabilities are those of the same tokens.",
         {"beta": 1.0}),
        ("The gradient's norm is cut to grad_clip, before the step.", {"grad_clip": 0.01}),
        ("Several updates on one batch: each begins with fresh gradients, and old_logp stays that of the policy before "
         "the first one.", {"updates": 3, "loss": "dapo"}),
        ("Micro-batches are for memory: their gradients add up to that of the whole batch, so each is divided by the "
         "batch's completions and tokens, and there is one optimizer step.", {"micro_tokens": 12, "loss": "dapo"}),
    ):
        same(step(grpo.update, **changes)[0], step(slow, **changes)[0],
             f"{says} The weights afterwards are not right.", 1e-6)
    _, seen = step(grpo.update, beta=0.1)
    missing = {"loss", "kl", "entropy", "clip_frac", "ratio", "grad_norm", "flat_groups", "logp_gap"} - set(seen)
    expect(not missing, f"The metrics lack {', '.join(sorted(missing))}: the docstring says what each is.")
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    grpo.update(model, None, groups, optimizer, SimpleNamespace(**settings))
    before = [p.detach().clone() for p in model.parameters()]
    for group in groups:
        group.rewards = [1.0, 1.0, 1.0]
    seen = grpo.update(model, None, groups, optimizer, SimpleNamespace(**settings))
    expect(all(map(torch.equal, before, model.parameters())), "A batch of flat groups and no KL: nothing is learnt. "
           "But AdamW would move the weights by its momentum, so its step must be left out.")
    same(seen["flat_groups"], 1.0, "flat_groups is the share of groups whose rewards are all equal.")


CHECKS = {  # function: its check
    "rewards.length_penalty": length_penalty, "grpo.advantages": advantages, "grpo.kl_estimates": kl_estimates,
    "grpo.policy_loss": policy_loss, "model.token_logprobs": token_logprobs, "model.Cache.share": share,
    "rollout.draw": draw, "rollout.sample": sample, "grpo.update": update, "metrics.rouge_l": rouge_l,
}


# --- the copy ---------------------------------------------------------------------------------------------------------


def hollow(source: str, module: str) -> str:
    """A file's text -> the same, the bodies of the functions in CHECKS gone. Nothing else changes, not a comment."""
    lines, tree = source.split("\n"), ast.parse(source)
    classes = [(f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [(f"{module}.{prefix}{node.name}", node) for prefix, body in [("", tree.body), *classes]
                 for node in body if isinstance(node, ast.FunctionDef)]
    for name, node in sorted(functions, key=lambda pair: -pair[1].lineno):  # from below, so that line numbers hold
        if name in CHECKS:
            says = " " * node.body[0].col_offset + f'raise NotImplementedError("{name} is yours to write")'
            lines[node.body[0].end_lineno:node.end_lineno] = [says]  # from behind the docstring
    return "\n".join(lines)


def write_copy(folder: Path) -> None:
    """The project in `folder`, ten functions hollow. ValueError where something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and what you wrote in it is safe: take another name, or ask for "
                         f"python -m studies.rebuild {folder} check.")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.name)
        elif path.name in ROOMS:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for module in {name.partition(".")[0] for name in CHECKS}:
        path = folder / f"{module}.py"
        path.write_text(hollow(path.read_text(encoding="utf-8"), module), encoding="utf-8", newline="\n")


# --- the command ------------------------------------------------------------------------------------------------------


def verdict(name: str) -> tuple[bool, str]:
    """Whether a function holds, and a line about it."""
    try:
        CHECKS[name]()
    except NotImplementedError as e:
        which = str(e).partition(" ")[0]
        return False, "to write" if which == name else f"waits for {which}"
    except Wrong as e:
        return False, f"no: {e}"
    except Exception as e:  # whatever a body of somebody's own raises: it is shown, with its place
        place = traceback.extract_tb(e.__traceback__)[-1]
        return False, f"no: {type(e).__name__}: {e} ({Path(place.filename).name}, line {place.lineno})"
    return True, "holds"


def check(folder: Path) -> int:
    """Check each of the ten in `folder` -> the exit code. A process of its own imports that folder's files."""
    if folder.resolve() != ROOT:
        if not (folder / "studies" / "rebuild.py").exists():
            raise ValueError(f"{folder} is no copy: make it with python -m studies.rebuild {folder}.")
        return subprocess.run([sys.executable, "-m", "studies.rebuild", ".", "check"], cwd=folder).returncode
    held = 0
    for name in CHECKS:
        holds, line = verdict(name)
        held += holds
        print(f"{name:24}{line}", flush=True)
    print(f"{held} of {len(CHECKS)} hold." + (" Now: python train.py" if held == len(CHECKS) else ""))
    return 0 if held == len(CHECKS) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m studies.rebuild", description=__doc__.partition("\nShapes")[0],
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the copy is, or will be")
    parser.add_argument("action", nargs="?", default="write", choices=("write", "check"), help="default: write")
    args = parser.parse_args(argv)
    open_console()
    torch.set_num_threads(1)
    try:
        if args.action == "check":
            return check(args.folder)
        write_copy(args.folder)
    except (ValueError, OSError) as e:
        print(f"rebuild: {e}", file=sys.stderr)
        return 1
    print(f"{args.folder} is a copy of the project without the bodies of", *CHECKS, sep="\n  ")
    print(f"Write them, and ask after each: python -m studies.rebuild {args.folder} check")
    return 0


if __name__ == "__main__":
    sys.exit(main())
