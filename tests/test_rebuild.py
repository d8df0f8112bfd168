"""Rebuild it: ten functions go and come back, and each classic mistake is told apart from what is right.

The wrong bodies are the mistakes that people make. Each is right but for one thing, and the check's message must speak
of that thing. The plain bodies are those of a reader: not ours, slower, and they hold.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
import metrics
import model
import rewards
import rollout
from studies import rebuild

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"grpo": grpo, "metrics": metrics, "model": model, "rewards": rewards, "rollout": rollout}


def put(monkeypatch, name, body):
    """Another function in the place of one of the ten."""
    *owner, last = name.split(".")
    place = MODULES[owner[0]]
    for inner in owner[1:]:
        place = getattr(place, inner)
    monkeypatch.setattr(place, last, body)


# --- plain bodies, and what can go wrong in them: `but` names the one mistake -----------------------------------------


def length_penalty(but=None):
    def body(n_tokens, target):
        if target <= 0 and but != "no refusal":
            raise ValueError("a target is positive")
        if but == "max for abs":
            return -max(n_tokens - target, 0) / target
        if but == "sign":
            return (n_tokens - target) / target
        return -abs(n_tokens - target) / (1 if but == "tokens" else target)
    return body


def rouge_l(but=None):
    def body(candidate, reference):
        a, b = metrics._tokens(candidate), metrics._tokens(reference)
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longer = 0 if but == "substring" else max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
        lcs = max(map(max, table))
        if but == "bag of words":
            lcs = sum(min(a.count(word), b.count(word)) for word in set(a))
        if but == "greedy":
            lcs, at = 0, 0
            for word in a:
                if word in b[at:]:
                    lcs, at = lcs + 1, b.index(word, at) + 1
        if not lcs:
            return 0.0
        return lcs / len(b) if but == "recall" else 2 * lcs / (len(a) + len(b))
    return body


def advantages(but=None):
    def body(rewards, kind="group", weights=None, floor=0.05):
        if kind not in grpo.ADVANTAGES:
            raise ValueError("unknown")
        r = rewards.double()
        if kind == "gdpo":
            parts = [body(r[..., k]).double() * w for k, w in enumerate(weights)]
            total = sum(parts)
            return (total if but == "summed, not normalised" else total / (total.std() + 1e-4)).float()
        a = r - (r.mean() if but == "ungrouped" else r.mean(1, keepdim=True))
        std = r.std(1, keepdim=True, unbiased=but != "biased")
        a = {"mean": a, "group": a / (std + 1e-4), "batch": a / (r.std() + 1e-4)}[kind]
        flat = r.amax(1, keepdim=True) - r.amin(1, keepdim=True) < (0 if but == "rounding" else 1e-9)
        return a.masked_fill(flat, 0.0).float()
    return body


def kl_estimates(but=None):
    def body(x, ratio):
        if but == "other sign":
            x = -x
        k3 = x.exp() - 1 - x
        return {"k1": -x, "k2": x ** 2 / 2, "k3": k3, "k3_ratio": (ratio.detach() if but == "detached" else ratio) * k3}
    return body


def policy_loss(but=None):
    def body(logp, old_logp, ref_logp, advantages, mask, kind="grpo", *, clip_low=0.2, clip_high=0.2, beta=0.0,
             kl="k3", max_length=None, n_completions=None, n_tokens=None):
        how, surrogate, reduction = grpo.KINDS[kind]
        logp = logp.masked_fill(~mask, 0.0)
        fixed = logp if but == "not detached" else logp.detach()
        old_logp = fixed if old_logp is None else old_logp.masked_fill(~mask, 0.0)
        A, x = advantages[..., None], logp - old_logp
        if how == "sequence" and but != "gspo by token":
            x = (x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).expand_as(logp)
        ratio = x.exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        choose = {"max for min": torch.max, "plain clip": lambda a, b: b}.get(but, torch.min)
        loss = -choose(ratio * A, clipped * A)
        if surrogate == "weight":
            loss = -ratio.clamp(max=1 + clip_high).detach() * A * logp
        cut = (ratio > 1 + clip_high) & (A > 0) | (ratio < 1 - clip_low) & (A < 0)
        seen = {"clip_frac": cut[mask].float().mean(), "ratio": ratio[mask].mean()}
        if ref_logp is not None:
            estimates = grpo.kl_estimates(ref_logp.masked_fill(~mask, 0.0) - logp, ratio)
            seen["kl"], loss = estimates["k3"][mask].mean(), loss + beta * estimates[kl]
        loss = loss.masked_fill(~mask, 0.0)
        n_completions, n_tokens = n_completions or advantages.numel(), n_tokens or int(mask.sum())
        if but == "piece by piece":
            n_completions, n_tokens = advantages.numel(), int(mask.sum())
        if reduction == "completions":
            own = mask.shape[-1] if but == "mean over padding" else mask.sum(-1)
            return (loss.sum(-1) / own).sum() / n_completions, seen
        constant = n_completions * (max_length or mask.shape[-1])
        return loss.sum() / (n_tokens if reduction == "tokens" else constant), seen
    return body


def token_logprobs(but=None):
    def body(model, hidden, targets, temperature=1.0, words=0):
        if temperature <= 0:
            raise ValueError("greedy")
        logits = hidden.float() @ model.head.float().T if hidden.dtype == torch.bfloat16 else hidden @ model.head.T
        log_p = (logits / (1 if but == "no temperature" else temperature)).log_softmax(-1)
        if but == "bfloat16":
            log_p = log_p.to(hidden.dtype)
        if but == "shifted":
            log_p = log_p.roll(1, -2)
        entropy = -(log_p.exp() * log_p).sum(-1)
        if but != "entropy learns":
            entropy = entropy.detach()
        return log_p.gather(-1, targets[..., None])[..., 0], entropy
    return body


def share(but=None):
    def body(self, G):
        if self.shared is not None and but != "twice":
            raise ValueError("shared before")
        self.shared, self.shared_mask = self.own, self.own_mask
        if but != "prompt stays own":
            self.own, self.own_mask, self.columns = None, None, 0
        if but == "positions from 0":
            self.lengths = 0
        elif torch.is_tensor(self.lengths):
            repeat = {"G after G": lambda x: x.repeat(G, 1)}.get(but, lambda x: x.repeat_interleave(G, 0))
            self.lengths = repeat(self.lengths)
        return self
    return body


def draw(but=None):
    def body(logits, noise, temperature, top_k, top_p):
        logits = logits.double()
        if temperature == 0:
            token = logits.argmax(-1)
            return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0].float()
        p, untouched = (logits / temperature).softmax(-1), logits.softmax(-1)
        for row in p:
            order = row.argsort(descending=True)
            if top_k:
                row[order[top_k:]] = 0
            mass = row[order].cumsum(0) / row.sum()
            outside = mass > top_p if but == "without the word that crosses" else mass - row[order] / row.sum() >= top_p
            if top_p < 1:
                row[order[outside]] = 0
        if but != "not renormalised":
            p = p / p.sum(-1, keepdim=True)
        token = (p.cumsum(-1) <= noise[:, None]).sum(-1).clamp(max=p.shape[-1] - 1)
        if but == "always the likeliest":
            token = p.argmax(-1)
        believed = untouched if but == "logp without temperature" else p
        return token, believed.gather(-1, token[:, None])[:, 0].log().float()
    return body


def sample(but=None):
    @torch.no_grad()
    def body(model, prompts, G, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=None, seed=0,
             tokenizer=None, stop_text=""):
        stops = set(model.config.eos_token_ids if stop_ids is None else stop_ids)
        prompts = [torch.as_tensor(prompt) for prompt in prompts]
        numbers = rollout.random_numbers(prompts, G, max_new_tokens, seed, torch.device("cpu"))
        if but == "one stream":
            numbers = torch.rand(numbers.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        N = len(prompts) * G
        out = {"tokens": torch.zeros(N, max_new_tokens, dtype=torch.long), "logp": torch.zeros(N, max_new_tokens),
               "mask": torch.zeros(N, max_new_tokens, dtype=torch.bool), "stopped": torch.zeros(N, dtype=torch.bool)}
        for n in range(N):
            text = prompts[n // G]
            for t in range(max_new_tokens):
                token, logp = rollout.draw(model(text[None])[:, -1], numbers[n, t:t + 1], temperature, top_k, top_p)
                text = torch.cat([text, token])
                out["tokens"][n, t], out["logp"][n, t], out["mask"][n, t] = token[0], logp[0], True
                if int(token) in stops:
                    out["stopped"][n] = True
                    out["mask"][n, t] = but != "drops the stop token"
                    if but != "goes on":
                        break
        if but == "mask from values":
            out["mask"] = out["tokens"] != 0
        return rollout.split(prompts, G, tokenizer, **out, ending=None)
    return body


def update(but=None):
    def body(model, ref_model, groups, optimizer, config):
        rewards, weights = grpo.rewards_of(groups, config.advantage == "gdpo")
        A = rewards.float() if but == "rewards" else grpo.advantages(rewards, config.advantage, weights)
        flat, beta = (A == 0).all(1), config.beta if ref_model is not None else 0.0
        temperature = 1.0 if but == "no temperature" else config.temperature
        pieces = grpo.micro_batches(groups, A, config.micro_tokens)
        whole = {"n_completions": A.numel(), "n_tokens": sum(int(m.mask.sum()) for m in pieces)}
        if but == "piece by piece":
            whole = {}
        seen = {"flat_groups": flat.float().mean().item(), "grad_norm": 0.0, "logp_gap": 0.0}
        olds = {}
        for _ in range(config.updates):
            if but != "gradients pile up":
                optimizer.zero_grad()
            for i, m in enumerate(pieces):
                logp, entropy = grpo.group_logprobs(model, m.prompts, m.tokens, m.mask, temperature)
                with torch.no_grad():
                    ref, _ = grpo.group_logprobs(ref_model or model, m.prompts, m.tokens, m.mask, temperature)
                if but == "old is new":
                    olds = {}
                loss, more = grpo.policy_loss(
                    logp, olds.setdefault(i, logp.detach()), ref if beta else None, m.advantages, m.mask, config.loss,
                    beta=0.0 if but == "no KL" else beta, kl=config.kl, clip_low=config.clip_low,
                    clip_high=config.clip_high, max_length=config.max_new_tokens, **whole)
                loss.backward()
                seen |= {name: value.item() for name, value in more.items()}
                seen |= {"loss": loss.item(), "entropy": entropy.mean().item()}
            limit = 1e9 if but == "no clip" else config.grad_clip
            seen["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
            if beta or not flat.all() or but == "flat groups move":
                optimizer.step()
        return seen
    return body


BODIES = {"rewards.length_penalty": length_penalty, "metrics.rouge_l": rouge_l, "grpo.advantages": advantages,
          "grpo.kl_estimates": kl_estimates, "grpo.policy_loss": policy_loss, "model.token_logprobs": token_logprobs,
          "model.Cache.share": share, "rollout.draw": draw, "rollout.sample": sample, "grpo.update": update}
MISTAKES = [  # (function, its mistake, a word of the lesson)
    ("rewards.length_penalty", "max for abs", "tokens short"), ("rewards.length_penalty", "sign", "absolute value"),
    ("rewards.length_penalty", "tokens", "units of the target"), ("rewards.length_penalty", "no refusal", "ValueError"),
    ("metrics.rouge_l", "substring", "gaps"), ("metrics.rouge_l", "bag of words", "order"),
    ("metrics.rouge_l", "greedy", "first match"), ("metrics.rouge_l", "recall", "2pr"),
    ("grpo.advantages", "ungrouped", "own group"), ("grpo.advantages", "biased", "unbiased"),
    ("grpo.advantages", "rounding", "exactly 0"), ("grpo.advantages", "summed, not normalised", "gdpo"),
    ("grpo.kl_estimates", "other sign", "sign"), ("grpo.kl_estimates", "detached", "detach"),
    ("grpo.policy_loss", "max for min", "-min"), ("grpo.policy_loss", "plain clip", "min"),
    ("grpo.policy_loss", "mean over padding", "padding"), ("grpo.policy_loss", "not detached", "detach"),
    ("grpo.policy_loss", "piece by piece", "micro-batches"), ("grpo.policy_loss", "gspo by token", "gspo"),
    ("model.token_logprobs", "no temperature", "divided by it"), ("model.token_logprobs", "shifted", "shifted"),
    ("model.token_logprobs", "entropy learns", "looking at"), ("model.token_logprobs", "bfloat16", "float32"),
    ("model.Cache.share", "twice", "shared twice"), ("model.Cache.share", "prompt stays own", "begins empty"),
    ("model.Cache.share", "positions from 0", "Positions"), ("model.Cache.share", "G after G", "side by side"),
    ("rollout.draw", "always the likeliest", "interval"), ("rollout.draw", "without the word that crosses", "crosses"),
    ("rollout.draw", "not renormalised", "0.5/0.8"), ("rollout.draw", "logp without temperature", "temperature"),
    ("rollout.sample", "drops the stop token", "stop token is part"), ("rollout.sample", "mask from values", "guess"),
    ("rollout.sample", "goes on", "first stop token"), ("rollout.sample", "one stream", "whatever"),
    ("grpo.update", "rewards", "not rewards"), ("grpo.update", "no temperature", "temperature"),
    ("grpo.update", "gradients pile up", "fresh gradients"), ("grpo.update", "old is new", "old_logp"),
    ("grpo.update", "piece by piece", "Micro-batches"), ("grpo.update", "no KL", "beta"),
    ("grpo.update", "no clip", "grad_clip"), ("grpo.update", "flat groups move", "momentum"),
]


# --- the checks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rebuild.CHECKS)
def test_what_stands_holds_and_so_do_plain_bodies(name, monkeypatch):
    assert rebuild.verdict(name) == (True, "holds")
    put(monkeypatch, name, BODIES[name]())
    assert rebuild.verdict(name) == (True, "holds")


@pytest.mark.parametrize("name, mistake, lesson", MISTAKES)
def test_a_mistake_is_answered_with_its_lesson(name, mistake, lesson, monkeypatch):
    put(monkeypatch, name, BODIES[name](mistake))
    holds, line = rebuild.verdict(name)
    assert not holds and line.startswith("no: ") and lesson in line and len(line) > 50, line
    assert not re.match(r"no: \w+Error: ", line)  # a lesson, and not what Python says


def test_each_function_has_two_mistakes_and_is_one_that_a_run_calls():
    assert set(rebuild.CHECKS) == set(BODIES) and len(BODIES) == 10
    assert all(sum(name == own for own, _, _ in MISTAKES) >= 2 for name in BODIES)


def test_an_error_is_shown_with_its_place_and_a_gap_by_its_name(monkeypatch):
    put(monkeypatch, "grpo.policy_loss", lambda *args, **more: 1 / 0)
    assert "ZeroDivisionError" in rebuild.verdict("grpo.policy_loss")[1]
    assert "test_rebuild.py, line" in rebuild.verdict("grpo.policy_loss")[1]

    def gone(*_):
        raise NotImplementedError("grpo.kl_estimates is yours to write")
    monkeypatch.undo()
    put(monkeypatch, "grpo.kl_estimates", gone)
    assert rebuild.verdict("grpo.kl_estimates") == (False, "to write")
    assert rebuild.verdict("grpo.policy_loss") == (False, "waits for grpo.kl_estimates")


# --- the copy ---------------------------------------------------------------------------------------------------------


def functions(source):
    """{name: (first line of the body behind the docstring, last line)}, counted from 0 and one past the end."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        for inner in getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef) else []:
            if isinstance(inner, ast.FunctionDef):
                owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                found[owner + inner.name] = (inner.body[0].end_lineno, inner.end_lineno, ast.get_docstring(inner))
    return found


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8")


def test_bodies_go_and_come_back(tmp_path, capsys):
    """Hollow, ten are to write, and the docstrings are there. With the true bodies the files are those of the project,
    all ten hold, and train.py runs."""
    folder = tmp_path / "mine"
    assert rebuild.main([str(folder)]) == 0
    hollow = run("-m", "studies.rebuild", folder, "check")
    assert hollow.returncode == 1 and hollow.stdout.count("to write") + hollow.stdout.count("waits for") == 10
    assert hollow.stdout.rstrip().endswith("0 of 10 hold.")
    for name in sorted(rebuild.CHECKS):
        module, _, inside = name.partition(".")
        whole, path = (ROOT / f"{module}.py").read_text(encoding="utf-8"), folder / f"{module}.py"
        text = path.read_text(encoding="utf-8")
        (first, end, said), (gone_first, gone_end, says) = functions(whole)[inside], functions(text)[inside]
        assert said == says and gone_end == gone_first + 1 and "yours to write" in text.split("\n")[gone_first]
        lines = text.split("\n")
        lines[gone_first:gone_end] = whole.split("\n")[first:end]
        path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    for module in MODULES:
        assert (folder / f"{module}.py").read_bytes() == (ROOT / f"{module}.py").read_bytes()
    assert rebuild.main([str(folder)]) == 1 and "there already" in capsys.readouterr().err  # and nothing is overwritten
    full = run("-m", "studies.rebuild", folder, "check")
    assert full.returncode == 0 and "10 of 10 hold" in full.stdout
    trained = run("train.py", "--stages", "length:2", "--prompts", "1", "--eval-posts", "2", cwd=folder)
    assert trained.returncode == 0 and "grpo.py" not in trained.stderr, trained.stderr


def test_a_folder_that_is_no_copy_is_a_sentence(tmp_path, capsys):
    assert rebuild.main([str(tmp_path / "nothing"), "check"]) == 1
    assert "is no copy" in capsys.readouterr().err
