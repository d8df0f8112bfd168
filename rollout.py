"""Prompts in, groups of completions out: the half of reinforcement learning in which the policy acts.

A group is one prompt with G sampled answers. The prompt goes through the model once, and its keys and values serve all
G rows. Rows that have said their stop token leave the batch, or fill it up (`drop_finished`). The sampler's own
log-probabilities are kept with the tokens: they say what the policy believed when it acted, and `grpo.update` compares
its own with them (`logp_gap`).

Why is the stop token trained? To stop is a choice like any other, and in a task of length it is the one that matters.
So the mask, which is made here with the tokens, is True on it. Is a completion trained that was cut off at
`max_new_tokens`? Yes, like all others: else the policy would never learn that it was too long. Is it punished? Only by
its reward: `length` counts its tokens, and a tagged answer that was cut has no summary.

Shapes: B prompts, G completions a prompt, N = B*G rows, P prompt tokens, T completion tokens, V vocabulary. n = b*g of
the rows are still in the batch: g of each of b prompts.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import Cache, ModelConfig, Transformer, pad, to_logits
from plumbing.prompts import spelt as _spelt


@dataclass
class Group:
    """One prompt and its G completions. Lengths are known here, where tokens are made, and never guessed again."""

    prompt: Tensor  # [P] token ids
    tokens: Tensor  # [G, T] token ids, 0 where mask is False
    mask: Tensor  # [G, T] bool: True on every sampled token, the stop token included
    logp: Tensor  # [G, T] the sampler's own log-probabilities, 0 where mask is False
    stopped: Tensor  # [G] bool: ended by itself, and was not cut off at max_new_tokens
    texts: list[str]  # G decoded completions, without the stop token
    rewards: list[float] | None = None  # G numbers, filled in by whoever scores the group
    ending: Tensor | None = None  # [G] tokens that spell the stop text, 0 elsewhere; None without a stop text
    parts: dict[str, list[float]] = field(default_factory=dict)  # G values of each reward, before its weight
    weights: dict[str, float] = field(default_factory=dict)  # the weight of each of them
    version: int | None = None  # steps that the weights had learnt which wrote it; None: those of now

    @property
    def lengths(self) -> Tensor:
        """Tokens of content per completion [G]: the stop is trained, but it is not part of the summary."""
        ending = self.stopped.long() if self.ending is None else self.ending.maximum(self.stopped.long())  # [G]
        return self.mask.sum(1) - ending


@torch.no_grad()
def sample(model: Transformer, prompts: Sequence, G: int, max_new_tokens: int, temperature: float = 1.0,
           top_p: float = 1.0, top_k: int = 0, stop_ids: Sequence[int] | None = None, seed: int = 0,
           tokenizer: Tokenizer | None = None, stop_text: str = "") -> list[Group]:
    """B prompts (sequences of token ids, any lengths) -> B groups of G completions.

    temperature 0 is greedy. `top_k` (0: off) keeps the k likeliest tokens, then `top_p` the smallest set that holds
    that much probability. `logp` is under the distribution that was really sampled: with top_p below 1 or a top_k it is
    not what `token_logprobs` computes, so do not train on such samples. `stop_ids` None: the model's own end tokens.
    Texts need the tokenizer. `stop_text` ends a completion too, with the token that completes it in the decoded text,
    whatever tokens spell it. Those are sampled tokens like all others, and stand in `texts`.

    A completion's random numbers depend on the seed, its prompt and its place in the group. One seed gives the same
    tokens whatever the batch, in float32 and but for a rare tie (1 text of 192 in one trial); bf16 rounds by the batch.
    """
    prompts = [torch.as_tensor(p, dtype=torch.long).cpu() for p in prompts]  # B x [P_b]
    check_request(prompts, model.config, G, max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    if stop_text and tokenizer is None:
        raise ValueError("A stop text is looked for in decoded text: pass the tokenizer.")
    B, N, device = len(prompts), len(prompts) * G, model.embed_tokens.weight.device
    stop = torch.tensor(sorted(model.config.eos_token_ids if stop_ids is None else stop_ids), device=device)  # [stops]
    noise = random_numbers(prompts, G, max_new_tokens, seed, device)  # [N, T]

    # Each prompt is read once; then its keys and values serve G rows.
    cache = Cache()
    logits = read_prompts(model, prompts, cache).repeat_interleave(G, 0)  # [N, V]
    cache.share(G)

    # What comes out, for all N rows; and which of them are still in the batch.
    tokens = torch.zeros(N, max_new_tokens, dtype=torch.long, device=device)  # [N, T]
    mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)  # [N, T]
    logp = torch.zeros(N, max_new_tokens, device=device)  # [N, T] float32
    stopped = torch.zeros(N, dtype=torch.bool, device=device)  # [N]
    ending = torch.zeros(N, dtype=torch.long, device=device)  # [N] tokens that spell the stop text
    rows = torch.arange(N, device=device)  # [n] which of the N rows each row of the batch is
    alive = torch.ones(B, G, dtype=torch.bool, device=device)  # [b, g] True: still writing; False: finished, a filler
    with torch.inference_mode(), model.packed(N, max_new_tokens):  # speed: nothing kept for gradients, fast products
        for t in range(max_new_tokens):
            # One token for each row of the batch. A row that has finished says something too, but nothing is written.
            token, token_logp = draw(logits, noise[rows.to(noise.device), t], temperature, top_k, top_p)  # [n], [n]
            live = alive.flatten()  # [n]
            tokens[rows, t] = token * live
            logp[rows, t] = token_logp.where(live, 0.0)
            mask[rows, t] = live  # made with the tokens: token 0 may be sampled, and padding is 0 too
            ends = live & torch.isin(token, stop)  # [n]
            if stop_text and tokenizer is not None:  # several tokens may spell it, and not always the same ones
                spelt = torch.tensor(_spelt(tokenizer, stop_text, tokens[rows, :t + 1]), device=device)  # [n]
                spelt = spelt.where(live & ~ends, 0)  # [n]
                ending[rows] += spelt
                ends |= spelt > 0
            stopped[rows] |= ends
            alive &= ~ends.view_as(alive)
            left = alive.sum(1).tolist()  # rows of each prompt; the one thing in a step that a GPU has to be waited for
            if not any(left) or t + 1 == max_new_tokens:
                break
            # Speed again: without this line finished rows are computed to the end, and the tokens are the same.
            alive, rows, token = drop_finished(cache, alive, left, rows, token)  # [b, g], [n], [n]
            logits = to_logits(model.hidden(token[:, None], cache)[:, 0], model.head)  # [n, V]

    return split(prompts, G, tokenizer, tokens=tokens, mask=mask, logp=logp, stopped=stopped,
                 ending=ending if stop_text else None)


def read_prompts(model: Transformer, prompts: Sequence[Tensor], cache: Cache) -> Tensor:
    """B prompts of [P_b] tokens into the cache, each of them once -> the logits of what comes next [B, V]."""
    device = model.embed_tokens.weight.device
    padded, mask = pad([p.to(device) for p in prompts])  # [B, P], [B, P]
    hidden = model.hidden(padded, cache, None if bool(mask.all()) else mask)  # [B, P, D]
    last = hidden[torch.arange(len(prompts), device=device), mask.sum(1) - 1]  # [B, D]
    return to_logits(last, model.head)


def drop_finished(cache, alive: Tensor, left: list[int], rows: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alive [b, g], rows and token [n], and how many rows of each prompt are left -> all three, of a smaller batch.

    The batch stays a rectangle, b prompts with g rows each. Prompts without a living row go. Then g becomes the most
    living rows that a prompt has. A prompt with fewer of them keeps some finished rows, to fill its places.
    """
    going_on, most = [b for b, n in enumerate(left) if n], max(left)
    if len(going_on) * most == alive.numel():
        return alive, rows, token
    keep = torch.tensor(going_on, device=alive.device)  # [b']
    order = alive[keep].long().argsort(dim=1, descending=True, stable=True)[:, :most]  # [b', g'] living rows first
    index = (keep[:, None] * alive.shape[1] + order).flatten()  # [n'] places in the batch as it was
    cache.keep(keep, index)
    return alive[keep].gather(1, order), rows[index], token[index]


def split(prompts: Sequence[Tensor], G: int, tokenizer: Tokenizer | None, *, tokens: Tensor, mask: Tensor, logp: Tensor,
          stopped: Tensor, ending: Tensor | None) -> list[Group]:
    """What N rows have said, [N, T] and [N] -> B groups, each as wide as its longest completion, with their texts."""
    ends = stopped if ending is None else stopped & (ending == 0)  # [N] by a stop token, which is no text
    written = (mask.sum(1) - ends.long()).tolist()  # N numbers of tokens
    ids = [row[:n] for row, n in zip(tokens.tolist(), written)]  # N lists
    texts = [""] * len(ids) if tokenizer is None else tokenizer.decode_batch(ids, skip_special_tokens=True)  # N
    groups = []
    for b, T in enumerate(mask.sum(1).view(-1, G).amax(1).tolist()):
        at = slice(b * G, (b + 1) * G)
        groups.append(Group(prompt=prompts[b].to(tokens.device), tokens=tokens[at, :T], mask=mask[at, :T],
                            logp=logp[at, :T], stopped=stopped[at], texts=texts[at],
                            ending=None if ending is None else ending[at]))
    return groups


def draw(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], one uniform number in [0, 1) a row -> (token [N], its log-probability [N], float32).

    The token is the first one whose cumulative probability exceeds the number. So a token of probability p owns an
    interval of length p. torch.multinomial is slower and needs a random number for each word of the vocabulary.

    >>> thirds = torch.tensor([[0.0, 0.0, 0.0]]).expand(2, 3)  # three words that are equally likely
    >>> draw(thirds, torch.tensor([0.1, 0.9]), temperature=1.0, top_k=0, top_p=1.0)
    (tensor([0, 2]), tensor([-1.0986, -1.0986]))
    """
    logits = logits.float()  # [N, V]
    if temperature == 0:
        log_p = logits.log_softmax(-1)  # [N, V]
        token = logits.argmax(-1)  # [N]
        return token, log_p.gather(-1, token[:, None]).squeeze(-1)
    logits = logits if temperature == 1 else logits / temperature  # [N, V]
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, -1).values[:, -1:]  # [N, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)  # [N, V]
    if top_p < 1:
        ordered, where = logits.sort(-1, descending=True)  # [N, V], [N, V]
        p = ordered.softmax(-1)  # [N, V]
        # Outside: the mass before a token suffices already. The likeliest token always stays.
        outside = p.cumsum(-1) - p >= top_p  # [N, V] bool
        logits = logits.masked_fill(outside.scatter(-1, where, outside), -torch.inf)  # [N, V]
    top = logits.amax(-1, keepdim=True)  # [N, 1]
    # In float64, where the noise is: a float32 running sum over 150,000 words loses the rare ones.
    cdf = (logits - top).exp_().to(noise.device).cumsum(-1, dtype=noise.dtype)  # [N, V], not divided by its end yet
    whole = cdf[:, -1:]  # [N, 1], that last value: the softmax's denominator
    token = torch.searchsorted(cdf, noise[:, None] * whole, right=True).clamp(max=cdf.shape[-1] - 1)  # [N, 1]
    token, log_whole = token.to(logits.device), whole.log().float().to(logits.device)  # [N, 1], [N, 1]
    return token.squeeze(-1), (logits.gather(-1, token) - top - log_whole).squeeze(-1)


# --- what a first reading skips: refusals, random numbers -------------------------------------------------------------


def check_request(prompts: Sequence[Tensor], model_config: ModelConfig, G: int, max_new_tokens: int, *,
                  temperature: float, top_p: float, top_k: int) -> None:
    """Refuse, with a sentence, what would fail deep inside or say nonsense. (Comparisons with NaN are False.)"""
    if not (G >= 1 and max_new_tokens >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(f"sample needs G and max_new_tokens of at least 1, temperature at least 0, top_p in (0, 1], "
                         f"top_k at least 0; got {G}, {max_new_tokens}, {temperature}, {top_p}, {top_k}.")
    lengths = [len(p) for p in prompts]
    if min(lengths, default=0) == 0:
        raise ValueError("sample was given no prompt, or an empty one: every prompt needs at least one token.")
    strange = [i for p in prompts for i in p.tolist() if not 0 <= i < model_config.vocab_size]
    if strange:
        raise ValueError(f"A prompt holds token {strange[0]}, and the model knows 0 to {model_config.vocab_size - 1}: "
                         f"the tokenizer belongs to another model.")
    if max(lengths) + max_new_tokens > model_config.max_position_embeddings:
        raise ValueError(f"A prompt of {max(lengths)} tokens and {max_new_tokens} new ones do not fit into the model's "
                         f"context of {model_config.max_position_embeddings}: shorten the post or the completion.")


def random_numbers(prompts: Sequence[Tensor], G: int, T: int, seed: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) [N, T], float64; each row's stream is keyed by (seed, prompt, times it came before, g).
    """
    seen: Counter = Counter()
    rows = []
    for prompt in prompts:
        key = zlib.crc32(prompt.numpy().tobytes())
        rows += [np.random.default_rng([seed, key, seen[key], g]).random(T) for g in range(G)]
        seen[key] += 1  # a prompt given twice gets two different groups
    noise = torch.from_numpy(np.stack(rows))  # [N, T]
    return noise if device.type == "mps" else noise.to(device)  # Apple's GPU has no float64: `draw` adds on the CPU

# Next: task.py, what the prompts ask and how the answers are read
