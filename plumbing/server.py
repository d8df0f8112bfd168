"""Other people's servers: any that speaks OpenAI's protocol (hosted, Ollama, vLLM, llama.cpp).

$OPENAI_BASE_URL says where it is (Ollama on this machine unless told), $OPENAI_API_KEY who asks.
"""

import json
import math
import os
import urllib.request
from collections.abc import Sequence

_known: dict[tuple[str, str, str], list[float]] = {}  # (server, model, text) -> vector; references come back each epoch
MOST = 4096  # vectors that are kept


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
    url = os.environ.get("OPENAI_BASE_URL", "http://localhost:11434/v1").rstrip("/") + "/embeddings"
    model = os.environ.get("EMBEDDING_MODEL", "nomic-embed-text")
    new = [text for text in dict.fromkeys(texts) if (url, model, text) not in _known]
    if new:
        if len(_known) + len(new) > MOST:
            _known.clear()
            new = list(dict.fromkeys(texts))
        _known.update(((url, model, text), vector) for text, vector in zip(new, _ask(url, model, new)))
    return {text: _known[url, model, text] for text in texts}


def _ask(url: str, model: str, texts: list[str]) -> list[list[float]]:
    request = urllib.request.Request(url, json.dumps({"model": model, "input": texts}).encode(), {
        "Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = json.load(answer)["data"]
        data = sorted(data, key=lambda item: item.get("index", 0))  # a stable sort: some servers give no index
        vectors = [list(map(float, item["embedding"])) for item in data]
        if len(vectors) != len(texts):
            raise ValueError(f"{len(vectors)} vectors for {len(texts)} texts")
        return vectors
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise ConnectionError(f"The reward 'embedding' got no vectors from {url} for the model {model} ({e!r}): start "
                              f"a server there, or set OPENAI_BASE_URL, OPENAI_API_KEY, EMBEDDING_MODEL.") from e
