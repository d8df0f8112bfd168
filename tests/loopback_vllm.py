"""A vLLM server on this machine, by crisp's own sampler. It answers as vLLM 0.32 was read and seen to, mistakes
included: a test names the one that it is to make.

A parameter that is not sent gets the server's own default, and the defaults here are such that it shows.
"""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from grpo import group_logprobs
from lora import load_adapters
from model import load
from plumbing.posts import TINY
from rollout import sample


class Vllm:
    """`fault` is what it does wrong, from now on; `asked` holds (path, body) of all requests."""

    def __init__(self, folder=TINY, context=1024):
        self.model, self.tokenizer = load(folder)
        self.context, self.adapters, self.asked = context, {}, []
        self.fault, self.broken, self.lock = "", False, threading.Lock()
        self.ending = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"vllm": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.ending.set()
        self.http.shutdown()
        self.http.server_close()

    def bodies(self, path):
        return [body for asked, body in self.asked if asked == path]

    def answer(self, path, body):
        """-> (status, what is sent). None for a status: the connection is closed."""
        if self.broken:
            return (200, "") if path == "/health" else (None, "")
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            card = {"id": "served", "parent": None, "max_model_len": self.context}
            return 200, {"data": [card, *({"id": name, "parent": "served"} for name in self.adapters)]}
        if path == "/v1/load_lora_adapter":
            return self.load_adapter(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            found = self.adapters.pop(body["lora_name"], None)
            return (200, "Success") if found is not None and self.fault != "unload" else (404, "cannot be found")
        if path == "/collective_rpc":
            return self.reload(body)
        if path == "/reset_prefix_cache":
            return 200, {"success": self.fault != "cache"}
        return self.complete(body) if path == "/v1/completions" else (404, {"detail": "Not Found"})

    def load_adapter(self, name, path):
        if self.fault == "no runtime lora":
            return 404, {"detail": "Not Found"}
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        assert Path(path, "adapter_config.json").exists()
        self.adapters[name] = copy.deepcopy(self.model)
        if self.fault != "no adapter":
            load_adapters(self.adapters[name], path)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def reload(self, body):
        assert body["method"] == "reload_weights"
        if self.fault == "reload":
            self.broken = True
            return 500, {"error": {"message": "EngineCore encountered an issue"}}
        if self.fault == "no dev mode":
            return 404, {"detail": "Not Found"}
        if self.fault != "stale":
            self.model, _ = load(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def complete(self, body):
        if self.fault == "dies":
            self.broken = True
            return None, ""
        if self.fault == "500":
            return 500, {"error": {"message": "EngineCore encountered an issue"}}
        if self.fault == "hangs":
            self.ending.wait(60)
        model = self.adapters.get(body["model"], self.model)
        if body["model"] not in ("served", *self.adapters):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        T = min(body.get("max_tokens", 16), self.context - len(body["prompt"]))
        T = 5 if self.fault == "cuts" else T
        top_k = 5 if self.fault == "few words" else body.get("top_k", 5)
        defaults = {"min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": 1}
        assert not [name for name in defaults if body.get(name, defaults[name]) != (name == "repetition_penalty")]
        stops = body["stop_token_ids"] if body["ignore_eos"] else [*body["stop_token_ids"], 0]
        with self.lock:
            group, = sample(model, [body["prompt"]], body["n"], T, body.get("temperature", 0.6), body.get("top_p", 0.5),
                            max(top_k, 0), stops, body["seed"])
            if self.fault == "raw":
                group.logp, _ = (x[0] for x in group_logprobs(model, [group.prompt], group.tokens[None],
                                                              group.mask[None], 1.0))
        choices = [self.choice(group, g, body, T) for g in range(body["n"])]
        return 200, {"object": "text_completion", "choices": choices[::-1]}  # in any order

    def choice(self, group, g, body, T):
        n = int(group.mask[g].sum())
        tokens, logp = group.tokens[g, :n].tolist(), group.logp[g, :n].tolist()
        reason = "stop" if group.stopped[g] else "length"
        for text in body["stop"]:  # wherever it stands in the text
            for t in range(1, n + 1):
                if text in self.tokenizer.decode(tokens[:t], True):
                    tokens, logp, reason = tokens[:t], logp[:t], "stop"
                    break
        if self.fault == "abort":
            tokens, logp, reason = tokens[:2], logp[:2], "abort"
        if self.fault == "stops":
            tokens, logp, reason = tokens[:3], logp[:3], "stop"
        return {"index": g, "text": self.tokenizer.decode(tokens, True), "finish_reason": reason, "token_ids": tokens,
                "prompt_token_ids": body["prompt"], "logprobs": {"token_logprobs": logp}}


class Handler(BaseHTTPRequestHandler):
    vllm: Vllm

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else {}
        self.vllm.asked.append((self.path, body))
        if self.vllm.fault == "elsewhere" and self.path == "/v1/completions":
            self.send_response(307)
            self.send_header("Location", self.vllm.other + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        status, content = self.vllm.answer(self.path, body)
        if status is None:
            return self.connection.close()
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client did not wait
            pass

    do_GET = do_POST

    def log_message(self, *_):
        pass


def learn(model, size=0.02):
    """A step of training, as far as a server can tell: all that is trained moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator)
