"""Prompts in, groups of completions out: the half of reinforcement learning in which the policy acts.

A group is one prompt with G sampled answers. The prompt goes through the model once and its keys and values serve all
G rows; rows that have said their stop token leave the batch; what the sampler believed (`logp`) is kept, because it is
the only honest record of the policy that acted.

Shapes: B prompts, G completions a prompt, N = B*G rows, P prompt tokens, T completion tokens, V vocabulary.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import Cache, Transformer, pad, to_logits


@dataclass
class Group:
    """One prompt and its G completions. Lengths are known here, where tokens are made, and never guessed again."""

    prompt: Tensor  # [P] token ids
    tokens: Tensor  # [G, T] token ids, 0 where mask is False
    mask: Tensor  # [G, T] bool: True on every sampled token, the stop token included
    logp: Tensor  # [G, T] the sampler's own log-probabilities, 0 where mask is False
    stopped: Tensor  # [G] bool: ended by itself, and was not cut at max_new_tokens
    texts: list[str]  # G decoded completions, without the stop token
    rewards: list | None = None  # [G], filled in by whoever scores the group
    parts: dict | None = None
    ending: Tensor | None = None  # [G] tokens that spell the stop text, 0 elsewhere; None without a stop text

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
    that much probability; `logp` is under the distribution that was really sampled, so anything but top_p=1, top_k=0
    will not agree with `token_logprobs`. `stop_ids` None: the model's own end tokens. Texts need the tokenizer.
    `stop_text` ends a completion too, with the token that completes it in the decoded text, whatever tokens spell it;
    those are sampled tokens like all others, and stand in `texts`.

    The random numbers of a completion depend on the seed, its prompt's tokens and its place in the group: the same seed
    gives the same tokens whatever else is in the batch (a prompt given twice in one call gets two different groups).
    """
    if not (G >= 1 and max_new_tokens >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):  # NaN included
        raise ValueError(f"sample needs G and max_new_tokens of at least 1, temperature at least 0, top_p in (0, 1], "
                         f"top_k at least 0; got {G}, {max_new_tokens}, {temperature}, {top_p}, {top_k}.")
    prompts = [torch.as_tensor(p, dtype=torch.long).cpu() for p in prompts]  # B x [P_b]
    longest = max((len(p) for p in prompts), default=0)
    if min((len(p) for p in prompts), default=0) == 0:
        raise ValueError("sample was given no prompt, or an empty one: every prompt needs at least one token.")
    strange = [i for p in prompts for i in p.tolist() if not 0 <= i < model.config.vocab_size]
    if strange:
        raise ValueError(f"A prompt holds token {strange[0]}, and the model knows 0 to {model.config.vocab_size - 1}: "
                         f"the tokenizer belongs to another model.")
    if stop_text and tokenizer is None:
        raise ValueError("A stop text is looked for in decoded text: pass the tokenizer.")
    if longest + max_new_tokens > model.config.max_position_embeddings:
        raise ValueError(f"A prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's "
                         f"context of {model.config.max_position_embeddings}: shorten the post or the completion.")
    B, device = len(prompts), model.embed_tokens.weight.device
    stop = torch.tensor(sorted(model.config.eos_token_ids if stop_ids is None else stop_ids), device=device)
    noise = torch.from_numpy(_noise(prompts, G, max_new_tokens, seed))  # [N, max_new_tokens] float64
    if device.type != "mps":  # it has no float64: there `draw` adds up on the CPU
        noise = noise.to(device)
    padded, mask = pad(prompts)  # [B, P], [B, P]
    padded, mask = padded.to(device), mask.to(device)
    equal = bool(mask.all())  # then nobody needs a mask

    cache = Cache()
    hidden = model.hidden(padded, cache, None if equal else mask)  # [B, P, D]
    last = hidden[torch.arange(B, device=device), mask.sum(1) - 1]  # [B, D]
    logits = to_logits(last, model.head).repeat_interleave(G, 0)  # [N, V]: each prompt's head runs once
    cache.share(G)

    tokens = torch.zeros(B * G, max_new_tokens, dtype=torch.long, device=device)  # [N, T]
    logp = torch.zeros(B * G, max_new_tokens, device=device)  # [N, T] float32
    length = torch.full((B * G,), max_new_tokens, device=device)  # [N] sampled tokens, stop token included
    stopped = torch.zeros(B * G, dtype=torch.bool, device=device)  # [N]
    ending = torch.zeros(B * G, dtype=torch.long, device=device)  # [N] tokens that spell the stop text
    rows = torch.arange(B * G, device=device)  # which of the N rows each row of the batch is
    alive = torch.ones(B, G, dtype=torch.bool, device=device)  # rows that still write; the others only fill the batch
    with torch.inference_mode(), model.packed(B * G, max_new_tokens):  # no bookkeeping for gradients at all
        for t in range(max_new_tokens):
            number = noise[rows.to(noise.device), t]  # [rows]
            token, token_logp = draw(logits, number, temperature, top_k, top_p)  # [rows], [rows]
            live = alive.flatten()
            tokens[rows, t] = torch.where(live, token, tokens[rows, t])
            logp[rows, t] = torch.where(live, token_logp, logp[rows, t])
            ends = live & torch.isin(token, stop)
            if stop_text:
                spelt = torch.tensor(_spelt(tokenizer, stop_text, tokens[rows, :t + 1]), device=device)  # [rows]
                ending[rows] = torch.where(live & ~ends, spelt, ending[rows])
                ends |= live & (spelt > 0)
            length[rows] = torch.where(ends, t + 1, length[rows])
            stopped[rows] |= ends
            alive &= ~ends.view_as(alive)
            # The batch stays a rectangle of [prompts, rows each]: finished prompts go, and so does every column that no
            # prompt needs any more. Rows that finished early in a slow group stay as filler until it shrinks.
            left = alive.sum(1).tolist()  # rows of each prompt; the one thing a step that a GPU has to be waited for
            keep, G_left = [b for b, n in enumerate(left) if n], max(left)  # prompts with a row that still writes
            if not keep or t + 1 == max_new_tokens:
                break
            if len(keep) * G_left < alive.numel():
                keep = torch.tensor(keep, device=device)  # [prompts']
                order = alive[keep].long().argsort(dim=1, descending=True, stable=True)  # [prompts', G]
                order = order[:, :G_left]  # [prompts', G_left]
                index = (keep[:, None] * alive.shape[1] + order).flatten()
                cache.keep(keep, index)
                rows, token, alive = rows[index], token[index], alive[keep].gather(1, order)
            logits = to_logits(model.hidden(token[:, None], cache)[:, 0], model.head)  # [rows, V]

    mask = torch.arange(max_new_tokens, device=device) < length[:, None]  # [N, T]
    groups = []
    for b in range(B):
        at = slice(b * G, (b + 1) * G)
        T = int(length[at].max())
        ends = stopped[at] & (ending[at] == 0)  # by a stop token, which is no text
        ids = [row[:n].tolist() for row, n in zip(tokens[at], length[at] - ends.long())]
        texts = [""] * G if tokenizer is None else tokenizer.decode_batch(ids, skip_special_tokens=True)
        groups.append(Group(prompts[b].to(device), tokens[at, :T], mask[at, :T], logp[at, :T], stopped[at], texts,
                            ending=ending[at] if stop_text else None))
    return groups


def _spelt(tokenizer: Tokenizer, stop_text: str, tokens: Tensor) -> list[int]:
    """How many of its last tokens it takes each row of tokens [rows, t] to spell the stop text; 0: it is not there.

    Every token is a byte at least, so as many tokens as the text has bytes hold it. What comes after it in the same
    token does not matter.
    """
    last = tokens[:, -len(stop_text.encode()):].tolist()
    ends = [stop_text in text for text in tokenizer.decode_batch(last, skip_special_tokens=False)]
    return [next(n for n in range(1, len(row) + 1) if stop_text in tokenizer.decode(row[-n:], False)) if end else 0
            for row, end in zip(last, ends)]


def draw(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], one uniform number in [0, 1) a row -> (token [N], its log-probability [N], float32).

    Inverse transform: the first token whose cumulative probability exceeds the number. That is one scan over the
    vocabulary, where torch.multinomial is ten times slower, and it needs one number a token whatever the vocabulary.
    """
    logits = logits.float()
    if temperature == 0:
        log_p = logits.log_softmax(-1)  # [N, V]
        token = logits.argmax(-1)  # [N]
        return token, log_p.gather(-1, token[:, None]).squeeze(-1)
    logits = logits if temperature == 1 else logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, -1).values[:, -1:]  # [N, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, where = logits.sort(-1, descending=True)  # [N, V]
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the mass before a token already suffices; the first one always stays
        logits = logits.masked_fill(outside.scatter(-1, where, outside), -torch.inf)
    top = logits.amax(-1, keepdim=True)  # [N, 1]
    # In float64, where the noise is: a float32 running sum over 150,000 words loses the rare ones.
    cdf = (logits - top).exp_().to(noise.device).cumsum(-1, dtype=noise.dtype)  # [N, V], not divided by its last value:
    whole = cdf[:, -1:]  # [N, 1], the softmax's denominator
    token = torch.searchsorted(cdf, noise[:, None] * whole, right=True).clamp(max=cdf.shape[-1] - 1)  # [N, 1]
    token, log_whole = token.to(logits.device), whole.log().float().to(logits.device)  # [N, 1] each
    return token.squeeze(-1), (logits.gather(-1, token) - top - log_whole).squeeze(-1)


def _noise(prompts: Sequence[Tensor], G: int, T: int, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1) [N, T]; each row's stream is keyed by (seed, prompt, times it came before, g)."""
    seen: Counter = Counter()
    rows = []
    for prompt in prompts:
        key = zlib.crc32(prompt.numpy().tobytes())
        rows += [np.random.default_rng([seed, key, seen[key], g]).random(T) for g in range(G)]
        seen[key] += 1  # a prompt given twice gets two different groups
    return np.stack(rows)
