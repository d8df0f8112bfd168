"""Is the judge right? People rate pairs of summaries blindly, and then the judge and the metrics are held against them.

    python eval.py tiny runs/tiny-1                                                  # writes every summary
    python -m studies.judge_check --summaries runs/eval/tiny.jsonl runs/eval/runs_tiny-1.jsonl --n 40
    python -m studies.judge_check --summaries ... --n 40 --ratings ratings.csv --judge "http://localhost:11434/v1#qwen3:8b"

Without --ratings it writes a sheet: one HTML file that needs no network. It shows a post and two summaries of it, which
is whose stands nowhere in it, and it saves a CSV. What is drawn, and which is A, depends on the seed and the
summaries alone; so the second command finds the same pairs, and nothing else has to be kept.

With --ratings it says how well the person's preference (from -2, A is far better, to 2, B is) agrees with the
difference of the judge's scores, and of each metric: Spearman's rank correlation, with a 95% bootstrap interval over
pairs. Where two people have rated, it says how well they agree with each other: nobody can expect more of a judge.
With --repeat R the judge is asked R times anew, and its own spread from time to time is said.
"""

import argparse
import csv
import hashlib
import html
import json
import sys
from pathlib import Path

import numpy as np

from judge import CRITERIA, VERSION, Judge, judged
from plumbing.folder import write_text
from plumbing.results import in_columns, in_markdown
from plumbing.significance import interval, rank_correlation

METRICS = ("rouge_l", "meteor", "bleu", "invented", "copy_rate", "length")
ANSWERS = {-2: "A, by far", -1: "A, a little", 0: "the same", 1: "B, a little", 2: "B, by far"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which summary is better?</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
section { border-top: 1px solid #8888; padding: 1rem 0; }
.post { white-space: pre-wrap; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
.two p { border: 1px solid #8888; border-radius: .4rem; margin: 0; padding: .6rem; white-space: pre-wrap; }
fieldset { border: 0; padding: .6rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
footer { position: sticky; bottom: 0; background: Canvas; border-top: 1px solid #8888; padding: .6rem 0; }
button { font: inherit; padding: .3rem .8rem; }
</style></head><body>
<h1>Which summary is better?</h1>
<p>Take the one that you would rather have been given instead of the post. What is false counts more than what is
missing, and what is missing more than what is too much. Who wrote which is not said. Your answers stay in this browser
until you save them.</p>
<form id="sheet">
PAIRS
</form>
<footer><button id="save" type="button">Save ratings.csv</button> <output id="done"></output></footer>
<script>
"use strict";
const form = document.getElementById("sheet"), key = "sheet SHEET", names = NAMES;
const given = () => names.map(name => [name, (new FormData(form)).get(name)]);
const say = () => { const n = given().filter(([, value]) => value !== null).length;
                    document.getElementById("done").textContent = `${n} of ${names.length}`; };
try {
  for (const [name, value] of JSON.parse(localStorage.getItem(key) || "[]"))
    if (value !== null) form.elements[name].value = value;
} catch (e) { /* a browser that keeps nothing for files: then the page must stay open */ }
form.addEventListener("change", () => {
  say();
  try { localStorage.setItem(key, JSON.stringify(given())); } catch (e) { /* as above */ }
});
document.getElementById("save").addEventListener("click", () => {
  const rows = given().filter(([, value]) => value !== null).map(([name, value]) => `SHEET,${name},${value}`);
  const link = document.createElement("a");
  const text = ["sheet,pair,preference", ...rows].join("\\n") + "\\n";
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  link.download = "ratings.csv";
  link.click();
});
say();
</script></body></html>
"""


# --- the sheet --------------------------------------------------------------------------------------------------------


def read_rows(path: str) -> list[dict]:
    """The summaries that eval.py wrote."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if not rows or not all({"id", "document", "summary"} <= row.keys() for row in rows):
            raise ValueError("its lines have no id, document and summary")
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path} does not hold summaries ({e}): take a .jsonl that eval.py wrote.") from e
    return rows


def pairs_of(files: list[list[dict]], n: int, seed: int) -> list[dict]:
    """n pairs {"document", "left", "right"} of two models' summaries of a post, drawn and turned by the seed.

    Pairs of equal summaries are left out: there is nothing to prefer.
    """
    by_post: list[dict] = [{} for _ in files]
    for found, rows in zip(by_post, files):
        for row in rows:
            found.setdefault(row["document"], row)
    rng = np.random.default_rng(seed)
    pairs = []
    for document in by_post[0]:
        there = [found[document] for found in by_post if document in found]
        if len(there) > 1:
            a, b = (there[i] for i in rng.permutation(len(there))[:2])
            if a["summary"] != b["summary"]:
                pairs.append({"document": document, "left": a, "right": b})
    if not pairs:
        raise ValueError("The files hold no two different summaries of one post: evaluate both models on the same "
                         "posts.")
    return [pairs[i] for i in rng.permutation(len(pairs))[:n]]


def sheet_of(pairs: list[dict]) -> str:
    """A name that no other sheet has."""
    texts = [[pair["document"], pair["left"]["summary"], pair["right"]["summary"]] for pair in pairs]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:10]


def page(pairs: list[dict]) -> str:
    """The sheet as a page. Text of posts and models is escaped: one that spells a tag is text."""
    parts = []
    for i, pair in enumerate(pairs, 1):
        texts = [html.escape(text) or "(nothing)" for text in (pair["document"], pair["left"]["summary"],
                                                               pair["right"]["summary"])]
        buttons = "".join(f'<label><input type="radio" name="{i}" value="{value}"> {answer}</label>'
                          for value, answer in ANSWERS.items())
        parts.append(f'<section><h2>{i}</h2><p class="post">{texts[0]}</p><div class="two"><p><b>A</b> {texts[1]}</p>'
                     f'<p><b>B</b> {texts[2]}</p></div><fieldset><legend>Better is</legend>{buttons}</fieldset>'
                     f'</section>')
    names = json.dumps([str(i) for i in range(1, len(pairs) + 1)])
    # The texts come last: one that spells a place of the page is not filled in.
    return PAGE.replace("SHEET", sheet_of(pairs)).replace("NAMES", names).replace("PAIRS", "\n".join(parts))


def read_ratings(path: str, pairs: list[dict]) -> np.ndarray:
    """A CSV of the sheet -> preferences [pairs], -2 to 2, NaN where there is none."""
    values = np.full(len(pairs), np.nan)
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f))
    try:
        for row in rows:
            if row["sheet"] != sheet_of(pairs):
                raise ValueError(f"it belongs to sheet {row['sheet']}, and these summaries, --n and --seed make sheet "
                                 f"{sheet_of(pairs)}")
            if not 1 <= int(row["pair"]) <= len(pairs) or int(row["preference"]) not in ANSWERS:
                raise ValueError(f"there is no pair {row['pair']} with the preference {row['preference']}")
            values[int(row["pair"]) - 1] = int(row["preference"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be used ({e}): give what the sheet saved, and the summaries, --n and --seed "
                         f"that it was made with.") from e
    if np.isnan(values).sum() > len(values) - 3:
        raise ValueError(f"{path} holds fewer than three ratings: a correlation takes more.")
    return values


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement(a: np.ndarray, b: np.ndarray) -> list[str]:
    """Cells of two series over pairs: Spearman's correlation with its interval, and over how many pairs."""
    there = ~np.isnan(a) & ~np.isnan(b)
    both = np.stack([a[there], b[there]], 1)  # [pairs, 2]
    if len(both) < 3:
        return ["-", str(len(both))]
    low, high = interval(np.arange(len(both))[None], lambda drawn: rank_correlation(*both[drawn[0]].T))
    return [f"{rank_correlation(*both.T):+.2f} ({low:+.2f}..{high:+.2f})", str(len(both))]


def differences(pairs: list[dict], key: str) -> np.ndarray:
    """Right minus left of a number of the summaries [pairs]; NaN where one lacks it."""
    sides = [[pair[side].get(key) for pair in pairs] for side in ("left", "right")]
    left, right = (np.array([np.nan if v is None else float(v) for v in values]) for values in sides)
    return right - left


def judge_pairs(judge: Judge, pairs: list[dict], repeat: int) -> list[dict]:
    """Scores of all summaries, left then right of each pair, asked for the `repeat`-th time."""
    return judged(judge, [(pair["document"], pair[side]["summary"]) for pair in pairs for side in ("left", "right")],
                  repeat)


def spread(scores: list[list[dict]]) -> list[list[str]]:
    """Test and retest: how far the scores of one summary lie apart from one time to the next, and how they agree."""
    lines = [["judge, asked again", "standard deviation of a score", "rank correlation of two times", "summaries"]]
    for name in (*CRITERIA, "composite"):
        times = np.array([[np.nan if row[name] is None else row[name] for row in each] for each in scores])  # [R, n]
        whole = times[:, ~np.isnan(times).any(0)]  # [R, n]
        deviation = f"{np.sqrt(whole.var(0, ddof=1).mean()):.3f}" if whole.size else "-"
        lines.append([name, deviation, *agreement(times[0], times[1])])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.judge_check", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summaries", nargs="+", required=True, metavar="FILE",
                        help="what eval.py wrote of two models or more")
    parser.add_argument("--n", type=int, default=40, help="pairs on the sheet")
    parser.add_argument("--seed", type=int, default=0, help="decides which pairs, and which of two is A")
    parser.add_argument("--ratings", nargs="*", default=[], metavar="CSV", help="what the sheet saved, one a person")
    parser.add_argument("--judge", default="", help="URL#MODEL (OPENAI_API_KEY is its key)")
    parser.add_argument("--repeat", type=int, default=1, help="ask the judge so many times anew, and say how it varies")
    parser.add_argument("--judge-replies", type=int, default=8, help="answers that are averaged where the server tells "
                                                                     "no probabilities")
    parser.add_argument("--jobs", type=int, default=8, help="questions to the judge at a time")
    parser.add_argument("--cache", default="runs/judge.sqlite", help="what the judge has answered")
    parser.add_argument("--out", default="runs/judge_check", help="folder of sheet.html and agreement.md")
    args = parser.parse_args(argv)
    try:
        if len(args.summaries) < 2 or min(args.n, args.repeat, args.judge_replies, args.jobs) < 1:
            raise ValueError("--summaries takes two files or more; --n, --repeat, --judge-replies and --jobs must be "
                             "at least 1.")
        pairs = pairs_of([read_rows(path) for path in args.summaries], args.n, args.seed)
        if not args.ratings and not args.judge:
            path = Path(args.out) / "sheet.html"
            write_text(path, page(pairs))
            print(f"{len(pairs)} pairs are in {path}: open it in a browser, rate, save ratings.csv, and give it back "
                  f"with --ratings.")
            return 0
        check(args, pairs)
    except (ValueError, OSError) as e:
        print(f"judge_check: {e}", file=sys.stderr)
        return 1
    return 0


def check(args: argparse.Namespace, pairs: list[dict]) -> None:
    """Person against judge and metrics; the judge against itself; to the screen and to agreement.md."""
    people = {path: read_ratings(path, pairs) for path in args.ratings}
    tables, note = [], ""
    names = [*METRICS, *(key for key in pairs[0]["left"] if key.startswith("SQUISH@"))]
    measures = {name: values for name in names if not np.isnan(values := differences(pairs, name)).all()}
    if args.judge:
        judge = Judge(args.judge, args.judge_replies, args.jobs, cache=args.cache)
        scores = [judge_pairs(judge, pairs, repeat) for repeat in range(args.repeat)]
        for name in (*CRITERIA, "composite"):
            values = np.array([np.nan if row[name] is None else row[name] for row in scores[0]])  # [2 * pairs]
            measures[f"judge: {name}"] = values[1::2] - values[::2]
        tables += [spread(scores)] if args.repeat > 1 else []
        how = sorted({how for each in scores for row in each for how in row["judge"]["how"]})
        note = (f"Judge: {args.judge}, prompts {VERSION}, {'; '.join(how)}; "
                f"{sum(row['missing'] for each in scores for row in each)} scores are missing.")
    lines = [["agreement with", *[f"{path} (95%)" if k == 0 else "pairs" for path in people for k in (0, 1)]]]
    for name, values in measures.items():
        lines.append([name, *(cell for rated in people.values() for cell in agreement(rated, values))])
    for name, values in people.items() if len(people) > 1 else ():
        lines.append([name, *(cell for rated in people.values() for cell in agreement(rated, values))])
    tables = [lines, *tables] if people else tables
    if not tables:
        raise ValueError("There is nothing to compare the judge with: give --ratings, or --repeat 2.")
    write_text(Path(args.out) / "agreement.md", "\n\n".join([*map(in_markdown, tables), note]).strip() + "\n")
    print("\n\n".join([*map(in_columns, tables), note]).strip())


if __name__ == "__main__":
    sys.exit(main())
