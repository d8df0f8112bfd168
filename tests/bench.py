"""Speed, ours against the libraries' own, in pairs on one machine. No test: it prints a table.

    pip install -r tests/requirements.txt && python tests/bench.py
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from helpers import nltk_wordnet  # noqa: E402
from nltk.translate.meteor_score import meteor_score  # noqa: E402
from rouge_score.rouge_scorer import RougeScorer  # noqa: E402
from sacrebleu.metrics import BLEU  # noqa: E402

from rewards import bleu, meteor, rouge_l, words_13a  # noqa: E402
from rollout import TINY  # noqa: E402
from words import find_wordnet  # noqa: E402

GROUPS, G, WORDS, ROUNDS = 8, 8, 55, 15  # 64 completions of 55 words: about 64 tokens


def batches() -> list[list[tuple[str, str]]]:
    """ROUNDS batches of (completion, reference) pairs that share about half of their words. No text comes twice: what
    is remembered of texts is of no use, as in training, but for a group's reference."""
    rng = random.Random(0)
    texts = [json.loads(line)["document"].split() for line in (TINY / "train.jsonl").read_text().splitlines()]
    rounds = []
    for _ in range(ROUNDS):
        batch = []
        for _ in range(GROUPS):
            reference = (rng.choice(texts) + rng.choice(texts))[:WORDS]
            for _ in range(G):
                other = rng.choice(texts)
                batch.append((" ".join(word if rng.random() < 0.5 else rng.choice(other) for word in reference),
                              " ".join(reference)))
        rounds.append(batch)
    return rounds


class NoSynonyms:
    def synsets(self, word):
        return []


def rewards_against_libraries() -> None:
    rouge, sacre = RougeScorer(["rougeL"], use_stemmer=True), BLEU(effective_order=True)
    wordnet = nltk_wordnet() if find_wordnet() else NoSynonyms()
    pairs = {
        "ROUGE-L": (rouge_l, "rouge_score", lambda c, r: rouge.score(r, c)["rougeL"].fmeasure),
        "BLEU": (bleu, "sacreBLEU", lambda c, r: sacre.sentence_score(c, [r]).score / 100),
        "METEOR": (meteor, "nltk", lambda c, r: meteor_score([words_13a(r)], words_13a(c), wordnet=wordnet)),
    }
    print(f"rewards: {GROUPS} groups of {G} completions of {WORDS} words; median of {ROUNDS} rounds, ms a round. "
          f"WordNet: {find_wordnet() or 'none'}")
    print(f"{'':10} {'ours':>8} {'library':>9} {'ratio':>7}")
    rounds, total = batches(), 0.0
    for pair in (pair for batch in rounds for pair in batch):  # every word has been met once, as after a run's first
        backwards = [" ".join(reversed(text.split())) for text in pair]  # steps, but no text: sacreBLEU remembers those
        for ours, _, theirs in pairs.values():
            ours(*backwards), theirs(*backwards)
    for name, (ours, library, theirs) in pairs.items():
        seconds = []
        for i, batch in enumerate(rounds):
            row = {}
            for who in ((ours, theirs), (theirs, ours))[i % 2]:  # in turns, so that neither is always the first
                begun = time.perf_counter()
                for candidate, reference in batch:
                    who(candidate, reference)
                row[who] = time.perf_counter() - begun
            seconds.append((row[ours], row[theirs], row[theirs] / row[ours]))
        a, b, ratio = (statistics.median(column) for column in zip(*seconds))
        total += a
        print(f"{name:10} {1e3 * a:8.2f} {1e3 * b:9.2f} {ratio:6.1f}x  {library}", flush=True)
    print(f"{'all three':10} {1e3 * total:8.2f}")


if __name__ == "__main__":
    rewards_against_libraries()
