"""One vLLM server, over the package openai: what it is asked, and what of its answers is believed.

The routes are vLLM's own: /health, /v1/models, /v1/completions, and for new weights /v1/load_lora_adapter and
/v1/unload_lora_adapter, or /collective_rpc and /reset_prefix_cache. Answers are JSON or text; nothing is unpickled.
"""

import json
import math
import os
import socket
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from plumbing.prompts import spelt
from plumbing.server import Refused, Server
from plumbing.thoughts import is_ended

SECONDS, TRIES = 600, 2  # for the completions of a prompt, or for new weights; of the former
# What a server needs to be told at its start, for the routes that it may lack.
NEEDED = {"/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, with a --max-lora-rank of at "
                                   "least --lora",
          "/collective_rpc": "VLLM_SERVER_DEV_MODE=1", "/reset_prefix_cache": "VLLM_SERVER_DEV_MODE=1"}


@dataclass
class Row:
    """One completion."""

    tokens: list[int]
    logp: list[float]  # of each token, nats
    reason: str  # "stop" or "length"
    stopped: bool = False
    ending: int = 0  # tokens that spell the stop text
    spelt: bool = False  # whether there is a stop text


class Engine:
    """One vLLM server, at http://host:port."""

    def __init__(self, url: str):
        check_address(url)
        self.url = url.rstrip("/")
        self.server = Server(f"{self.url}/v1", "", os.environ.get("VLLM_API_KEY", ""))  # the name is vLLM's own
        from openai import DefaultHttpxClient
        # No address but this one: no proxy of the environment, and nowhere that it sends us on. A connection that is
        # kept may be closed by the server in the moment in which it is used again.
        http = DefaultHttpxClient(trust_env=False, follow_redirects=False, event_hooks={"request": [self.on_the_way]})
        self.client = self.server.client.with_options(http_client=http, default_headers={"Connection": "close"})
        self.name, self.base, self.context = "", "", 0  # what is asked for; the model without adapters; its tokens
        self.limits: tuple[float, float] | None = None  # of the gap: largest and mean; None: never compared
        self.met = False  # it has written a completion
        self.over = False  # nobody waits for its answers any more
        self.sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # of requests that are in flight

    def on_the_way(self, request) -> None:
        """A request is about to go: keep its connection, for `hang_up`."""
        def connected(event: str, info: dict) -> None:
            if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                self.sockets.add(info["return_value"].get_extra_info("socket"))
                if self.over:
                    self.hang_up()

        if self.over:
            raise ConnectionError("The run is over.")
        request.extensions["trace"] = connected

    def hang_up(self) -> None:
        """End all requests, and begin none: a thread that waits for an answer gets an error in its place."""
        self.over = True
        for each in list(self.sockets):
            with suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)

    def send(self, method: str, path: str, body: dict | None = None, tries: int = 1, seconds: float = 0) -> str:
        """The answer's text; Refused where there is none."""
        client = self.client.with_options(max_retries=tries - 1, timeout=self.server.timeout(seconds or SECONDS))
        try:
            if method == "GET":
                return client.get(self.url + path, cast_to=str)
            return client.post(self.url + path, cast_to=str, body=body)
        except self.server.error as e:
            status = getattr(e, "status_code", None)  # None: there was no answer
            needed = f" (it has to be started with {NEEDED[path]})" if path in NEEDED and status else ""
            raise Refused(f"{path}: {self.server.failure(e, status)}{needed}", status=status) from None

    def begin(self) -> None:
        """Is it there, and what does it serve?"""
        self.send("GET", "/health", seconds=10)
        try:
            cards = [card for card in as_object(self.send("GET", "/v1/models", seconds=60))["data"]
                     if not card.get("parent")]  # an adapter has one
            self.base = self.name = cards[0]["id"]
            self.context = cards[0]["max_model_len"]
            if not isinstance(self.name, str) or type(self.context) is not int:
                raise ValueError("no name or no length")
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as e:
            raise Refused(f"/v1/models does not say which model it serves, and up to how many tokens ({e!r:.100}): is "
                          f"it a vLLM server?") from None

    def take_adapter(self, new: Path, old: Path) -> None:
        """Under a name of its own: a server keeps what it computed with a name's first weights."""
        name = f"{new.parent.name}-{new.name}"
        self.send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(new)})
        before, self.name = self.name, name
        if before == f"{old.parent.name}-{old.name}":
            self.send("POST", "/v1/unload_lora_adapter", {"lora_name": before})

    def drop_adapter(self) -> None:
        """When the run is over: the server forgets the last adapter, whose files go now."""
        if self.name != self.base:
            self.over = False
            with suppress(Refused):  # it is gone, or does not answer: then it may keep the name
                self.send("POST", "/v1/unload_lora_adapter", {"lora_name": self.name}, seconds=5)
            self.over, self.name = True, self.base

    def take_weights(self, folder: Path) -> None:
        self.send("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        answer = self.send("POST", "/reset_prefix_cache")
        if '"success":true' not in answer.replace(" ", ""):
            raise Refused(f"it keeps what it computed of prompts with older weights (/reset_prefix_cache answered "
                          f"{answer!r:.100})")

    def complete(self, wish: dict, prompt: list[int], G: int, T: int, *, tokenizer, seed: int, words: int) -> list[Row]:
        """G completions of at most T tokens, checked. `words`: the size of the vocabulary."""
        if len(prompt) + T > self.context:  # else it would cut without a word
            raise Refused(f"its context has {self.context} tokens, and a prompt of {len(prompt)} with {T} new ones "
                          f"needs more: start it with a larger --max-model-len")
        rows = self.request(wish, prompt, G, T, seed=seed, words=words)
        for g, row in enumerate(rows):
            # The server stops where the stop text stands in the text. Where that only names it, the completion goes on.
            while ended(row, wish, tokenizer) is False and len(row.tokens) < T:
                more, = self.request(wish, prompt + row.tokens, 1, T - len(row.tokens), seed=seed + g, words=words)
                row.tokens, row.logp, row.reason = row.tokens + more.tokens, row.logp + more.logp, more.reason
        return rows

    def request(self, wish: dict, prompt: list[int], n: int, T: int, *, seed: int, words: int) -> list[Row]:
        body = {**wish, "model": self.name, "prompt": prompt, "n": n, "max_tokens": T, "seed": seed, "logprobs": 0,
                "return_token_ids": True}
        try:
            text = self.send("POST", "/v1/completions", body, tries=TRIES)
        except Refused as e:
            if self.met or e.status not in (None, 500):
                raise
            raise Refused(f"{e}. vLLM's CPU build dies of a seed with chunked prefill: start it with "
                          f"--no-enable-chunked-prefill") from None
        try:
            rows = read_completions(as_object(text), prompt, n, T, words)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as e:
            raise Refused(f"/v1/completions answered {self.server.clean(text[:200])!r} ({e!r:.200})") from None
        self.met = True
        return rows


def check_address(url: str) -> None:
    """ValueError where it is not http://host:port."""
    try:
        parts = urlsplit(url)
        fine = (parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and "@" not in parts.netloc
                and parts.path in ("", "/") and not parts.query and not parts.fragment)
    except ValueError:
        fine = False
    if not fine:
        raise ValueError("--rollouts takes addresses of vLLM servers such as http://localhost:8000, without /v1 and "
                         "without a key or a password (a key is $VLLM_API_KEY).")


def as_object(text: str) -> dict:
    try:
        found = json.loads(text)
    except RecursionError as e:
        raise ValueError("too deep") from e
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def read_completions(answer: dict, prompt: list[int], n: int, T: int, words: int) -> list[Row]:
    """The n completions of an answer, in their order. Refused or ValueError where a part of it is not what was asked
    for."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(n)):
        raise ValueError(f"{len(choices)} completions in place of {n}")
    rows = []
    for choice in choices:
        reason, tokens = choice["finish_reason"], choice.get("token_ids")
        if reason not in ("stop", "length"):  # "abort": /pause answers so
            raise Refused(f"it broke a completion off ({reason!r:.40}), as one does that is paused")
        if tokens is None:
            raise Refused("it does not return token ids: take vLLM 0.10.2 or newer")
        logp = choice["logprobs"]["token_logprobs"]
        if not (0 < len(tokens) <= T and len(logp) == len(tokens)):
            raise ValueError(f"{len(tokens)} tokens and {len(logp)} log-probabilities where at most {T} were asked for")
        if not all(type(i) is int and 0 <= i < words for i in tokens):
            raise ValueError(f"a token that is not one of {words}")
        if not all(type(p) in (int, float) and -math.inf < p <= 1e-3 for p in logp):  # rounded, 0 may be above 0
            raise ValueError("a log-probability that is none")
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise Refused("it has read another prompt than it was given")
        if reason == "length" and len(tokens) < T:
            raise Refused(f"it cut a completion after {len(tokens)} of {T} tokens: look for max_new_tokens in the "
                          f"model's generation_config.json, or start it with --generation-config vllm")
        rows.append(Row(list(tokens), list(map(float, logp)), reason))
    return rows


def ended(row: Row, wish: dict, tokenizer) -> bool | None:
    """Set the row's `stopped` and `ending` by the rules of `rollout.sample`. False: the server stopped where only the
    stop text's name is; None: it was cut. Refused where it stopped, or went on, for no reason that it was given."""
    stops, stop_text = set(wish["stop_token_ids"]), "".join(wish["stop"])
    *before, last = row.tokens
    row.spelt = bool(stop_text)
    row.ending = 0 if last in stops or not stop_text else spelt(tokenizer, stop_text, torch.tensor([row.tokens]))[0]
    row.stopped = last in stops or row.ending > 0
    if not stops.isdisjoint(before) or stop_text and is_ended(tokenizer.decode(before, True), stop_text):
        raise Refused("a completion went on after its end")
    if row.stopped:
        return True
    if row.reason == "length":
        return None
    if not stop_text or stop_text not in tokenizer.decode(row.tokens, True):
        raise Refused("a completion stopped where nothing ends one: it has stop words of its own, so start it with "
                      "--generation-config vllm")
    return False
