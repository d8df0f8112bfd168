"""Is the judge right? The sheet that people fill in, and how well they agree with a judge that is made up."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from plumbing.significance import rank_correlation
from studies import judge_check as study

EVIL = "</p></section><script>alert('SHEET PAIRS NAMES')</script>"


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch) -> Path:
    """Two models' summaries of twenty posts. B's are longer; ROUGE-L says the opposite of the length."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "AB":
        rows = []
        for i in range(20):
            n = int(rng.integers(1, 60)) + 60 * (name == "B")
            rows.append({"id": str(i), "model": name, "document": f"Post {i} {EVIL}", "summary": f"{i}: " + "x" * n,
                         "length": n, "rouge_l": 1 / n})
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def run(*args) -> int:
    return study.main(["--summaries", "A.jsonl", "B.jsonl", "--n", "16", *args])


def pairs(seed=0) -> list[dict]:
    return study.pairs_of([study.read_rows(f"{name}.jsonl") for name in "AB"], 16, seed)


def rate(path="ratings.csv", prefer=lambda left, right: np.sign(right["length"] - left["length"]), chosen=None):
    """A person who prefers what `prefer` says."""
    chosen = chosen or pairs()
    lines = [f"{study.sheet_of(chosen)},{i},{int(prefer(pair['left'], pair['right']))}"
             for i, pair in enumerate(chosen, 1)]
    Path(path).write_text("sheet,pair,preference\n" + "\n".join(lines) + "\n", encoding="utf-8")


def test_the_rank_correlation_is_scipys():
    rng = np.random.default_rng(1)
    for n in (3, 10, 50):
        x, y = rng.integers(0, 6, n).astype(float), rng.normal(size=n)
        assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert rank_correlation(np.ones(4), np.arange(4.0)) == 0.0


def test_the_sheet_is_blind_seeded_and_needs_no_network(capsys):
    assert run() == 0
    page = Path("runs/judge_check/sheet.html").read_text(encoding="utf-8")
    assert run() == 0 and Path("runs/judge_check/sheet.html").read_text(encoding="utf-8") == page
    assert run("--seed", "1") == 0 and Path("runs/judge_check/sheet.html").read_text(encoding="utf-8") != page
    assert "A.jsonl" not in page and "rouge" not in page and not re.search(r"https?://|src=|@import|url\(", page)
    sides = [pair["left"]["model"] for pair in pairs()]
    assert len(sides) == 16 and 3 < sides.count("A") < 13  # the place says nothing


def test_what_posts_and_models_write_is_text():
    tags, texts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)

        def handle_data(self, data):
            texts.append(data)

    run()
    Reader().feed(Path("runs/judge_check/sheet.html").read_text(encoding="utf-8"))
    assert tags.count("script") == 1 and tags.count("section") == 16 and tags.count("input") == 16 * 5
    assert sum(EVIL in text for text in texts) == 16  # and its words are filled in nowhere


def test_agreement_with_metrics_by_hand(capsys):
    rate()
    assert run("--ratings", "ratings.csv") == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines()}
    chosen = pairs()
    preference = np.array([np.sign(p["right"]["length"] - p["left"]["length"]) for p in chosen])
    for key in ("length", "rouge_l"):
        values = np.array([p["right"][key] - p["left"][key] for p in chosen])
        assert f"{scipy.stats.spearmanr(preference, values).statistic:+.2f} (" in rows[key] and "16" in rows[key]
    assert "meteor" not in rows  # nobody has measured it


def test_people_judge_and_retest_stand_in_one_table(capsys, monkeypatch):
    """A judge whose scores are the length, and which wavers by 0.1 from one time to the next."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "")

    def judged(judge, texts, repeat):
        rows = [dict.fromkeys(study.CRITERIA, len(text) / 200 + 0.1 * repeat) for _, text in texts]
        return [{**row, "composite": sum(row.values()), "missing": 0, "judge": {"how": ["weighted"]}} for row in rows]

    monkeypatch.setattr(study, "judged", judged)
    rate()
    rate("second.csv", lambda left, right: 2 * np.sign(left["length"] - right["length"]))
    judge = ["--judge", "http://127.0.0.1:9/v1#j", "--cache", "kept.sqlite"]
    assert run("--ratings", "ratings.csv", "second.csv", *judge, "--repeat", "2") == 0
    text = Path("runs/judge_check/agreement.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "-1.00" in rows["second.csv"] and "+1.00" in rows["second.csv"]  # with the first, and with herself
    assert rows["judge: clarity"].count("+0.") == 3 and "-0." in rows["judge: clarity"]
    assert "| 0.071 | +1.00" in rows["clarity"]  # of x and x + 0.1: 0.1 / sqrt(2)
    assert "prompts 1-" in text
    assert run(*judge, "--repeat", "2") == 0 and run(*judge) == 1


def holds(path: str, text: str):
    return lambda: Path(path).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("break_it, says", [
    (lambda: rate(chosen=pairs(seed=1)), "--seed"), (holds("ratings.csv", "a,b\n1,2\n"), "cannot be"),
    (holds("ratings.csv", "sheet,pair,preference\n"), "fewer than three"),
    (lambda: rate(prefer=lambda *_: 3), "preference 3"), (holds("B.jsonl", "{}\n"), "eval.py wrote"),
    (lambda: shutil.copy("A.jsonl", "B.jsonl"), "no two different"), (lambda: None, "ratings.csv")])
def test_what_does_not_fit_together_is_a_sentence(capsys, break_it, says):
    break_it()
    assert run("--ratings", "ratings.csv") == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_the_sheet_works_in_a_browser(cwd):
    """Headless: every pair is there, a click counts, and no script fails."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("there is no Chromium here")
    run()
    page = cwd / "runs" / "judge_check" / "sheet.html"
    click = ("<script>document.querySelectorAll('input')[4].click();"
             "document.title = given()[0] + ' of ' + names.length</script>")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", click + "</body>"), encoding="utf-8")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={cwd / 'profile'}",
                           "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "<title>1,2 of 16</title>" in done.stdout and ">1 of 16</output>" in done.stdout
