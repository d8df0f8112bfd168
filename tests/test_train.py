"""The loop as a user meets it: a real process, killed, resumed, fed with broken files, and read afterwards."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import disk_full_after, raw_config, tiny_model
from tokenizers import Tokenizer

import eval as evaluation
import train
from config import Config
from model import Transformer, load, read_config, save
from plumbing.cli import Stop, open_run
from plumbing.folder import file_parameters
from plumbing.posts import TINY, load_posts, load_split
from rewards import GROUP_REWARDS, REWARDS
from task import batch_of

ROOT = Path(__file__).parent.parent
STAGES = ["--stages", "length:8", "rouge_l+length:8"]
SMALL = ["--prompts", "2", "--group", "4", "--target", "6", "--eval-posts", "4", "--lr", "1e-2", "--save-every", "3",
         "--print-every", "1", "--stage-ref", "previous", *STAGES]
TIMINGS = {"seconds", "tokens_per_s"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random model of one narrow layer with the tiny folder's tokenizer: a training step takes milliseconds."""
    raw = json.loads((TINY / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = Transformer(read_config(raw, "test"))
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    # It babbles a dozen words and the stop token, so that lengths and overlaps differ and there is something to learn.
    words = tokenizer.encode(" the a was on in his her and to he she").ids + [tokenizer.token_to_id("<|im_end|>")]
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    model.lm_head.weight.data[words] = torch.randn(len(words), 16)
    model.raw_config = raw
    folder = tmp_path_factory.mktemp("small") / "model"
    save(model, tokenizer, folder)
    return folder


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(cwd: Path, *args: str) -> subprocess.Popen:
    def hear_signals():  # also where these tests run under nohup, or behind an "&"
        for name in ("SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)

    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=None if sys.platform == "win32" else hear_signals)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(path)]


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(encoding="utf-8").count("\n") >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run never came to step {step}: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """The run that nobody disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    process = start(cwd, "--model", str(small), "--run", "r", *SMALL)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    return cwd / "runs" / "r"


def test_a_killed_run_resumes_bit_for_bit(small, whole, cwd):
    """kill -9 at three random moments (once right at the change of stage), resumed each time: the same log, the same
    evaluations and the same weights as the run that was left alone."""
    dice = random.Random(time.time_ns())  # any moment must do; a failing moment is printed
    moments = [dice.randint(1, 7), 8, dice.randint(9, 15)]
    print("killed at", moments)
    for i, moment in enumerate(moments):
        process = start(cwd, *(["--resume"] if i else ["--model", str(small), *SMALL]), "--run", "r")
        wait_for_step(process, cwd / "runs" / "r", moment)
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
    process = start(cwd, "--resume", "--run", "r")
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0 and "Resumed after step" in out, out
    mine = cwd / "runs" / "r"
    assert untimed(mine / "metrics.jsonl") == untimed(whole / "metrics.jsonl")
    assert lines(mine / "eval.jsonl") == lines(whole / "eval.jsonl")
    assert lines(mine / "samples.jsonl") == lines(whole / "samples.jsonl")
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (mine, whole)]
    assert weights[0] == weights[1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(small, whole, cwd, name):
    """And so do a scheduler and a closing terminal, which signal twice at times."""
    process = start(cwd, "--model", str(small), "--run", "r", *SMALL)
    wait_for_step(process, cwd / "runs" / "r", 4)
    for _ in range(1 if name == "SIGINT" else 2):
        process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "--run r --resume" in out and "Traceback" not in out, out
    stopped = len(lines(cwd / "runs" / "r" / "metrics.jsonl"))
    assert 4 <= stopped < 16
    load(cwd / "runs" / "r" / "model")  # and there is a model to look at meanwhile
    # In a process of its own: other tests of this one may have changed torch's number of threads, and so the last bits.
    process = start(cwd, "--run", "r", "--resume")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert untimed(cwd / "runs" / "r" / "metrics.jsonl") == untimed(whole / "metrics.jsonl")


def test_what_a_run_leaves_behind(whole):
    """The files and keys that other tools rely on."""
    assert {p.name for p in whole.iterdir()} == {"config.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl",
                                                 "groups.jsonl", "checkpoint", "model", "curves.png", "report.html"}
    rows = lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row["stage"] for row in rows] == [1] * 8 + [2] * 8
    keys = {"step", "stage", "reward", "reward_std", "length", "within_2", "within_10pct", "kl", "entropy",
            "clip_frac", "flat_groups", "grad_norm", "logp_gap", "tokens_per_s", "seconds"}
    assert keys <= rows[0].keys() and "reward/rouge_l" in rows[-1]
    assert max(row["logp_gap"] for row in rows) < 1e-4  # sampler and trainer agree at every step
    assert rows[0]["kl"] == 0 and rows[7]["kl"] > 0 and rows[8]["kl"] == 0  # --stage-ref previous begins anew
    evals = lines(whole / "eval.jsonl")
    assert [(row["step"], row["stage"], row["n"]) for row in evals] == [(0, 0, 4), (8, 1, 4), (16, 2, 4)]
    assert {"length", "within_2", "within_10pct", "rouge_l", "reward", "reward/rouge_l"} <= evals[0].keys()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(whole.rglob("*.part"))


def test_every_logged_number_is_explained(whole):
    assert explained(whole)


def explained(run: Path) -> bool:
    """Whether docs/read-your-run.md names every key; `reward/NAME` and `NAME@BUDGET` stand for many."""
    page = (ROOT / "docs" / "read-your-run.md").read_text(encoding="utf-8")
    names = lines(run / "metrics.jsonl")[-1].keys() | lines(run / "eval.jsonl")[-1].keys()
    missing = {name for name in names if f"`{re.sub('^reward/.*', 'reward/NAME', name.partition('@')[0])}`" not in page}
    assert not missing
    return bool(names)


def test_help_explains_every_flag():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        train.main(["--help"])
    flat = re.sub(r"[\s-]", "", text.getvalue())  # argparse wraps lines at spaces and hyphens
    for f in dataclasses.fields(train.Config):
        assert f"  --{f.name.replace('_', '-')}" in text.getvalue()
        assert len(f.metadata["help"]) > 10 and re.sub(r"[\s-]", "", f.metadata["help"]) in flat


def refused(capsys, *args: str) -> str:
    """Run train.py in this process; it must fail with one line on stderr, which is returned."""
    try:
        code = train.main(list(args))
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code != 0 and err.count("\n") == 1 and err.startswith("train.py: ") and "Traceback" not in err, err
    return err


def test_bad_arguments_are_sentences(cwd, capsys):
    for args, says in ((["--lrr", "1"], "--lrr"), (["--group", "1"], "--group 1"), (["--group", "x"], "--group"),
                       (["--stages", "length"], "REWARD:STEPS"), (["--stages", "lenght:3"], "length, rouge_l"),
                       (["--temperature", "0"], "temperature"), (["--loss", "ppo"], "grpo"),
                       (["--target", "0"], "--target"), (["--lr", "nan"], "--lr"), (["--device", "abacus"], "abacus"),
                       (["--max-new-tokens", "32", "--target", "32"], "--max-new-tokens"),
                       (["--max-new-tokens", "2000"], "--max-new-tokens"),
                       (["--resume", "--run", "nothing"], "nothing")):
        assert says in refused(capsys, *args)
    assert not (cwd / "runs").exists()  # refused before anything was written


def test_bad_models_are_sentences(small, cwd, capsys):
    def broken(name: str, content: bytes | None) -> str:
        shutil.rmtree("broken", ignore_errors=True)
        shutil.copytree(small, "broken")
        (Path("broken") / name).unlink()
        if content is not None:
            (Path("broken") / name).write_bytes(content)
        return refused(capsys, "--model", "broken", *SMALL)

    assert "no/where/model" in refused(capsys, "--model", "no/where/model", *SMALL)
    assert "config.json is missing" in broken("config.json", None)
    assert "not valid JSON" in broken("config.json", b"{")
    assert "tokenizer.json" in broken("tokenizer.json", None)
    weights = (small / "model.safetensors").read_bytes()
    assert "model.safetensors is not a whole" in broken("model.safetensors", weights[:len(weights) // 2])


def test_bad_posts_are_sentences(small, cwd, capsys):
    good = [json.dumps({"document": f"Post number {i} about a cat.", "summary": "A cat."}) for i in range(40)]

    def posts(change) -> str:
        rows = list(good)
        change(rows)
        Path("posts.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return refused(capsys, "--model", str(small), "--data", "posts.jsonl", *SMALL)

    assert "posts.jsonl line 17" in posts(lambda r: r.__setitem__(16, r[16][:-5]))
    assert "line 3 has no text" in posts(lambda r: r.__setitem__(2, '{"document": "  ", "summary": "x"}'))
    long = json.dumps({"id": "the-long-one", "document": "cat " * 1100, "summary": "x"})
    error = posts(lambda r: r.__setitem__(4, long))
    assert "the-long-one" in error and "--max-prompt" in error
    bare = [json.dumps({"text": f"Post number {i}."}) for i in range(40)]
    assert "no summaries for rouge_l" in posts(lambda r: r.__setitem__(slice(None), bare))
    assert "gone.jsonl" in refused(capsys, "--model", str(small), "--data", "gone.jsonl", *SMALL)


def test_a_post_list_of_ones_own(small, cwd, capsys):
    """A single file: the last tenth is held out, and too long posts can be left out by name of their size."""
    rows = [json.dumps({"post": f"Post number {i} about a cat.", "tldr": "A cat."}) for i in range(40)]
    rows[4] = json.dumps({"post": "cat " * 1100, "tldr": "x"})
    Path("posts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    args = ["--model", str(small), "--data", "posts.jsonl", "--prompts", "2", "--group", "2", "--target", "6",
            "--stages", "length:2", "--max-prompt", "200", "--run", "own"]
    assert train.main(args) == 0
    assert [row["n"] for row in lines(Path("runs/own/eval.jsonl"))] == [4, 4]
    trained, held_out = load_split("posts.jsonl")
    assert trained + held_out == load_posts("posts.jsonl") and len(held_out) == 4
    capsys.readouterr()
    assert evaluation.main(["runs/own"]) == 0  # and these four are what the run is measured on
    assert int(capsys.readouterr().out.splitlines()[1].removeprefix("runs/own").split()[0]) == 4


@pytest.mark.parametrize("more", [{}, {"lean": True}, {"lora": 2}], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "lfm2"])
def test_weight_decay_spares_what_transformers_trainer_spares(tmp_path, family, more):
    """Published commands with --weight-decay 0.1 mean: matrices, the embedding among them; no norm, no bias."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer
    model = tiny_model(family, dtype=torch.bfloat16 if "lean" in more else torch.float32)
    if "lora" in more:
        train.add_lora(model, 2, 4.0)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw_config(family)))
    expected = {n.removeprefix("model.") for n in Trainer.get_decay_parameter_names(None, theirs)} - {"lm_head.weight"}
    names = {id(p): name for name, p in file_parameters(model).items()}
    optimizer = train.make_optimizer(Config(weight_decay=0.1, **more), model)
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    if "lora" in more:  # adapters are matrices
        assert decayed and all("lora_" in name for name in decayed) and not spared
    else:
        assert decayed == expected and decayed | spared == {*names.values()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in file_parameters(model).items()}
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()  # w - lr wd w, and nothing else: the gradient is 0
    for name, p in file_parameters(model).items():
        kept = 0.9 if name in decayed else 1.0
        torch.testing.assert_close(p.float(), before[name].float() * kept, rtol=8e-3, atol=0)


def test_a_run_from_before_norms_were_spared_is_not_gone_on_with(small, cwd, monkeypatch, capsys):
    """Its optimizer has one group where there are two now. The sentence does not blame the model."""
    args = ["--model", str(small), *SMALL, "--stages", "length:1", "--weight-decay", "0.1", "--run", "a"]
    with monkeypatch.context() as before:
        before.setattr(train, "spare_norms", list)
        assert train.main(args) == 0
    kept = Path("runs/a/metrics.jsonl").read_bytes()
    assert "--weight-decay pulled at norms and biases" in refused(capsys, "--run", "a", "--resume")
    assert Path("runs/a/metrics.jsonl").read_bytes() == kept


def test_the_last_lines_speak_of_a_length_only_where_something_pays_for_it(small, cwd, capsys):
    """ROUGE-L alone wants no length: "12% within the target" would blame the run for what nobody asked of it. In a run
    of two stages the first one did ask, and whether the second forgets it is the question."""
    for stages, asked in ((["rouge_l:1"], False), (["length:1", "rouge_l:1"], True)):
        assert train.main(["--model", str(small), *SMALL, "--stages", *stages]) == 0
        last = capsys.readouterr().out.partition("\nheld-out greedy")[2]
        assert ("of the target" in last) == asked == ("target 6 tokens" in last), last
        assert "reward" in last and "length" in last


def test_a_run_is_never_overwritten(small, cwd, capsys):
    args = ["--model", str(small), *SMALL, "--stages", "length:1"]
    assert train.main([*args, "--run", "a"]) == 0
    before = Path("runs/a/metrics.jsonl").read_bytes()
    assert "--resume" in refused(capsys, *args, "--run", "a")
    assert "keeps its settings" in refused(capsys, "--run", "a", "--resume", "--lr", "1")
    assert Path("runs/a/metrics.jsonl").read_bytes() == before


def test_what_is_rehearsed_is_the_batch_of_the_longest_prompts(small, cwd):
    """Posts of 1 to 40 cats in some order; those that are held out do not count."""
    cats = random.Random(0).sample(range(1, 41), 40)
    rows = [json.dumps({"post": "A" + " cat" * n, "tldr": "x"}) for n in cats]
    Path("posts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = train.Config(model=str(small), data="posts.jsonl", target=6, prompts=3, stages=["length:1"])
    model, tokenizer = train.load_policy(config)
    posts, _, longest = train.choose_posts(config, train.parse_stages(config.stages), model, tokenizer)
    cat = tokenizer.encode(" cat").ids
    assert [prompt.count(cat[-1]) for prompt in longest] == sorted(p.document.count("cat") for p in posts)[-3:]


def test_checkpointing_learns_the_same_and_keeps_memory_tidy(small, cwd, monkeypatch):
    tidied = []
    monkeypatch.setattr(train.memory, "tidy", tidied.append)
    args = ["--model", str(small), *SMALL, "--stages", "rouge_l+length:2"]
    assert train.main([*args, "--run", "plain"]) == 0 and not tidied
    assert train.main([*args, "--run", "again", "--checkpointing"]) == 0 and len(tidied) == 1
    for ours, theirs in zip(lines(Path("runs/again/metrics.jsonl")), lines(Path("runs/plain/metrics.jsonl"))):
        for name in ("reward", "length", "kl", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_compiled_layers_say_the_same(small, cwd, monkeypatch):
    """Policy and reference, through torch's tracer and without the minutes in a C++ compiler."""
    compiled, real = [], torch.nn.Module.compile

    def traced(layer, **how):
        compiled.append(layer)
        real(layer, backend="eager", **how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    args = ["--model", str(small), *SMALL, "--stages", "rouge_l+length:2", "--stage-ref", "start", "--lr", "1e-3"]
    assert train.main([*args, "--run", "plain"]) == 0 and not compiled
    assert train.main([*args, "--run", "compiled", "--compile"]) == 0
    assert len(compiled) == len(set(compiled)) == 2  # one layer each
    for ours, theirs in zip(lines(Path("runs/compiled/metrics.jsonl")), lines(Path("runs/plain/metrics.jsonl"))):
        for name in ("reward", "length", "kl", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(("more", "says"), [
    (["--temperature", "1e-38"], "--temperature"), (["--stages", "1e30*length:2", "--advantage", "mean"], "reward")])
def test_a_run_that_is_stopped_names_what_stopped_it(small, cwd, capsys, more, says):
    """The first gradient does not depend on --lr. Who is told to lower it, lowers it for an evening."""
    code = train.main(["--model", str(small), *SMALL, *more, "--run", "x"])
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and says in err and "--lr" not in err, err


def test_large_rewards_are_no_explosion(small, cwd):
    """Advantages of 1e9 make a loss and a gradient of 1e9. The clip to norm 1 takes that out, and it is a run."""
    assert train.main(["--model", str(small), *SMALL, "--stages", "1e9*length:2", "--advantage", "mean"]) == 0


def test_a_loss_that_is_not_a_number_stops_the_run(small, cwd, capsys):
    """A learning rate of 1e30 wrecks the weights in its first step: the second one says so, and the last finite ones
    are left to go on from. 1e38 overflows at once, before there is anything to keep."""
    for lr, says in (("1e30", "which are good"), ("1e38", "before the first checkpoint")):
        more = ["--lr", lr, "--warmup", "0", "--save-every", "1", "--run", lr]
        code = train.main(["--model", str(small), *SMALL, *more])
        err = capsys.readouterr().err
        assert code == 1 and err.count("\n") == 1 and "--lr" in err and says in err, err
    model, _ = load("runs/1e30/model")
    assert all(p.isfinite().all() for p in model.parameters())
    assert not Path("runs/1e38/model").exists()


def test_a_full_disk_is_a_sentence_and_loses_nothing(small, cwd, capsys):
    """No file may grow beyond 100 kB, and the checkpoint wants to: the run ends, and goes on when there is room."""
    args = ["--model", str(small), *SMALL, "--stages", "length:6", "--save-every", "2"]
    assert train.main([*args, "--run", "room"]) == 0
    capsys.readouterr()
    with disk_full_after(100_000):
        error = refused(capsys, *args, "--run", "full")
    assert "Could not write" in error and "state.pt" in error and not list(Path("runs/full").rglob("*.part"))
    assert train.main(["--run", "full", "--resume"]) == 0
    assert untimed(Path("runs/full/metrics.jsonl")) == untimed(Path("runs/room/metrics.jsonl"))


def test_a_forker_s_reward_is_on_the_screen_in_the_files_and_in_the_curves(small, cwd, capsys, monkeypatch):
    """Whatever its name: `loss` and `ratio` are names of the update's numbers too."""
    monkeypatch.setitem(REWARDS, "loss", lambda s: -float(len(s.text)))
    monkeypatch.setitem(GROUP_REWARDS, "ratio", lambda group: [float(i) for i in range(len(group))])
    drawn = []
    monkeypatch.setattr("plumbing.curves.draw_panel", lambda ax, name, *_: drawn.append(name))
    stages = ["--stages", "length:2", "0.01*loss + ratio:2"]
    assert train.main(["--model", str(small), *SMALL, *stages, "--run", "mine"]) == 0
    rows, evals = lines(Path("runs/mine/metrics.jsonl")), lines(Path("runs/mine/eval.jsonl"))
    assert rows[-1]["reward/loss"] < -1 < rows[-1]["loss"] and rows[-1]["reward/ratio"] == 1.5
    assert rows[-1]["ratio"] == pytest.approx(1) and "reward/loss" not in rows[0]
    for row in evals:  # of the last stage at every evaluation, so that before and after mean the same
        assert row["reward"] == pytest.approx(0.01 * row["reward/loss"] + row["reward/ratio"])
        assert {"rouge_l", "length", "within_2"} <= row.keys()
    assert evals[-1]["reward/loss"] < -1
    assert drawn[:4] == ["reward", "reward/loss", "reward/ratio", "length"]
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if line.startswith("  step") and "ratio" in line)
    assert "loss" in head and out.count("(loss ") >= 3


def test_batches_are_epochs():
    """Every post once per epoch, each epoch in its own order, and a step's batch depends on nothing but the step."""
    config = train.Config(prompts=3, seed=5)
    posts = list(range(10))
    seen = [p for step in range(20) for p in batch_of(posts, step, config)]
    epochs = [seen[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(e) == posts for e in epochs) and epochs[0] != epochs[1]
    assert batch_of(posts, 7, config) == seen[21:24]


def test_the_evaluation_command_reads_runs_and_folders(small, whole, cwd, capsys):
    """The same posts give the same numbers as in the loop's own last evaluation."""
    assert evaluation.main([str(whole), str(small), "--split", "val", "--n", "4", "--target", "6"]) == 0
    row = re.findall(r"[\d.]+", capsys.readouterr().out.splitlines()[1].removeprefix(str(whole)))
    last = lines(whole / "eval.jsonl")[-1]
    assert row[0] == "4" and float(row[1]) == pytest.approx(last["length"], abs=0.05)
    assert float(row[5]) == pytest.approx(last["rouge_l"], abs=5e-4)
    assert evaluation.main(["no/such/model"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluation_does_not_depend_on_its_batches(small):
    model, tokenizer = load(small)
    posts = load_posts("tiny", "test")[:7]
    one, many = (evaluation.evaluate(model, tokenizer, posts, train.Config(target=6), batch=b) for b in (1, 7))
    assert [r["summary"] for r in one["summaries"]] == [r["summary"] for r in many["summaries"]]
    assert [r["id"] for r in many["summaries"]] == [p.id for p in posts]
    assert one["length"] == sum(r["length"] for r in one["summaries"]) / 7


# --- one folder, one process ------------------------------------------------------------------------------------------


def test_runs_that_start_at_once_get_folders_of_their_own(small, cwd):
    """Without --run, the next free name each; with the same --run, one of them gets a sentence."""
    args = ["--model", str(small), *SMALL, "--stages", "length:3", "--seed"]
    three = [start(cwd, *args, str(seed)) for seed in range(3)]
    out = [process.communicate(timeout=120)[0] for process in three]
    assert [process.returncode for process in three] == [0, 0, 0], out
    runs = [cwd / "runs" / f"model-{n}" for n in (1, 2, 3)]
    assert sorted(path for path in (cwd / "runs").iterdir()) == runs
    assert [[row["step"] for row in lines(run / "metrics.jsonl")] for run in runs] == [[1, 2, 3]] * 3
    assert {json.loads((run / "config.json").read_text(encoding="utf-8"))["seed"] for run in runs} == {0, 1, 2}

    two = [start(cwd, *args, str(seed), "--run", "same") for seed in range(2)]
    out = [process.communicate(timeout=120)[0] for process in two]
    assert sorted(process.returncode for process in two) == [0, 1], out
    assert [row["step"] for row in lines(cwd / "runs" / "same" / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_goes_on_is_not_resumed_beside_itself(small, cwd, capsys):
    """Not by --resume and not as a new run of its name; it is when its process was killed, however it was."""
    process = start(cwd, "--model", str(small), "--run", "r", *SMALL, "--stages", "length:400")
    wait_for_step(process, cwd / "runs" / "r", 4)
    assert "runs/r is in use by another train.py" in refused(capsys, "--resume", "--run", "r")
    assert "runs/r is in use by another train.py" in refused(capsys, "--model", str(small), *SMALL, "--run", "r")
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert [row["step"] for row in lines(cwd / "runs/r/metrics.jsonl")][:4] == [1, 2, 3, 4]
    with open_run(train.Config(run="r"), True, {}) as (config, folder):  # held by nobody now
        assert config.stages == ("length:400",) and folder == Path("runs/r")


# --- what a run was begun with ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """The folder in which a run of six steps, over a file of 40 posts, was made."""
    cwd = tmp_path_factory.mktemp("finished")
    rows = [json.dumps({"document": f"Post number {i} about a cat.", "summary": f"A cat, {i}."}) for i in range(40)]
    (cwd / "posts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shutil.copytree(small, cwd / "m")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        assert train.main(["--model", "m", "--data", "posts.jsonl", "--run", "r", *SMALL, "--stages", "length:6"]) == 0
    return cwd


@pytest.fixture
def halfway(finished, cwd, capsys) -> Path:
    """That run, which --resume goes on with from its third step; whole/ is what it comes to."""
    shutil.copytree(finished, cwd, dirs_exist_ok=True)
    shutil.copytree("runs/r", "whole")
    Path("runs/r/checkpoint/state.pt").unlink()  # the checkpoint before it is of step 3
    capsys.readouterr()
    return cwd / "runs" / "r"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def untouched(run: Path, capsys, *args: str) -> str:
    """The sentence with which --resume is refused; nothing in the run's folder has changed."""
    before = contents(run)
    said = refused(capsys, "--resume", "--run", run.name, *args)
    assert contents(run) == before
    return said


def test_a_run_goes_on_where_it_was_and_with_what_it_was_begun_with(halfway):
    assert train.main(["--resume", "--run", "r"]) == 0
    assert untimed(halfway / "metrics.jsonl") == untimed(Path("whole/metrics.jsonl"))
    assert (halfway / "model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()


def test_a_run_by_parts_goes_on_where_it_was(small, cwd, capsys):
    """gdpo reads each group's parts, and the soft zone is one of them: neither leaves anything behind to be kept."""
    flags = ["--model", str(small), *SMALL, "--advantage", "gdpo", "--overlong", "4", "--updates", "2", "--save-every",
             "2", "--stages", "rouge_l + length - twice:4"]
    assert train.main([*flags, "--run", "r"]) == 0
    shutil.copytree("runs/r", "whole")
    Path("runs/r/checkpoint/state.pt").unlink()
    assert train.main(["--resume", "--run", "r"]) == 0
    assert "Resumed after step 2" in capsys.readouterr().out
    assert untimed(Path("runs/r/metrics.jsonl")) == untimed(Path("whole/metrics.jsonl"))
    weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("runs/r", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("change", ["one more", "another word", "held out"])
def test_other_posts_are_refused(halfway, capsys, change):
    rows = Path("posts.jsonl").read_text(encoding="utf-8").splitlines()
    if change == "one more":
        rows.append(rows[0])
    elif change == "another word":
        rows[7] = rows[7].replace("cat", "dog")
    else:
        rows[-1] = rows[-1].replace("cat", "dog")
    Path("posts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    said = untouched(halfway, capsys)
    assert f"begun with other {'held-out posts' if change == 'held out' else 'posts'}" in said
    assert change != "one more" or "36 (" in said and "37 (" in said  # how many there were, and are


@pytest.mark.parametrize("more, refuses", [([], True), (["--lora", "2"], True), (["--beta", "0"], False)])
def test_another_base_model_is_refused_where_it_decides_something(small, cwd, capsys, more, refuses):
    """One bit of one weight. The KL is to the model that the run began with, and adapters stand on it; a run without
    either has all of its weights in the checkpoint."""
    shutil.copytree(small, "m")
    args = ["--model", "m", *SMALL, "--stages", "length:6", "--stage-ref", "start", "--run", "r", *more]
    assert train.main(args) == 0
    Path("runs/r/checkpoint/state.pt").unlink()
    weights = bytearray(Path("m/model.safetensors").read_bytes())
    weights[-3] ^= 1
    Path("m/model.safetensors").write_bytes(weights)
    capsys.readouterr()
    if refuses:
        assert "begun with other base model" in untouched(cwd / "runs" / "r", capsys)
    else:
        assert train.main(["--resume", "--run", "r"]) == 0


def test_another_tokenizer_or_wordnet_is_refused(halfway, capsys, monkeypatch):
    monkeypatch.setattr("plumbing.words._wordnet", lambda: {"data.noun": b"another edition"})
    assert "other WordNet" in untouched(halfway, capsys)
    monkeypatch.undo()
    monkeypatch.chdir(halfway.parent.parent)
    raw = json.loads(Path("m/tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["merges"].pop(0)
    Path("m/tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert "other prompts" in untouched(halfway, capsys)


def test_flags_that_change_no_result_may_change_and_are_kept(halfway, capsys):
    """Those that the advice about memory names, and habits."""
    free = ["--micro-tokens", "500", "--checkpointing", "--print-every", "2", "--save-every", "1"]
    said = untouched(halfway, capsys, *free, "--lr", "1")
    assert "begun with lr = 0.01, not 1.0" in said and "but for --micro-tokens, --checkpointing" in said
    assert train.main(["--resume", "--run", "r", *free]) == 0
    now = json.loads((halfway / "config.json").read_text(encoding="utf-8"))
    assert (now["micro_tokens"], now["checkpointing"], now["save_every"], now["print_every"]) == (500, True, 1, 2)
    for ours, theirs in zip(lines(halfway / "metrics.jsonl"), lines(Path("whole/metrics.jsonl")), strict=True):
        assert ours["reward"] == theirs["reward"] and ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3, abs=1e-6)


# --- checkpoints and logs that are damaged or gone --------------------------------------------------------------------


def test_the_last_two_checkpoints_are_kept(finished):
    states = [torch.load(finished / "runs/r/checkpoint" / name)["step"] for name in ("previous.pt", "state.pt")]
    assert states == [3, 6] and not (finished / "runs/r/checkpoint/next-state.pt").exists()


def test_a_bit_that_fell_over_in_a_checkpoint_is_a_sentence_and_the_one_before_it_serves(halfway, capsys):
    """torch.load does not look at the checksums of what it reads; the archive has them."""
    state = halfway / "checkpoint" / "state.pt"
    content = bytearray(Path("whole/checkpoint/state.pt").read_bytes())
    weights = torch.load(io.BytesIO(content))["model"]["embed_tokens.weight"].detach()
    content[content.index(weights[100].numpy().tobytes()) + 2] ^= 1
    state.write_bytes(content)
    said = untouched(halfway, capsys)
    assert "state.pt is damaged (the checksum of " in said
    assert "Delete it, and --resume goes on from the one before it, previous.pt" in said
    state.write_bytes(content[:len(content) // 2])
    assert "state.pt is damaged" in untouched(halfway, capsys)
    state.unlink()  # as the sentence says
    assert train.main(["--resume", "--run", "r"]) == 0
    assert untimed(halfway / "metrics.jsonl") == untimed(Path("whole/metrics.jsonl"))


def test_a_run_whose_checkpoints_were_deleted_keeps_its_logs(halfway, capsys):
    shutil.rmtree(halfway / "checkpoint")
    before = contents(halfway)
    said = refused(capsys, "--resume")
    assert "a log of 6 steps, but no checkpoint/state.pt" in said and "model is in runs/r/model" in said
    assert contents(halfway) == before


def test_a_run_killed_before_its_first_checkpoint_begins_again(halfway):
    shutil.rmtree(halfway / "checkpoint")
    for name in ("metrics", "eval", "samples"):
        rows = lines(halfway / f"{name}.jsonl")
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= (3 if name == "metrics" else 0))
        (halfway / f"{name}.jsonl").write_text(kept, encoding="utf-8")
    assert train.main(["--resume", "--run", "r"]) == 0
    assert untimed(halfway / "metrics.jsonl") == untimed(Path("whole/metrics.jsonl"))


def test_a_damaged_log_keeps_its_whole_lines_and_says_what_is_gone(halfway, capsys):
    """Of six lines the second is broken; a power cut took the fourth and all after it, and left zeros."""
    shutil.copy("whole/checkpoint/state.pt", halfway / "checkpoint/state.pt")
    rows = (halfway / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (halfway / "metrics.jsonl").write_bytes(rows[0] + rows[1][:40] + b"\n" + rows[2] + b"\0" * 80)
    (halfway / "eval.jsonl").unlink()
    assert train.main(["--resume", "--run", "r"]) == 0
    out = capsys.readouterr().out
    assert ("The log was damaged: metrics.jsonl: line 2 could not be read and is left out; metrics.jsonl has no line "
            "of 4 steps (2 to 6); eval.jsonl lacks the evaluation before training. All other lines are kept.") in out
    assert [row["step"] for row in lines(halfway / "metrics.jsonl")] == [1, 3]
    # The last evaluation is of this very step: it was done again.
    assert lines(halfway / "eval.jsonl") == lines(Path("whole/eval.jsonl"))[1:]
    assert "before  reward" not in out and "after   reward" in out


def test_summaries_that_are_gone_are_made_again_where_they_can_be(halfway, capsys):
    shutil.copy("whole/checkpoint/state.pt", halfway / "checkpoint/state.pt")
    (halfway / "samples.jsonl").unlink()
    assert train.main(["--resume", "--run", "r"]) == 0
    assert "samples.jsonl lacks the evaluation before training" in capsys.readouterr().out
    made = lines(Path("whole/samples.jsonl"))
    assert lines(halfway / "samples.jsonl") == [row for row in made if row["stage"] == 1]
    assert lines(halfway / "eval.jsonl") == lines(Path("whole/eval.jsonl"))


def test_a_last_line_that_a_kill_cut_is_not_called_damage(halfway, capsys):
    with open(halfway / "metrics.jsonl", "ab") as log:
        log.write(b'{"step": 7, "sta')
    assert train.main(["--resume", "--run", "r"]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert untimed(halfway / "metrics.jsonl") == untimed(Path("whole/metrics.jsonl"))


def test_the_completions_of_a_step_that_fails_are_kept(halfway, capsys, monkeypatch):
    seen = []

    def fails(summary):
        seen.append(summary.text)
        raise ValueError("my reward has no answer")

    monkeypatch.setitem(REWARDS, "length", fails)
    monkeypatch.setattr(train, "evaluate", lambda *args: pytest.fail("the run was resumed in the middle of a stage"))
    with pytest.raises(RuntimeError, match="The reward 'length' failed with ValueError"):  # and its traceback
        train.main(["--resume", "--run", "r"])
    assert "Step 4 failed." in capsys.readouterr().out
    rows = lines(halfway / "failed.jsonl")
    assert [row["step"] for row in rows] == [4, 4] and [len(row["completions"]) for row in rows] == [4, 4]
    assert seen[0] in rows[0]["completions"]


# --- nobody listens, nothing can be drawn -----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_without_these_signals_and_a_thread_have_a_stop_too(monkeypatch):
    for name in ("SIGHUP", "SIGBREAK"):
        monkeypatch.delattr(signal, name, raising=False)
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
    entered = []

    def elsewhere():
        with Stop() as stop:
            entered.append(stop.asked)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert entered == [False]


@pytest.mark.skipif(sys.platform == "win32", reason="the shell of Windows has no such redirections")
@pytest.mark.parametrize("shell", ["| head -1", ">&-", ">&- 2>&-", "| (read line)"])
def test_a_run_goes_on_when_nobody_reads_what_it_says(small, cwd, shell):
    command = shlex.join([sys.executable, str(ROOT / "train.py"), "--model", str(small), "--run", "r", *SMALL,
                          "--stages", "length:6"])
    done = subprocess.run(f"{{ {command}; echo $? > code; }} {shell}", shell=True, cwd=cwd, text=True,
                          capture_output=True)
    assert (cwd / "code").read_text(encoding="utf-8") == "0\n" and done.stderr == ""
    assert [row["step"] for row in lines(cwd / "runs/r/metrics.jsonl")] == list(range(1, 7))
    assert (cwd / "runs/r/curves.png").exists() and (cwd / "runs/r/model/model.safetensors").exists()


@pytest.mark.parametrize("backend", ["module://not_here.backend_inline", "inline_elsewhere"])
def test_a_notebook_s_backend_does_no_harm(finished, cwd, backend):
    """Of a matplotlib that is elsewhere; and the one that is chosen here stays as it is."""
    shutil.copytree(finished / "runs" / "r", "r")
    Path("r/curves.png").unlink()
    code = ("from pathlib import Path; from plumbing.curves import draw_curves; import os\n"
            "draw_curves(Path('r'), 6, [6]); print(os.environ['MPLBACKEND'])")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)})
    assert done.stdout == backend + "\n" and Path("r/curves.png").read_bytes().startswith(b"\x89PNG"), done.stderr


def test_a_run_whose_curves_cannot_be_drawn_is_not_a_failed_run(halfway, capsys, monkeypatch):
    (halfway / "curves.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it is an ImportError
    assert train.main(["--resume", "--run", "r"]) == 0
    out = capsys.readouterr().out
    assert "The curves could not be drawn (" in out and "train.py --run r --resume draws them" in out
    assert "Look at runs/r/report.html; the model is in runs/r/model" in out
    monkeypatch.undo()
    monkeypatch.chdir(halfway.parent.parent)
    assert train.main(["--resume", "--run", "r"]) == 0  # as the sentence says
    assert (halfway / "curves.png").exists()
    assert untimed(halfway / "metrics.jsonl") == untimed(Path("whole/metrics.jsonl"))


def test_a_clock_that_is_set_back_is_not_seen(halfway, monkeypatch):
    """As when a laptop wakes up and asks for the time."""
    now = iter(range(10 ** 9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert train.main(["--resume", "--run", "r"]) == 0
    assert all(0 < row["seconds"] < 100 and row["tokens_per_s"] > 0 for row in lines(halfway / "metrics.jsonl"))


@pytest.mark.parametrize("more", [[], ["--lean"], ["--lora", "2"]])
def test_a_seed_may_be_the_time_in_nanoseconds(small, cwd, more):
    args = ["--model", str(small), *SMALL, "--stages", "length:2", "--seed", "1795" + 15 * "0", "--run", "r"]
    assert train.main([*args, *more]) == 0


@pytest.mark.parametrize("changes", [{"prompts": "2"}, {"loss": "nothing"}, {"beta": None}, {"lean": 1}])
def test_settings_that_no_run_wrote_are_named(halfway, capsys, changes):
    """A config.json that was edited by hand, or by a tool."""
    path = halfway / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    (name, value), = changes.items()
    assert f"says that {name} is {value!r}, which it cannot be" in untouched(halfway, capsys)


def test_settings_that_are_gone_are_not_replaced_by_others(halfway, capsys):
    """`{}` would go on with the default model and stages, under the name and after the log of this run."""
    (halfway / "config.json").write_text("{}", encoding="utf-8")
    assert "does not hold the settings of a run" in untouched(halfway, capsys)


@pytest.mark.parametrize("name", ["other", "of-today/other"])
def test_a_run_that_was_renamed_advises_its_new_name(halfway, capsys, monkeypatch, name):
    (halfway.parent / name).parent.mkdir(exist_ok=True)
    halfway.rename(halfway.parent / name)
    real = train.ranks.stop_together
    monkeypatch.setattr(train.ranks, "stop_together", lambda stop: setattr(stop, "asked", True) or real(stop))
    assert train.main(["--resume", "--run", name]) == 0
    assert f"--run {name} --resume" in capsys.readouterr().out


def test_who_resumes_in_less_memory_is_told_what_a_resumed_run_may_change(halfway, capsys, monkeypatch):
    real = train.memory.rehearse
    full = RuntimeError("not enough memory")

    def rehearse(model, sample, learn, *, micro_tokens, **more):
        def small(n):
            if n > 600:
                raise full
            learn(n)

        real(model, sample, small, micro_tokens=micro_tokens, **more)

    monkeypatch.setattr(train.memory, "rehearse", rehearse)
    said = untouched(halfway, capsys)
    advice = re.search(r"--micro-tokens (\d+) does", said)
    assert advice and "can only take" not in said
    assert train.main(["--resume", "--run", "r", "--micro-tokens", advice[1]]) == 0  # as it says
    assert [row["step"] for row in lines(halfway / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(torch, "ones_like", lambda p: (_ for _ in ()).throw(full))
    said = refused(capsys, "--resume", "--run", "r")
    assert "AdamW's two moments" in said and "can only take --checkpointing and a lower --micro-tokens" in said
