"""Completions from servers: what is asked, what is believed, and what a run does about a server that dies or lies.

The oracle is our own model: whatever a server answers, the log-probabilities that reach the update are those of the
weights that are trained.
"""

import doctest
import json
import socket
import threading
from types import SimpleNamespace

import pytest
import torch

import grpo
import train
from config import Config
from lora import add_lora, save_adapters
from model import load, save
from plumbing import rollouts as rollouts_module
from plumbing import vllm as vllm_module
from plumbing.posts import TINY
from plumbing.rollouts import on_servers
from plumbing.server import Refused
from plumbing.vllm import Engine, Row, check_address, ended, read_completions
from rollout import sample, split
from studies import rollouts_check
from tests.helpers import refusal
from tests.loopback_vllm import Vllm, learn

PROMPTS = [[1, 300, 301, 302], [1, 300, 301], [1, 400, 401, 402, 403], [1, 300, 301]]
G, T = 3, 10


@pytest.fixture
def servers():
    pytest.importorskip("openai")
    found = [Vllm(), Vllm()]
    yield found
    for server in found:
        server.close()


@pytest.fixture
def run(tmp_path, servers, capsys, monkeypatch):
    """`begin(lora=, ...)` -> act; `step()` -> groups of the next step; `said()`: what was printed since."""
    from openai import _base_client
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    run = SimpleNamespace(seed=0, servers=servers, folder=tmp_path)

    def begin(lora=0, temperature=1.0, urls=None):
        run.model, run.tokenizer = load(TINY, "cpu")
        if lora:
            add_lora(run.model, lora, 2.0 * lora, seed=0)
        run.config = Config(lora=lora, temperature=temperature, max_new_tokens=T,
                            rollouts=tuple(urls or [server.url for server in servers]))
        run.act = on_servers(run.config, tmp_path, act=sample, model=run.model, tokenizer=run.tokenizer,
                             prompt=PROMPTS[2], grpo=grpo, split=split, save=save, save_adapters=save_adapters)
        return run

    def step(prompts=PROMPTS, stop_text=""):
        learn(run.model)
        run.seed += 1
        groups = run.act(run.model, prompts, G=G, max_new_tokens=T, temperature=run.config.temperature, seed=run.seed,
                         tokenizer=run.tokenizer, stop_text=stop_text)
        assert [group.prompt.tolist() for group in groups] == prompts
        for group in groups:
            ours, _ = grpo.group_logprobs(run.model, [group.prompt], group.tokens[None], group.mask[None],
                                          run.config.temperature)
            torch.testing.assert_close(group.logp, ours[0].detach(), rtol=0, atol=1e-4)
        return groups

    run.begin, run.step, run.said = begin, step, lambda: capsys.readouterr().out
    return run


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_without_servers_nothing_changes(tmp_path):
    """The single machine's path is the function itself."""
    act = on_servers(Config(), tmp_path, act=sample, model=None, tokenizer=None, prompt=[], grpo=grpo, split=split,
                     save=save, save_adapters=save_adapters)
    assert act is sample


@pytest.mark.parametrize("lora", [0, 2])
def test_groups_of_servers_are_those_of_the_sampler(run, lora):
    """Every field as `rollout.sample` fills it in: the mask with its stop token, lengths, texts, the weights' logp."""
    run.begin(lora)
    for _ in range(3):
        for group in run.step():
            assert group.tokens.shape == group.mask.shape == group.logp.shape and len(group.texts) == G
            assert group.mask.shape[1] == group.mask.sum(1).max() and group.ending is None
            assert not group.tokens[~group.mask].any() and not group.logp[~group.mask].any()
            for g in range(G):
                ids = group.tokens[g][group.mask[g]].tolist()
                ends = ids[-1] in run.model.config.eos_token_ids
                assert group.stopped[g] == ends and len(ids) == T or ends
                assert group.texts[g] == run.tokenizer.decode(ids[:-1] if ends else ids, True)
    asked = [server.bodies("/v1/completions") for server in run.servers]
    assert [len(bodies) for bodies in asked] == [1 + 3 * 2] * 2  # the test of the beginning; then two prompts each
    assert "dropped" not in run.said()
    del run.act
    assert not list(run.folder.glob("rollouts-*"))  # weights of the last step


def test_no_two_completions_are_drawn_with_the_same_seed(run):
    """vLLM draws completion g with seed + g: two prompts, or two steps, whose seeds are closer than G share numbers."""
    run.begin()
    run.step(), run.step(), run.step()
    bodies = [body for server in run.servers for body in server.bodies("/v1/completions") if body["n"] == G]
    seeds = [body["seed"] + g for body in bodies for g in range(G)]
    assert len(seeds) == len(set(seeds)) == 3 * len(PROMPTS) * G


def test_adapters_get_a_name_and_a_folder_of_their_own(run):
    """Loaded under a new name before the old one goes: a server keeps what it computed with a name's first weights."""
    run.begin(lora=2)
    run.step(), run.step()
    server, = run.servers[:1]
    routes = [(path.rpartition("/")[2], body.get("lora_name"), body.get("model")) for path, body in server.asked]
    names = [name for route, name, _ in routes if route == "load_lora_adapter"]
    assert len(names) == len(set(names)) == 3 and list(server.adapters) == names[-1:]
    assert routes[2:] == [
        ("load_lora_adapter", names[0], None), ("completions", None, names[0]),
        ("load_lora_adapter", names[1], None), ("unload_lora_adapter", names[0], None),
        ("completions", None, names[1]), ("completions", None, names[1]),
        ("load_lora_adapter", names[2], None), ("unload_lora_adapter", names[1], None),
        ("completions", None, names[2]), ("completions", None, names[2])]
    assert [path.name for path in run.folder.glob("rollouts-*/*")] == ["weights-3"]  # the others are deleted
    fleet = run.act.__self__
    fleet.close(), fleet.close()  # the run is over: its last adapter goes as well, once
    assert server.adapters == {} and server.asked[12][1] == {"lora_name": names[2]} and len(server.asked) == 13
    assert not list(run.folder.glob("rollouts-*"))


def test_held_out_posts_are_summarised_here(run):
    run.begin()
    before = [len(server.asked) for server in run.servers]
    settings = {"G": 1, "max_new_tokens": T, "temperature": 0.0, "seed": 0, "tokenizer": run.tokenizer}
    here, = run.act(run.model, PROMPTS[:1], **settings, stop_text="")
    assert here.texts == sample(run.model, PROMPTS[:1], **settings)[0].texts
    assert before == [len(server.asked) for server in run.servers]


def test_a_stop_text_ends_a_completion_and_its_name_does_not(run):
    """A server stops wherever the text stands. Where it is only named, in a thought, the completion goes on, so the
    groups have the endings that the sampler gives them."""
    run.begin(urls=[run.servers[0].url])
    group, = run.step([PROMPTS[0]], stop_text=".")
    here, = sample(run.model, [PROMPTS[0]], G, T, seed=run.seed * G, tokenizer=run.tokenizer, stop_text=".")
    assert group.ending.tolist() == here.ending.tolist() and group.lengths.tolist() == here.lengths.tolist()
    assert group.ending.any() and group.texts == here.texts

    row = Row(run.tokenizer.encode("<think> a the b").ids, [], "stop")
    wish = {"stop_token_ids": [2], "stop": [" the"]}
    assert ended(row, wish, run.tokenizer) is False and not row.stopped
    row = Row(run.tokenizer.encode("<think> a</think> b the").ids, [], "stop")
    assert ended(row, wish, run.tokenizer) is True and row.ending == 1


# --- servers that die or lie ------------------------------------------------------------------------------------------


def choice(**more):
    return {"index": 0, "finish_reason": "stop", "token_ids": [5, 2], "prompt_token_ids": [1, 2, 3],
            "logprobs": {"token_logprobs": [-1.0, -0.5]}, **more}


LIES = {  # what is wrong with an answer to "two completions of at most three tokens" -> (its choices, words)
    "no token ids": ([choice(), choice(index=1, token_ids=None)], "0.10.2"),
    "text for tokens": ([choice(), choice(index=1, token_ids="ab")], "not one of 10"),
    "a number for tokens": ([choice(), choice(index=1, token_ids=2)], "len"),
    "true for a token": ([choice(), choice(index=1, token_ids=[True, 2])], "not one of 10"),
    "beyond the vocabulary": ([choice(), choice(index=1, token_ids=[5, 10])], "not one of 10"),
    "no tokens": ([choice(), choice(index=1, token_ids=[], logprobs={"token_logprobs": []})], "at most 3"),
    "too many": ([choice(), choice(index=1, token_ids=[5] * 4, logprobs={"token_logprobs": [-1.0] * 4})], "4 tokens"),
    "too few numbers": ([choice(), choice(index=1, logprobs={"token_logprobs": [-1.0]})], "1 log-probabilities"),
    "NaN": ([choice(), choice(index=1, logprobs={"token_logprobs": [-1.0, float("nan")]})], "is none"),
    "minus infinity": ([choice(), choice(index=1, logprobs={"token_logprobs": [-1.0, float("-inf")]})], "is none"),
    "more than certain": ([choice(), choice(index=1, logprobs={"token_logprobs": [-1.0, 0.5]})], "is none"),
    "a text": ([choice(), choice(index=1, logprobs={"token_logprobs": [-1.0, "-1"]})], "is none"),
    "no number of a float": ([choice(), choice(index=1, logprobs={"token_logprobs": [-1, -10 ** 400]})], "too large"),
    "no numbers": ([choice(), choice(index=1, logprobs=None)], "None"),
    "one completion": ([choice()], "in place of 2"),
    "one of them twice": ([choice(), choice()], "in place of 2"),
    "another prompt": ([choice(), choice(index=1, prompt_token_ids=[1, 2])], "another prompt"),
    "cut": ([choice(), choice(index=1, finish_reason="length")], "after 2 of 3 tokens"),
    "broken off": ([choice(), choice(index=1, finish_reason="abort")], "paused"),
    "a list": ([choice(), [1]], "list"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_is_checked_before_it_is_used(lie):
    """In an engine that has been asked, the same is a reason to drop it."""
    pytest.importorskip("openai")
    rows = read_completions({"choices": [choice(index=1), choice(token_ids=[7, 2])]}, [1, 2, 3], 2, 3, 10)
    assert [row.tokens for row in rows] == [[7, 2], [5, 2]] and rows[0].logp == [-1.0, -0.5]  # in any order
    engine = Engine("http://localhost:8000")
    choices, words = LIES[lie]
    engine.send = lambda *_, **__: json.dumps({"choices": choices})
    with pytest.raises(Refused) as caught:
        engine.request({}, [1, 2, 3], 2, 3, seed=0, words=10)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"choices": 1}', "[" * 100_000, "<html>busy</html>"])
def test_what_is_no_answer_is_a_refusal(text):
    pytest.importorskip("openai")
    engine = Engine("http://localhost:8000")
    engine.send = lambda *_, **__: text
    with pytest.raises(Refused):
        engine.request({}, [1, 2, 3], 2, 3, seed=0, words=10)


def test_a_completion_ends_where_it_was_told_to_end(run):
    """One that goes on after its end, or stops without one, comes from stop words of the server's own."""
    run.begin(urls=[run.servers[0].url])
    wish = {"stop_token_ids": [2], "stop": []}
    assert ended(Row([5, 2], [], "stop"), wish, run.tokenizer) is True
    assert ended(Row([5, 6], [], "length"), wish, run.tokenizer) is None
    for row, words in ((Row([5, 2, 6], [], "length"), "went on"), (Row([5, 6], [], "stop"), "nothing ends one")):
        with pytest.raises(Refused, match=words):
            ended(row, wish, run.tokenizer)


LATER = {  # fault that begins after a good step -> (full weights or rank of adapters, temperature, words)
    "dies": (0, 1.0, "connection"), "500": (2, 1.0, "EngineCore"), "abort": (2, 1.0, "paused"),
    "cuts": (0, 1.0, "after 5 of 10"), "stops": (2, 1.0, "nothing ends one"), "hangs": (2, 1.0, "timed out"),
    "stale": (0, 1.0, "tied"), "reload": (0, 1.0, "/collective_rpc"), "cache": (0, 1.0, "older weights"),
    "no adapter": (2, 1.0, "without the adapter"), "unload": (2, 1.0, "cannot be found"),
    "few words": (0, 1.0, "--generation-config vllm"), "elsewhere": (0, 1.0, "307"),
}


@pytest.mark.parametrize("fault", LATER)
def test_a_server_that_begins_to_fail_is_dropped_and_no_step_is_lost(run, fault, monkeypatch):
    """Its prompts go to the other one; when that fails as well, they are sampled here."""
    lora, temperature, words = LATER[fault]
    run.begin(lora, temperature)
    run.step()
    first, second = run.servers
    if fault == "hangs":
        monkeypatch.setattr(vllm_module, "TRIES", 1)
        monkeypatch.setattr(run.act.__self__.engines[0].server, "timeout", lambda seconds: 0.2 + 0 * seconds)
    first.other = second.url
    first.fault = fault
    run.said()
    run.step()
    said = run.said()
    assert said.count("is dropped") == 1 and first.url in said and words in said, said
    assert len(second.bodies("/v1/completions")) == 1 + 2 + 4
    second.fault, asked = "dies", len(first.asked)
    run.step()
    assert "Completions are written on this machine from now on" in run.said() and len(first.asked) == asked


AT_ONCE = {  # fault from the beginning -> (rank, temperature, words)
    "raw": (0, 0.7, "processed_logprobs"), "few words": (0, 1.0, "--generation-config vllm"),
    "no dev mode": (0, 1.0, "VLLM_SERVER_DEV_MODE=1"), "no runtime lora": (2, 1.0, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    "other model": (2, 1.0, "another model"), "context": (0, 1.0, "--max-model-len"), "dies": (0, 1.0, "chunked"),
    "nobody": (0, 1.0, "cannot be reached"), "no vllm": (0, 1.0, "is it a vLLM server"),
}


@pytest.mark.parametrize("fault", AT_ONCE)
def test_what_cannot_work_is_said_before_the_first_step(run, fault):
    lora, temperature, words = AT_ONCE[fault]
    first, second = run.servers
    first.fault = fault
    urls = [first.url, second.url]
    if fault == "other model":
        learn(first.model, 0.1)
    elif fault == "context":
        first.context = 14
    elif fault == "no vllm":
        first.context = None
    elif fault == "nobody":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            urls[0] = f"http://127.0.0.1:{free.getsockname()[1]}"
    run.begin(lora, temperature, urls)
    said = run.said()
    assert f"{urls[0]} is dropped" in said and words in said and f"written by {second.url}." in said, said
    run.step()


def test_a_run_without_any_server_of_use_does_not_begin(run):
    for server in run.servers:
        server.fault = "500"
    message = refusal_of(ConnectionError, run.begin)
    assert "--rollouts without an address" in message and run.said().count("is dropped") == 2
    assert not list(run.folder.iterdir())


def refusal_of(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_server_in_bfloat16_is_judged_by_the_mean(run):
    """Its single tokens are off by more than a mistake would be. Said once, and a mistake of this size is found."""
    for server in run.servers:
        server.model.to(torch.bfloat16)
    run.begin(lora=2, urls=[run.servers[0].url])
    assert "rounds" in run.said()
    learn(run.model)
    settings = {"G": G, "max_new_tokens": T, "temperature": 1.0, "tokenizer": run.tokenizer}
    run.act(run.model, PROMPTS, **settings, seed=1)
    assert not run.said()
    run.servers[0].fault = "no adapter"
    run.act(run.model, PROMPTS, **settings, seed=2)
    assert "without the adapter" in run.said()


@pytest.mark.parametrize("url", ["localhost:8000", "http://h:8000/v1", "http://me:secret@h", "http://", "ftp://h",
                                 "http://h:99999", "http://h?key=1", "http://[h"])
def test_an_address_is_a_host_and_a_port(url):
    assert "http://localhost:8000" in refusal(ValueError, check_address, url)


def test_nobody_else_is_asked(run, monkeypatch):
    """Neither a proxy of the environment nor whatever a server sends us on to; and OpenAI's key stays here."""
    monkeypatch.setenv("HTTP_PROXY", run.servers[1].url)
    monkeypatch.setenv("http_proxy", run.servers[1].url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    seen = []
    run.servers[0].http.RequestHandlerClass.parse_request = parse_and_keep(seen)
    run.begin(urls=[run.servers[0].url])
    run.step()
    assert not run.servers[1].asked and seen and "sk-of-somebody-else" not in str(seen)


def parse_and_keep(seen):
    from http.server import BaseHTTPRequestHandler

    def parse_request(self):
        fine = BaseHTTPRequestHandler.parse_request(self)
        seen.append(dict(self.headers))
        return fine

    return parse_request


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_whose_servers_die_in_the_middle(run, monkeypatch, capsys):
    """All steps are there, and in each the update's log-probabilities are the sampler's; then it is resumed here."""
    monkeypatch.chdir(run.folder)
    first, second = run.servers
    settings = ["--prompts", "2", "--group", "3", "--target", "8", "--eval-posts", "2", "--save-every", "2", "--lora",
                "2", "--run", "r", "--stages", "length:4", "--rollouts", first.url, second.url]
    die_after(first, 2), die_after(second, 4)
    assert train.main(settings) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (run.folder / "runs/r/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and max(row["logp_gap"] for row in rows) < 1e-4
    assert "not repeated or resumed bit for bit" in said and said.count("is dropped") == 2
    assert not list((run.folder / "runs/r").glob("rollouts-*"))
    config = json.loads((run.folder / "runs/r/config.json").read_text(encoding="utf-8"))
    assert config["rollouts"] == [first.url, second.url]
    assert train.main(["--run", "r", "--resume"]) == 1  # they are still away
    assert "--rollouts without an address" in capsys.readouterr().err
    assert train.main(["--run", "r", "--resume", "--rollouts"]) == 0  # sampled here


def die_after(server, n):
    """It dies at its completion number n + 1."""
    whole, lock = server.complete, threading.Lock()

    def complete(body):
        with lock:
            if len(server.bodies("/v1/completions")) > n:
                server.broken = True
                return None, ""
        return whole(body)

    server.complete = complete


def test_together_hands_on_what_is_no_refusal():
    def fail(x):
        raise KeyError(x)

    with pytest.raises(KeyError):
        rollouts_module.together(fail, [(1,)])


def test_weights_that_were_not_written_whole_are_not_sent(tmp_path):
    """A server that reloads them answers 500, looks healthy, and dies of the next request."""
    save(*load(TINY, "cpu"), tmp_path)
    file = tmp_path / "model.safetensors"
    rollouts_module.check_whole(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert "not written whole" in refusal(OSError, rollouts_module.check_whole, file)


def test_the_study_s_model_with_a_head_of_its_own_is_the_embedded_one(tmp_path):
    assert doctest.testmod(rollouts_check).failed == 0
    (model, _), (tied, _) = load(rollouts_check.untied(tmp_path / "m"), "cpu"), load(TINY, "cpu")
    assert model.lm_head is not None and not model.config.tie_word_embeddings
    tokens = torch.tensor([PROMPTS[2]])  # [1, P]
    assert torch.equal(model(tokens), tied(tokens))
