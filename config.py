"""The command line of train.py: every setting, what is refused, and the folder of a run."""

import argparse
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import rewards
from eval import parse_budgets
from grpo import ADVANTAGES, KLS, LOSSES
from plumbing.folder import read_json
from squish import UNITS


def flag(default, help: str, **more):
    """A dataclass field that documents itself: its help is the command line's help."""
    return field(default=default, metadata={"help": help, **more})


# What `grpo.update` reads. In --help these fields stand apart.
OF_UPDATE = {"loss", "advantage", "clip_low", "clip_high", "beta", "kl", "updates", "temperature", "grad_clip",
             "micro_tokens", "max_new_tokens"}


@dataclass
class Config:
    """Every field is a flag of the same name; the defaults are those of the embedded model."""

    loss: str = flag("grpo", "policy loss: what is clipped, and what a token weighs", choices=LOSSES)
    advantage: str = flag("group", "r - mean, divided by the group's std, by nothing, or by the batch's std",
                          choices=ADVANTAGES)
    clip_low: float = flag(0.2, "the ratio may fall to 1 - this before its gradient stops")
    clip_high: float = flag(0.2, "the ratio may rise to 1 + this before its gradient stops (DAPO: 0.28)")
    beta: float = flag(0.05, "weight of the KL to the reference model; 0 needs no reference")
    kl: str = flag("k3_ratio", "KL estimator in the loss; k2 and k3_ratio have the right gradient", choices=KLS)
    updates: int = flag(1, "optimizer steps on each batch of completions (mu in the paper)")
    temperature: float = flag(1.0, "of the sampler, and therefore of the loss")
    grad_clip: float = flag(1.0, "largest norm of the whole gradient")
    micro_tokens: int = flag(16384, "most tokens of one forward and backward: lower it when memory runs out")
    max_new_tokens: int = flag(0, "where a completion is cut; 0: twice the target")
    model: str = flag("tiny", "a Hugging Face folder, a hub name, or tiny")
    data: str = flag("tiny", "posts to train on: tiny, a folder with train.jsonl, a .jsonl or .jsonl.gz file, or a "
                             "hub data set such as mlabonne/smoltldr")
    eval_data: str = flag("", "held-out posts; empty: the data's own val or test split, else a tenth of the data")
    max_posts: int = flag(0, "take only the first so many posts of the data and of the held-out data; 0: all")
    min_chars: int = flag(0, "leave out posts of fewer characters")
    stages: tuple[str, ...] = flag(("length:40", "rouge_l+3*length:180"), "one or more REWARD:STEPS, run in order")
    stage_ref: str = flag("start", "the model that the KL holds to: the run's first, or the last of the previous stage",
                          choices=("start", "previous"))
    run: str = flag("", "name of the run's folder in runs/; empty: the first free of MODEL-1, MODEL-2, ...")
    target: int = flag(30, "wanted length of a summary, in tokens of the model")
    prompts: int = flag(4, "posts in a batch (B)")
    group: int = flag(8, "completions of each post (G)")
    template: str = flag("", "prompt template: chatml, qwen3 (thinking off), plain; for SQUISH tagged, notes, "
                             "tagged_chatml; empty: whatever fits the model")
    budgets: str = flag("0.1,0.2", "for SQUISH: size of a summary, one of these for each post: shares of the document "
                                   "(0.1) or numbers (200)")
    budget_unit: str = flag("chars", "what a budget counts", choices=UNITS)
    references: str = flag("", "for SQUISH: models that measure it, with commas between; empty: the one that the run "
                               "begins with")
    missing: str = flag("worst", "for SQUISH: a completion without a summary shares its group's worst reward, or gets "
                                 "less than it", choices=("worst", "penalty"))
    max_document: int = flag(0, "cut documents to this many tokens; 0: refuse what does not fit")
    lora: int = flag(0, "rank of the adapters that are trained in place of the weights; 0: train the weights")
    lora_alpha: float = flag(0.0, "adapters count alpha / rank times; 0: twice the rank")
    lora_targets: str = flag("", "projections that get adapters, such as q_proj,v_proj; empty: all")
    max_prompt: int = flag(0, "leave out posts whose prompt has more tokens than this; 0: refuse what does not fit")
    lr: float = flag(6e-4, "learning rate (about 2e-6 for a model of 0.5B)")
    warmup: int = flag(5, "steps over which the learning rate rises from 0")
    lr_end: float = flag(0.1, "share of --lr that is left at the last step; 1 keeps it constant")
    weight_decay: float = flag(0.0, "how strongly AdamW pulls the weights to zero")
    seed: int = flag(0, "decides everything: order of posts, completions, and so the weights")
    eval_posts: int = flag(200, "held-out posts per evaluation")
    save_every: int = flag(20, "steps between checkpoints")
    print_every: int = flag(5, "steps between printed lines; each line is a mean over them")
    checkpointing: bool = flag(False, "recompute each layer in backward: less memory, about a third more time")
    lean: bool = flag(False, "bfloat16 weights and moments, rounded at random: half the memory (adamw.py)")
    compile: bool = flag(False, "let torch.compile fuse each layer: a minute or more at first, and no gain on the CPUs "
                                "where it was measured")
    device: str = flag("", "cpu, cuda or mps; empty: cuda where there is one, else cpu")


@dataclass(frozen=True)
class Stage:
    number: int  # from 1
    reward: rewards.Reward
    first: int  # its first step, counted from 0
    end: int  # one past its last

    @property
    def by_model(self) -> bool:
        """Whether a language model measures its reward: then prompts speak of budgets."""
        return not rewards.NEED_MODEL.isdisjoint(self.reward.names)


def parse_stages(texts: tuple[str, ...]) -> list[Stage]:
    """("length:80", "rouge_l+length:80") -> stages with their place in the run."""
    stages, first = [], 0
    for text in texts:
        expression, colon, steps = text.rpartition(":")
        if not colon or not steps.isascii() or not steps.isdigit() or int(steps) == 0:
            raise ValueError(f"--stages: '{text}' should be REWARD:STEPS, such as \"rouge_l+length:80\".")
        stages.append(Stage(len(stages) + 1, rewards.parse(expression), first, first + int(steps)))
        first += int(steps)
    return stages


def budgets_of(config: Config) -> list[float | int]:
    """The budgets to draw from; none where no stage's reward is measured by a model, and prompts speak of tokens."""
    return parse_budgets(config.budgets) if any(stage.by_model for stage in parse_stages(config.stages)) else []


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"train.py: {message}. See python train.py --help.\n")


def read_arguments(argv: list[str] | None, description: str) -> tuple[Config, bool, dict]:
    """argv -> (config, resume, the flags that were really given)."""
    parser = Parser(description=description, usage="python train.py [--FLAG VALUE ...]", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {False: parser.add_argument_group("the run"), True: parser.add_argument_group("the update (grpo.py)")}
    for f in fields(Config):
        default = " ".join(f'"{x}"' for x in f.default) if isinstance(f.default, tuple) else f.default
        default = "empty" if default == "" else default
        more: dict = {"help": f"{f.metadata['help']} (default: {default})".replace("%", "%%")}
        if isinstance(f.default, bool):
            more["action"] = argparse.BooleanOptionalAction
        else:
            more |= {"type": str if isinstance(f.default, tuple) else type(f.default),
                     "choices": f.metadata.get("choices"), "nargs": "+" if isinstance(f.default, tuple) else None,
                     "metavar": None if "choices" in f.metadata else f.name.upper()}
        groups[f.name in OF_UPDATE].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **more)
    parser.add_argument("--resume", action="store_true", help="go on with the run named by --run (or the latest one)")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if "stages" in given:
        given["stages"] = tuple(given["stages"])
    return Config(**given), resume, given


def check(c: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
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
        (0 < c.max_new_tokens <= 1.1 * c.target, f"--max-new-tokens {c.max_new_tokens} would cut summaries at the "
                                                 f"target of {c.target} and count them as hits: leave room to miss"),
        *((getattr(c, n) < 0, f"--{n.replace('_', '-')} cannot be negative") for n in (
            "max_new_tokens", "max_prompt", "max_posts", "min_chars")),
        *((getattr(c, n) < 1, f"--{n.replace('_', '-')} must be at least 1") for n in (
            "target", "prompts", "updates", "micro_tokens", "eval_posts", "save_every", "print_every")),
    ):
        if wrong:
            raise ValueError(says + ".")


def open_run(config: Config, resume: bool, given: dict) -> tuple[Config, Path]:
    """The run's folder, new or to be resumed, and the config that counts."""
    runs = Path("runs")
    if resume:
        known = sorted(runs.glob("*/config.json"), key=lambda p: p.stat().st_mtime)
        folder = runs / config.run if config.run else known[-1].parent if known else runs / "?"
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"There is no run {folder} to resume; there are: "
                                    f"{', '.join(p.parent.name for p in known) or 'none'}.")
        saved = read_json(folder / "config.json")
        saved["stages"] = tuple(saved.get("stages", ()))
        for name, value in given.items():
            if name != "run" and saved.get(name) != value:
                raise ValueError(f"{folder} was begun with {name} = {saved.get(name)}, not {value}: a resumed run "
                                 f"keeps its settings. Leave the flag out, or start another run.")
        return Config(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved}), folder
    if not config.run:
        base, n = Path(config.model).name, 1
        while (runs / f"{base}-{n}").exists():
            n += 1
        config.run = f"{base}-{n}"
    folder = runs / config.run
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is there already: go on with --resume, or take another --run.")
    if not budgets_of(config):  # what a budget comes to is not known before the posts are read
        config.max_new_tokens = config.max_new_tokens or 2 * config.target
    return config, folder
