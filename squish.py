"""SQUISH: what a summary is worth, measured by how much less is left to say of its document. No reference is needed.

    I(d)     = -sum_t log2 p(d_t | bos, d_<t)               bits that a frozen language model needs for the document
    I(d | s) = the same sum, over the same tokens, when TEMPLATE with the summary in it stands before them
    SQUISH   = (I(d) - I(d | s)) / I(d)                     0: the summary says nothing, 1: it says everything

A summary may not be longer than a budget, a share of the document: over it the score is 0, as it is for no summary at
all. A summary that misleads costs bits and is below 0.

Kept from the published benchmark: the measure, the budget, the tags. Mended: both sums run over every document token,
the first one included, and over nothing else; the document is tokenised by itself, so they are the same tokens; LoRA
adapters are off while it is measured, so the measure does not drift with the policy; and text is text, whatever control
token or tag it spells.

Shapes: G summaries, T document tokens, V vocabulary, D hidden size.
"""

import hashlib
import math
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from model import Transformer, pad, token_logprobs

# What stands before the document. Anybody can redo the measurement: encode the text up to the first place, the summary,
# the text between, and the document, each by itself, put bos in front, and sum over the document's tokens.
TEMPLATE = "A summary, and the document that it was made of.\n<summary>\n{summary}\n</summary>\n<document>\n{document}"
UNITS = ("chars", "tokens")


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """The text's tokens and nothing else: no bos, and "<|im_end|>" in a text about chat templates is ten characters."""
    as_text, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = as_text


def shorten(tokenizer: Tokenizer, document: str, n: int) -> str:
    """The longest beginning of the document that has at most n tokens.

    A document longer than the model's context is refused by everything else here. Cut it before anybody sees it: then
    policy, budget and both sums mean the same text.
    """
    while True:
        found = encode(tokenizer, document)
        if len(found) <= n:
            return document.rstrip()
        # Where token n begins, in characters. What is left may be cut into more tokens than before: look again.
        document = document[:found.offsets[n][0]]


# --- bits -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sequence_bits(model: Transformer, rows: Sequence[tuple[list[int], list[int]]],
                  micro_tokens: int = 2048) -> list[Tensor]:
    """(context, text) pairs of token ids -> -log2 p(text_t | context, text_<t), one float32 tensor [T_i] a pair, on
    the CPU, where their sums can be float64 (Apple's GPU has none).

    Rows of like length go together, at most `micro_tokens` tokens with their padding, which stands on the right, where
    no causal model looks. Logits exist for text tokens only, and a slice of the vocabulary at a time. Adapters are off.
    """
    longest = max((len(context) + len(text) - 1 for context, text in rows), default=0)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"A document and its summary have {longest} tokens, and the model that measures them has a "
                         f"context of {model.config.max_position_embeddings}: shorten the document (--max-document).")
    device = model.embed_tokens.weight.device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    bits: list[Tensor] = [torch.empty(0)] * len(rows)
    with model.adapters_off():
        while order:
            fit = max(1, micro_tokens // (len(rows[order[0]][0]) + len(rows[order[0]][1])))
            batch, order = order[:fit], order[fit:]
            # The last token predicts nothing that is asked for.
            tokens, _ = pad([torch.tensor((rows[i][0] + rows[i][1])[:-1], device=device) for i in batch])  # [n, L]
            states = model.hidden(tokens)  # [n, L, D]
            contexts, texts = zip(*(rows[i] for i in batch))
            before = torch.cat([state[len(context) - 1:len(context) - 1 + len(text)]
                                for state, context, text in zip(states, contexts, texts)])  # [sum of T_i, D]
            logp, _ = token_logprobs(model, before, torch.tensor(sum(texts, []), device=device))  # [sum of T_i]
            for i, piece in zip(batch, logp.cpu().split([len(text) for text in texts])):
                bits[i] = -piece / math.log(2)
    return bits


def token_bits(model: Transformer, tokenizer: Tokenizer, document: str, summaries: Sequence[str | None] = (None,),
               micro_tokens: int = 2048) -> Tensor:
    """Bits of every document token after each of the summaries (None: after bos alone) [len(summaries), T]."""
    text = encode(tokenizer, document).ids
    if not text:
        raise ValueError("SQUISH of an empty document is not defined: there is nothing to say of it.")
    first, between = TEMPLATE.removesuffix("{document}").split("{summary}")
    head, middle = [_bos(model), *encode(tokenizer, first).ids], encode(tokenizer, between).ids
    contexts = [[_bos(model)] if s is None else head + encode(tokenizer, s).ids + middle for s in summaries]
    return torch.stack(sequence_bits(model, [(context, text) for context in contexts], micro_tokens))


def _bos(model: Transformer) -> int:
    """The token before everything: the model's bos, or its end-of-text token where it has none."""
    c = model.config
    if c.bos_token_id is None and not c.eos_token_ids:
        raise ValueError("SQUISH needs a token to begin with, and config.json names neither bos_token_id nor "
                         "eos_token_id.")
    return c.eos_token_ids[0] if c.bos_token_id is None else c.bos_token_id


# I(d) by model and document. It is thrown away when a weight of the base changes. A frozen model's never do, but a
# policy without adapters may be its own reference.
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def information(model: Transformer, tokenizer: Tokenizer, document: str, summary: str | None = None,
                micro_tokens: int = 2048) -> float:
    """I(d), or I(d | s) when there is a summary: bits in the document, summed over its tokens.

    I(d) is computed once for each document and model, and kept.
    """
    if summary is not None:
        return token_bits(model, tokenizer, document, [summary], micro_tokens).double().sum().item()
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    state = (base[0].dtype, base[0].device, *((id(p), p._version) for p in base))
    if model not in _known or _known[model][0] != state:
        _known[model] = (state, {})
    bits = _known[model][1]
    key = hashlib.sha256(np.array(encode(tokenizer, document).ids, np.int32).tobytes()).digest()
    if key not in bits:
        bits[key] = token_bits(model, tokenizer, document, micro_tokens=micro_tokens).double().sum().item()
    return bits[key]


# --- the reward -------------------------------------------------------------------------------------------------------


def size(tokenizer: Tokenizer, text: str, unit: str) -> int:
    if unit not in UNITS:
        raise ValueError(f"There is no budget unit '{unit}': take one of {', '.join(UNITS)}.")
    return len(text) if unit == "chars" else len(encode(tokenizer, text))


def allowance(tokenizer: Tokenizer, document: str, budget: float | int, unit: str = "chars") -> float:
    """The largest size of a summary: a share of the document's when `budget` is a float, itself when it is an int.

    >>> allowance(None, "a" * 300, 0.1), allowance(None, "a" * 300, 100)
    (30.0, 100)
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"A budget of {budget} is none: give a share such as 0.1, or a whole number of {unit}.")
    return round(budget * size(tokenizer, document, unit), 6) if isinstance(budget, float) else budget


def most_tokens(tokenizer: Tokenizer, documents: Iterable[str], budgets: Sequence[float | int], unit: str) -> float:
    """The largest of these budgets, of any of these documents, in tokens; about, where the unit is characters."""
    most = 0.0
    for document in documents:
        room = max(allowance(tokenizer, document, budget, unit) for budget in budgets)
        if unit == "chars":  # a language may take many tokens for few characters
            room *= len(encode(tokenizer, document).ids) / len(document)
        most = max(most, room)
    return most


def fits(tokenizer: Tokenizer, document: str, summary: str | None, budget: float | int | None,
         unit: str = "chars") -> bool:
    """Whether there is a summary at all, and it is not over budget. Without a budget (None) every summary fits."""
    if not summary or not summary.strip():
        return False
    return budget is None or size(tokenizer, summary, unit) <= allowance(tokenizer, document, budget, unit)


def squish(model: Transformer, tokenizer: Tokenizer, document: str, summaries: Sequence[str | None],
           budget: float | int | None = 0.10, unit: str = "chars", micro_tokens: int = 2048) -> list[float]:
    """(I(d) - I(d|s)) / I(d) for each of G summaries of one document [G]; 1 at most, below 0 for a misleading one.

    0 for None, an empty or blank summary, and one over budget: longer than `budget` times the document (a float), or
    than `budget` itself (an int), in characters or in tokens of this tokenizer; None: there is no budget. A
    document without information, one that the model knows by heart, gives 0. Raises ValueError when the document is
    empty or does not fit the context.
    """
    fit = [s if fits(tokenizer, document, s, budget, unit) else None for s in summaries]
    kept = [s for s in dict.fromkeys(fit) if s is not None]  # equal summaries are measured once
    whole = information(model, tokenizer, document, micro_tokens=micro_tokens)
    if not kept or whole <= 0:
        return [0.0] * len(fit)
    left = token_bits(model, tokenizer, document, kept, micro_tokens).double().sum(-1).tolist()  # I(d|s)
    value: dict[str | None, float] = {s: (whole - bits) / whole for s, bits in zip(kept, left)}
    return [value.get(s, 0.0) for s in fit]


def ensemble(scorers: Sequence[tuple[Transformer, Tokenizer]], document: str, summaries: Sequence[str | None],
             budget: float | int | None = 0.10, unit: str = "chars", micro_tokens: int = 2048) -> list[float]:
    """The mean SQUISH [G] of several models, each with its own tokenizer. The policy need not be one of them."""
    values = [squish(model, tokenizer, document, summaries, budget, unit, micro_tokens)
              for model, tokenizer in scorers]
    return [sum(v) / len(v) for v in zip(*values, strict=True)]


def cost(model: Transformer, tokenizer: Tokenizer, document: str, summaries: Sequence[str | None],
         micro_tokens: int = 2048) -> list[float]:
    """I(s) / I(d) for each summary [G]: the bits that the summary itself takes, as a share of the document's.

    `squish - cost` is what remains when the summary has to be sent too, the published ablation R - alpha I(s).
    """
    whole = information(model, tokenizer, document, micro_tokens=micro_tokens)
    rows = [([_bos(model)], encode(tokenizer, s or "").ids) for s in summaries]
    bits = iter(sequence_bits(model, [row for row in rows if row[1]], micro_tokens))
    return [next(bits).double().sum().item() / whole if text and whole > 0 else 0.0 for _, text in rows]

# Next: mlx_model.py, the model once more for Apple silicon
