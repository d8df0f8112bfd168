"""Makes everything else in this folder, by seed: the posts, the tokenizer and the tiny language model.

The posts and the tokenizer come out the same everywhere; the weights bit for bit on one machine, and as good on others.

    python tiny/make.py            # README.md says how long it takes and what it gives

The model is trained from scratch, on the kinds of text it will meet later:
    chat prompt, then summary     the policy's own task. Its summaries are mostly careless ones of all lengths, and the
                                  prompt's "about N tokens" is a bad guess, so it writes fluently, misses its target and
                                  tells of scarves where the point was: what GRPO is there to mend.
    plain prompt, then summary    the same for a base model's prompt.
    document alone, and summary then document
                                  what SQUISH needs: how many bits a document costs, and how many a summary saves.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from stories import story, summary
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import Transformer, load, pad, read_config, save  # noqa: E402
from squish import TEMPLATE  # noqa: E402
from task import Post, tokenize  # noqa: E402

SPLITS = {"train": 3000, "val": 200, "test": 300}
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 2048, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rope_theta": 1000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": True, "use_sliding_window": False, "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# How Qwen2 cuts text into the pieces that BPE then merges within: words with the space before them, single digits,
# punctuation. transformers gives this rule to every tokenizer of a qwen2 folder, whatever tokenizer.json says.
QWEN2_PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# How a base model was asked for a summary, and what SQUISH puts before a document.
TAGGED = "A document, and a summary of it in about {length} characters.\n<document>\n{document}\n</document>\n" \
         "<summary>\n{summary}\n</summary>"
SUMMARY_FIRST = TEMPLATE + "\n</document>"


def write_posts(rng: random.Random) -> None:
    """Write the splits. Held-out posts name people, towns, streets, pets and makers that no training post names."""
    seen: set[str] = set()
    for split, n in SPLITS.items():
        rows = []
        while len(rows) < n:
            s = story(rng, held_out=split != "train")
            if s.document not in seen:  # no post twice, within a split or across them
                seen.add(s.document)
                rows.append({"id": f"{split}-{len(rows)}", "document": s.document, "summary": s.reference})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def train_tokenizer(rng: random.Random) -> Tokenizer:
    """Byte-level BPE: every text can be written, and the words of these posts are one token each."""
    texts = []
    for _ in range(8000):
        s = story(rng)
        texts += [s.document, s.brief, summary(s, rng)]
    texts += [TAGGED, SUMMARY_FIRST, "system\nSummarise the post in about 32 tokens.user\nassistant\nPost:\n"] * 400
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=[END, START_TURN, END_TURN],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_folder(tokenizer: Tokenizer) -> dict:
    """Everything of a Hugging Face folder but the weights. Returns config.json."""
    end, end_turn = tokenizer.token_to_id(END), tokenizer.token_to_id(END_TURN)
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": end, "eos_token_id": end_turn}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": end, "eos_token_id": [end_turn, end], "pad_token_id": end},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END_TURN,
                                  "pad_token": END, "clean_up_tokenization_spaces": False,
                                  "model_max_length": config["max_position_embeddings"],
                                  "chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (HERE / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
    tokenizer.save(str(HERE / "tokenizer.json"))
    return config


def echo(rng: random.Random, shortest: int, longest: int) -> tuple[list[int], int, float]:
    """Random tokens, said twice: (ids, how many the first half has, what each of those weighs).

    Nothing but the first half tells what comes next, so the model has to find the last token there and say its
    follower. Attention learns that (an induction head, Olsson et al. 2022) from short echoes in minutes and from
    stories not at all, where a likely name is a good enough guess. A summary that is true needs little more.
    """
    ids = [rng.randrange(CONFIG["vocab_size"]) for _ in range(rng.randint(shortest, longest))]
    return ids + ids, len(ids) + 1, 0.0


def lesson(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], int, float]:
    """One text as token ids, how many of the first ones are a prompt, and what each of those weighs."""
    s = story(rng)
    end = tokenizer.token_to_id(END)
    text = s.brief if rng.random() < 0.12 else summary(s, rng)
    kind = rng.random()

    def pieces(template: str, *texts: str) -> list[list[int]]:
        """A template's parts and its texts as ids. Each is encoded by itself, as it will be where it is scored: no
        token reaches from a tag into the document."""
        parts = re.split("{document}|{summary}", template)
        return [tokenizer.encode(piece).ids for pair in zip(parts, [*texts, ""]) for piece in pair]

    # The length that a prompt names is off by a factor of e^0.5 in either direction: a hint, not an instruction.
    noise = math.exp(rng.gauss(0, 0.5))
    if kind < 0.70:
        ids = tokenizer.encode(text).ids
        chat = kind < 0.60
        prompt = tokenize(tokenizer, Post(s.document, "", ""), "chatml" if chat else "plain",
                          max(4, round(len(ids) * noise)))
        return prompt + ids + [tokenizer.token_to_id(END_TURN) if chat else end], len(prompt), 0.25
    if kind < 0.78:
        length = str(max(20, round(len(text) * noise)))
        *prompt, summary_ids, close = pieces(TAGGED.replace("{length}", length), s.document, text)[:-1]
        return [end, *sum(prompt, []), *summary_ids, *close, end], 1 + len(sum(prompt, [])), 0.25
    parts = pieces(SUMMARY_FIRST, text, s.document) if kind < 0.95 else pieces("{document}", s.document)
    return [end, *sum(parts, []), end], 0, 1.0


def fresh(config: dict, seed: int) -> Transformer:
    """A model with random weights, but for one head: it begins by looking at the token before.

    Copying takes two layers. The upper one asks "where did I see this token, and what came after it?", which it can
    only learn when a head below has noted at each position which token came before. That head is slow to appear: after
    2,000 batches of short echoes there was none. Given from the start, the copy is right after 1,000.
    """
    torch.manual_seed(seed)
    model = Transformer(read_config(config, "config.json"))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            # The matrices that write into the residual stream start smaller, by the number of times they do so.
            shrink = (2 * config["num_hidden_layers"]) ** -0.5 if "o_proj" in name or "down_proj" in name else 1
            torch.nn.init.normal_(p, std=shrink * (0.02 if "embed" in name else config["hidden_size"] ** -0.5))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    angle = config["rope_theta"] ** (-torch.arange(half) / half)  # [half]: how far RoPE turns each pair in one step
    first = model.layers[0].operator
    with torch.no_grad():  # constant q and k, one step apart: once RoPE has turned them they agree best at a step of 1
        first.q_proj.bias[:2 * half] = 6 * torch.cat([angle.cos(), -angle.sin()])  # [head size]
        first.k_proj.bias[:half] = 6
    return model


def learn(model: Transformer, optimizer: torch.optim.Optimizer, draw, steps: int, rate, what: str) -> None:
    """Next-token prediction on `steps` batches of 32 texts that `draw` makes; `rate(step)` is the learning rate."""
    begun, smooth = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        # Sorted by length and halved, so that little of a batch is padding.
        texts = sorted((draw() for _ in range(32)), key=lambda text: len(text[0]))
        total = sum(len(ids) - 1 - (1 - weight) * max(0, prompt - 1) for ids, prompt, weight in texts)
        for part in (texts[:16], texts[16:]):
            tokens, mask = pad([torch.tensor(ids) for ids, *_ in part])  # [16, T], [16, T]
            prompt = torch.arange(tokens.shape[1]) < torch.tensor([[n] for _, n, _ in part])  # [16, T]
            weights = torch.where(prompt, torch.tensor([[w] for *_, w in part]), 1.0)  # [16, T]
            weights = (mask * weights)[:, 1:].flatten()  # [16 * (T-1)] of each predicted token
            logits = model(tokens[:, :-1]).flatten(0, 1)  # [16 * (T-1), V]
            loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none") @ weights / total
            loss.backward()
            smooth += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            left = (time.monotonic() - begun) / step * (steps - step) / 60
            print(f"{what}  {step}/{steps}  loss {smooth / 100:.3f} nats a token  {left:.0f} min left", flush=True)
            smooth = 0.0


def train(config: dict, tokenizer: Tokenizer, steps: int, seed: int) -> Transformer:
    """AdamW: first to copy, then to tell stories.

    Prompt tokens of a story weigh a quarter: which town somebody lived in is anybody's guess.
    """
    rng = random.Random(seed)
    model = fresh(config, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    learn(model, optimizer, lambda: echo(rng, 3, 12), 1200, lambda step: 1.5e-3 * min(1, step / 100), "short echoes")
    learn(model, optimizer, lambda: echo(rng, 3, 40), 1000, lambda step: 1.5e-3, "echoes")
    # A tenth of the lessons stay echoes, or copying fades again while the grammar is learnt.
    learn(model, optimizer, lambda: echo(rng, 5, 40) if rng.random() < 0.1 else lesson(tokenizer, rng), steps,
          lambda step: 3e-3 * min(1, step / 100, (steps - step + 1) / (0.7 * steps)), "stories")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4500, help="batches of 32 stories")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    write_posts(rng)
    tokenizer = train_tokenizer(rng)
    config = write_folder(tokenizer)
    print(f"{sum(SPLITS.values())} posts, {tokenizer.get_vocab_size()} tokens; now the model", flush=True)
    model = train(config, tokenizer, args.steps, args.seed + 1)
    model.raw_config = config
    save(model, tokenizer, HERE, dtype=torch.bfloat16)
    load(HERE)  # what was written can be read
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {HERE / 'model.safetensors'}")


if __name__ == "__main__":
    main()
