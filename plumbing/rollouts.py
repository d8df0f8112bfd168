"""Completions written by vLLM servers: --rollouts http://host:8000 [more]. docs/machines.md says how to start them.

A server is an engine that samples faster than this process, and one that is easily wrong without a word: it has other
weights than the policy, says log-probabilities of another distribution, or cuts what it was not told to cut. So

1. every sampling parameter is sent (one that is left out is the server's own choice), and every answer is checked;
2. before each step the server gets the weights that were just learnt;
3. then, and before the first step, the log-probabilities of one group of each server are compared with ours. A gap is
   told with the mistake that it looks like.

A server that dies or lies is dropped. Its prompts go to the others, or are sampled here, so no step is lost. Held-out
posts are summarised here, by the very weights that are saved.

With --ahead 1 the servers write the next step's completions while this one's are learnt from. When they have come,
servers get new weights, and nothing is in flight then. They are compared with the weights that wrote them, of which a
copy is kept: those that are trained have moved on.

Shapes: G completions a prompt, T completion tokens.
"""

import math
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plumbing.command import to_resume
from plumbing.groups import logprobs
from plumbing.log import say
from plumbing.server import Refused
from plumbing.staleness import weights_of_now, with_weights
from plumbing.vllm import Engine, Row

# Nats between the server's log-probabilities and ours. Two that compute in float32 differ by 3e-5 at most. bfloat16
# makes single tokens differ by 0.2, but 0.006 a token on average.
EXACT, ROUNDED = 1e-3, 0.03  # the largest gap of a token; the mean
# What a gap looks like.
RAW = "They are those of temperature 1: start it with --logprobs-mode processed_logprobs"
NO_ADAPTER = "They are those of the model without the adapter, which it does not use"
FEW_WORDS = ("No token is less likely than it should be: it draws from fewer words (top-k or top-p of the model's "
             "generation_config.json), so start it with --generation-config vllm")
UNKNOWN = "It has another model, or keeps older weights: start it on the model that the run begins with"
STALE_ADAPTER = "It was right before: an older adapter is in use"
STALE = ("It was right before, so it keeps weights of before the reload: vLLM's CPU build does so with a head that is "
         "tied to the embedding, and hybrid models (lfm2) are spoilt by reloads. Take --lora, or begin run and server "
         "on a folder with a head of its own")


def on_servers(config, folder: Path, *, act: Callable, model, tokenizer, prompt: list[int], grpo, split: Callable,
               save: Callable, save_adapters: Callable, stop=None) -> Callable:
    """A function that is called as `act`, and asks the servers of --rollouts; `act` itself where there are none.

    `act` samples here, `prompt` is the longest that may come, `grpo` the module (or whatever has its group_logprobs);
    split, save and save_adapters are those of rollout.py, model.py and lora.py; `stop` (`cli.Stop`) ends what is in
    flight when the run ends. ConnectionError where no server is of use; ValueError for an address that is none.
    """
    if not config.rollouts:
        return act
    write = (lambda path: save_adapters(model, path)) if config.lora else (lambda path: save(model, tokenizer, path))
    fleet = Fleet(config, folder, act, write, split=split, grpo=grpo)
    if stop is not None:
        stop.at_end.append(fleet.close)
    fleet.begin(model, prompt, tokenizer)
    return fleet.sample


def asked_ahead(config, step: int, total: int, stop, tasks: Callable[[], list]) -> dict:
    """What `act` is told besides: {"step", "then"}, where servers write ahead and there is a step to come, else {}.
    `tasks()` makes those of the next step."""
    if not (config.ahead and config.rollouts) or step + 1 >= total or stop.asked:
        return {}
    return {"step": step, "then": tasks}


@dataclass
class Sent:
    """Completions that are being written."""

    jobs: list[tuple]  # (server, place of the prompt)
    answers: "Answers"
    question: tuple = ()  # of what is written ahead: prompts and settings,
    step: int = 0  # the steps that the weights have learnt which write it,
    weights: Sequence[Tensor] = ()  # and those of them that are trained


class Fleet:
    """All servers that are still of use."""

    def __init__(self, config, folder: Path, act: Callable, write: Callable[[Path], object], *, split: Callable, grpo):
        """`write(folder)` saves what is trained: the model, or its adapters."""
        self.config, self.act, self.write, self.split, self.grpo = config, act, write, split, grpo
        self.engines = [Engine(url) for url in dict.fromkeys(config.rollouts)]
        self.known = tuple(self.engines)  # also those that are dropped
        for left in folder.glob("rollouts-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix="rollouts-", dir=folder)).resolve()  # the server finds it by that
        os.chmod(self.folder, 0o755)  # and may be another user
        self.remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # when the run ends
        self.n, self.alone = 0, False  # how often new weights were written; whether no server is left
        self.sent: Sent | None = None  # what is written ahead

    def begin(self, model, prompt: list[int], tokenizer) -> None:
        """Try all that a step will ask for, on the longest prompt. ConnectionError where no server is left."""
        self.each(lambda engine: engine.begin())
        if self.engines:
            self.sync()
            self.ask(model, [prompt] * len(self.engines), G=2, max_new_tokens=self.config.max_new_tokens,
                     temperature=self.config.temperature, seed=self.config.seed, tokenizer=tokenizer)
        if not self.engines:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise ConnectionError("No server of --rollouts is of use: mend one, name another, or sample on this "
                                  "machine (--rollouts without an address).")
        say(f"Completions are written by {' and '.join(engine.url for engine in self.engines)}. A server rounds by "
            f"what else it computes, so this run is not repeated or resumed bit for bit.")

    def sample(self, model, prompts: Sequence, *, step: int = 0, then: Callable | None = None, **settings) -> list:
        """What `rollout.sample` says, of settings G, max_new_tokens, temperature, seed, tokenizer and stop_text.

        `then`: to write ahead. A function -> the tasks of the next step, whose seed is one more; the model has learnt
        `step` steps. Groups that were written ahead have a version.
        """
        if settings["temperature"] == 0:  # of held-out posts
            return self.act(model, prompts, **settings)
        sent, self.sent = self.sent, None
        if sent and sent.question != (prompts, settings):  # something else is asked for now
            sent.answers.wait()
            sent = None
        if sent:
            with with_weights(model, sent.weights):
                groups = self.ask(model, prompts, sent, **settings)
            for group in groups.values():
                group.version = sent.step
        if self.engines and (then or not sent):
            self.sync()
        if not sent:
            groups = self.ask(model, prompts, **settings)
        if self.engines and then:
            asked, more = [task.prompt for task in then()], settings | {"seed": settings["seed"] + 1}
            kept = weights_of_now(model)
            self.sent = replace(self.send(model, asked, range(len(asked)), **more), question=(asked, more), step=step,
                                weights=kept)
        left = [i for i in range(len(prompts)) if i not in groups]
        if left and not self.alone:
            self.alone = True
            say("Completions are written on this machine from now on.")
        if left:
            groups |= dict(zip(left, self.act(model, [prompts[i] for i in left], **settings)))
        return [groups[i] for i in range(len(prompts))]

    def close(self) -> None:
        """The run is over: nobody waits for what is in flight, and the servers may stop writing it."""
        sent, self.sent = self.sent, None
        for engine in self.known:
            engine.hang_up()
        if sent:
            sent.answers.join(10)
        for engine in self.engines:
            engine.drop_adapter()
        self.remove()

    def sync(self) -> None:
        """Give all servers what was learnt. Nothing is in flight now: the steps of a run follow each other."""
        self.n += 1
        old, new = (self.folder / f"weights-{n}" for n in (self.n - 1, self.n))
        self.write(new)
        if self.config.lora:
            self.each(lambda engine: engine.take_adapter(new, old))
        else:
            check_whole(new / "model.safetensors")
            self.each(lambda engine: engine.take_weights(new))
        shutil.rmtree(old, ignore_errors=True)

    def send(self, model, prompts: Sequence, left: Sequence[int], *, G: int, max_new_tokens: int, temperature: float,
             seed: int, tokenizer, stop_text: str = "") -> Sent:
        """Ask the servers for the completions of some of the prompts, and wait for nothing."""
        stops = sorted(model.config.eos_token_ids)
        wish = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True,
                "stop_token_ids": stops, "stop": [stop_text] if stop_text else [], "include_stop_str_in_output": True,
                "skip_special_tokens": True, "add_special_tokens": False, "echo": False, "stream": False}

        def complete(engine: Engine, i: int) -> list[Row]:
            # Completion g is drawn with seed + g.
            return engine.complete(wish, list(map(int, prompts[i])), G, max_new_tokens, tokenizer=tokenizer,
                                   seed=(seed * len(prompts) + i) * G % 2 ** 62, words=model.config.vocab_size)

        jobs = [(self.engines[k % len(self.engines)], i) for k, i in enumerate(left)]
        return Sent(jobs, Answers(complete, jobs))

    def ask(self, model, prompts: Sequence, sent: Sent | None = None, **settings) -> dict:
        """{place of a prompt: its group}, of all prompts unless no server is left. `sent`: what was asked before."""
        groups: dict = {}
        while self.engines and len(groups) < len(prompts):
            left = [i for i in range(len(prompts)) if i not in groups]
            now, sent = sent or self.send(model, prompts, left, **settings), None
            answers = now.answers.wait()
            for engine in {engine: None for engine, _ in now.jobs}:
                mine = {i: answer for (asked, i), answer in zip(now.jobs, answers) if asked is engine}
                refused = [answer for answer in mine.values() if isinstance(answer, Refused)]
                if not refused:
                    written = {i: self.group_of(model, settings["tokenizer"], prompts[i], rows)
                               for i, rows in mine.items()}
                    refused = self.doubts(engine, model, next(iter(written.values())))
                if refused:
                    self.drop(engine, refused[0])
                else:
                    groups |= written
        return groups

    def group_of(self, model, tokenizer, prompt: Sequence[int], rows: list[Row]):
        """A server's answer as `rollout.sample` would have given it."""
        G, T = len(rows), max(len(row.tokens) for row in rows)
        tokens, mask = torch.zeros(G, T, dtype=torch.long), torch.zeros(G, T, dtype=torch.bool)  # [G, T] each
        logp = torch.zeros(G, T)  # [G, T]
        for g, row in enumerate(rows):
            n = len(row.tokens)
            tokens[g, :n], logp[g, :n], mask[g, :n] = torch.tensor(row.tokens), torch.tensor(row.logp), True
        stopped = torch.tensor([row.stopped for row in rows])  # [G]
        ending = torch.tensor([row.ending for row in rows]) if rows[0].spelt else None  # [G]
        device = model.embed_tokens.weight.device
        tokens, mask, logp, stopped = (x.to(device) for x in (tokens, mask, logp, stopped))
        ending = None if ending is None else ending.to(device)  # [G]
        return self.split([torch.as_tensor(prompt, dtype=torch.long)], G, tokenizer, tokens=tokens, mask=mask,
                          logp=logp, stopped=stopped, ending=ending)[0]

    def doubts(self, engine: Engine, model, group) -> list[Refused]:
        """What a group's log-probabilities say against the server, if anything."""
        theirs, mask = group.logp.cpu(), group.mask.cpu()  # [G, T] each
        ours = logprobs(model, group, self.config, self.grpo)[0]  # [G, T]
        gap = (theirs - ours)[mask]  # [sampled tokens]
        if fits(gap, engine.limits or (EXACT, EXACT)):
            engine.limits = engine.limits or (EXACT, EXACT)
            return []
        trap = looks_like(gap, {name: (theirs - logp)[mask] for name, logp in self.mistaken(model, group)})
        if engine.limits is None and not trap and gap.abs().mean() <= ROUNDED:
            engine.limits = (math.inf, ROUNDED)
            say(f"{engine.url} rounds: its log-probabilities differ from ours by {gap.abs().mean():.4f} a token, as in "
                f"bfloat16. Small mistakes cannot be told from that. Started with --dtype float32, they can.")
            return []
        trap = trap or (UNKNOWN if engine.limits is None else STALE_ADAPTER if self.config.lora else STALE)
        return [Refused(f"its log-probabilities differ from ours by {gap.abs().max():.2g} at most and "
                        f"{gap.abs().mean():.2g} a token. {trap}")]

    def mistaken(self, model, group) -> Iterator[tuple[str, Tensor]]:
        """Log-probabilities [G, T] that a server says by mistake: what to do about it, and the numbers."""
        yield RAW, logprobs(model, group, replace(self.config, temperature=1.0), self.grpo)[0]
        if self.config.lora:
            with model.adapters_off():
                base = logprobs(model, group, self.config, self.grpo)[0]  # [G, T]
            yield NO_ADAPTER, base

    def each(self, work: Callable) -> None:
        """work(engine) of all at once; those that refuse are dropped."""
        for engine, answer in zip(list(self.engines), together(work, [(engine,) for engine in self.engines])):
            if isinstance(answer, Refused):
                self.drop(engine, answer)

    def drop(self, engine: Engine, why: Refused) -> None:
        self.engines.remove(engine)
        say(f"{engine.url} is dropped: {str(why).rstrip('.')}. " + (
            "Its prompts go to the other servers." if self.engines else "No other server is left."))


def fits(gap: Tensor, limits: tuple[float, float]) -> bool:
    """Whether the largest and the mean of |gap| are within the limits. NaN is not."""
    return bool(gap.abs().max() <= limits[0] and gap.abs().mean() <= limits[1])


def looks_like(gap: Tensor, others: dict[str, Tensor]) -> str:
    """The mistake that makes such a gap (theirs - ours), in a sentence, or "". `others`: mistake -> the gap to the
    numbers that a server says by it."""
    for mistake, other in others.items():
        if other.abs().mean() < gap.abs().mean() / 3:
            return mistake
    return FEW_WORDS if gap.min() >= -EXACT else ""


def check_whole(file: Path) -> None:
    """A server that reloads a broken file says so, looks healthy, and dies of the next request."""
    try:
        with safe_open(file, framework="pt") as f:
            f.keys()
    except (OSError, SafetensorError) as e:
        raise OSError(f"{file} was not written whole ({e}): is the disk full? The last checkpoint is good: "
                      f"{to_resume(file.parents[2])} goes on from it.") from e


class Answers:
    """work(*job) of all jobs at once, each in a thread. Who ends the run at once waits for none of them."""

    def __init__(self, work: Callable, jobs: Sequence[tuple]):
        self.found: list = [None] * len(jobs)
        self.threads = [threading.Thread(target=self.attempt, args=(k, work, job), daemon=True, name="rollouts")
                        for k, job in enumerate(jobs)]
        for thread in self.threads:
            thread.start()

    def attempt(self, k: int, work: Callable, job: tuple) -> None:
        try:
            self.found[k] = work(*job)
        except Exception as e:  # for the thread that waits
            self.found[k] = e

    def join(self, seconds: float | None = None) -> None:
        for thread in self.threads:
            thread.join(seconds)

    def wait(self) -> list:
        """[work(*job), or the Refused that it raised] of all jobs."""
        self.join()
        for answer in self.found:
            if isinstance(answer, Exception) and not isinstance(answer, Refused):
                raise answer
        return self.found


def together(work: Callable, jobs: Sequence[tuple]) -> list:
    """[work(*job), or the Refused that it raised] of all jobs at once."""
    return Answers(work, jobs).wait()
