"""GRPO in a hundred lines: the whole algorithm, and nothing that makes it fast or safe.

    python -m studies.hundred_lines          # the embedded model learns to write 40 tokens; docs/doing.md says how fast

Names are the symbols of grpo.py, and one update here moves each weight as one `grpo.update` does, to 1e-5. What the
rest of crisp adds: each prompt runs once for its group, a cache, a batch, memory that is bounded, real rewards,
checkpoints, refusals. Shapes: G completions of a prompt, P prompt tokens, T completion tokens, V vocabulary.
"""

import copy
import json
from pathlib import Path

import torch

from model import load

TINY = Path(__file__).parents[1] / "tiny"  # the embedded model and its posts
B, G, TARGET = 4, 8, 40  # posts a step, completions of each, and the length that is wanted, in tokens
STEPS, UPDATES = 40, 1  # batches that are sampled, and optimizer steps on each of them
LR, CLIP, BETA, TEMPERATURE, GRAD_CLIP = 6e-4, 0.2, 0.1, 1.0, 1.0  # all numbers here are config.py's defaults


def prompt_of(tokenizer, document):
    """The model's chat format, as token ids [P]. The answer comes next."""
    text = f"<|im_start|>system\nSummarise the post in about {TARGET} tokens.<|im_end|>\n"  # what is wanted
    text += f"<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n"  # the post, and whose turn it is
    return torch.tensor(tokenizer.encode(text).ids)  # [P]


@torch.no_grad()  # sampling is not differentiated: see grpo.py, step 1
def sample(model, prompt):
    """A prompt [P] -> a group of G completions [T], each up to its stop token, which is part of it and is trained."""
    rows, stops = prompt.repeat(G, 1), torch.tensor(sorted(model.config.eos_token_ids))  # [G, P], [stops]
    for _ in range(2 * TARGET):  # so far beyond the target that only a miss is cut off
        p = (model(rows)[:, -1] / TEMPERATURE).softmax(-1)  # [G, V]: the policy; all is computed again for each token
        rows = torch.cat([rows, torch.multinomial(p, 1)], 1)  # [G, P+t]: one more token for each completion
        if torch.isin(rows[:, len(prompt):], stops).any(1).all():  # each has said a stop token
            break  # nothing that comes later would be kept
    completions = []  # a row went on after its stop token while others wrote, so each is cut behind the first one
    for o in rows[:, len(prompt):]:  # [t]
        ends = torch.isin(o, stops).nonzero()  # [number of stop tokens, 1]: where they stand
        completions.append(o[:int(ends[0]) + 1] if len(ends) else o)  # [T]; what never stopped stays whole
    return completions


def reward(model, completion):
    """A plain number: any function of the text will do. This one wants TARGET tokens; the stop token is no text."""
    n = len(completion) - (int(completion[-1]) in model.config.eos_token_ids)  # tokens of the summary
    return -abs(n - TARGET) / TARGET  # 0 is best


def advantages(rewards):
    """G rewards -> A [G]: how much better than its group each completion did. Equal rewards give about 0."""
    r = torch.tensor(rewards)  # [G]
    return (r - r.mean()) / (r.std() + 1e-4)  # [G]: the mean is the baseline, the std makes all prompts weigh alike


def logprobs(model, prompt, completion):
    """log pi(o_t | q, o_<t) of each token o_t of a completion [T] after a prompt q [P] -> [T]."""
    logits = model(torch.cat([prompt, completion])[None])[0] / TEMPERATURE  # [P+T, V]: what comes after each token
    log_p = logits[len(prompt) - 1:-1].log_softmax(-1)  # [T, V]: the prompt's last token predicts the first of o
    return log_p.gather(1, completion[:, None])[:, 0]  # [T]: of all words, the ones that were sampled


def loss_of(logp, old_logp, ref_logp, A):
    """-J of one completion, from log-probabilities [T] and its advantage A, a number: eq. 3 of DeepSeekMath."""
    ratio = (logp - old_logp).exp()  # [T], rho: how far the policy has moved since it sampled; 1 in the first update
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)  # [T]: no gradient where it has moved far enough
    gain = torch.min(ratio * A, clipped * A)  # [T]: the min lets a token come back that went the wrong way
    x = ref_logp - logp  # [T]
    kl = ratio * (x.exp() - 1 - x)  # [T]: how far the policy is from the model that it began as (k3_ratio)
    return (BETA * kl - gain).mean()  # the mean over its tokens: every completion weighs the same


def update(model, ref_model, groups, optimizer):
    """B groups, each (prompt, G completions, G rewards) -> UPDATES steps of the policy towards what was paid more."""
    batch = []  # (prompt, completion, its old_logp, its ref_logp, its advantage), B*G of them
    for prompt, completions, rewards in groups:  # B of them
        for o, A in zip(completions, advantages(rewards)):  # G of them; A compares within the group
            with torch.no_grad():  # two policies that do not move in this update
                old_logp, ref_logp = logprobs(model, prompt, o), logprobs(ref_model, prompt, o)  # [T], [T]
            batch.append((prompt, o, old_logp, ref_logp, A))  # from here on, one completion is like another
    for _ in range(UPDATES):  # in the first one the ratio is 1, and nothing is clipped
        optimizer.zero_grad()  # of the step before
        for prompt, o, old_logp, ref_logp, A in batch:  # one at a time: no padding, and no mask
            loss = loss_of(logprobs(model, prompt, o), old_logp, ref_logp, A) / len(batch)  # []
            loss.backward()  # gradients add up, so this is the gradient of the batch's mean
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)  # one strange batch must not ruin the policy
        optimizer.step()  # AdamW, against the gradient


def train(steps=STEPS):
    """Sample, score, update, `steps` times -> the mean reward of each step."""
    torch.manual_seed(0)  # the same run each time
    model, tokenizer = load(TINY, "cpu")  # the policy, which learns
    ref_model = copy.deepcopy(model).requires_grad_(False)  # what it was: the KL holds the policy near it
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.99), weight_decay=0.0)  # train.py's, but LR stays
    posts = [json.loads(line) for line in open(TINY / "train.jsonl", encoding="utf-8")]  # the summaries are not used
    means = []  # for each step the mean reward: the one number that shows whether it learns
    for step in range(steps):  # the algorithm box of the paper
        groups = []  # B of them
        for post in posts[step * B:(step + 1) * B]:  # other posts in each step
            prompt = prompt_of(tokenizer, post["document"])  # [P]
            completions = sample(model, prompt)  # G of [T]
            groups.append((prompt, completions, [reward(model, o) for o in completions]))  # scored
        update(model, ref_model, groups, optimizer)  # what did better than its group becomes likelier
        means.append(sum(sum(rewards) for _, _, rewards in groups) / (B * G))  # before the update
        text = tokenizer.decode(completions[0].tolist())  # one of the step's summaries, to see what is learnt
        print(f"step {step + 1:2}  mean reward {means[-1]:6.3f}   {text}", flush=True)
    return means


if __name__ == "__main__":
    train()
