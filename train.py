"""Teach a language model to write crisp summaries, by GRPO.

    python train.py                                              # the embedded model and posts, about two minutes
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data mlabonne/smoltldr --target 64 --lr 2e-6
    python train.py --stages squish:100 --budgets 0.1 --lora 16 --lr 1e-3     # no reference summaries: SQUISH
    python train.py --run tiny-1 --resume                        # go on where a run was stopped, or killed

A stage is a reward and a number of steps, "length:80"; stages follow each other, and one stage is a joint run. All
that happens is in runs/NAME: config.json, metrics.jsonl (a line a step), eval.jsonl, samples.jsonl, checkpoint/, model/
and, to look at, report.html and curves.png. Every number in there is explained in docs/read-your-run.md.

Shapes: B prompts (posts) a step, G completions of each, P prompt tokens.
"""

import copy
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

import grpo
import task
from config import Config, Stage, check, parse_stages, reading, reward_names
from eval import evaluate, fit_posts
from lora import add_lora, merge_lora, save_adapters
from model import Transformer, load, save
from plumbing import memory, ranks
from plumbing.adamw import AdamW, spare_norms
from plumbing.checkpoint import kept_when_alone, load_checkpoint, made_of, save_checkpoint, stage_copy
from plumbing.cli import Stop, complain, open_console, open_run, read_arguments
from plumbing.command import to_resume
from plumbing.curves import draw_curves
from plumbing.device import Lies, check_device
from plumbing.exploded import explained
from plumbing.folder import can_stop, with_words
from plumbing.groups import keeping_groups
from plumbing.log import Log
from plumbing.posts import TINY, Post, load_split, say_references
from plumbing.rehearsal import rehearse_largest_step
from plumbing.rollouts import asked_ahead, on_servers
from plumbing.staleness import renew
from plumbing.teacher import load_teacher
from rewards import NEED_MODEL, NEED_REFERENCE, NEED_TARGET
from rollout import sample, split


def train(config: Config, folder: Path, resume: bool, stop: Stop) -> None:
    """Load everything, rehearse the largest step, run the stages, and keep what was learnt in `folder`.

    Three models take part. The policy writes and learns. The reference model is the policy as it was at the start: the
    KL in the loss holds the policy near it, so that it does not forget how to write. The scorers measure SQUISH, where
    a stage is paid by it. The last two are frozen. Under LoRA all three share one set of weights, unless --references
    or --stage-ref previous asks for others. With --teacher a fourth, frozen too, says how likely each token is to it.
    """
    begun = time.monotonic()
    mlx = import_module("mlx_grpo") if config.backend == "mlx" else None  # not everybody has MLX
    stages = parse_stages(config.stages)
    device = config.backend if mlx else config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    free = memory.cap_memory(device, ranks.on_this_machine())
    # From here on, what cannot work is refused before the first step: posts that are too long, a model that is too big.
    model, tokenizer = load_policy(config)
    posts, held_out, longest = choose_posts(config, stages, model, tokenizer)
    ref_model, scorers = frozen_models(config, stages, model, tokenizer)
    teacher = load_teacher(config, model, tokenizer, load_with_tokenizer)
    begun_with = made_of(folder, posts, held_out, longest, {
        "base model": model if config.lora else ref_model, "teacher": teacher,
        **{f"model {n} that measures squish": scorer for n, (scorer, _) in enumerate(scorers, 1)}})
    make_fast_or_small(config, model, ref_model)
    check_device(model, min(longest, key=len), sample, grpo.group_logprobs)  # does nothing on the CPU
    if not mlx:  # a step in torch says nothing of MLX's memory
        rehearse_largest_step(model, ref_model, ranks.largest_share(longest), config, free, grpo, teacher)
    optimizer = make_optimizer(config, model)
    # A run is its weights, the optimizer's moments and a step; the rest follows from its seed. It resumes bit for bit.
    step = load_checkpoint(folder, model, optimizer) if resume else 0
    act, learn = mlx.take_over(model, optimizer, min(longest, key=len)) if mlx else (sample, grpo.update)
    act = on_servers(config, folder, act=ranks.sharing(act, split), model=model, tokenizer=tokenizer, grpo=grpo,
                     prompt=max(longest, key=len), split=split, save=save, save_adapters=save_adapters, stop=stop)
    log = Log(folder, config, stages, step, task.describe_goal(config), begun_with)
    log.begin(model, posts, held_out)
    # Greedy summaries of posts that the policy never learns from, scored by the last stage's reward.
    held_out_summaries = partial(evaluate, model, tokenizer, held_out, config, scorers, act=act)

    for stage in stages:
        if step >= stage.end:
            continue  # done before the run was resumed
        if step == stage.first:
            log.evaluation(step, stage.number - 1, held_out_summaries, held_out)
        # The KL is to the model that the run began with, or to the one that this stage began with.
        if config.stage_ref == "previous" and ref_model is not None and stage.number > 1:
            ref_model = frozen_copy_of_stage(folder, model, stage, begins=step == stage.first)
        step = run_stage(config, folder, stage, step, model=model, ref_model=ref_model, tokenizer=tokenizer,
                         posts=posts, scorers=scorers, optimizer=optimizer, total=stages[-1].end, log=log, stop=stop,
                         act=act, learn=learn, teacher=teacher)
        if stop.asked:
            save(model, tokenizer, folder / "model")
            return log.say(f"Stopped after step {step}. Go on with: {to_resume(config.run)}")

    log.evaluation(step, len(stages), held_out_summaries, held_out)
    save(model, tokenizer, folder / "model")
    if config.lora:
        save_adapters(model, folder / "adapter", TINY if config.model == "tiny" else config.model)
    draw_curves(folder, config.target, [stage.end for stage in stages])
    log.finish(time.monotonic() - begun, memory.peak(device))


def run_stage(config: Config, folder: Path, stage: Stage, step: int, *, model, ref_model, tokenizer, posts, scorers,
              optimizer, total: int, log: Log, stop: Stop, act, learn, teacher=None) -> int:
    """The algorithm box of the paper (Shao et al. 2024, algorithm 1), from `step` to the stage's end, which is returned
    if nobody stops the run. `act` and `learn` are `sample` and `update`, of torch, MLX or servers."""
    learn = partial(learn, teacher=teacher) if teacher is not None else learn  # MLX's update takes none
    while step < stage.end:
        clock = time.monotonic()
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, total, config)

        # 1. B posts, each with a prompt that asks for a summary of a certain size. Every epoch has an order of its own.
        tasks = task.tasks_of(posts, step, config, tokenizer)
        # 2. The policy writes G summaries of each. The same temperature divides the logits here and in the loss: else
        #    the policy that is trained would not be the one that wrote.
        wish = dict(G=config.group, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                    seed=config.seed * 1_000_003 + step, tokenizer=tokenizer,
                    stop_text=task.CLOSE if task.has_tag(config.template) else "")
        # With --ahead, servers write the next step's summaries while this one's are learnt from.
        ahead = asked_ahead(config, step, total, stop, partial(task.tasks_of, posts, step + 1, config, tokenizer))
        groups = act(model, [each.prompt for each in tasks], **wish, **ahead)
        ages = renew(groups, step, config, partial(sample, model, **wish))  # what is too old is written anew
        # 3. Each summary gets a number. Any function of the text will do, for no gradient goes through it: the loss
        #    asks only how much better than its own group a summary was.
        # Some groups are kept for the report; if this fails, all texts; if a reward's server is gone, a checkpoint.
        kept = keeping_groups(log, step + 1, groups, model=model, ref_model=ref_model, tokenizer=tokenizer, grpo=grpo,
                              teacher=teacher)
        with kept, kept_when_alone(folder, model, optimizer, step):
            line = task.score(groups, tasks, stage.reward, config, tokenizer, scorers)
            # 4. Summaries that did better than their own group become likelier, the others less likely: not too far
            #    from the policy that wrote them (the clip), nor from the reference model (the KL).
            with explained(folder, model, tokenizer, optimizer, groups=groups, config=config, step=step, save=save):
                line |= ages | learn(model, ref_model, groups, optimizer, config)

        # 5. Say what happened, and now and then write down all that is needed to go on from here.
        step += 1
        line["n_tokens"] = sum(int(group.mask.sum()) for group in groups)
        log.step(step, stage, line, time.monotonic() - clock)
        ranks.stop_together(stop)  # under torchrun
        if stop.asked or step % config.save_every == 0 or step == stage.end:
            save_checkpoint(folder, model, optimizer, step)
        if stop.asked:
            break
    return step


def learning_rate(step: int, total: int, config: Config) -> float:
    """A line down from --lr to about `lr_end` of it, times a warm-up from 1/warmup to 1.

    AdamW's first moments are poor estimates, and late steps only polish. A pure function of the step: a resumed run
    needs no scheduler's state.
    """
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * (1 - (1 - config.lr_end) * step / total)


# --- before the first step --------------------------------------------------------------------------------------------


def load_policy(config: Config):
    """-> (model, tokenizer): the policy, with adapters where --lora asks for them.

    Adapters add nothing at first (their B is 0), so the run begins at the base model either way.
    """
    model, tokenizer = load_with_tokenizer(config.model, config)
    can_stop(config.model, model)
    if config.lora:
        targets = [name for name in config.lora_targets.split(",") if name]
        add_lora(model, config.lora, config.lora_alpha or 2.0 * config.lora, targets, config.seed)
    model.checkpointing = config.checkpointing
    return model, tokenizer


def load_with_tokenizer(name: str, config: Config):
    # Weights are float32 unless --lean: at a learning rate of 1e-6 nearly all updates would vanish in bfloat16.
    dtype = torch.bfloat16 if config.lean else torch.float32
    return with_words(name, *load(TINY if name == "tiny" else name, config.device or None, dtype))


def choose_posts(config: Config, stages: list[Stage], model, tokenizer) -> tuple[list[Post], list[Post], list]:
    """-> (posts to train on, held-out posts, the B longest prompts that may come).

    Settles what --template and --max-new-tokens leave open, and refuses what cannot work with these posts.
    """
    names = reward_names(stages)
    config.template = config.template or task.choose_template(model, tokenizer, names)
    unit_of = {"chars": "char_length", "tokens": "length"}
    for name in names & NEED_TARGET:
        if task.has_budget(config.template) and not name.startswith(unit_of[config.budget_unit]):
            raise ValueError(f"--stages: '{name}' does not go with budgets of {config.budget_unit}: take "
                             f"{unit_of[config.budget_unit]}, whose target is then the budget.")
    splits = load_split(config.data, config.eval_data, split=config.split, **reading(config))
    (posts, prompts), (held_out, _) = fit_posts(model, tokenizer, splits, config)
    if len(posts) < config.prompts or not held_out:
        raise ValueError(f"{len(posts)} posts to train on and {len(held_out)} held out are too few for batches "
                         f"of {config.prompts}: give more posts, lower --prompts or raise --max-prompt.")
    say_references(posts, held_out, sorted(names & NEED_REFERENCE), config.data)
    return posts, held_out[:config.eval_posts], sorted(prompts, key=len)[-config.prompts:]


def frozen_models(config: Config, stages: list[Stage], model, tokenizer) -> tuple:
    """-> (the model that the KL holds to, or None; the (model, tokenizer) pairs that measure squish and cost, if any).

    By default both are the policy as it is now, before its first step, and they never move: a frozen copy, or under
    LoRA the policy itself with its adapters off. --references names other scorers.
    """
    measured = not NEED_MODEL.isdisjoint(reward_names(stages))
    names = [name for name in config.references.split(",") if name and measured]
    start = None
    if config.beta > 0 or measured and not names:
        start = model if config.lora else copy.deepcopy(model).requires_grad_(False)
    scorers = [(start, tokenizer)] if measured and not names else []
    for name in names:
        scorer, words = load_with_tokenizer(name, config)
        scorers.append((scorer.requires_grad_(False), words))
    return start if config.beta > 0 else None, scorers


def frozen_copy_of_stage(folder: Path, model: Transformer, stage: Stage, begins: bool) -> Transformer:
    """The policy as it was when the stage began: the reference model under --stage-ref previous."""
    ref_model = stage_copy(folder / "checkpoint" / f"stage-{stage.number}.pt", model, begins)
    merge_lora(ref_model)  # its adapters are part of it: they must not go off with the policy's
    return ref_model.requires_grad_(False)


def make_fast_or_small(config: Config, model: Transformer, ref_model: Transformer | None) -> None:
    """--compile, or a heap that gives back what is free. Neither changes a result beyond rounding."""
    if config.compile:
        for layer in {*model.layers, *(ref_model.layers if ref_model else ())}:
            layer.compile(dynamic=True)
    elif config.checkpointing:
        memory.tidy(model)  # not when compiled: torch.compile cannot look into what it calls


def make_optimizer(config: Config, model: Transformer) -> torch.optim.Optimizer:
    """AdamW over what is trained: all weights, or under LoRA the adapters.

    Its second moment is a mean over about 100 steps (0.99): torch's 0.999, over 1,000, would outlast a run of 220.
    --lean keeps weights and moments in bfloat16 and needs an AdamW that rounds at random, or small updates would be
    lost (plumbing/adamw.py). Adapters are float32 even then, so torch's own serves them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = spare_norms(trained) if config.weight_decay else trained
    if config.lean and not config.lora:
        return AdamW(groups, config.lr, weight_decay=config.weight_decay, seed=config.seed)
    fused = trained[0].device.type in ("cpu", "cuda") or None  # None: whatever torch has for this device
    return torch.optim.AdamW(groups, config.lr, (0.9, 0.99), 1e-8, config.weight_decay, fused=fused)


def main(argv: list[str] | None = None) -> int:
    """The command -> its exit code. What a user can mend is one sentence on the screen and not a traceback."""
    config, resume, given = read_arguments(Config, argv, __doc__.partition("\nShapes")[0])
    open_console()
    try:
        check(config)
        parse_stages(config.stages)
        with ranks.joined(), open_run(config, resume, given) as (config, folder), Stop(folder) as stop:
            train(config, folder, resume, stop)
    except (ValueError, OSError, FloatingPointError, ImportError, memory.Full, Lies, ranks.Lost) as e:
        return complain(str(e))
    except (RuntimeError, MemoryError) as e:
        if not memory.is_full(e):
            raise
        return complain(f"Out of memory. A new run can take fewer --prompts, --lean or a smaller model. A run with a "
                        f"checkpoint goes on from it, with --checkpointing and a lower --micro-tokens beside: "
                        f"{to_resume(config.run)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# Next: rollout.py, where the completions come from
