"""Break it: the classic mistakes, one at a time, and what each of them looks like.

    python -m studies.break_it                        # all runs; what is done is not done again, then the page
    python -m studies.break_it run --seeds 1 --only "k3|stop"     # some of it
    python -m studies.break_it tables                 # docs/break-it.md, from studies/results/break_it/ alone
    python -m studies.break_it figures                # figures/break_it.png, likewise
    python -m studies.break_it healthy                # healthy runs, for the rules of plumbing/symptoms.py

A mistake is some flags of train.py, or an edit of one or two lines of the story, made in the memory of the run's own
process: the files stay as they are. Beside it stands the same run without the mistake. Runs are short (50 steps, 50
held-out posts, about half a minute of one core), and so are their summaries: what is to be seen is the difference.

What is kept of a run, one small file, has no texts: the settings, the edits, the curves of metrics.jsonl, the first and
the last line of eval.jsonl, how many weights are not what they were, and the sentence that the run died with, if any.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import grpo
import rewards
import rollout
import train
from config import Config
from model import load
from plumbing import once
from plumbing.cli import read_arguments
from plumbing.curves import new_figure
from plumbing.edits import Edit, edited
from plumbing.folder import write_file, write_text
from plumbing.posts import TINY

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "break_it"
STEPS, LAST = 50, 10  # of a run; of the end, over which a number is a mean
CURVES = ("reward", "reward_std", "length", "within_10pct", "kl", "entropy", "distinct", "templated", "repetition",
          "invented", "flat_groups", "grad_norm", "logp_gap", "ratio", "clip_frac", "loss")
SHARES = ("within_10pct", "repetition", "invented", "flat_groups", "moved")


# --- the gallery ------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A mistake, or (without `says`) a healthy run that mistakes are held against."""

    flags: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    beside: str = "healthy"  # the same without the mistake
    says: str = ""  # how people report it
    look: str = "reward"  # the number in which one sees it
    why: str = ""
    mend: str = ""


def paid(expression: str, *flags: str) -> tuple[str, ...]:
    return "--stages", f"{expression}:{STEPS}", *flags


SUM, LENGTH = "rouge_l + 4*length", "length"
SECOND = Config().stages[1].rpartition(":")[0]  # what the default's second stage pays
AGAIN = """\
    for i, text in enumerate(texts):  # the ids that the tokenizer makes of the text, for those that were sampled
        end = tokens[i][mask[i]].tolist()[-1:] * int(ends[i])
        again = tokenizer.encode(text, add_special_tokens=False).ids[:tokens.shape[1] - 1] + end
        tokens[i], mask[i] = 0, False
        tokens[i, :len(again)], mask[i, :len(again)] = torch.tensor(again), True
    groups = []
"""
EVERY_REWARD = Edit(rewards.Reward.__call__, "totals = [sum(", "totals = [0.7 + sum(")

GALLERY: dict[str, Entry] = {
    # What the others are held against.
    "healthy": Entry(paid(SUM)),
    "length only": Entry(paid(LENGTH)),
    "rouge_l only": Entry(paid("rouge_l")),
    "four updates": Entry(paid(SUM, "--updates", "4")),
    "lean, lr 1e-6": Entry(paid(SUM, "--lean", "--lr", "1e-6")),
    "every reward 0.7": Entry(paid("0*length"), (EVERY_REWARD,)),
    # Healthy and at full length. Nothing stands beside them: see HEALTHY.
    "default": Entry(()),
    "target 20": Entry(("--target", "20")),
    "target 20, solved": Entry(("--target", "20", "--stages", "length:40", f"{SECOND}:360")),
    "SQUISH": Entry(("--stages", "squish:100", "--lora", "16", "--lr", "1e-3")),
    "SQUISH, larger steps": Entry(("--stages", "squish:100", "--lora", "16", "--lr", "2e-3", "--beta", "0.15")),

    "stop token left out": Entry(
        paid(SUM), (Edit(grpo.micro_batch_loss, "m.advantages, m.mask,",
                         "m.advantages, m.mask & ~torch.isin(m.tokens, torch.tensor([*model.config.eos_token_ids])),"
                         ),),
        says="It learns everything but to stop in time", look="reward/rouge_l",
        why="To stop is a choice like any other, and here its token is not in the sum that is trained: the length can "
            "only be learnt from the words before it. It is, nearly as fast, and at a price: sentences are chosen for "
            "where they end. One sees it beside a healthy run only.",
        mend="Make the mask where the tokens are made, True on the stop token."),
    "mask guessed from pad": Entry(
        paid(SUM), (Edit(rollout.split, "mask=mask[at, :T]", "mask=tokens[at, :T].where(mask[at, :T], 2) != 2"),),
        says="pad_token = eos_token, and the model rambles on", look="logp_gap",
        why="2 is the end token, and here the padding too. So a mask that is read off the tokens has no end token: the "
            "sampler has a log-probability where the trainer has none, and `length` counts one too few. The harm is "
            "that of a stop token that is left out.",
        mend="Make masks from lengths, never from values of tokens."),
    "one end token of two": Entry(
        paid(SUM), (Edit(rollout.sample, "sorted(model.config.eos_token_ids if stop_ids is None else stop_ids)",
                         "[0]"),),
        says="The answer is good and then goes on and on; every completion has the full length", look="length",
        why="The model ends with one of its end tokens, and the sampler stops at another.",
        mend="Take all of generation_config.json's eos_token_id."),
    "every completion cut": Entry(
        paid(LENGTH), (Edit(train.run_stage, "max_new_tokens=config.max_new_tokens", "max_new_tokens=12"),),
        "length only", says="Every completion is cut off and clipped_ratio is 1; the reward does not move",
        look="flat_groups",
        why="All are cut at the same length, so all are paid the same, and equal rewards have nothing to say. The few "
            "that end sooner are paid less: all that is learnt is to end later, after 59 to 76 tokens held out, where "
            "it was 41.",
        mend="`--max-new-tokens`."),
    "sampled at 0.7": Entry(
        paid(SUM), (Edit(train.run_stage, "temperature=config.temperature", "temperature=0.7"),),
        says="Rewards are fine while it trains, and worse at temperature 1", look="logp_gap",
        why="The policy that wrote is softmax(logits / 0.7), and the one that is trained is softmax(logits). Rewards "
            "do not show it: at 0.7 one writes better. Nor do summaries after 50 steps: so far it is harmless.",
        mend="Divide the logits by one temperature in both places, as `--temperature` does."),
    "top-k samples": Entry(
        paid(SUM), (Edit(train.run_stage, "temperature=config.temperature",
                         "temperature=config.temperature, top_k=3"),),
        says="KL grows although the learning rate is small; the trainer's and vLLM's log-probabilities differ",
        look="logp_gap",
        why="Only 3 tokens could be drawn, but they are scored as if every token could: the gradient is of a policy "
            "that did not act. Here 3 tokens hold nearly all of the probability, and 50 steps show no harm.",
        mend="Train on samples of the whole softmax: top_k 0, top_p 1."),
    "characters for tokens": Entry(
        paid("rouge_l + 4*char_length"), says="I ask for 40 tokens and get twelve", look="length",
        why="The target is in tokens and len(text) counts characters.", mend="`length` in place of `char_length`."),
    "text encoded again": Entry(
        paid(SUM), (Edit(rollout.split, "    groups = []\n", AGAIN),),
        says="logp of old and new policy differ on the first step, on a few tokens only", look="logp_gap",
        why="A policy may spell a word in two ways, and the tokenizer knows one: the loss then grades ids that nobody "
            "sampled. Here such words are rare, and it does no visible harm.",
        mend="Keep the sampled ids."),
    "tiny eps": Entry(
        paid("0*length"), (EVERY_REWARD, Edit(grpo.advantages, "rewards.double()", "rewards.float()"),
                           Edit(grpo.advantages, ".masked_fill(flat, 0.0)", ""),
                           Edit(grpo.advantages, "/ (std + 1e-4)) @", "/ (std + 1e-8)) @")),
        "every reward 0.7", says="All rewards are equal, and yet the loss is not 0 and the model changes", look="kl",
        why="The float32 mean of eight times 0.7 is not quite 0.7, and 6e-8 divided by a std of 0 and an eps of 1e-8 "
            "is an advantage of 6, the same for all eight.",
        mend="Give a flat group exactly 0, whatever eps is."),
    "bf16 without rounding": Entry(
        paid(SUM, "--lean", "--lr", "1e-6"), (Edit(train.make_optimizer, "if config.lean and not config.lora:",
                                                   "if False:"),),
        "lean, lr 1e-6", says="Loss and gradient are fine, but did anything train?", look="moved",
        why="A step of 1e-6 is, for nearly all weights here, less than half the distance of two neighbouring bfloat16 "
            "numbers, so the sum is the old weight.",
        mend="float32 weights (the default), or `--lean`, which rounds at random."),
    "k1 as a loss": Entry(
        paid(SUM, "--beta", "1", "--kl", "k1"), beside="KL too strong", look="kl",
        says="beta is large and the KL grows all the same",
        why="The mean gradient of k1 is that of a sum of probabilities, which is 1 whatever the weights: it is 0.",
        mend="`--kl k3_ratio`."),
    "k3 as a loss": Entry(
        paid(SUM, "--beta", "1", "--kl", "k3"), beside="KL too strong", look="kl",
        says="Which KL does my trainer minimise?",
        why="The gradient of k3 is that of KL(ref, policy), the other KL; where the two policies are near each other "
            "both are nearly the same, as here: harmless while a strong KL keeps them near.",
        mend="`--kl k3_ratio`."),
    "k3 upside down": Entry(
        paid(SUM, "--lr", "6e-3"), (Edit(grpo.kl_estimates, "k3 = x.expm1() - x", "k3 = (-x).expm1() + x"),),
        "lr ten times too high", says="The KL is in the billions, or jumps", look="kl",
        why="With the log-ratio's sign turned, the mean is the chi-square distance less the KL, and a token weighs "
            "pi / ref. Near the reference model that is nearly the KL, and nothing shows; farther away it has no "
            "bound.",
        mend="It is the reference's log-probability minus the policy's."),
    "max for min": Entry(
        paid(SUM, "--updates", "4"), (Edit(grpo.policy_loss, "-torch.min(", "-torch.max("),), "four updates",
        says="It learns, but the KL is higher than in other people's runs", look="kl",
        why="max never stops a token that has gone far enough, and stops those that went the wrong way. So the "
            "KL is 1.5 to 2 times as large, for less reward. It shows beside the other run only, and with one update a "
            "batch not at all: the ratio is 1.",
        mend="The pessimistic one of the two: min of the objective, or max of the losses."),
    "gradient of zero": Entry(
        paid(SUM), (Edit(grpo.policy_loss, "logp.detach() if old_logp is None", "logp if old_logp is None"),),
        says="Reward, length and entropy move, and after a night nothing is better", look="grad_norm",
        why="A log-probability minus itself has no gradient. The curves move because each step has other posts.",
        mend="Detach the old one: the value of the ratio is 1, its gradient is that of logp."),
    "reward always 0": Entry(
        paid("0*length", "--weight-decay", "1"), says="The loss rises from 0 and so does the KL, so does it learn?",
        look="reward_std",
        why="All rewards are equal, so all advantages are 0. What moves is weight decay and what the KL does "
            "against it.",
        mend="Print the rewards of one group: a reward that cannot differ teaches nothing."),
    "mean per token": Entry(
        paid("rouge_l", "--loss", "dapo"), beside="rouge_l only", look="length",
        says="Completions shrink (or grow) though nobody pays for it",
        why="Divided by its own tokens, a token of a long completion counts less, for better or worse; divided by all "
            "tokens of the batch, every token counts the same. Neither is a mistake, and two tokens lie between "
            "them here.",
        mend="Keep `length` in the reward; in `dapo` and `dr_grpo` every token weighs the same."),
    "group of 2": Entry(
        paid(SUM, "--group", "2", "--prompts", "16"), says="Batch size or group size?",
        why="Two completions give the sign of a difference and no size; sixteen posts take their place. By the "
            "samples' reward it learns more slowly. Held out, its seeds lie farther apart than the two ways do.",
        mend="`--group 8`."),
    "group of 32": Entry(
        paid(SUM, "--group", "32", "--prompts", "1"), says="Batch size or group size?",
        why="One post a step: a good baseline for a step that speaks for one post only. Three seeds show neither harm "
            "nor gain.",
        mend="`--prompts 4 --group 8`."),
    "KL off": Entry(
        paid(LENGTH, "--beta", "0", "--lr", "2e-3"), beside="length only", look="invented",
        says="The reward is perfect and the text is nonsense",
        why="Nothing holds the policy to its language, and the cheapest text of the right length wins. (The rate is "
            "three times the default's, too.)",
        mend="`--beta 0.1`, and a quality reward."),
    "KL too strong": Entry(
        paid(SUM, "--beta", "1"), look="within_10pct", says="The reward rises a little and then stays",
        why="The reward's pull and the KL's are soon equal.", mend="`--beta 0.1`."),
    "lr ten times too high": Entry(
        paid(SUM, "--lr", "6e-3"), look="kl", says="The KL runs away, and the summaries are worse than at a low rate",
        why="A step goes beyond where the gradient says anything. The length is learnt all the faster, and the "
            "language goes: of the names in its samples more than a third is invented, in greedy summaries a sixth.",
        mend="`--lr 6e-4`."),
    "lr a hundred times too high": Entry(
        paid(SUM, "--lr", "6e-2"), look="entropy", says="Suddenly it writes !!!!!!!!",
        why="Within eight steps the policy goes from babble (an entropy near 3) to one token. Then all samples are "
            "alike, and there is nothing left to compare.",
        mend="`--lr 6e-4`."),
    "lr ten times too low": Entry(
        paid(SUM, "--lr", "6e-5"), look="kl", says="Hours of nothing",
        why="The policy has hardly moved: its samples' reward rises by 0.1, where the healthy run's rises by 0.55.",
        mend="`--lr 6e-4`."),
    "filler": Entry(
        paid("length + 0*twice", "--lr", "1.2e-3", "--beta", "0.02"), beside="length only", look="invented",
        says="The length is right, and the summaries say less and less",
        why="The cheapest way to a length is words that fit everywhere: invented names, stock phrases (`templated`), "
            "in one seed of three a sentence that is said twice. (The rate is twice the default's, and the KL's weight "
            "a fifth.)",
        mend="A quality reward, `- 3*invented`, `- 2*twice`, a larger `--beta`."),
    "one reward wins": Entry(
        paid("20*length + rouge_l"), look="reward/rouge_l",
        says="Several rewards: the sum rises, and one of them does not",
        why="Divided by the std of the sum, the part that varies most has nearly all of the advantage. Here that costs "
            "little: a summary of the right length is also nearer to the reference.",
        mend="Weights by their spread, or `--advantage gdpo`; watch `reward/NAME`."),
    "100 more": Entry(
        paid(SUM), (Edit(rewards.Reward.__call__, "totals = [sum(", "totals = [100 + sum("),),
        says="My rewards are all near 100: is that bad?", look="within_10pct",
        why="It is harmless: the group's mean takes the constant out.", mend="Nothing to mend."),
    "1e13 more": Entry(
        paid(SUM), (Edit(rewards.Reward.__call__, "totals = [sum(", "totals = [1e13 + sum("),),
        says="My rewards are huge, and nothing is learnt", look="flat_groups",
        why="Differences below 1e-12 of the reward are taken for rounding. Beside 1e13 that is 10, so every group "
            "counts as flat. (A float32 itself loses a difference of 1 beside 2e7.)",
        mend="Take the constant off."),
    "a factor of 1e-5": Entry(
        paid("1e-5*rouge_l + 4e-5*length"), says="My rewards are tiny, and the KL wins", look="within_10pct",
        why="The std of a group is then far below the 1e-4 that is added to it, so advantages shrink beside beta.",
        mend="Rewards of the size of 1."),
}
# {setting: seeds} of runs that no rule of plumbing/symptoms.py was made on: tests hold the rules to them.
HEALTHY = {"default": range(10, 20), "target 20": range(6), "target 20, solved": range(2), "SQUISH": range(3),
           "SQUISH, larger steps": range(3)}


# --- runs -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str
    seed: int

    @property
    def entry(self) -> Entry:
        return GALLERY[self.name]

    @property
    def flags(self) -> list[str]:
        return ["--eval-posts", "50", *self.entry.flags, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{once.slug(self.name, self.seed)}.json"

    @property
    def config(self) -> Config:
        return read_arguments(Config, self.flags, "")[0]

    @property
    def decides(self) -> dict:
        """All that decides a run: where one of it is another, the run is done again."""
        edits = [[e.function.__qualname__, e.old, e.new] for e in self.entry.edits]
        return {"config": once.as_json(self.config), "edits": edits, "model": once.embedded("train", "val")}

    @property
    def folder(self) -> Path:
        return once.run_folder(f"break-{once.slug(self.name, self.seed)}", json.dumps(self.decides))


def result_of(run: Run) -> dict | None:
    """What was kept of a run, if it was one of these settings, these edits and this model."""
    return once.kept(run.result, run.config, Config(), edits=run.decides["edits"], model=run.decides["model"])


def train_broken(run: Run) -> int:
    """The run itself, in a process of its own -> train.py's exit code."""
    flags = ["--run", run.folder.name]
    with edited(run.entry.edits):
        return train.main([*flags, "--resume"] if (run.folder / "config.json").exists() else [*run.flags, *flags])


def do(run: Run, threads: int) -> dict:
    """Train, or go on, and keep the result. RuntimeError if the run neither reaches its end nor explodes."""
    command = [sys.executable, "-m", "studies.break_it", "one", "--only", run.name, "--seeds", str(run.seed)]
    result = {**run.decides, **once.short_run(command, run.folder, ROOT, threads, CURVES)}
    result["moved"] = None if result["ended"] else moved(run)
    write_text(run.result, json.dumps(result) + "\n")
    return result


def moved(run: Run) -> float:
    """The share of the weights that are not what they were, in the run's own precision."""
    dtype = torch.bfloat16 if "--lean" in run.flags else torch.float32
    (before, _), (after, _) = load(TINY, "cpu", dtype), load(run.folder / "model", "cpu", dtype)
    changed = [(p != q).flatten() for p, q in zip(before.parameters(), after.parameters())]
    return round(torch.cat(changed).float().mean().item(), 4)


# --- what is to be seen -----------------------------------------------------------------------------------------------


def at_the_end(result: dict, look: str) -> float | None:
    """The number in which one sees it: the mean of the last steps, or of the last evaluation. None: there is none."""
    if look.startswith("held out, "):
        return None if result["ended"] else result["val"][-1][look.removeprefix("held out, ")]
    if look == "moved":
        return result["moved"]
    values = [value for value in result["curves"][look][-LAST:] if value is not None]
    return fmean(values) if values else None


def cell(values: Sequence[float | None], look: str) -> str:
    """Mean (least..most) over the seeds, shares in per cent."""
    def form(x: float) -> str:
        if look.removeprefix("held out, ") not in SHARES:
            return f"{x:.3g}"
        return f"{x:.0%}" if x >= 0.1 else f"{100 * x:.2g}%"

    return once.spread(values, form)


def results(name: str) -> list[dict]:
    """What there is of an entry, one a seed."""
    return [r for seed in range(3) if (r := result_of(Run(name, seed)))]


def done() -> dict[str, tuple[Entry, list[dict], list[dict]]]:
    """{mistake: (entry, its results, those of the run beside it)}, where there are both."""
    found = {name: (entry, results(name), results(entry.beside)) for name, entry in GALLERY.items() if entry.says}
    return {name: each for name, each in found.items() if each[1] and each[2]}


def make_page() -> str:
    """The numbers of all mistakes that have been run, and what is to be said of each."""
    text = ("| mistake | look at | without -> with it | held out: within 10% | held out: ROUGE-L | seeds |\n"
            "| --- | --- | --- | --- | --- | --- |\n")
    for name, (entry, sick, healthy) in done().items():
        seen = [" -> ".join(cell([at_the_end(r, name) for r in some], name) for some in (healthy, sick))
                for name in (entry.look, "held out, within_10pct", "held out, rouge_l")]
        anchor = re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")
        ended = "".join(f"; {r['ended']}" for r in sick if r["ended"])
        text += f"| [{name}](#{anchor}) | `{entry.look}` | {' | '.join(seen)} | {len(sick)}{ended} |\n"
    for name, entry in GALLERY.items():
        beside = f", beside *{entry.beside}*" if entry.beside != "healthy" else ""
        about = f"{entry.why} Look at `{entry.look}`{beside}. Mend it: {entry.mend}"
        about = textwrap.fill(about, 120, break_on_hyphens=False)
        if entry.says:
            text += f"\n### {name}\n\n\"{entry.says}\"\n\n{change(name)}\n{about}\n"
    return text


def change(name: str) -> str:
    """What is another than beside it: the command, the words of the edits."""
    entry = GALLERY[name]
    beside = GALLERY[entry.beside]
    text = f"```bash\npython train.py {shown(entry.flags)}\n```\n" if entry.flags != beside.flags else ""
    lines = ""
    for edit in entry.edits:
        if edit not in beside.edits:
            lines += edit.lines()
    return text + (f"```diff\n{lines}```\n" if lines else "")


def shown(flags: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in flags)


PANELS = ("stop token left out", "one end token of two", "sampled at 0.7", "characters for tokens", "tiny eps",
          "k3 upside down", "max for min", "KL off", "lr ten times too high", "lr a hundred times too high", "filler",
          "gradient of zero")


def draw(path: Path) -> None:
    """A panel for each of the twelve that show most: the runs with the mistake, in red, and those without, in blue."""
    there = {name: each for name, each in done().items() if name in PANELS}
    if not there:
        raise ValueError("There is no result to draw yet: python -m studies.break_it run.")
    figure, axes = new_figure(-(-len(there) // 3))
    for ax, (name, (entry, sick, healthy)) in zip(axes.flat, there.items()):
        for some, color, label in ((healthy, "C0", "without"), (sick, "C3", "with the mistake")):
            for i, result in enumerate(some):
                values = [value or 0.0 for value in result["curves"][entry.look]]  # None: there is no KL
                smooth = [fmean(values[max(0, n - 5):n]) for n in range(1, len(values) + 1)]
                ax.plot(range(1, len(values) + 1), smooth, lw=1.3, color=color, alpha=0.8, label="" if i else label)
        ax.set_title(f"{name}: {entry.look}", fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.2)
        if entry.look in ("kl", "logp_gap"):  # over powers of ten; a KL begins at 0
            ax.set_yscale("symlog", linthresh=0.01 if entry.look == "kl" else 1e-6)
    axes.flat[0].legend(fontsize=8)
    for ax in axes.flat[len(there):]:
        ax.axis("off")
    path.parent.mkdir(exist_ok=True)
    write_file(path, lambda part: figure.savefig(part, dpi=100, format="png"))


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = once.arguments("break_it", __doc__, ("run", "tables", "figures", "healthy", "one"),
                          "mistakes to run, and what stands beside them").parse_args(argv)
    if args.action == "one":
        return train_broken(Run(args.only, args.seeds))
    page = ROOT / "docs" / "break-it.md"
    try:
        if args.action == "run":
            run_all(args)
        if args.action == "healthy":
            runs = [Run(name, seed) for name, seeds in HEALTHY.items() for seed in seeds]
            once.the_rest([run for run in runs if re.search(args.only, run.name)], result_of, do, args.jobs)
            return 0
        if args.action in ("run", "tables"):
            head, heading, _ = page.read_text(encoding="utf-8").partition("## The numbers\n\n")
            write_text(page, head + heading + make_page())
            print(f"{len(done())} of {sum(bool(entry.says) for entry in GALLERY.values())} mistakes are in {page}.")
        else:
            draw(ROOT / "figures" / "break_it.png")
    except (ValueError, OSError, RuntimeError) as e:
        print(f"break_it: {e}", file=sys.stderr)
        return 1
    return 0


def run_all(args: argparse.Namespace) -> None:
    """What has no result yet, `args.jobs` runs at a time, seed by seed."""
    names = [name for name, entry in GALLERY.items() if entry.says and re.search(args.only, name)]
    names = list(dict.fromkeys(each for name in names for each in (GALLERY[name].beside, name)))
    once.the_rest([Run(name, seed) for seed in range(args.seeds) for name in names], result_of, do, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
