"""Teach a language model to write crisp summaries, by GRPO.

    python train.py                                              # the embedded model and posts, about two minutes
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data posts.jsonl --target 64 --lr 2e-6
    python train.py --run tiny-1 --resume                        # go on where a run was stopped, or killed

A stage is a reward and a number of steps, "length:80"; stages follow each other, and one stage is a joint run. All
that happens is in runs/NAME: config.json, metrics.jsonl (a line a step), eval.jsonl, samples.jsonl, checkpoint/, model/
and curves.png. Every number in there is explained in README.md.
"""

import argparse
import copy
import dataclasses
import json
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
import rewards
from eval import content_lengths, describe, draw_curves, evaluate, read_lines, within
from grpo import flag
from model import load, read_json, save, write_file
from rollout import TINY, choose_template, load_split, sample, tokenize
from words import find_wordnet


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
    template: str = flag("", "prompt template: chatml, qwen3 (thinking off) or plain; empty: whatever fits the model")
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
    dtype: str = flag("float32", "of the weights that are trained; bfloat16 forgets small updates",
                      choices=("float32", "bfloat16"))
    device: str = flag("", "cpu, cuda or mps; empty: cuda where there is one, else cpu")


@dataclass(frozen=True)
class Stage:
    number: int  # from 1
    reward: rewards.Reward
    first: int  # its first step, counted from 0
    end: int  # one past its last


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


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(config: Config, folder: Path, resume: bool, stop: "Stop") -> None:
    """The algorithm box of the paper: sample groups, score them, update, and say what happened."""
    begun = time.time()
    stages = parse_stages(config.stages)
    model, tokenizer, posts, held_out = prepare(config, stages)
    reference = copy.deepcopy(model).requires_grad_(False) if config.beta > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), eps=1e-8,
                                  weight_decay=config.weight_decay, fused=True)
    step = load_checkpoint(folder, model, optimizer) if resume else 0
    log = Log(folder, config, stages, step)
    log.begin(model, posts, held_out)

    for stage in stages:
        if step >= stage.end:
            continue
        if step == stage.first:
            log.evaluation(step, stage.number - 1, model, tokenizer, held_out)
        if config.stage_ref == "previous" and reference is not None and stage.number > 1:
            reference = stage_reference(folder / "checkpoint" / f"stage-{stage.number}.pt", model, step == stage.first)
        while step < stage.end:
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(step, stages[-1].end, config)
            clock = time.time()
            batch = batch_of(posts, step, config)
            groups = sample(model, [prompt for _, prompt in batch], config.group, config.max_new_tokens,
                            config.temperature, seed=config.seed * 1_000_003 + step, tokenizer=tokenizer)
            line = score(groups, [post for post, _ in batch], stage.reward, config.target)
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
    log.evaluation(step, len(stages), model, tokenizer, held_out)
    save(model, tokenizer, folder / "model")
    log.finish(time.time() - begun)


def prepare(config: Config, stages: list[Stage]):
    """Model, tokenizer, training posts as (post, prompt tokens) pairs, and held-out posts."""
    model, tokenizer = load(TINY if config.model == "tiny" else config.model, config.device or None,
                            getattr(torch, config.dtype))
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer.json: copy it there from the model it was made of.")
    model.checkpointing = config.checkpointing
    room = model.config.max_position_embeddings - config.max_new_tokens
    if room < 1:
        raise ValueError(f"{config.max_new_tokens} new tokens leave no room for a prompt in the model's context of "
                         f"{model.config.max_position_embeddings}: lower --target or --max-new-tokens.")
    template = config.template or choose_template(model, tokenizer)
    pairs = []
    for posts in load_split(config.data, config.eval_data, config.max_posts, config.min_chars):
        prompts = [tokenize(tokenizer, post, template, config.target) for post in posts]
        pairs.append([(post, prompt) for post, prompt in zip(posts, prompts)
                      if not config.max_prompt or len(prompt) <= config.max_prompt])
        for post, prompt in pairs[-1]:
            if len(prompt) > room:
                raise ValueError(f"Post {post.id} has a prompt of {len(prompt)} tokens; with {config.max_new_tokens} "
                                 f"new ones it does not fit into the model's context of "
                                 f"{model.config.max_position_embeddings}. Leave such posts out: --max-prompt {room}.")
    train_pairs, held_out = pairs[0], [post for post, _ in pairs[1]]
    if len(train_pairs) < config.prompts or not held_out:
        raise ValueError(f"{len(train_pairs)} posts to train on and {len(held_out)} held out are too few for batches "
                         f"of {config.prompts}: give more posts, lower --prompts or raise --max-prompt.")
    compared = sorted({name for s in stages for name in s.reward.names} & rewards.NEED_REFERENCE)
    if compared and not any(post.reference for post, _ in train_pairs):
        raise ValueError(f"{config.data} has no summaries for {', '.join(compared)} to compare with: call their field "
                         f"'summary', or train with --stages length:N.")
    return model, tokenizer, train_pairs, held_out[:config.eval_posts]


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


PENALTIES = {"length": "length_penalty", "repetition": "repetition_penalty"}  # rewards logged under another name


def score(groups: list, posts: list, reward: rewards.Reward, target: int) -> dict[str, float]:
    """Fill in each group's rewards; return the batch's means of them and of the lengths."""
    totals, parts, lengths = [], {name: [] for name in reward.names}, []
    for group, post in zip(groups, posts):
        n = content_lengths(group)
        total, part = reward(group.texts, n, post.reference, target, post.document)
        group.rewards = torch.tensor(total)  # [G]
        totals.append(total)
        lengths += n
        for name in part:
            parts[name] += part[name]
    return {"reward": fmean(r for total in totals for r in total),
            "reward_std": fmean(float(np.std(total, ddof=1)) for total in totals),
            **{PENALTIES.get(name, name): fmean(values) for name, values in parts.items()},
            "length": fmean(lengths), **within(lengths, target),
            "distinct": fmean(rewards.distinct(group.texts) for group in groups),
            "templated": rewards.templated([group.texts for group in groups]),
            "repetition": fmean(rewards.repetition(text) for group in groups for text in group.texts),
            "n_tokens": sum(int(g.mask.sum()) for g in groups)}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """All that a run is: weights, moments, step. Posts and completions follow from the seed and the step."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_file(folder / "checkpoint" / "state.pt", lambda part: torch.save(state, part))


def read_state(path: Path, device) -> dict:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a broken pickle raises whatever it likes
        raise ValueError(f"{path} cannot be read ({e}): delete {path.parent} to start this run again.") from e


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Bring model and optimizer to where the run was left; returns the step. 0 where it never came to a checkpoint."""
    path = folder / "checkpoint" / "state.pt"
    if not path.exists():
        return 0
    state = read_state(path, model.embed_tokens.weight.device)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except (RuntimeError, KeyError, ValueError) as e:
        raise ValueError(f"{path} does not belong to the model that config.json names: put that one back, or start "
                         f"another run.") from e


def stage_reference(path: Path, model, begins: bool):
    """The policy as it was when the stage began, frozen: copied and saved then, read again when a run is resumed."""
    reference = copy.deepcopy(model).requires_grad_(False)
    if begins:
        write_file(path, lambda part: torch.save(reference.state_dict(), part))
    else:
        reference.load_state_dict(read_state(path, model.embed_tokens.weight.device))
    return reference


# --- what a person sees -----------------------------------------------------------------------------------------------


# The progress line: key of metrics.jsonl, title, width, format.
COLUMNS = (("reward", "reward", 7, "{:.3f}"), ("length", "length", 6, "{:.1f}"), ("within_2", "±2", 5, "{:.0%}"),
           ("within_10pct", "±10%", 5, "{:.0%}"), ("kl", "kl", 6, "{:.3f}"), ("entropy", "entropy", 7, "{:.2f}"),
           ("distinct", "distinct", 8, "{:.2f}"), ("templated", "templ", 5, "{:.0%}"),
           ("clip_frac", "clip", 5, "{:.0%}"), ("flat_groups", "flat", 5, "{:.0%}"), ("grad_norm", "grad", 5, "{:.2f}"),
           ("logp_gap", "gap", 6, "{:.0e}"), ("tokens_per_s", "tok/s", 6, "{:.0f}"))


class Log:
    """The run's files and the lines on the screen."""

    def __init__(self, folder: Path, config: Config, stages: list[Stage], step: int):
        self.folder, self.config, self.stages, self.total = folder, config, stages, stages[-1].end
        self.recent: list[dict] = []
        self.shown = 0
        self.first = self.last = step
        if not (folder / "config.json").exists():
            # METEOR's values depend on whether there are synonyms, so a run says where it got them.
            text = json.dumps(dataclasses.asdict(config) | {"wordnet": str(find_wordnet() or "")}, indent=2) + "\n"
            write_file(folder / "config.json", lambda part: part.write_text(text))
        # What was logged after the checkpoint is about to happen again, and so is an evaluation that was not finished.
        kept = {name: [row for row in read_lines(folder / f"{name}.jsonl") if row["step"] <= step]
                for name in ("metrics", "eval", "samples")}
        self.rows, self.warned = kept["metrics"], False
        self.evaluated = {(row["step"], row["stage"]) for row in kept["eval"]}
        kept["samples"] = [row for row in kept["samples"] if (row["step"], row["stage"]) in self.evaluated]
        for name, rows in kept.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_file(folder / f"{name}.jsonl", lambda part, text=text: part.write_text(text))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def append(self, name: str, row: dict) -> None:
        path = self.folder / f"{name}.jsonl"
        try:
            with open(path, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"Could not write {path} ({e.strerror}): the last checkpoint is good. Free some space, then "
                          f"go on with --resume.") from e

    def begin(self, model, posts: list, held_out: list) -> None:
        c, n = self.config, sum(p.numel() for p in model.parameters())
        self.say(f"{c.model}: {n:,} parameters, {model.config.model_type}. {len(posts):,} posts to train on, "
                 f"{len(held_out)} held out. {self.total} steps of {c.prompts} posts x {c.group} completions, target "
                 f"{c.target} tokens. Everything goes to {self.folder}.")
        if find_wordnet() is None:
            self.say("There is no WordNet on this machine (WNSEARCHDIR, or apt install wordnet-base): METEOR matches "
                     "equal words and stems, no synonyms.")
        if self.first:
            self.say(f"Resumed after step {self.first}.")

    def evaluation(self, step: int, stage: int, model, tokenizer, held_out: list) -> None:
        """Evaluate once per (step, stage), even when the run was killed right after."""
        if (step, stage) not in self.evaluated:
            r = evaluate(model, tokenizer, held_out, self.config)
            summaries = r.pop("summaries")
            for post, row in zip(held_out[:5], summaries):
                self.append("samples", {"step": step, "stage": stage, "document": post.document,
                                        "reference": post.reference, **row})
            self.append("eval", {"step": step, "stage": stage, **r})
        self.say(f"  held out, greedy, {'before training' if stage == 0 else f'after stage {stage}'}: "
                 + describe(read_lines(self.folder / "eval.jsonl")[-1]))
        self.shown = 0

    def step(self, step: int, stage: Stage, line: dict, seconds: float) -> None:
        """One line in metrics.jsonl for every step; one on the screen for every few, their mean."""
        row = {"step": step, "stage": stage.number, **line, "kl": line.get("kl"),
               "tokens_per_s": line["n_tokens"] / seconds, "seconds": seconds}
        del row["n_tokens"]
        self.append("metrics", row)
        self.recent.append(row)
        self.rows.append(row)
        self.last = step
        self.watch()
        if step % self.config.print_every and step != stage.end and step != self.first + 1:
            return
        parts = [PENALTIES.get(n, n) for n in stage.reward.names if n != "length"]
        columns = [COLUMNS[0], *((n, n, max(7, len(n)), "{:.3f}") for n in parts), *COLUMNS[1:]]
        if self.shown % 20 == 0:
            head = "".join(f"{title:>{w + 1}}" for _, title, w, _ in columns)
            self.say(f"\nstage {stage.number}: {stage.reward.expression}\n  step{head}   left")
        self.shown += 1
        text = f"{step:6d}"
        for name, _, w, form in columns:
            values = [row[name] for row in self.recent if row[name] is not None]
            value = (max if name == "logp_gap" else fmean)(values) if values else None
            text += f"{'-' if value is None else form.format(value):>{w + 1}}"
        left = fmean(row["seconds"] for row in self.rows[-20:]) * (self.total - step)
        self.say(f"{text}  {int(left // 60):2d}:{int(left % 60):02d}")
        self.recent.clear()

    def watch(self) -> None:
        """Say it once when the completions become templates: a policy that games its reward begins with that."""
        if self.warned or len(self.rows) < 20:
            return
        (d0, t0, r0), (d1, t1, r1) = ([fmean(row[name] for row in rows) for name in (
            "distinct", "templated", "repetition")] for rows in (self.rows[:10], self.rows[-10:]))
        if d1 < 0.5 * d0 or t1 > t0 + 0.15 or r1 > r0 + 0.05:
            self.warned = True
            self.say(f"  Completions become alike. Distinct word pairs in a group: {d0:.0%} at first, now {d1:.0%}; "
                     f"phrases said of several posts: {t0:.0%}, now {t1:.0%}; twice in one: {r0:.0%}, now {r1:.0%}. "
                     f"Read some; more --beta or --temperature, or 0.1*distinct in the reward, can help.")

    def finish(self, seconds: float) -> None:
        """Curves, and what the run did to the first held-out posts."""
        evals, samples = read_lines(self.folder / "eval.jsonl"), read_lines(self.folder / "samples.jsonl")
        draw_curves(self.folder, self.config.target, [stage.end for stage in self.stages])
        first = [row for row in samples if row["stage"] == 0]
        last = [row for row in samples if row["stage"] == evals[-1]["stage"]]
        for before, after in list(zip(first, last))[:3]:
            self.say(f"\n  post       {before['document']}\n  reference  {before['reference']}\n"
                     f"  before     {before['summary']} [{before['length']} tokens]\n"
                     f"  after      {after['summary']} [{after['length']} tokens]")
        self.say(f"\nheld-out greedy summaries, target {self.config.target} tokens"
                 f"\n  before  {describe(evals[0])}\n  after   {describe(evals[-1])}"
                 f"\nDone in {int(seconds // 60)}:{int(seconds % 60):02d}. Look at {self.folder / 'curves.png'}; the "
                 f"model is in {self.folder / 'model'}.")


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
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "not enough memory" not in str(e):
            raise
        print("train.py: Out of memory. Lower --micro-tokens or --prompts, or add --checkpointing.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
