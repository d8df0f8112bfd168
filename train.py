"""Teach a language model to write crisp summaries, by GRPO.

    python train.py                                              # the embedded model and posts, about two minutes
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data mlabonne/smoltldr --target 64 --lr 2e-6
    python train.py --stages squish:100 --lora 16 --lr 1e-3      # no reference summaries: SQUISH, with a LoRA policy
    python train.py --run tiny-1 --resume                        # go on where a run was stopped, or killed

A stage is a reward and a number of steps, "length:80"; stages follow each other, and one stage is a joint run. All
that happens is in runs/NAME: config.json, metrics.jsonl (a line a step), eval.jsonl, samples.jsonl, checkpoint/, model/
and curves.png. Every number in there is explained in README.md.
"""

import argparse
import copy
import dataclasses
import math
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

import grpo
import memory
import rewards
from adamw import AdamW
from checkpoint import load_checkpoint, save_checkpoint, stage_reference
from eval import ask, content_lengths, opened, parse_budgets, room_for, within
from folder import read_json
from grpo import flag
from log import PENALTIES, Log
from model import add_lora, load, save, save_adapters
from rollout import TINY, Post, choose_template, load_split, sample, tokenize
from squish import CLOSE, UNITS, cost, cut, ensemble, extract, fits, penalise


@dataclass
class Config(grpo.Config):
    """Every field is a flag of the same name; the defaults are those of the embedded model."""

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


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(config: Config, folder: Path, resume: bool, stop: "Stop") -> None:
    """The algorithm box of the paper: sample groups, score them, update, and say what happened."""
    begun = time.time()
    stages = parse_stages(config.stages)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    free = memory.limit(device)
    model, tokenizer, posts, held_out, longest = prepare(config, stages)
    reference, judges = references(config, model, tokenizer)
    if config.compile:
        for layer in {*model.layers, *(reference.layers if reference else ())}:
            layer.compile(dynamic=True)
    elif config.checkpointing:
        memory.tidy(model)  # not when compiled: torch.compile cannot look into what it calls
    memory.rehearse(model, reference, longest, config, free)
    optimizer = make_optimizer(config, model)
    step = load_checkpoint(folder, model, optimizer) if resume else 0
    log = Log(folder, config, stages, step)
    log.begin(model, posts, held_out)

    for stage in stages:
        if step >= stage.end:
            continue
        if step == stage.first:
            log.evaluation(step, stage.number - 1, model, tokenizer, held_out, judges)
        if config.stage_ref == "previous" and reference is not None and stage.number > 1:
            reference = stage_reference(folder / "checkpoint" / f"stage-{stage.number}.pt", model, step == stage.first)
        while step < stage.end:
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(step, stages[-1].end, config)
            clock = time.time()
            tasks = tasks_of(posts, step, config, tokenizer)
            groups = sample(model, [task.prompt for task in tasks], config.group, config.max_new_tokens,
                            config.temperature, seed=config.seed * 1_000_003 + step, tokenizer=tokenizer,
                            stop_text=CLOSE if judges else "")
            line = score(groups, tasks, stage.reward, config, judges, tokenizer)
            try:
                line |= grpo.update(model, reference, groups, optimizer, config)
            except FloatingPointError as e:
                step = load_checkpoint(folder, model, optimizer)
                if step == 0:
                    raise FloatingPointError(f"{e} in step {log.last + 1}, before the first checkpoint: start again "
                                             f"with a lower --lr.") from e
                save(model, tokenizer, folder / "model")
                raise FloatingPointError(f"{e} in step {log.last + 1}. The weights of step {step}, which are good, are "
                                         f"in {folder / 'model'}: go on from them with --model {folder / 'model'} and "
                                         f"a lower --lr.") from e
            step += 1
            log.step(step, stage, line, time.time() - clock)
            if stop.asked or step % config.save_every == 0 or step == stage.end:
                save_checkpoint(folder, model, optimizer, step)
            if stop.asked:
                save(model, tokenizer, folder / "model")
                log.say(f"Stopped after step {step}. Go on with: python train.py --run {config.run} --resume")
                return
    log.evaluation(step, len(stages), model, tokenizer, held_out, judges)
    save(model, tokenizer, folder / "model")
    if config.lora:
        save_adapters(model, folder / "adapter", str(config.model))
    log.finish(time.time() - begun, memory.peak(device))


def prepare(config: Config, stages: list[Stage]):
    """Model, tokenizer, posts to train on, held-out posts, and the prompts of the largest batch that may come; what
    cannot work is refused here, before any step."""
    model, tokenizer = load(TINY if config.model == "tiny" else config.model, config.device or None,
                            weight_type(config))
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer.json: copy it there from the model it was made of.")
    if config.lora:
        targets = [name for name in config.lora_targets.split(",") if name]
        add_lora(model, config.lora, config.lora_alpha or 2.0 * config.lora, targets, config.seed)
    model.checkpointing = config.checkpointing
    budgets = budgets_of(config)
    config.template = config.template or ("tagged" if budgets else choose_template(model, tokenizer))
    splits = load_split(config.data, config.eval_data, config.max_posts, config.min_chars)
    if config.max_document:
        splits = [[dataclasses.replace(post, document=cut(tokenizer, post.document, config.max_document))
                   for post in posts] for posts in splits]
    wrong = "length" if config.budget_unit == "chars" else "char_length"
    if budgets and any(wrong in stage.reward.names for stage in stages):
        raise ValueError(f"--stages: '{wrong}' does not go with budgets of {config.budget_unit}: take "
                         f"{'char_length' if wrong == 'length' else 'length'}, whose target is then the budget.")
    if budgets:
        config.max_new_tokens = config.max_new_tokens or max(room_for(tokenizer, posts, config) for posts in splits)
    room = model.config.max_position_embeddings - config.max_new_tokens
    if room < 1:
        raise ValueError(f"{config.max_new_tokens} new tokens leave no room for a prompt in the model's context of "
                         f"{model.config.max_position_embeddings}: lower --target, --budgets or --max-new-tokens.")
    kept = []
    for posts in splits:
        prompts = [max((task_of(tokenizer, post, config, budget).prompt for budget in budgets or [0]), key=len)
                   for post in posts]
        kept.append([(post, prompt) for post, prompt in zip(posts, prompts)
                     if not config.max_prompt or len(prompt) <= config.max_prompt])
        for post, n in zip(posts, map(len, prompts)):
            if n > room and (not config.max_prompt or n <= config.max_prompt):
                raise ValueError(f"Post {post.id} has a prompt of {n} tokens; with {config.max_new_tokens} "
                                 f"new ones it does not fit into the model's context of "
                                 f"{model.config.max_position_embeddings}. Leave such posts out (--max-prompt {room}), "
                                 f"or cut their documents (--max-document).")
    longest = sorted((prompt for _, prompt in kept[0]), key=len)[-config.prompts:]
    posts, held_out = ([post for post, _ in pairs] for pairs in kept)
    if len(posts) < config.prompts or not held_out:
        raise ValueError(f"{len(posts)} posts to train on and {len(held_out)} held out are too few for batches "
                         f"of {config.prompts}: give more posts, lower --prompts or raise --max-prompt.")
    compared = sorted({name for s in stages for name in s.reward.names} & rewards.NEED_REFERENCE)
    if compared and not any(post.reference for post in posts):
        raise ValueError(f"{config.data} has no summaries for {', '.join(compared)} to compare with: call their field "
                         f"'summary', or train with --stages length:N or squish:N.")
    return model, tokenizer, posts, held_out[:config.eval_posts], longest


def weight_type(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.lean else torch.float32


def make_optimizer(config: Config, model) -> torch.optim.Optimizer:
    """AdamW over what is trained. Adapters are float32 even under --lean, so torch's own serves them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.lean and not config.lora:
        return AdamW(trained, config.lr, weight_decay=config.weight_decay, seed=config.seed)
    return torch.optim.AdamW(trained, config.lr, (0.9, 0.99), 1e-8, config.weight_decay, fused=True)


def references(config: Config, model, tokenizer) -> tuple:
    """The model that the KL holds to, or None, and the (model, tokenizer) pairs that measure SQUISH, if any.

    Under LoRA both are the policy itself without its adapters. Else both are one frozen copy of it.
    """
    measured, names = bool(budgets_of(config)), [n for n in config.references.split(",") if n]
    start = None
    if config.beta > 0 or measured and not names:
        start = model if config.lora else copy.deepcopy(model).requires_grad_(False)
    judges = []
    for name in names if measured else []:
        judge, words = load(TINY if name == "tiny" else name, config.device or None, weight_type(config))
        if words is None:
            raise ValueError(f"{name} has no tokenizer.json: copy it there from the model it was made of.")
        judges.append((judge.requires_grad_(False), words))
    return start if config.beta > 0 else None, judges or ([(start, tokenizer)] if measured else [])


@dataclass(frozen=True)
class Task:
    """What the policy is asked: to summarise a post to a target, in tokens, or in the unit of its budget."""

    post: Post
    prompt: list[int]  # token ids
    target: int
    budget: float | int = 0  # 0: there is none, the target is one of length


def task_of(tokenizer, post: Post, config: Config, budget: float | int) -> Task:
    if budget:
        return Task(post, *ask(tokenizer, post, config, budget), budget)
    return Task(post, tokenize(tokenizer, post, config.template, config.target), config.target)


def tasks_of(posts: list[Post], step: int, config: Config, tokenizer) -> list[Task]:
    """The tasks of a step: every epoch in an order of its own, and a budget for each post; a pure function of seed and
    step, so that resuming needs no state."""
    budgets = budgets_of(config) or [0]
    draw = np.random.default_rng([config.seed, step, 1])
    return [task_of(tokenizer, post, config, budgets[draw.integers(len(budgets))])
            for post in batch_of(posts, step, config)]


def learning_rate(step: int, total: int, config: Config) -> float:
    """Up from 0 over the warm-up, then down in a straight line to `lr_end` times --lr: late steps only polish."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * (1 - (1 - config.lr_end) * step / total)


def batch_of(posts: list, step: int, config: Config) -> list:
    """The posts of a step: every epoch in an order of its own, a pure function of seed and step, so that resuming
    needs no state."""
    batch = []
    for i in range(step * config.prompts, (step + 1) * config.prompts):
        epoch, at = divmod(i, len(posts))
        batch.append(posts[np.random.default_rng([config.seed, epoch]).permutation(len(posts))[at]])
    return batch


def score(groups: list, tasks: list[Task], reward: rewards.Reward, config: Config, judges: list,
          tokenizer) -> dict[str, float]:
    """Fill in each group's rewards; return the batch's means of them and of the lengths."""
    totals, parts, lengths, summaries = [], {name: [] for name in reward.names}, [], []
    for group, task in zip(groups, tasks):
        texts, measured = group.texts, {}
        if judges:
            found = [extract(text, opened(config)) for text in texts]
            texts = [text or "" for text in found]
            at = (task.post.document, found, task.budget, config.budget_unit)
            measured["squish"] = ensemble(judges, *at)
            if "cost" in reward.names:
                measured["cost"] = [fmean(v) for v in zip(*(cost(*judge, *at[:2]) for judge in judges))]
        n = content_lengths(group)
        total, part = reward(texts, n, task.post.reference, task.target, task.post.document, measured)
        if config.missing == "penalty" and judges:
            total = penalise(total, [not text for text in texts])
        group.rewards = torch.tensor(total)  # [G]
        totals.append(total)
        summaries.append(texts)
        lengths += n
        for name in part:
            parts[name] += part[name]
    every = [(text, task) for texts, task in zip(summaries, tasks) for text in texts]
    return {"reward": fmean(r for total in totals for r in total),
            "reward_std": fmean(float(np.std(total, ddof=1)) for total in totals),
            **{PENALTIES.get(name, name): fmean(values) for name, values in parts.items()},
            "length": fmean(lengths),
            **({"over": fmean(bool(text) and not fits(tokenizer, task.post.document, text, task.budget,
                                                      config.budget_unit) for text, task in every),
                "missing": fmean(not text for text, _ in every)} if judges else within(lengths, config.target)),
            "distinct": fmean(map(rewards.distinct, summaries)),
            "templated": rewards.templated(summaries),
            "repetition": fmean(rewards.repetition(text) for text, _ in every),
            "n_tokens": sum(int(g.mask.sum()) for g in groups)}


# --- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"train.py: {message}. See python train.py --help.\n")


def read_arguments(argv: list[str] | None) -> tuple[Config, bool, dict]:
    """argv -> (config, resume, the flags that were really given)."""
    parser = Parser(description=__doc__, usage="python train.py [--FLAG VALUE ...]", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    of_update = {f.name for f in fields(grpo.Config)}
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
        groups[f.name in of_update].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **more)
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


class Stop:
    """Ctrl-C: the first one ends the run after its step, the second one at once."""

    def __enter__(self):
        self.asked, self.before = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)

    def ask(self, *_) -> None:
        if self.asked:
            sys.exit("\nStopped at once. The last checkpoint is good; go on with --resume.")
        self.asked = True
        print("\nStopping after this step (again to stop at once) ...", flush=True)


def main(argv: list[str] | None = None) -> int:
    config, resume, given = read_arguments(argv)
    sys.stdout.reconfigure(errors="replace")  # a console that cannot show an emoji should not end the run
    try:
        check(config)
        parse_stages(config.stages)
        config, folder = open_run(config, resume, given)
        with Stop() as stop:
            train(config, folder, resume, stop)
    except (ValueError, OSError, FloatingPointError, memory.Full) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as e:
        if not memory.is_full(e):
            raise
        print("train.py: Out of memory. Lower --micro-tokens or --prompts, add --checkpointing or --lean, or take a "
              "smaller model; what was saved is good, and --resume goes on from it.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
