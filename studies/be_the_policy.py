"""Be the policy: write a summary yourself, and see what GRPO would make of it.

    python -m studies.be_the_policy                          # type a summary, then a better one; an empty line ends it
    python -m studies.be_the_policy --answer "Ann lost a shoe." "Ann lost a shoe, and a dog found it."

You get the prompt that the model gets, and join its group. Then you see each summary's reward and advantage, and one
real step of `grpo.update` on this group: which of your tokens it would make likelier, and by how much. The weights are
put back afterwards, so each of your answers meets the same model and the same other summaries.

Shapes: G completions of one prompt, yours the first; P prompt tokens, T completion tokens.
"""

import argparse
import copy
import sys
import textwrap
from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

import grpo
import task
from config import Config
from model import pad
from plumbing.cli import open_console
from plumbing.posts import load_split
from rewards import NEED_MODEL, parse
from rollout import Group, sample
from squish import encode
from train import load_policy, make_optimizer

WIDTH = 80
MEANS = {  # what a part of the reward wants, for who has just been paid by it
    "length": "0 at the wanted number of tokens; a miss of a tenth of it costs 0.1",
    "rouge_l": "words in common with the post's own summary, in its order; at most 1",
    "meteor": "words, stems and synonyms in common with the post's own summary; at most 1",
    "bleu": "words, pairs, triples and quadruples in common with it; at most 1",
}


# --- the group, and one step on it ------------------------------------------------------------------------------------


def your_row(model, tokenizer, prompt: Tensor, answer: str, limit: int) -> tuple[Tensor, bool]:
    """A text after prompt [P] -> its tokens [T] as the policy would have sampled them, and whether it stops by itself.

    A policy says when it is done, so a stop token is added: of the model's, the one that it finds likeliest here. What
    is longer than `limit` is cut, as the model's own summaries are.
    """
    ids = torch.tensor(encode(tokenizer, answer).ids)  # [T-1]
    if len(ids) >= limit:
        return ids[:limit], False
    stops = torch.tensor(sorted(model.config.eos_token_ids))  # [stops]
    with torch.no_grad():
        logits = model(torch.cat([prompt, ids])[None])[0, -1]  # [V]: what comes next
    return torch.cat([ids, stops[logits[stops].argmax()][None]]), True  # [T]


def join(model, tokenizer, group: Group, answer: str, config: Config) -> Group:
    """The model's group of G - 1, and your answer in front of it: a group of G."""
    yours, stops = your_row(model, tokenizer, group.prompt, answer, config.max_new_tokens)  # [T]
    rows = [yours, *(tokens[mask] for tokens, mask in zip(group.tokens, group.mask))]  # G of [T_i]
    tokens, mask = pad(rows)  # [G, T] each
    with torch.no_grad():
        logp, _ = grpo.group_logprobs(model, [group.prompt], tokens[None], mask[None], config.temperature)  # [1, G, T]
    text = tokenizer.decode(yours.tolist(), skip_special_tokens=True)  # what is left of it, if it was too long
    return Group(prompt=group.prompt, tokens=tokens, mask=mask, logp=logp[0], texts=[text, *group.texts],
                 stopped=torch.cat([torch.tensor([stops]), group.stopped]))


def after_one_step(model, group: Group, config: Config) -> Tensor:
    """The log-probabilities [G, T] that the group's tokens have after one update on it. The model stays as it is.

    There is no reference model: before its first step the policy is the reference model, where the KL has no gradient.
    """
    weights = copy.deepcopy(model.state_dict())
    try:
        grpo.update(model, None, [group], make_optimizer(config, model), config)
        with torch.no_grad():
            logp, _ = grpo.group_logprobs(model, [group.prompt], group.tokens[None], group.mask[None],
                                          config.temperature)  # [1, G, T]
    finally:
        model.load_state_dict(weights)  # bit for bit
    return logp[0]


# --- what is shown ----------------------------------------------------------------------------------------------------


def wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def times(log_ratio: float) -> str:
    """How many times likelier: as a factor where it can be read, as a power of ten where it cannot.

    >>> times(0.0), times(-0.693147), times(23.0)
    ('x 1.00', 'x 0.50', 'x 1e+10')
    """
    factor = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
    return f"x {factor:.2f}" if 0.01 <= factor < 100 else f"x {factor:.0e}"


def share(p: float) -> str:
    """A probability: in per cent, or as a power of ten where that would read 0.00%."""
    return f"{p:7.2%}" if p >= 1e-4 else f"{p:7.0e}"


def show_group(group: Group, gains: list[float]) -> str:
    """All G summaries, best first, and how likely one step makes each; gains [G]: the change of its log-probability."""
    r = torch.tensor(group.rewards, dtype=torch.float64)  # [G]
    A = grpo.advantages(r[None])[0].tolist()  # [G]
    mean, others = fmean(group.rewards), fmean(group.rewards[1:])
    lines = [wrapped("The group, best first. A = (reward - mean) / std: how much better than the others. "
                     "The last column: how many times likelier one step on this group makes the whole summary."), "",
             " reward " + "".join(f"{name[:9]:>10}" for name in group.parts) + "  tokens       A   one step"]
    lengths = group.lengths.tolist()  # [G]
    for i in sorted(range(len(A)), key=lambda i: -group.rewards[i]):
        parts = "".join(f"{values[i]:10.3f}" for values in group.parts.values())
        lines += ["", f"{group.rewards[i]:7.3f} {parts}{lengths[i]:8}{A[i]:+8.2f}   {times(gains[i]):9}"
                      f"{'<- you' if i == 0 else ''}".rstrip(),
                  wrapped(group.texts[i] or "(nothing)", 4)]
    if not any(A):
        return "\n".join([*lines, "", "All rewards are equal, so nothing is learnt from this group."])
    better = "better" if A[0] > 0 else "worse"
    return "\n".join([*lines, "", wrapped(
        f"The group's mean is {mean:.3f}, its std {r.std().item():.3f}; without you the mean is {others:.3f}. Your "
        f"reward of {group.rewards[0]:.3f} is {better} than the mean, so your advantage is {A[0]:+.2f}. No critic had "
        f"to guess what this post brings: the other summaries say it.")])


def show_pay(group: Group, reference: str, target: int) -> str:
    """What each part of the reward wants, what you got for it, and what the group's best got."""
    lines = ["What pays:"]
    for name, values in group.parts.items():
        weight = group.weights[name]
        factor = "" if weight == 1 else f", times {weight:g}"
        meaning = f" ({MEANS[name]})" if name in MEANS else ""
        lines.append(wrapped(f"{name}{factor}: you {values[0]:.3f}, the best {max(values):.3f}{meaning}.", 2))
    return "\n".join([*lines, wrapped(f"{target} tokens are wanted, and yours has {group.lengths[0]}. The post's own "
                                      f"summary:", 2), wrapped(reference or "(it has none)", 4)])


def show_tokens(tokenizer, group: Group, after: Tensor) -> str:
    """Your tokens in two columns: the probability of each before and after the step, and the factor between them."""
    n = int(group.mask[0].sum())
    ids, before, after = group.tokens[0, :n].tolist(), group.logp[0, :n], after[0, :n]
    cells = []
    for token, old, new in zip(ids, before.tolist(), after.tolist()):
        word = tokenizer.decode([token], skip_special_tokens=False)
        p, q = torch.tensor([old, new]).exp().tolist()
        cells.append(f"{visible(word)[:12]:12} {share(p)} -> {share(q)} {times(new - old):>7}")
    half = (len(cells) + 1) // 2
    right = [*cells[half:], ""][:half]
    lines = [f"{a:39} {b}".rstrip() for a, b in zip(cells[:half], right)]
    old, new, up = before.sum().item(), after.sum().item(), int((after > before).sum())
    return "\n".join(["Your tokens, the stop token too: probability before -> after the step.", *lines, "", wrapped(
        f"{up} of {n} tokens became likelier, {n - up} did not. All together: log-probability {old:.1f} before, "
        f"{new:.1f} after, {times(new - old)}. A token can go against your advantage: other summaries have it too, and "
        f"all of them share the weights.")])


def visible(word: str) -> str:
    """A token as one can see it: its blank in front as a low line, and no newline."""
    return word.replace(" ", "_").replace("\n", "\\n").replace("\t", "\\t")


# --- the command ------------------------------------------------------------------------------------------------------


def answers(given: list[str] | None) -> Iterator[str]:
    """What was given with --answer, or else what is typed, until a line is empty or the input ends."""
    if given:
        for answer in given:
            print(f"> {answer}")
            yield answer
        return
    while True:
        try:
            answer = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            answer = ""
        if not answer:
            return
        yield answer


def play(config: Config, reward, given: list[str] | None) -> None:
    """One post, the model's G - 1 summaries of it, and as many answers of yours as you like."""
    model, tokenizer = load_policy(config)
    _, held_out = load_split(config.data)
    post = held_out[config.seed % len(held_out)]
    config.template = task.choose_template(model, tokenizer)
    config.max_new_tokens = task.completion_limit(tokenizer, [post], config)
    asked = task.make_task(tokenizer, post, config)
    (others,) = sample(model, [asked.prompt], G=config.group - 1, max_new_tokens=config.max_new_tokens,
                       temperature=config.temperature, seed=config.seed, tokenizer=tokenizer)
    words = len(post.document.split()) / len(encode(tokenizer, post.document).ids)  # words a token
    print(wrapped(post.document), "", wrapped(
        f"Summarise this post in about {config.target} tokens, that is about {config.target * words:.0f} words. The "
        f"model has written {config.group - 1} summaries of it, and yours joins them. Paid is {reward.expression}. An "
        f"empty line ends it."), sep="\n")
    for answer in answers(given):
        group = join(model, tokenizer, others, answer, config)
        task.score([group], [asked], reward, config, tokenizer)
        after = after_one_step(model, group, config)  # [G, T]
        gains = ((after - group.logp) * group.mask).sum(1).tolist()  # [G]
        print("", show_group(group, gains), "", show_tokens(tokenizer, group, after), "",
              show_pay(group, post.reference, config.target), "", sep="\n")
        if not group.stopped[0]:
            print(wrapped(f"It was cut at {config.max_new_tokens} tokens, as the model's summaries are.") + "\n")
        if not given:
            print("The weights are as they were. Once more? (an empty line ends it)")


def main(argv: list[str] | None = None) -> int:
    usual = Config()
    parser = argparse.ArgumentParser("python -m studies.be_the_policy", description=__doc__.partition("\nShapes")[0],
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer", nargs="+", metavar="TEXT", help="your summaries, in place of typing them")
    parser.add_argument("--reward", default=usual.stages[-1].rpartition(":")[0], help="default: %(default)s")
    parser.add_argument("--target", type=int, default=usual.target, help="wanted tokens (default: %(default)s)")
    parser.add_argument("--group", type=int, default=usual.group, help="summaries, with yours (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=usual.lr / usual.warmup,
                        help="of the one step (default: %(default)s, which is a run's first)")
    parser.add_argument("--model", default="tiny", help="a folder or a hub name (default: tiny)")
    parser.add_argument("--data", default="tiny", help="as in train.py (default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="which post, and the model's luck (default: 0)")
    args = parser.parse_args(argv)
    open_console()
    try:
        reward = parse(args.reward)
        if not NEED_MODEL.isdisjoint(reward.names):
            raise ValueError(f"--reward {args.reward}: what a model measures asks for another prompt, with a budget. "
                             f"Take length, rouge_l, meteor or any other reward of the text.")
        if args.group < 3 or args.target < 1 or not args.lr > 0 or args.seed < 0:
            raise ValueError("--group must be at least 3, --target at least 1, --lr above 0, --seed at least 0.")
        if args.answer and not all(answer.strip() for answer in args.answer):
            raise ValueError("--answer: an empty text is no summary. Write one, or leave the flag out and type it.")
        play(Config(model=args.model, data=args.data, target=args.target, group=args.group, lr=args.lr,
                    seed=args.seed, device="cpu"), reward, args.answer)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"be_the_policy: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
