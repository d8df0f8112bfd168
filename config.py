"""Every knob, once. A field of `Config` is a flag of train.py, its help is the flag's help, and a typo is refused.

A stage is a reward and a number of steps, "length:80"; stages follow each other. What cannot work is refused by `check`
and by the parsers here, before anything is loaded.

To a new model one brings five numbers: --lr (2e-6 at 0.5B, where the embedded model of a million parameters takes
6e-4), --target, --prompts and --group (as many completions as patience allows; --micro-tokens bounds the memory of
learning from them), and --beta. The others may stay as they are. docs/real-models.md says what each costs in memory.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from grpo import ADVANTAGES, KINDS, KLS
from rewards import Reward, parse
from squish import UNITS


def flag(default: Any, help: str, choices: tuple = (), group: str = "the run") -> Any:
    """A dataclass field that documents itself: `help` is what --help prints, `group` the heading above it."""
    return field(default=default, metadata={"help": help, "choices": choices or None, "group": group})


def of_update(default: Any, help: str, choices: tuple = ()) -> Any:
    """The same for what `grpo.update` reads."""
    return flag(default, help, choices, "the update (grpo.py)")


@dataclass
class Config:
    """What a run is; the defaults are those of the embedded model.

    Everything that takes a config takes any object with the fields that it reads: a test may hand in a few of them.
    """

    # --- what is learnt, and from which posts ---
    # A model is a Hugging Face folder; posts are JSON lines with a document and, for most rewards, somebody's summary.
    # Which field holds which is guessed from the usual names (plumbing/posts.py).
    model: str = flag("tiny", "a Hugging Face folder, a hub name, or tiny")
    data: str = flag("tiny", "posts to train on: tiny, a folder with train.jsonl, a .jsonl, .csv, .json or .parquet "
                             "file, or a hub data set such as mlabonne/smoltldr")
    eval_data: str = flag("", "held-out posts; empty: the data's own val or test split, else a tenth of the data")
    split: str = flag("", "which split to train on, where it is not called train")
    document_field: str = flag("", "field that holds the text, where its name is not guessed")
    summary_field: str = flag("", "field that holds the summary, where its name is not guessed")
    max_posts: int = flag(0, "take only the first so many posts of the data and of the held-out data; 0: all")
    min_chars: int = flag(0, "leave out posts of fewer characters; from 1 on also rows without a text")
    # First the length alone. Then a good summary of that length, one that invents nothing and does not stammer, because
    # GRPO unlearns what nobody pays for (docs/read-your-run.md).
    stages: tuple[str, ...] = flag(("length:40", "rouge_l+4*length-3*invented-2*twice:180"),
                                   "one or more REWARD:STEPS, run in order")
    stage_ref: str = flag("start", "the model that the KL holds to: the run's first, or the last of the previous stage",
                          choices=("start", "previous"))
    run: str = flag("", "name of the run's folder in runs/; empty: the first free of MODEL-1, MODEL-2, ...")
    # --- the task ---
    # B x G completions are one batch. More completions of a post (G) make its mean a better baseline, and cost less
    # than more posts, for they share its prompt. More posts (B) make a step speak for more of them.
    target: int = flag(40, "wanted length of a summary, in tokens of the model")
    prompts: int = flag(4, "posts in a batch (B)")
    group: int = flag(8, "completions of each post (G)")
    template: str = flag("", "prompt template: chatml, qwen3 (thinking off), plain; with a budget tagged, notes, "
                             "tagged_chatml; empty: whatever fits the model and the rewards")
    budgets: str = flag("0.1,0.2", "templates with a budget: size of a summary, one of these for each post: shares of "
                                   "the document (0.1) or numbers (200)")
    budget_unit: str = flag("chars", "what a budget counts", choices=UNITS)
    references: str = flag("", "models that measure squish and cost, with commas between; empty: the one that the run "
                               "begins with")
    # A completion that is cut has no ending. The zone says so before it happens; it counts all that was sampled.
    overlong: int = flag(0, "soft zone before the cut: over its last so many tokens a completion is paid up to 1 less "
                            "(DAPO); 0: off")
    missing: str = flag("worst", "a completion without a summary between its tags shares its group's worst reward, or "
                                 "gets less than it", choices=("worst", "penalty"))
    # A teacher says of every sampled token how likely it is to it. It needs no reward, but the same words.
    teacher: str = flag("", "a frozen model of the same vocabulary (a folder, a hub name or a run) whose log p - the "
                            "policy's is each token's advantage: on-policy distillation (docs/distill.md)")
    teacher_weight: float = flag(1.0, "share of the teacher in the advantages; the rest is the group's, from rewards")
    max_document: int = flag(0, "cut documents to this many tokens; 0: refuse what does not fit")
    # --- what is trained, and how far it moves in a step ---
    # The learning rate matters most. Too high: the KL and the gradient's norm run away. Too low: nothing happens. It
    # rises over the first steps, in which AdamW knows little about the gradient's size.
    lora: int = flag(0, "rank of the adapters that are trained in place of the weights; 0: train the weights")
    lora_alpha: float = flag(0.0, "adapters count alpha / rank times; 0: twice the rank")
    lora_targets: str = flag("", "projections that get adapters, such as q_proj,v_proj; empty: all")
    max_prompt: int = flag(0, "leave out posts whose prompt has more tokens than this; 0: refuse what does not fit")
    lr: float = flag(6e-4, "learning rate (about 2e-6 for a model of 0.5B)")
    warmup: int = flag(5, "steps over which the learning rate rises to --lr; 0 or 1: it starts there")
    lr_end: float = flag(0.1, "share of --lr that is left at the last step; 1 keeps it constant")
    weight_decay: float = flag(0.0, "how strongly AdamW pulls matrices to zero; norms and biases are spared, as in "
                                   "transformers' Trainer")
    seed: int = flag(0, "decides everything: order of posts, completions, and so the weights")
    # --- what is kept and said ---
    eval_posts: int = flag(200, "held-out posts per evaluation")
    save_every: int = flag(20, "steps between checkpoints")
    print_every: int = flag(5, "steps between printed lines; each line is a mean over them")
    # --- memory and speed ---
    # No result depends on these, but in the last bits (under --lean in more of them); on --ahead and --max-age it does.
    checkpointing: bool = flag(False, "recompute each layer in backward: less memory, about a third more time")
    lean: bool = flag(False, "bfloat16 weights and moments, rounded at random: half the memory (plumbing/adamw.py)")
    compile: bool = flag(False, "let torch.compile fuse each layer: a minute or more at first, and no gain on the CPUs "
                                "where it was measured")
    device: str = flag("", "cpu, cuda or mps; empty: cuda where there is one, else cpu")
    # Servers that sample get the new weights before each step, in a folder that they must see too.
    rollouts: tuple[str, ...] = flag((), "vLLM servers that write the completions, such as http://localhost:8000; "
                                         "empty: this machine does (docs/machines.md)")
    # Writing and learning then go on at the same time. But a step's completions are by the weights of one step before:
    # take --tis 2 as well.
    ahead: int = flag(0, "1: the servers write the next batch while this one is learnt from; 0: they wait", (0, 1))
    max_age: int = flag(0, "completions of weights that are older than so many steps are thrown away and written anew, "
                           "on this machine; 0: off")
    # MLX is Apple's library for its own chips. The same seed writes the same summaries, within rounding.
    backend: str = flag("torch", "what computes: torch, or mlx on Apple silicon", choices=("torch", "mlx"))
    # --- the update: grpo.py explains each, README.md says which paper takes which ---
    loss: str = of_update("grpo", "policy loss: what is clipped, and what a token weighs", choices=tuple(KINDS))
    advantage: str = of_update("group", "r - mean, divided by the group's std, by nothing, or by the batch's std; gdpo "
                                        "divides each reward of the sum by its own std", choices=ADVANTAGES)
    clip_low: float = of_update(0.2, "the ratio may fall to 1 - this before its gradient stops")
    clip_high: float = of_update(0.2, "the ratio may rise to 1 + this before its gradient stops (DAPO: 0.28)")
    beta: float = of_update(0.1, "weight of the KL to the reference model; 0 needs no reference model")
    # `policy_loss` by itself takes k3, the paper's. A run takes k3_ratio, whose gradient is that of the KL.
    kl: str = of_update("k3_ratio", "KL estimator in the loss; k3_ratio has the right gradient (with gspo: k2)",
                        choices=KLS)
    updates: int = of_update(1, "optimizer steps on each batch of completions (mu in the paper)")
    # For completions that are not quite the policy's: a server rounds, or has older weights. docs/machines.md says what
    # that does to a run, and when to correct it.
    tis: float = of_update(0.0, "truncated importance sampling: a token counts policy / sampler times, but at most so "
                                "many; 0: off")
    tis_mode: str = of_update("token", "weights of --tis: a token's ratio, cut; or its completion's, 0 where it is "
                                       "above (trl's default)", choices=("token", "sequence_mask"))
    temperature: float = of_update(1.0, "of the sampler, and therefore of the loss")
    grad_clip: float = of_update(1.0, "largest norm of the whole gradient")
    micro_tokens: int = of_update(16384, "most tokens of one forward and backward: lower it when memory runs out")
    max_new_tokens: int = of_update(0, "where a completion is cut; 0: twice the target, or 1.5 times the largest "
                                     "budget")


@dataclass(frozen=True)
class Stage:
    """A part of the run that is paid by one reward."""

    number: int  # from 1
    reward: Reward
    first: int  # its first step, counted from 0
    end: int  # one past its last


def parse_stages(texts: tuple[str, ...]) -> list[Stage]:
    """("length:80", "rouge_l+length:80") -> stages with their place in the run. ValueError with a sentence."""
    stages: list[Stage] = []
    first = 0
    for text in texts:
        expression, colon, steps = text.rpartition(":")
        if not colon or not steps.isascii() or not steps.isdigit() or int(steps) == 0:
            raise ValueError(f"--stages: '{text}' should be REWARD:STEPS, such as \"rouge_l+length:80\".")
        stages.append(Stage(len(stages) + 1, parse(expression), first, first + int(steps)))
        first += int(steps)
    return stages


def reward_names(stages: list[Stage]) -> set[str]:
    """The names of all rewards that any stage pays."""
    return {name for stage in stages for name in stage.reward.names}


def reading(c: Config) -> dict:
    """How posts are read: which rows count, and what their fields are called."""
    return {"max_posts": c.max_posts, "min_chars": c.min_chars, "document": c.document_field or None,
            "reference": c.summary_field or None}


def parse_budgets(text: str) -> list[float | int]:
    """Sizes of a summary: with a point a share of the document, without one a number of characters or tokens.

    >>> parse_budgets("0.1,200")
    [0.1, 200]
    """
    try:
        budgets = [float(b) if "." in b else int(b) for b in text.split(",")]
    except ValueError:
        budgets = [0]
    if not all(0 < b < math.inf for b in budgets):
        raise ValueError(f"--budgets {text}: write shares of the document with a point and sizes without, like "
                         f"0.05,0.1,200.")
    return budgets


def check(c: Config) -> None:
    """Refuse, with a sentence, what cannot work whatever the model and the posts are.

    What depends on them (a prompt that does not fit, a template that the tokenizer cannot write) is refused where they
    are read, before the first step.
    """
    for wrong, says in (
        (c.group < 2, f"--group {c.group}: GRPO compares completions of one post with each other, so it needs "
                      f"at least 2"),
        (not 0 < c.temperature < math.inf, f"--temperature {c.temperature}: sampling needs a temperature above 0"),
        (not 0 < c.clip_low < 1 or not c.clip_high > 0, "--clip-low must lie in (0, 1) and --clip-high above 0"),
        (not (0 < c.lr < math.inf and c.grad_clip > 0 and 0 <= c.beta < math.inf),
         "--lr and --grad-clip must be above 0, --beta at least 0"),
        (c.lora < 0 or not 0 <= c.lora_alpha < math.inf or c.max_document < 0,
         "--lora, --lora-alpha and --max-document cannot be negative"),
        (c.seed < 0 or c.warmup < 0 or not c.weight_decay >= 0 or not 0 <= c.lr_end <= 1,
         "--seed, --warmup and --weight-decay cannot be negative, and --lr-end must lie in [0, 1]"),
        (c.backend == "mlx" and bool(c.device or c.compile),
         "--backend mlx computes on Apple's GPU, or on the CPU where there is none: leave out --device and --compile"),
        (c.backend == "mlx" and bool(c.tis or c.ahead or c.max_age),
         "--backend mlx learns from its own completions only: leave out --tis, --ahead and --max-age"),
        (not 0 <= c.tis < math.inf or 0 < c.tis < 1,
         f"--tis {c.tis:g} would cut the weights of completions by the very same policy, which are 1: take 2, or 0 for "
         f"none"),
        (bool(c.ahead and not c.rollouts),
         "--ahead 1 has servers write the next batch while this machine learns: name some with --rollouts, or leave it "
         "out"),
        (c.backend == "mlx" and bool(c.teacher), "--teacher needs --backend torch: mlx_grpo.py asks no teacher yet"),
        (not 0 <= c.teacher_weight <= 1, f"--teacher-weight {c.teacher_weight}: a share lies in [0, 1]"),
        (c.teacher_weight != 1 and not c.teacher, "--teacher-weight weighs a teacher: name one with --teacher"),
        *((getattr(c, n) < 0, f"--{n.replace('_', '-')} cannot be negative") for n in (
            "max_new_tokens", "max_prompt", "max_posts", "min_chars", "overlong", "max_age")),
        *((getattr(c, n) < 1, f"--{n.replace('_', '-')} must be at least 1") for n in (
            "target", "prompts", "updates", "micro_tokens", "eval_posts", "save_every", "print_every")),
    ):
        if wrong:
            raise ValueError(says + ".")

# Next: eval.py, what a trained model is worth
