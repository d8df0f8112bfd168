"""Teach a language model to write crisp summaries, by GRPO.

    python train.py                                              # the embedded model and posts, about two minutes
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data mlabonne/smoltldr --target 64 --lr 2e-6
    python train.py --stages squish:100 --lora 16 --lr 1e-3      # no reference summaries: SQUISH, with a LoRA policy
    python train.py --run tiny-1 --resume                        # go on where a run was stopped, or killed

A stage is a reward and a number of steps, "length:80"; stages follow each other, and one stage is a joint run. All
that happens is in runs/NAME: config.json, metrics.jsonl (a line a step), eval.jsonl, samples.jsonl, checkpoint/, model/
and curves.png. Every number in there is explained in README.md.
"""

import copy
import dataclasses
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

import grpo
import rewards
from config import Config, Stage, budgets_of, check, open_run, parse_stages, read_arguments
from eval import ask, content_lengths, opened, room_for, within
from lora import add_lora, save_adapters
from model import load, save
from plumbing import memory
from plumbing.adamw import AdamW
from plumbing.checkpoint import load_checkpoint, save_checkpoint, stage_reference
from plumbing.log import PENALTIES, Log
from plumbing.posts import TINY, Post, load_split
from rollout import sample
from squish import CLOSE, cost, cut, ensemble, extract, fits, penalise
from task import choose_template, tokenize


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
    fused = trained[0].device.type in ("cpu", "cuda") or None  # None: whatever torch has for this device
    return torch.optim.AdamW(trained, config.lr, (0.9, 0.99), 1e-8, config.weight_decay, fused=fused)


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
    config, resume, given = read_arguments(argv, __doc__)
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
