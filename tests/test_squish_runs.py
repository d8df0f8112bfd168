"""SQUISH in use: runs that are trained by it, their evaluation, and the benchmark with its servers and its cache."""

import json
import random
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import rewards
import train
from lora import load_adapters
from model import Linear, load
from plumbing.posts import TINY, Post, load_posts
from plumbing.server import TRIES
from rollout import sample
from squish import cost, encode, shorten, squish
from studies import squish_benchmark as benchmark
from task import CLOSE, extract, make_task, score, tasks_of
from tests.test_train import explained

ROOT = Path(__file__).parent.parent
RUN = ["--stages", "squish:6", "--lora", "4", "--prompts", "2", "--group", "4", "--eval-posts", "3", "--lr", "1e-2",
       "--save-every", "2", "--print-every", "1", "--beta", "0.02"]
TIMINGS = {"seconds", "tokens_per_s"}


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def start(cwd: Path, *args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("squish")
    out, _ = (process := start(cwd, *RUN, "--run", "r")).communicate(timeout=300)
    assert process.returncode == 0, out
    return cwd / "runs" / "r"


def test_a_run_logs_what_became_of_the_summaries_and_leaves_adapters(whole):
    rows, evals = lines(whole / "metrics.jsonl"), lines(whole / "eval.jsonl")
    assert {"reward/squish", "over", "missing", "length", "kl", "entropy", "flat_groups", "logp_gap"} <= rows[0].keys()
    assert "within_2" not in rows[0]
    assert max(row["logp_gap"] for row in rows) < 1e-4 and rows[0]["kl"] == 0 < rows[-1]["kl"]
    assert {f"{name}@{b}" for name in ("reward", "reward/squish", "over", "missing", "used")
            for b in (0.1, 0.2)} <= evals[0].keys()
    assert (evals[0]["step"], evals[-1]["step"], evals[0]["n"]) == (0, 6, 3)
    # The base was frozen: the adapters on top of it are the merged model.
    merged, _ = load(whole / "model", "cpu")
    model, _ = load(TINY, "cpu")
    load_adapters(model, whole / "adapter")
    x = torch.arange(12)[None] + 300
    torch.testing.assert_close(model(x), merged(x), rtol=0, atol=1e-4)
    base, _ = load(TINY, "cpu")
    with model.adapters_off():
        assert torch.equal(model(x), base(x))
    assert (model(x) - base(x)).abs().max() > 1e-3
    # A checkpoint holds what is trained: 155,648 / 4 float32 and their two moments, not the model.
    assert (whole / "checkpoint" / "state.pt").stat().st_size < 3 * 4 * 155_648 / 4 * 1.6


def test_every_number_of_such_a_run_is_explained(whole):
    assert explained(whole)


def test_a_killed_run_resumes_bit_for_bit(whole, cwd):
    dice = random.Random(time.time_ns())
    moment = dice.randint(1, 5)
    print("killed at", moment)
    process = start(cwd, *RUN, "--run", "r")
    path = cwd / "runs" / "r" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text(encoding="utf-8").count("\n") >= moment):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    out, _ = (process := start(cwd, "--resume", "--run", "r")).communicate(timeout=300)
    assert process.returncode == 0, out
    mine = cwd / "runs" / "r"
    for name in ("metrics", "eval", "samples"):
        assert [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(mine / f"{name}.jsonl")] == \
            [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines(whole / f"{name}.jsonl")]
    assert (mine / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def config(**more) -> train.Config:
    return train.Config(**({"stages": ("squish:2",), "budgets": "0.1,0.4,60", "prompts": 2, "group": 4,
                            "template": "tagged"} | more))


def scored(config, seed=0):
    """Groups of the embedded model, scored; (groups, tasks, the line of the log, scorers)."""
    model, tokenizer = load(TINY, "cpu")
    posts = load_posts("tiny", "val")[:8]
    tasks = tasks_of(posts, 1, config, tokenizer)
    groups = sample(model, [task.prompt for task in tasks], config.group, 60, seed=seed, tokenizer=tokenizer,
                    stop_text=CLOSE)
    scorers = [(model, tokenizer)]
    stage, = train.parse_stages(config.stages)
    return groups, tasks, score(groups, tasks, stage.reward, config, tokenizer, scorers), scorers


def test_the_loop_s_reward_is_the_squish_of_what_stands_before_the_closing_tag():
    groups, tasks, line, scorers = scored(config())
    everything, n_over, n_missing = [], 0, 0
    for group, task in zip(groups, tasks):
        summaries = [extract(text, True) for text in group.texts]
        expected = squish(*scorers[0], task.post.document, summaries, task.budget)
        assert group.rewards == pytest.approx(
            [e if s else min(expected) for e, s in zip(expected, summaries)], abs=1e-6)
        everything += expected
        limit = task.budget if isinstance(task.budget, int) else task.budget * len(task.post.document)
        n_over += sum(bool(s) and len(s) > limit for s in summaries)
        n_missing += sum(not s for s in summaries)
    assert line["reward/squish"] == pytest.approx(np.mean(everything), abs=1e-6)
    assert (line["over"], line["missing"]) == (n_over / 8, n_missing / 8) and n_over > 0


def test_squish_beside_a_length_without_budget_and_tag(cwd):
    """A reward that a model measures is one among others: what is asked, and how it is read, is the template's."""
    args = ["--stages", "length + 2*squish:1", "--template", "chatml", "--run", "plain", "--prompts", "2",
            "--group", "4", "--eval-posts", "3", "--beta", "0"]
    assert train.main(args) == 0
    row, (before, _) = lines(Path("runs/plain/metrics.jsonl"))[0], lines(Path("runs/plain/eval.jsonl"))
    assert {"reward/squish", "reward/length", "within_2"} <= row.keys() and not {"over", "missing"} & row.keys()
    assert before["reward"] == pytest.approx(before["reward/length"] + 2 * before["reward/squish"])
    assert not [name for name in before if "@" in name] and before["within_10pct"] <= 1
    model, tokenizer = load(TINY, "cpu")
    kept, = [s for s in lines(Path("runs/plain/samples.jsonl")) if s["stage"] == 0][:1]
    expected, = squish(model, tokenizer, kept["document"], [kept["summary"]], budget=None)
    assert kept["reward/squish"] == pytest.approx(expected, abs=1e-6)


def test_cost_and_penalty_reach_the_reward():
    groups, tasks, line, scorers = scored(config(stages=("squish - 0.5*cost:1",), missing="penalty"))
    for group, task in zip(groups, tasks):
        summaries = [extract(text, True) for text in group.texts]
        values = [a - 0.5 * b for a, b in zip(squish(*scorers[0], task.post.document, summaries, task.budget),
                                              cost(*scorers[0], task.post.document, summaries))]
        there = [v for v, s in zip(values, summaries) if s]
        low = min(there) - max(max(there) - min(there), 0.1)
        assert group.rewards == pytest.approx([v if s else low for v, s in zip(values, summaries)], abs=1e-5)
    assert line["reward/cost"] > 0


def test_budgets_are_drawn_for_each_document_and_the_prompt_says_them():
    model, tokenizer = load(TINY, "cpu")
    posts, c = load_posts("tiny", "val")[:40], config(prompts=4)
    tasks = [task for step in range(30) for task in tasks_of(posts, step, c, tokenizer)]
    assert {task.budget for task in tasks} == {0.1, 0.4, 60}
    counts = [sum(task.budget == b for task in tasks) for b in (0.1, 0.4, 60)]
    assert min(counts) > 20
    for task in tasks[:6]:
        wanted = task.budget if task.budget == 60 else int(round(task.budget * len(task.post.document), 6))
        assert task.target == wanted
        text = tokenizer.decode(task.prompt)
        assert f"at most {wanted} characters, about {round(0.9 * wanted)}." in text and text.endswith("<summary>\n")
    again = tasks_of(posts, 7, c, tokenizer)
    assert again == tasks[28:32]
    assert tasks_of(posts, 7, config(prompts=4, seed=1), tokenizer) != again
    drawn = [[task.budget for step in range(9) for task in tasks_of(posts, step, config(prompts=4, seed=s),
                                                                          tokenizer)] for s in (0, 1)]
    assert drawn[0] != drawn[1]
    token_task = make_task(tokenizer, posts[0], config(budget_unit="tokens"), 0.5)
    assert token_task.target == int(0.5 * len(encode(tokenizer, posts[0].document).ids))
    assert "tokens, about" in tokenizer.decode(token_task.prompt)


def test_the_reference_model_is_the_policy_s_own_start_and_scorers_may_be_others():
    model, tokenizer = load(TINY, "cpu")

    def frozen(**more):
        return train.frozen_models(c := config(**more), train.parse_stages(c.stages), model, tokenizer)

    ref_model, scorers = frozen(lora=4)
    assert ref_model is model and scorers == [(model, tokenizer)]  # LoRA: one set of weights for all three
    ref_model, scorers = frozen()
    assert ref_model is scorers[0][0] and ref_model is not model
    assert not any(p.requires_grad for p in ref_model.parameters())
    ref_model, scorers = frozen(beta=0.0)
    assert ref_model is None and scorers[0][0] is not model
    ref_model, scorers = frozen(beta=0.0, references="tiny,tiny")
    assert ref_model is None and len(scorers) == 2 and model not in [scorer for scorer, _ in scorers]
    ref_model, scorers = frozen(stages=("length:2",))
    assert ref_model is not None and scorers == []


def test_a_stage_s_reference_has_the_adapters_inside(tmp_path):
    """--stage-ref previous under LoRA: switching the policy's adapters off must not touch the reference."""
    from lora import add_lora
    model, _ = load(TINY, "cpu")
    add_lora(model, 2, 4.0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Linear):
                m.lora_B.normal_(0, 0.1)
    x = torch.arange(12)[None] + 300
    now = model(x)
    for begins in (True, False):  # copied when the stage begins, read when a run is resumed
        if not begins:
            with torch.no_grad():
                model.layers[0].mlp.up_proj.lora_B.zero_()  # the policy has moved on
        stage = train.parse_stages(("length:1",))[0]
        reference = train.frozen_copy_of_stage(tmp_path, model, stage, begins)
        with reference.adapters_off():
            torch.testing.assert_close(reference(x), now, rtol=0, atol=1e-4)
        assert not any(p.requires_grad for p in reference.parameters())


def test_the_evaluation_counts_missing_and_over_budget_summaries_as_nothing():
    model, tokenizer = load(TINY, "cpu")
    posts = load_posts("tiny", "val")[:6]
    c = config(budgets="0.1,0.3,1.0", max_new_tokens=40)
    r = evaluation.evaluate(model, tokenizer, posts, c, [(model, tokenizer)])
    for b in (0.1, 0.3, 1.0):
        rows = [row for row in r["summaries"] if row["budget"] == b]
        assert len(rows) == 6 == r["n"]
        for row, post in zip(rows, posts):
            expected = squish(model, tokenizer, post.document, [row["summary"]], b)[0]
            assert row["reward/squish"] == pytest.approx(expected, abs=1e-6)
            assert row["over"] == (len(row["summary"]) > b * len(post.document)) and row["missing"] == (
                not row["summary"])
            assert row["used"] == pytest.approx(len(row["summary"]) / int(b * len(post.document)), rel=0.03)
        assert r[f"reward/squish@{b}"] == pytest.approx(np.mean([row["reward/squish"] for row in rows]))
        assert r[f"over@{b}"] == np.mean([row["over"] for row in rows])
    assert r["over@0.1"] > r["over@1.0"] and r["reward/squish@1.0"] > 0


def test_a_closed_tag_with_nothing_before_it_is_a_missing_summary(monkeypatch):
    model, tokenizer = load(TINY, "cpu")
    posts = load_posts("tiny", "val")[:4]
    texts = [" \n</summary>", "A cat.", posts[2].document[:30] + "</summary>", posts[3].document + "</summary>"]
    monkeypatch.setattr(evaluation, "complete", lambda *_, **__: [
        SimpleNamespace(texts=[text], lengths=torch.tensor([9]), stopped=torch.tensor([True])) for text in texts])
    r = evaluation.evaluate(model, tokenizer, posts, config(budgets="0.2"), [(model, tokenizer)])
    assert [row["missing"] for row in r["summaries"]] == [True, True, False, False]
    assert [row["over"] for row in r["summaries"]] == [False, False, False, True]
    assert (r["missing@0.2"], r["over@0.2"]) == (0.5, 0.25)
    used = [30 / int(0.2 * len(posts[2].document)), len(posts[3].document) / int(0.2 * len(posts[3].document))]
    assert r["used@0.2"] == pytest.approx(sum(used) / 2, rel=0.04)


def refused(capsys, main, *args) -> str:
    try:
        code = main(list(args))
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code != 0 and "Traceback" not in err and err.strip().count("\n") <= (1 if "usage" in err else 0), err
    return err


def test_bad_settings_are_sentences(cwd, capsys):
    few = ["--stages", "squish:1", "--eval-posts", "1"]
    assert "0.05,0.1,200" in refused(capsys, train.main, *few, "--budgets", "ten")
    assert "0.05,0.1,200" in refused(capsys, train.main, *few, "--budgets", "0.1,-2")
    assert "rank" in refused(capsys, train.main, *few, "--lora", "4", "--lora-targets", "q")
    assert "negative" in refused(capsys, train.main, *few, "--lora", "-1")
    assert "char_length" in refused(capsys, train.main, "--stages", "squish+length:1")
    assert "notes" in refused(capsys, train.main, *few, "--template", "none")
    (cwd / "long.jsonl").write_text("".join(json.dumps({"text": "a long story " * 500, "id": i}) + "\n"
                                            for i in range(20)), encoding="utf-8")
    assert "--max-document" in refused(capsys, train.main, *few, "--data", "long.jsonl", "--max-new-tokens", "60")
    bench = benchmark.main
    assert "no folder" in refused(capsys, bench, "--models", "nowhere", "--n", "2")
    assert "no folder" in refused(capsys, bench, "--references", "nowhere", "--n", "2")
    assert "0.05,0.1,200" in refused(capsys, bench, "--budgets", "x")
    assert "temperature" in refused(capsys, bench, "--samples", "2")
    text = "this is no data base, and long enough to be looked at by its reader"
    (cwd / "broken.sqlite").write_text(text * 20, encoding="utf-8")
    assert "--cache" in refused(capsys, bench, "--cache", "broken.sqlite", "--n", "2")


def test_a_target_in_tokens_says_nothing_of_a_run_with_budgets(cwd):
    """--target is 40 by default, and nobody is asked for it or paid by it here: 30 tokens may be enough."""
    c = config(max_new_tokens=30, template="")
    train.check(c)
    model, tokenizer = train.load_policy(c)
    train.choose_posts(c, train.parse_stages(c.stages), model, tokenizer)
    assert (c.template, c.target, c.max_new_tokens) == ("tagged", 40, 30)


def test_documents_are_cut_before_anybody_sees_them(cwd):
    (cwd / "long.jsonl").write_text("".join(json.dumps({"text": f"{i}. a long story " * 200, "id": i}) + "\n"
                                            for i in range(20)), encoding="utf-8")
    c = config(data="long.jsonl", max_document=50)
    model, tokenizer = train.load_policy(c)
    posts, held_out, _ = train.choose_posts(c, train.parse_stages(c.stages), model, tokenizer)
    for post in posts + held_out:
        assert 45 <= len(encode(tokenizer, post.document).ids) <= 50 and not post.reference
    task = make_task(tokenizer, posts[0], c, 0.4)
    assert posts[0].document in tokenizer.decode(task.prompt)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def chat(content, end="stop", **more) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content, **more}, "finish_reason": end}]}).encode()


@pytest.fixture
def server(monkeypatch):
    """A chat server on this machine. `answers` is a function from the request to (status, headers, text)."""
    base_client = pytest.importorskip("openai._base_client")
    seen = SimpleNamespace(bodies=[], keys=[], answer=None, together=0, most=0, lock=threading.Lock())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                seen.bodies.append(body)
                seen.keys.append(self.headers["Authorization"])
                seen.together += 1
                seen.most = max(seen.most, seen.together)
                n = sum(b["messages"] == body["messages"] for b in seen.bodies)
            status, headers, text = seen.answer(body, n)
            with seen.lock:
                seen.together -= 1
            if status is None:
                self.connection.close()
                return
            data = text if isinstance(text, bytes) else chat(text) if status == 200 else text.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    seen.handler = Handler
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    seen.url = f"http://127.0.0.1:{http.server_port}/v1#some-model"
    monkeypatch.setattr(base_client, "INITIAL_RETRY_DELAY", 0.01)  # of the package: what it waits, doubled each time
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-nobody")
    yield seen
    http.shutdown()
    http.server_close()


def bench(*args) -> list[dict]:
    assert benchmark.main(["--n", "4", "--budgets", "0.3", *args]) == 0
    return lines(Path("runs/squish/scores.jsonl"))


def first_words(body, room=100):
    return "Here it is: <summary>" + body["messages"][1]["content"][:room] + "</summary> Voila."


def test_models_servers_and_baselines_stand_in_one_table(server, cwd, capsys):
    server.answer = lambda body, n: (200, {}, first_words(body))
    rows = {r["model"]: r for r in bench("--models", "tiny", server.url)}
    assert list(rows) == ["tiny", server.url, "first", "reference", "other", "empty"]
    model, tokenizer = load(TINY, "cpu")
    posts = load_posts("tiny", "test")[:4]

    def mean(texts):
        return np.mean([squish(model, tokenizer, post.document, [text], 0.3)[0] for post, text in zip(posts, texts)])

    rooms = [int(0.3 * len(post.document)) for post in posts]
    assert rows["first"]["squish"] == pytest.approx(mean([p.document[:n] for p, n in zip(posts, rooms)]), abs=1e-6)
    assert rows["reference"]["squish"] == pytest.approx(mean([p.reference[:n] for p, n in zip(posts, rooms)]), abs=1e-6)
    assert rows["other"]["squish"] < 0 < rows["first"]["squish"] and rows["empty"]["squish"] == 0
    assert rows[server.url]["squish"] == pytest.approx(mean([p.document[:100].strip() for p in posts]), abs=1e-6)
    assert (rows["empty"]["failed"], rows["empty"]["coverage"], rows["first"]["coverage"]) == (1, 0, 1)
    asked = server.bodies[0]
    assert asked["model"] == "some-model" and asked["messages"][1]["content"] in [p.document for p in posts]
    room = rooms[[p.document for p in posts].index(asked["messages"][1]["content"])]
    assert f"at most {room} characters, about {round(0.9 * room)}." in asked["messages"][0]["content"]
    assert (cwd / "runs/squish/chart.png").read_bytes().startswith(b"\x89PNG")
    text = (cwd / "runs/squish/table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and text.count("\n") == 8


def test_what_was_written_once_is_not_asked_for_again(server, cwd):
    server.answer = lambda body, n: (200, {}, first_words(body))
    before = bench("--models", server.url)
    assert len(server.bodies) == 4
    assert bench("--models", server.url) == before and len(server.bodies) == 4
    bench("--models", server.url, "--temperature", "1", "--samples", "2")  # other settings: other answers
    assert len(server.bodies) == 12 and {b["seed"] for b in server.bodies[4:]} == {0, 1}
    bench("--models", server.url, "--budgets", "0.2")
    assert len(server.bodies) == 16
    bench("--models", server.url.replace("some", "other"))
    assert len(server.bodies) == 20


def test_requests_go_out_together_and_come_back_in_order(server, cwd):
    def answer(body, n):
        time.sleep(0.1)
        return 200, {}, first_words(body)

    server.answer = answer
    rows = {r["model"]: r for r in bench("--models", server.url, "--jobs", "4")}
    assert server.most > 1
    posts = load_posts("tiny", "test")[:4]
    assert [s["summary"] for s in rows[server.url]["summaries"]] == [p.document[:100].strip() for p in posts]


@pytest.mark.parametrize("fault", [(500, {}, "oops"), (429, {"Retry-After": "0.02"}, "slow down"), (None, {}, ""),
                                   (503, {}, "")])
def test_a_fault_that_passes_is_waited_for(server, cwd, fault):
    server.answer = lambda body, n: fault if n < 3 else (200, {}, first_words(body))
    rows = {r["model"]: r for r in bench("--models", server.url)}
    assert rows[server.url]["failed"] == 0 and len(server.bodies) == 12


def test_what_fails_for_good_counts_nothing_and_is_tried_again_next_time(server, cwd):
    """One document of four is never answered, one answer has no tags, one is over budget: the mean is over four."""
    posts = load_posts("tiny", "test")[:4]

    def answer(body, n):
        i = [p.document for p in posts].index(body["messages"][1]["content"])
        return [(500, {}, "no"), (200, {}, "A summary."), (200, {}, first_words(body, 9999)),
                (200, {}, first_words(body))][i]

    server.answer = answer
    row = {r["model"]: r for r in bench("--models", server.url)}[server.url]
    model, tokenizer = load(TINY, "cpu")
    good = squish(model, tokenizer, posts[3].document, [posts[3].document[:100]], 0.3)[0]
    assert row["squish"] == pytest.approx(good / 4, abs=1e-6)
    assert (row["failed"], row["over"], row["coverage"]) == (0.5, 0.25, 0.25)
    n = len(server.bodies)
    assert n == TRIES + 3
    server.answer = lambda body, n: (200, {}, first_words(body))
    row = {r["model"]: r for r in bench("--models", server.url)}[server.url]
    assert row["failed"] == 0.25 and len(server.bodies) == n + 1  # the one that failed, and no other


def not_measured(capsys, *args) -> str:
    """The sentence in which a benchmark ends that had no answer; the table says why as well, and others are in it."""
    assert benchmark.main(["--n", "3", "--budgets", "0.3", "--models", *args]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "sk-of-nobody" not in err + out
    row = next(line for line in out.splitlines() if "not measured" in line)
    assert err.split(" could not be measured (")[1].split("): mend that")[0].replace("|", "/") in row
    rows = {r["model"]: r for r in lines(Path("runs/squish/scores.jsonl"))}
    assert rows[args[0]]["squish"] is None and rows["first"]["squish"] > 0
    return err


@pytest.mark.parametrize("fault, why", [
    ((401, {}, '{"error": {"message": "Incorrect API key: sk-of-nobody"}}'), "HTTP 401 Incorrect API key: ***"),
    ((404, {}, json.dumps({"error": "no model 'some'"}, indent=2)), "HTTP 404 no model 'some'"),
    ((429, {}, '{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'), "your quota"),
    ((200, {}, b'{"error": "Unexpected endpoint or method."}'), "Unexpected endpoint"),
    ((200, {}, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'), "data: "),
    ((200, {}, b"<html>sk-of-nobody | a"), "<html>*** | a"), ((200, {}, b"[]"), "[]"),
    ((200, {}, b'{"choices": []}'), "choices"), ((200, {}, chat(None)), "an empty answer"),
    ((200, {}, chat({"text": "A cat."})), "AttributeError"),
    ((200, {}, chat([{"type": "text", "text": 3}])), "TypeError"),
    ((200, {"Content-Length": "9999"}, chat("<summary>A cat")), "connection failed"),
    ((200, {}, chat("<think>Long", "length")), "--max-new-tokens"),
    ((200, {}, chat("", refusal="I will not.")), "I will not."),
    ((503, {}, "busy"), "HTTP 503 busy"), ((None, {}, ""), "connection failed")])
def test_a_server_that_only_errs_is_not_measured_and_the_table_says_why(server, cwd, capsys, monkeypatch, fault, why):
    monkeypatch.setattr(benchmark, "draw", lambda *_: None)  # it takes longer than all the rest
    server.answer = lambda body, n: fault
    assert why in not_measured(capsys, server.url)
    if fault[0] in (401, 404):
        assert len(server.bodies) == 1  # what concerns all is not asked on and on
    server.answer = lambda body, n: (200, {}, first_words(body))  # nothing broken was kept
    assert bench("--models", server.url)[0]["failed"] == 0


def test_a_server_that_is_not_there_or_has_no_url_is_a_sentence(server, cwd, capsys, monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    assert "cannot be reached" in not_measured(capsys, "http://127.0.0.1:9/v1#some-model")
    server.answer = lambda body, n: (404, {}, "404 page not found")
    assert "URLs end in /v1" in not_measured(capsys, server.url.replace("/v1", ""))
    args = ["--n", "2", "--models"]
    for url in ("http://127.0.0.1:80x/v1#m", "localhost:11434/v1#m", "http://#m"):
        assert "no server's URL" in refused(capsys, benchmark.main, *args, url)
    secret = refused(capsys, benchmark.main, *args, "http://me:sk-of-nobody@127.0.0.1/v1#m")
    assert "OPENAI_API_KEY" in secret and "sk-of-nobody" not in secret
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in refused(capsys, benchmark.main, *args, server.url)


@pytest.mark.parametrize("ending, name", [("\n", "\\n"), ("\u201d", "\\u201d"), (" ", "' '")])
def test_a_key_that_is_none_is_refused_by_the_variable_s_name(server, cwd, capsys, monkeypatch, ending, name):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-nobody" + ending)
    err = refused(capsys, benchmark.main, "--n", "2", "--models", server.url)
    assert "OPENAI_API_KEY" in err and name in err and "sk-of-nobody" not in err and not server.bodies


def test_the_key_goes_to_its_server_and_nowhere_else(server, cwd, caplog):
    """Another host that the server sends us to learns no key; and it is in no file and no log."""
    caplog.set_level("DEBUG")
    other = ThreadingHTTPServer(("127.0.0.1", 0), server.handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
    server.answer = lambda body, n: (200, {}, first_words(body)) if n % 2 == 0 else (307, {"Location": there}, "")
    assert bench("--models", server.url)[0]["failed"] == 0
    assert server.keys.count("Bearer sk-of-nobody") == server.keys.count(None) == 4
    assert not [path for path in cwd.rglob("*") if path.is_file() and b"sk-of-nobody" in path.read_bytes()]
    assert "sk-of-nobody" not in caplog.text
    other.shutdown()
    other.server_close()


def test_one_refused_document_counts_as_failed_and_the_others_are_measured(server, cwd):
    filtered = load_posts("tiny", "test")[0].document  # the first, so that nothing was answered before it
    for fault in ((400, {}, '{"error": {"code": "content_filter", "message": "The response was filtered"}}'),
                  (403, {}, "no"), (200, {}, chat("<summary>A c", "content_filter"))):
        server.answer = lambda body, n, fault=fault: fault if body["messages"][1]["content"] == filtered else (
            200, {}, first_words(body))
        row = bench("--models", server.url, "--cache", f"{fault[0]}.sqlite")[0]
        assert row["failed"] == 0.25 and row["squish"] > 0
        assert "filter" in row["why"] or "403" in row["why"]
        assert f"| 25% ({row['why']}) |" in Path("runs/squish/table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, refuses, says, instead", [
    ("max_tokens", lambda b: "max_tokens" in b, "Unsupported parameter: max_tokens. Use max_completion_tokens instead.",
     lambda b: b["max_completion_tokens"] == 1024),
    ("seed", lambda b: "seed" in b, "Unknown name seed: cannot find field.", lambda b: b["max_tokens"] == 1024),
    ("temperature", lambda b: "temperature" in b, "'temperature' does not support 0 with this model", lambda b: True),
    ("system role", lambda b: b["messages"][0]["role"] == "system", "System role not supported",
     lambda b: [m["role"] for m in b["messages"]] == ["user"] and "about" in b["messages"][0]["content"])])
def test_what_a_server_does_not_take_is_asked_in_the_way_it_takes(server, cwd, capsys, name, refuses, says, instead):
    error = json.dumps({"error": {"message": says, "type": "invalid_request_error"}}, indent=2)
    server.answer = lambda body, n: (400, {}, error) if refuses(body) else (200, {}, "<summary>A cat.</summary>")
    rows = bench("--models", server.url, "--budgets", "0.3,0.5")
    assert rows[0]["failed"] == rows[1]["failed"] == 0
    assert len(server.bodies) == 1 + 8 and all(map(instead, server.bodies[1:]))  # refused once, and never again
    assert f"takes no {name}" in capsys.readouterr().err


def test_a_server_may_refuse_several_things_and_then_the_document(server, cwd, capsys):
    server.answer = lambda body, n: (422, {}, "no max_tokens") if "max_tokens" in body else (
        422, {}, "no seed") if "seed" in body else (422, {}, "no such documents")
    assert "no max_tokens; and without max_tokens: HTTP 422 no seed; and without seed: HTTP 422 no such documents" in \
        not_measured(capsys, server.url)


@pytest.mark.parametrize("content, summary", [
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "<summary>Hm.</summary>"}]},
      {"type": "text", "text": "<summary>A "}, {"type": "text", "text": "cat.</summary>"}], "A cat."),
    ("<think>\nBetween <summary> and </summary>.\n</think>\n\n<summary>A cat.</summary>", "A cat."),
    ("<summary>A cat \ud83d</summary>", "A cat \ufffd"), ("<summary>A cat \ud83d\ude00</summary>", "A cat \U0001f600")])
def test_what_is_judged_of_an_answer(server, cwd, content, summary):
    server.answer = lambda body, n: (200, {}, chat(content, reasoning_content="<summary>Hm.</summary>"))
    for _ in ("asked", "kept"):
        assert {s["summary"] for s in bench("--models", server.url)[0]["summaries"]} == {summary}
    assert len(server.bodies) == 4


def test_an_answer_that_breaks_once_is_asked_for_again(server, cwd):
    broken = (200, {}, b'{"choices": [{"mess')
    server.answer = lambda body, n: broken if n == 1 else (200, {}, first_words(body))
    assert bench("--models", server.url)[0]["failed"] == 0 and len(server.bodies) == 8


def test_a_server_that_goes_away_in_the_middle_is_not_measured_but_what_it_said_is_kept(server, cwd, capsys):
    server.answer = lambda body, n: (200, {}, first_words(body)) if len(server.bodies) < 3 else (402, {}, "pay")
    assert "HTTP 402 pay" in not_measured(capsys, server.url, "--jobs", "1")
    asked = len(server.bodies)
    server.answer = lambda body, n: (200, {}, first_words(body))
    assert bench("--models", server.url)[0]["failed"] == 0 and len(server.bodies) == asked + 2


def test_a_model_that_was_trained_again_is_another_model(tmp_path, cwd):
    import shutil
    shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.py", "*.jsonl"))
    before = benchmark.identity(str(tmp_path / "m"))
    assert benchmark.identity(str(tmp_path / "m")) == before
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes())
    import os
    os.utime(path, ns=(1, 1))
    assert benchmark.identity(str(tmp_path / "m")) != before


def test_a_local_model_s_samples_differ_and_its_budgets_are_kept_apart(cwd):
    """The mean is over all samples; what was written for one budget is not taken for another's."""
    settings = ("--n", "3", "--samples", "2", "--temperature", "1", "--max-new-tokens", "24")
    row = next(r for r in bench("--models", "tiny", *settings) if r["model"] == "tiny")
    texts, values = ([[s[what] for s in row["summaries"] if s["sample"] == k] for k in (0, 1)]
                     for what in ("summary", "squish"))
    assert texts[0] != texts[1] and values[0] != values[1]
    assert row["squish"] == pytest.approx(np.mean(values), abs=1e-9)
    after = bench("--models", "tiny", *settings, "--budgets", "0.6")
    assert after == bench("--models", "tiny", *settings, "--budgets", "0.6", "--cache", "fresh.sqlite")


def test_the_benchmark_measures_cut_documents_and_asks_as_it_is_told(cwd):
    model, tokenizer = load(TINY, "cpu")
    texts = [shorten(tokenizer, p.document, 40) for p in load_posts("tiny", "test")[:4]]
    rows = {r["model"]: r for r in bench("--models", "tiny", "--max-document", "40", "--budgets", "0.3,0.5")}
    firsts = [text[:int(0.5 * len(text))] for text in texts]
    expected = np.mean([squish(model, tokenizer, text, [first], 0.5)[0] for text, first in zip(texts, firsts)])
    assert rows["first"]["squish"] == pytest.approx(expected, abs=1e-6)
    asked = [r for r in bench("--models", "tiny", "--template", "notes") if r["model"] == "tiny"]
    assert asked[0]["summaries"] != [r for r in bench("--models", "tiny") if r["model"] == "tiny"][0]["summaries"]


def test_the_table_begins_with_the_best_at_the_smallest_budget():
    rows = [dict.fromkeys(("low", "high", "coverage", "failed", "over", "used"), 0.0) | {
        "model": name, "budget": budget, "squish": value} for name, budget, value in (
        ("a", 0.2, 0.3), ("b", 0.2, 0.5), ("a", 0.1, 0.1), ("b", 0.1, 0.2))]
    order = [line.split(" | ")[:2] for line in benchmark.table(rows).splitlines()[2:]]
    assert order == [["| b", "0.1"], ["| a", "0.1"], ["| b", "0.2"], ["| a", "0.2"]]


def test_several_references_are_averaged(cwd):
    import shutil
    shutil.copytree(TINY, "m", ignore=shutil.ignore_patterns("*.py", "*.jsonl"))
    one = {r["model"]: r for r in bench("--models", "first")}
    two = {r["model"]: r for r in bench("--models", "first", "--references", "tiny,m")}
    assert two["first"]["squish"] == pytest.approx(one["first"]["squish"], abs=1e-6)


def test_short_documents_can_be_left_out(cwd):
    rows = {r["model"]: r for r in bench("--models", "first", "--min-chars", "400")}
    chosen = [p.id for p in load_posts("tiny", "test") if len(p.document) >= 400][:4]
    assert list(dict.fromkeys(s["id"] for s in rows["first"]["summaries"])) == chosen


def test_a_baseline_of_tokens_is_cut_in_tokens():
    _, tokenizer = load(TINY, "cpu")
    posts = [Post("A cat sat on a mat, and a dog sat on a log.", "A cat and a dog sat.", "1"),
             Post("Tom won a race.", "Tom won.", "2")]
    c = config(budget_unit="tokens")
    for name in ("first", "reference", "other"):
        for text in benchmark.baseline(name, posts, 3, c, tokenizer):
            assert 0 < len(encode(tokenizer, text).ids) <= 3
    assert benchmark.baseline("empty", posts, 3, c, tokenizer) == [None, None]


def test_the_free_text_before_the_summary_is_not_scored():
    """--template notes: what is thought first costs no budget and earns nothing."""
    model, tokenizer = load(TINY, "cpu")
    post = load_posts("tiny", "val")[0]
    c = config(template="notes")
    task = make_task(tokenizer, post, c, 0.4)
    text = f" It is about a goat, and that is long to say. {post.document} <summary>{post.reference[:60]}</summary>"
    group = SimpleNamespace(texts=[text, text.replace("<summary>", ""), "", text], mask=torch.ones(4, 3).bool(),
                            lengths=torch.tensor([3, 3, 0, 3]))
    line = score([group], [task], rewards.parse("squish"), c, tokenizer, [(model, tokenizer)])
    expected = squish(model, tokenizer, post.document, [post.reference[:60].strip()], 0.4)[0]
    assert group.rewards == pytest.approx([expected, 0, 0, expected], abs=1e-6) and expected > 0
    assert (line["missing"], line["over"]) == (0.5, 0.0)
