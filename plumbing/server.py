"""Other people's servers: any that speaks OpenAI's protocol (hosted, Ollama, vLLM, llama.cpp), by the package openai.

Retries, time-outs, Retry-After and the pool of connections are the package's. Here stands what servers do differently,
and what a caller must know of a failure. $OPENAI_API_KEY says who asks. Rewards ask the server at $OPENAI_BASE_URL
(Ollama on this machine unless told).
"""

import functools
import json
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import urlsplit

from plumbing.kept import Kept
from plumbing.thoughts import without_thoughts

TRIES = 5  # of one request, while the server is busy or away; the package waits in between
MOST = 4096  # vectors that are kept
TOO_MUCH = (400, 413, 422)  # how servers refuse a batch of more texts, or of more tokens, than they take at once
ALTERNATIVES = (20, 10, 5)  # how many likely tokens are asked for at each place; servers allow 20, 11, 5 or none
# Not every server takes all that is sent. What it does not take -> the words by which a refusal says so.
UNTAKEN = {**{f"{n} top_logprobs": "logprobs" for n in ALTERNATIVES},
           "max_tokens": r"\bmax_tokens\b", "seed": r"\bseed\b", "temperature": r"\btemperature\b",
           "system role": r"system (message|prompt|instruction)|\broles?\b|developer instruction"}


class Refused(OSError):
    """There is no answer, and why. `final`: the server will not answer the next request either. `status`: of HTTP."""

    def __init__(self, why: str, final: bool = False, status: int | None = None):
        super().__init__(why)
        self.final, self.status = final, status


# --- asking -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def connect(url: str, model: str, key: str) -> "Server":
    """The server, with all that was learnt about it since this process began."""
    return Server(url, model, key)


class Server:
    """A model behind a server."""

    def __init__(self, url: str, model: str, key: str):
        check_key(key)
        check_url(url)
        try:
            from openai import OpenAI, OpenAIError, Timeout
            self.client = OpenAI(base_url=url, api_key=key or "none", max_retries=TRIES - 1)
            self.timeout = functools.partial(Timeout, connect=10)
        except ImportError as e:
            if e.name is None:  # what a proxy of the environment needs
                raise OSError(f"No server can be asked: {' '.join(str(e).split())}") from e
            raise OSError("To ask a server takes a package that is not here: pip install openai.") from e
        self.url, self.model, self.key, self.error = url, model, key, OpenAIError
        self.untaken: set[str] = set()  # names of UNTAKEN that it was found not to take
        self.met = False  # it has answered before
        self.gone: Refused | None = None  # why it will not answer again
        self.batch = 2 ** 16  # texts that it takes in one request, as far as is known
        self.used: Counter[str] = Counter()  # answers, and the tokens that they were of
        self.lock = threading.Lock()

    def chat(self, system: str, user: str, *, max_tokens: int, temperature: float, seed: int, close: str = "") -> str:
        """One answer, without its reasoning field. `close`: an answer that was cut off before it has this is none."""
        body = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "messages": [
            {"role": "system", "content": mended(system)}, {"role": "user", "content": mended(user)}]}
        return self.ask(self.client.chat.completions, body, functools.partial(read_answer, close=close), seconds=600)

    def reply(self, system: str, user: str, *, max_tokens: int, temperature: float, seed: int, logprobs: bool,
              seconds: float) -> dict:
        """One answer, cut off or not: {"text", "tokens"}. The tokens are None where the server does not tell them."""
        body = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "messages": [
            {"role": "system", "content": mended(system)}, {"role": "user", "content": mended(user)}]}
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": ALTERNATIVES[0]}
        found = self.ask(self.client.chat.completions, body, read_reply, seconds)
        return {**found, "text": self.unkeyed(found["text"])}

    def vectors(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector for each text, in their order: in one request, or in halves where the server takes fewer texts.

        Servers have limits between 8 and 2,048 texts, and words of their own for them. So any refusal of a batch is
        tried on its halves; what is wrong with one text stays wrong when it goes alone.
        """
        found: list[list[float]] = []
        size = self.batch
        while len(found) < len(texts):
            some = texts[len(found):len(found) + size]
            body = {"input": [mended(text) for text in some], "encoding_format": "float"}  # not base64
            try:
                found += self.ask(self.client.embeddings, body, functools.partial(read_vectors, n=len(some)), 60)
            except Refused as e:
                if e.status not in TOO_MUCH or len(some) == 1:
                    raise
                size = (len(some) + 1) // 2
        self.batch = size
        return found

    def together(self, work: Callable, items: Sequence, jobs: int) -> Iterator[tuple]:
        """(item, work(item) or the Refused that it raised) of all items as they come, `jobs` at a time.

        The first of all goes alone: it learns what the server does not take, and whether it is there."""
        def attempt(item):
            try:
                return item, work(item)
            except Refused as e:
                return item, e

        if items and not self.met:
            yield attempt(items[0])
            items = items[1:]
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(attempt, item) for item in items]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:  # also where the caller was stopped: what has not begun does not begin
                for future in futures:
                    future.cancel()

    def ask(self, resource, body: dict, read: Callable, seconds: float):
        """What `read` makes of the answer. A broken one is asked for once more: it may have been cut on the way."""
        for last in (False, True):
            if self.gone:
                raise self.gone
            content = self.send(resource, body, seconds)
            try:
                answer = as_object(content)
                self.count(answer.get("usage"))
                result = read(answer)
                self.met = True
                return result
            except Refused as e:
                raise Refused(self.clean(str(e))) from None
            except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as e:
                if last:
                    said = self.clean(reason_of(content.decode("utf-8", "replace")))
                    raise Refused(f"it answered {said!r} ({self.clean(repr(e))}){self.hint()}") from None

    def send(self, resource, body: dict, seconds: float) -> bytes:
        """The answer's bytes. What the server refuses to take is changed or left out, and that is remembered."""
        untaken, before = set(self.untaken), ""
        while True:
            try:
                answer = resource.with_raw_response.create(model=self.model, timeout=self.timeout(seconds),
                                                           **adapted(body, untaken))
                for new in sorted(untaken - self.untaken):
                    print(f"{self.url} takes no {new} for {self.model}: asked without it.", file=sys.stderr)
                self.untaken |= untaken
                return answer.content
            except self.error as e:
                status = getattr(e, "status_code", None)
                failure = self.failure(e, status)
                name = next((name for name, words in UNTAKEN.items() if name not in untaken and sent(name, body)
                             and re.search(words, str(failure), re.IGNORECASE)), None)
                if name is None or status in (None, 401, 402, 403, 404, 429):
                    if failure.final:
                        self.gone = failure
                    raise Refused(before + str(failure), failure.final, status) from None
                before += f"{failure}; and without {name}: "
                untaken.add(name)

    def failure(self, e, status: int | None) -> Refused:
        """What is wrong, in words that do not have the key in them."""
        if status is None:
            cause = e.__cause__ or e
            away = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
            said = self.clean(f"{type(cause).__name__} {cause}")
            return Refused(f"it cannot be reached: {said}" if away else f"the connection failed: {said}", away)
        said = self.clean(reason_of(e.response.text))
        never = status in (401, 402, 404) or "insufficient_quota" in e.response.text
        return Refused(f"HTTP {status} {said}" + (self.hint() if status == 404 else ""), never)

    def count(self, usage) -> None:
        """Add up what the answers cost, where the server says it. An answer that is of no use is paid for, too."""
        usage = usage if isinstance(usage, dict) else {}
        with self.lock:
            self.used["answers"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.used[name] += usage[name] if isinstance(usage.get(name), int) else 0

    def hint(self) -> str:
        return "" if "/v1" in self.url else "; most servers' URLs end in /v1, this one does not"

    def clean(self, text: str) -> str:
        """One line, not too long, without the key."""
        text = " ".join(self.unkeyed(text).split())
        return text if len(text) <= 300 else text[:300] + " ..."

    def unkeyed(self, text: str) -> str:
        if len(self.key) > 3:  # a shorter one is no secret
            text = text.replace(self.key, "***").replace(json.dumps(self.key)[1:-1], "***")
        return text


def check_key(key: str) -> None:
    """A key travels in a header. What cannot go there is refused before a library shows it in an error."""
    strange = [char for char in key if not "!" <= char <= "~"]
    if strange:
        raise ValueError(f"OPENAI_API_KEY holds {ascii(strange[0])}, which no key has: set it again, without line "
                         f"ends, blanks and typographic quotes.")


def check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        secret = "@" in parts.netloc or bool(re.search("key|token|secret", parts.query, re.IGNORECASE))
    except ValueError:
        fine = secret = False
    if secret:
        raise ValueError("The server's URL holds a key or a password, and would be printed: leave it out, and set "
                         "OPENAI_API_KEY.")
    if not fine:
        raise ValueError(f"{url} is no server's URL: one looks like http://localhost:11434/v1 (in URL#NAME, or in "
                         f"OPENAI_BASE_URL).")


def sent(name: str, body: dict) -> bool:
    if name.endswith("top_logprobs"):
        return "logprobs" in body
    return "messages" in body if name == "system role" else name in body


def adapted(body: dict, untaken: set[str]) -> dict:
    """The request without what the server does not take; what has another form is said in that."""
    result = {name: value for name, value in body.items() if name not in untaken}
    if "max_tokens" in untaken & body.keys():
        result["max_completion_tokens"] = body["max_tokens"]  # OpenAI's newer name
    if "logprobs" in body:
        left = [n for n in ALTERNATIVES if f"{n} top_logprobs" not in untaken]
        result |= {"top_logprobs": left[0]} if left else {}
        result = result if left else {k: v for k, v in result.items() if k not in ("logprobs", "top_logprobs")}
    if "system role" in untaken and "messages" in body:  # in the user's turn
        result["messages"] = [{"role": "user", "content": "\n\n".join(m["content"] for m in body["messages"])}]
    return result


# --- reading ----------------------------------------------------------------------------------------------------------


def mended(text: str) -> str:
    """Text that has a UTF-8 form: half a character (a lone surrogate) becomes the sign for one that is lost."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def as_object(content: bytes) -> dict:
    answer = json.loads(content.decode("utf-8", "replace"))
    if answer.get("error"):
        raise ValueError("an error")
    return answer


def reason_of(text: str) -> str:
    """The message in the body of an error, whatever its form; else the body."""
    try:
        found = json.loads(text)
        found = found.get("error") or found
        found = found if isinstance(found, str) else found.get("message") or found
        return found if isinstance(found, str) else json.dumps(found)
    except (ValueError, AttributeError):
        return text


def read_answer(answer: dict, close: str) -> str:
    """The text of a chat's answer."""
    choice = answer["choices"][0]
    content, end = choice["message"]["content"], choice.get("finish_reason")
    if isinstance(content, list):  # in parts, some of which are thoughts
        content = "".join(part["text"] for part in content if part.get("type", "text") in ("text", "output_text"))
    if end == "content_filter" or choice["message"].get("refusal"):
        raise Refused(f"the server's filter refused it: {choice['message'].get('refusal') or end}")
    if end == "length" and close not in without_thoughts(content or ""):
        raise Refused("the answer was cut off before its end: allow it more with --max-new-tokens")
    text = mended(content or "")
    if not text.strip() or end == "error":
        raise ValueError(f"an empty answer, {end}")
    return text


def read_reply(answer: dict) -> dict:
    """The text of a chat's answer, and its tokens where the server tells them."""
    return {"text": read_answer(answer, close=""), "tokens": tokens_of(answer["choices"][0])}


def tokens_of(choice: dict) -> list[tuple[str, dict[str, float]]] | None:
    """The tokens of an answer at temperature 0, each with its likeliest alternatives and their log-probabilities.

    None where the server gives none, or in another form. At temperature 0 the token that was said is the likeliest.
    mlx_lm.server names another one of the list, and spells blanks as its vocabulary does.

    >>> tokens_of({"logprobs": {"content": [{"token": "\u2581a", "logprob": -2.0, "top_logprobs": [
    ...     {"token": "\u2581a", "logprob": -2.0}, {"token": "\u2581the", "logprob": -0.5}]}]}})
    [(' the', {' a': -2.0, ' the': -0.5})]
    """
    try:
        tokens = []
        for item in filter(None, choice["logprobs"]["content"]):
            each = {plain(other["token"]): float(other["logprob"]) for other in item.get("top_logprobs") or ()}
            each.setdefault(plain(item["token"]), float(item["logprob"]))
            tokens.append((max(each, key=each.__getitem__), each))
        return tokens or None
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def plain(token: str) -> str:
    """A word of a vocabulary as it stands in a text: its sign for a blank is a blank."""
    return token.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n")


def read_vectors(answer: dict, n: int) -> list[list[float]]:
    """The n vectors of an answer, whole and alike."""
    data = sorted(answer["data"], key=lambda item: item.get("index") or 0)  # stable: some servers give no index
    vectors = [list(map(float, item["embedding"])) for item in data]
    if len(vectors) != n:
        raise ValueError(f"{len(vectors)} vectors for {n} texts")
    if not all(vectors) or not all(math.isfinite(x) for vector in vectors for x in vector):
        raise ValueError("a vector that is empty or not finite")
    return vectors


# --- the reward 'embedding' -------------------------------------------------------------------------------------------


_known = Kept()  # (server, model, text) -> vector: references come back each epoch


def similarities(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Cosine similarity of each pair of texts by their vectors, in [-1, 1]; 0 where one of the two is blank."""
    vectors = embed([text for pair in pairs for text in pair if text.strip()])
    return [cosine(vectors[a], vectors[b]) if a.strip() and b.strip() else 0.0 for a, b in pairs]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """a b / (|a| |b|).

    >>> cosine([3.0, 4.0], [4.0, 3.0])
    0.96
    """
    return sum(map(float.__mul__, a, b)) / max(1e-12, math.hypot(*a) * math.hypot(*b))


def embed(texts: Sequence[str]) -> dict[str, list[float]]:
    """{text: vector} of the model $EMBEDDING_MODEL; all texts that are not known yet go in one request."""
    url = (os.environ.get("OPENAI_BASE_URL") or "http://localhost:11434/v1").strip().rstrip("/")
    model = os.environ.get("EMBEDDING_MODEL") or "nomic-embed-text"
    found = {text: _known.get(url, model, text) for text in texts}
    new = [text for text, vector in found.items() if vector is None]
    try:
        if new:
            server = connect(url, model, os.environ.get("OPENAI_API_KEY", ""))
            server.gone = None  # a reward asks again: nobody else would notice that the server is back
            found.update(zip(new, server.vectors(new)))
        sizes = {len(vector) for vector in found.values()}
        if len(sizes) > 1:
            raise Refused(f"vectors of {' and '.join(map(str, sorted(sizes)))} numbers")
    except Refused as e:
        raise ConnectionError(f"The reward 'embedding' got no vectors from {url}/embeddings for the model {model} "
                              f"({e}): start a server there, or set OPENAI_BASE_URL, OPENAI_API_KEY, "
                              f"EMBEDDING_MODEL.") from None
    if len(_known) + len(new) > MOST:
        _known.clear()
    for text in new:
        _known.put(found[text], url, model, text)
    return found
