"""The posts of a run, as a lesson: what it was trained and measured on is what it is measured on again, and what lacks
a summary is no zero.

Oracles: the run's own last line, the same posts without those that lack something, and numbers made by hand.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import train
from config import Config, parse_stages
from model import load
from plumbing.posts import TINY, Post, load_posts
from studies import squish_benchmark as benchmark
from task import Task, score

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--prompts", "2", "--group", "2", "--target", "6", "--stages", "rouge_l+length:1"]


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(n: int, words: int = 12, **names: str) -> list[dict]:
    """Posts of different lengths; `names` are those of the two fields."""
    text, summary = names.get("text", "document"), names.get("summary", "summary")
    return [{text: f"Tom lost shoe {i} in Leeds. " + "His dog found it. " * (words + i % 7), summary: f"Shoe {i} lost."}
            for i in range(n)]


def write(path: str, rows: list[dict]) -> str:
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measured(monkeypatch, *args: str) -> dict:
    """All numbers, unrounded, of the one row that eval.py prints."""
    found, real = [], evaluation.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate",
                      lambda *given, **more: found.append(real(*given, **more)) or found[-1])
        assert evaluation.main(list(args)) == 0
    result, = found
    numbers = {name: value for name, value in result.items() if name != "summaries"}
    return {**numbers, "lengths": [row["length"] for row in result["summaries"]]}  # as eval.jsonl keeps them


def last_line(run: str) -> dict:
    row = json.loads(Path("runs", run, "eval.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {name: value for name, value in row.items() if name not in ("step", "stage")}


FIELDS = {"text": "speech", "summary": "gist"}
NAMED = ["--document-field", "speech", "--summary-field", "gist"]


@pytest.mark.parametrize("flags", [
    ["--max-document", "40"], ["--max-prompt", "115"], ["--eval-posts", "3"],
    ["--max-posts", "40", "--min-chars", "260"],
    ["--max-document", "40", "--stages", "squish:1", "--lora", "2", "--budgets", "0.2"],
    ["--eval-data", "held-out.jsonl", "--max-document", "50", "--eval-posts", "5"],
], ids=" ".join)
def test_a_run_on_a_file_is_measured_as_it_measured_itself(flags, monkeypatch):
    write("posts.jsonl", rows(60, **FIELDS))
    write("held-out.jsonl", rows(9, words=20, **FIELDS))
    assert train.main([*SMALL, "--data", "posts.jsonl", *NAMED, *flags, "--run", "own"]) == 0
    assert measured(monkeypatch, "runs/own") == last_line("own")


@pytest.mark.parametrize("splits, split, asked", [
    (("train", "val"), "", []), (("train", "test"), "", []), (("sft", "val", "test"), "sft", ["--split", "val"]),
    (("test", "val"), "test", [])], ids=str)
def test_a_run_on_splits_is_measured_as_it_measured_itself(splits, split, asked, monkeypatch):
    """Also where there is no test split, or where that is what the run has learnt from."""
    for n, name in enumerate(splits):
        write(f"data/{name}.jsonl", rows(9 + n, words=9 + n))
    more = ["--split", split] if split else []
    assert train.main([*SMALL, "--data", "data", *more, "--max-document", "40", "--run", "own"]) == 0
    assert measured(monkeypatch, "runs/own", *asked) == last_line("own")


def test_other_posts_are_not_looked_for_by_the_names_of_the_run_s_own(monkeypatch):
    write("posts.jsonl", rows(30, **FIELDS))
    write("other.jsonl", rows(5))
    assert train.main([*SMALL, "--data", "posts.jsonl", *NAMED, "--max-posts", "20", "--run", "own"]) == 0
    assert measured(monkeypatch, "runs/own", "--data", "other.jsonl")["n"] == 5
    assert measured(monkeypatch, "tiny", "--data", "posts.jsonl", *NAMED, "--n", "4")["compared"] == 4
    assert measured(monkeypatch, "tiny", "--data", "posts.jsonl", "--document-field", "speech")["compared"] == 0


def test_every_flag_that_a_message_about_posts_advises_exists():
    """In train.py all of them. In eval.py those that load_posts alone may advise."""
    advised = {path: set(re.findall(r"--[a-z]+(?:-[a-z]+)*", (ROOT / path).read_text(encoding="utf-8")))
               for path in ("plumbing/posts.py", "plumbing/hub.py")}
    helps = {name: subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True, text=True,
                                  check=True).stdout for name in ("train", "eval")}
    for flags in advised.values():
        assert not [flag for flag in flags if not re.search(rf"{flag}\b", helps["train"] + "--n")]
    assert {"--document-field", "--summary-field", "--split", "--min-chars", "--data", "--max-prompt",
            "--max-document"} <= set(re.findall(r"--[a-z-]+", helps["eval"]))


# --- posts without a reference ----------------------------------------------------------------------------------------


def test_a_reward_that_compares_is_a_mean_over_the_posts_that_have_a_reference():
    config = Config(template="plain", target=4, stages=("length + 2*rouge_l:1", "length:1"))
    comparing, other = parse_stages(config.stages)
    asked = [Task(Post("Once a cat sat here.", reference, "1"), [1, 2], 4) for reference in ("a cat sat", "")]

    def line(stage):
        groups = [SimpleNamespace(texts=["a cat sat", "a dog"], lengths=SimpleNamespace(tolist=lambda: [3, 2]))
                  for _ in asked]
        return score(groups, asked, stage.reward, config, None)

    rouge = (1 + 2 * 1 / 3 * 1 / 2 / (1 / 3 + 1 / 2)) / 2  # of "a dog": one word of three, and of two
    assert line(comparing)["reward/rouge_l"] == pytest.approx(rouge)
    assert line(comparing)["reward"] == pytest.approx(2 * rouge + (-1 / 4 - 2 / 4) / 2)
    assert line(other)["reward"] == pytest.approx((-1 / 4 - 2 / 4) / 2)


def test_posts_without_a_reference_do_not_count_as_zero(monkeypatch, capsys):
    posts = load_posts(TINY, "test")[:12]  # such as the model knows: it is worth something there
    some = [{"document": post.document, "summary": post.reference} for post in posts[:6]]
    none = [{"document": post.document, "summary": None} for post in posts[6:]]
    write("some.jsonl", some)
    write("half.jsonl", some + none)
    write("none.jsonl", none)
    found = {name: measured(monkeypatch, "tiny", "--data", f"{name}.jsonl") for name in ("some", "half", "none")}
    assert [(r["n"], r["compared"]) for r in found.values()] == [(6, 6), (12, 6), (6, 0)]
    for name in ("rouge_l", "meteor", "bleu", "reward", "reward/rouge_l"):
        assert found["half"][name] == pytest.approx(found["some"][name]), name
    assert found["some"]["reward/rouge_l"] > 0 and "rouge_l" not in found["none"]
    err = capsys.readouterr().err.splitlines()
    assert "6 of 12 posts have a reference" in err[0] and "0 of 6 posts" in err[1] and "--summary-field" in err[1]


def test_how_many_groups_cannot_differ_is_said_at_the_start(capsys):
    write("half.jsonl", [row | {"summary": row["summary"] if i % 3 else ""} for i, row in enumerate(rows(40))])
    assert train.main([*SMALL, "--data", "half.jsonl", "--run", "half"]) == 0
    out = capsys.readouterr().out
    assert "12 of 36 posts have no summary for rouge_l to compare with" in out.splitlines()[0]
    assert "of 2 posts with a reference" in out  # 37 and 38 of the four that are held out
    assert train.main(["--prompts", "2", "--group", "2", "--data", "half.jsonl", "--target", "6", "--stages",
                       "length:1"]) == 0
    assert "have no summary" not in capsys.readouterr().out  # where nothing compares it does not matter


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_that_do_not_measure_the_same_are_said(capsys):
    write("posts.jsonl", rows(20))
    assert train.main([*SMALL, "--data", "posts.jsonl", "--run", "own"]) == 0
    capsys.readouterr()
    assert evaluation.main(["tiny", "runs/own", "--n", "2"]) == 0
    said = capsys.readouterr().err
    assert "do not measure the same" in said
    assert "tiny: 2 posts of tiny, target 40" in said and "runs/own: 2 posts of posts.jsonl" in said
    same = ["tiny", "runs/own", "--n", "2", "--data", "posts.jsonl"]
    assert evaluation.main([*same, "--target", "8"]) == 0
    assert capsys.readouterr().err == ""
    assert evaluation.main(same) == 0
    assert "target 40" in (said := capsys.readouterr().err) and "target 6" in said


@pytest.mark.parametrize("args", [["--help"], ["tiny", "--target", "4", "--show", "1", "--data", "a.jsonl"]],
                         ids=" ".join)
def test_a_console_without_unicode_is_no_obstacle(args):
    write("a.jsonl", [{"document": "Ida — naïve \U0001f600.", "summary": "“Naïve”."}] * 2)
    run = subprocess.run([sys.executable, ROOT / "eval.py", *args], capture_output=True,
                         env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert run.returncode == 0 and run.stderr == b"", run.stderr


# --- the benchmark ----------------------------------------------------------------------------------------------------


def bench(*args: str) -> dict:
    more = ["--budgets", "0.3", "--max-new-tokens", "40", "--cache", "kept.sqlite", "--out", "out"]
    assert benchmark.main(["--models", "tiny", *more, *args]) == 0
    lines = Path("out/scores.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["model"]: row for row in map(json.loads, lines)}


def test_one_document_has_no_interval_and_no_other_document_s_summary():
    found = bench("--n", "1")
    assert set(found) == {"tiny", "first", "reference", "empty"}
    assert {(row["low"], row["high"]) for row in found.values()} == {(None, None)}
    text = Path("out/table.md").read_text(encoding="utf-8")
    assert ".." not in text and f"| reference | 0.3 | {found['reference']['squish']:.3f} |" in text
    assert Path("out/chart.png").exists()
    two = bench("--n", "2")
    assert set(two) == {*found, "other"} and two["tiny"]["low"] <= two["tiny"]["squish"] <= two["tiny"]["high"]


def test_another_document_s_summary_is_never_the_post_s_own():
    def others(*references: str) -> list[str]:
        posts = [Post(f"Document {i}.", reference, str(i)) for i, reference in enumerate(references)]
        return [benchmark.another(posts, i) for i in range(len(posts))]

    assert others("a") == [""]
    assert others("a", "b", "c") == ["c", "a", "b"]
    assert others("a", "", "b") == ["b", "a", "a"]  # one that is missing is passed over
    assert others("a", "a", "b") == ["b", "b", "a"]  # and so is one that is the same
    assert others("a", "") == ["", "a"]


def test_the_held_out_posts_of_the_embedded_set_are_untouched():
    """The figures of the README are those of all test posts."""
    posts, limit = evaluation.posts_of(Config(), evaluation.read_command(["tiny"]))
    assert limit is None and posts == load_posts(TINY, "test")
    (fit, prompts), = evaluation.fit_posts(*load(TINY), [posts], Config(template="chatml"))
    assert fit == posts and len(prompts) == len(posts)


RECORDS = [{"document": f"Cat number {i} sat.", "summary": "A cat."} for i in range(12)]
POSTS = [Post(f"Cat number {i} sat.", "A cat.", str(i + 1)) for i in range(12)]


@pytest.mark.parametrize("whole, indent", [
    ({"data": RECORDS}, None), ({"data": RECORDS}, 2), ({"version": "1.1", "train": RECORDS, "licences": ["MIT"]}, 1),
    ({"data": [{**RECORDS[0], "title": "One"}, *RECORDS[1:]]}, None)])
def test_a_list_in_an_object_is_read_and_said_to_be(tmp_path, capsys, whole, indent):
    """The wrappers of the usual data sets. A bad record is named by its number in the list."""
    pytest.importorskip("datasets")
    path = tmp_path / "posts.json"
    path.write_text(json.dumps(whole, indent=indent), encoding="utf-8")
    assert load_posts(path) == POSTS
    key, = (key for key, value in whole.items() if value and isinstance(value[0], dict))
    assert capsys.readouterr().err == f"{path}: the posts are what stands under '{key}'.\n"
    path.write_text(json.dumps({key: [*RECORDS, {"document": " "}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"posts.json '{key}' record 13 has no text"):
        load_posts(path)


def test_a_post_with_a_list_of_objects_is_a_post(tmp_path, capsys):
    pytest.importorskip("datasets")
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"document": "A cat sat.", "comments": RECORDS}), encoding="utf-8")
    assert [post.document for post in load_posts(path)] == ["A cat sat."]
    path.write_text(json.dumps({"story": "A cat sat.", "comments": RECORDS}), encoding="utf-8")
    assert [post.document for post in load_posts(path, document="story")] == ["A cat sat."]
    for text, says in (("\n".join([json.dumps({"data": RECORDS})] * 2), "row 1 has no text"),  # no wrapper: two of them
                       (json.dumps({"prompt": [{"role": "user", "content": "A chat."}] * 12}), "but a list")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            load_posts(path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("whole", [
    {"test": RECORDS[:3], "train": RECORDS}, {name: [row[name] for row in RECORDS] for name in RECORDS[0]},
    {name: {str(i): row[name] for i, row in enumerate(RECORDS)} for name in RECORDS[0]}],
    ids=["splits", "lists", "pandas"])
def test_other_shapes_are_refused_with_a_command_that_mends_them(tmp_path, monkeypatch, whole):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    Path("my posts.json").write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match="my posts.json holds ") as caught:
        load_posts("my posts.json")
    command, new = re.search(r"(\S+ -c .*) makes (.*), which is read", str(caught.value)).groups()
    subprocess.run(command, shell=True, check=True)
    assert load_posts(new) == POSTS


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_table_that_is_parted_by_something_else_is_told_so(tmp_path, mark):
    """No --document-field would help: the table has one column, called `document;summary`."""
    pytest.importorskip("datasets")
    path = tmp_path / "posts.csv"
    path.write_text(f"document{mark}summary\n" + f"A cat sat.{mark}A cat.\n" * 12, encoding="utf-8")
    with pytest.raises(ValueError, match="Save it with commas") as caught:
        load_posts(str(path))
    assert repr(mark) in str(caught.value) and "--document-field" not in str(caught.value)


# --- tables that would be read otherwise than they were meant ------------------------------------------------------


@pytest.mark.parametrize("head", ["document,summary", "text"])
def test_a_text_with_commas_and_no_quotes_is_not_cut_at_them(tmp_path, head):
    """A table with one column more than names is taken for one with row names: "Tom lost a shoe" would be the name
    of a row, and " in Leeds" a post. Row numbers without a name, as R writes them, are what they seem to be."""
    pytest.importorskip("datasets")
    path = tmp_path / "posts.csv"
    path.write_text(f"{head}\n" + f"Tom lost a shoe, in Leeds{',A shoe.' * (head != 'text')}\n" * 12, encoding="utf-8")
    with pytest.raises(ValueError, match="row 1 has more columns .* quotes"):
        load_posts(str(path))
    path.write_text('document,summary\n1,"Tom lost a shoe, in Leeds",A shoe.\n', encoding="utf-8")
    assert [(p.document, p.reference) for p in load_posts(str(path))] == [("Tom lost a shoe, in Leeds", "A shoe.")]


def test_a_table_parted_by_semicolons_is_told_so_whatever_commas_are_in_it(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "posts.csv").write_text("document;summary\nTom, in Leeds;A shoe.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Save it with commas"):
        load_posts(str(tmp_path / "posts.csv"))


def test_a_copy_of_the_hub_s_data_set_is_told_which_file_to_give(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    part = tmp_path / "data" / "train-00000-of-00001.parquet"
    pandas.DataFrame({"document": ["A cat sat."]}).to_parquet(part)
    with pytest.raises(FileNotFoundError) as caught:
        load_posts(str(tmp_path))
    given = re.search("in place of the folder, (.*), or", str(caught.value))[1]
    assert given == str(part) and [post.document for post in load_posts(given)] == ["A cat sat."]


def test_one_number_among_the_texts_does_not_put_the_others_into_quotes(tmp_path):
    """`datasets` writes a column of several types as JSON: the post would begin and end with a quotation mark."""
    pytest.importorskip("datasets")
    path = tmp_path / "posts.json"
    path.write_text(json.dumps([{"document": "A cat sat."}] * 2000 + [{"document": 5}]), encoding="utf-8")
    with pytest.raises(ValueError, match="'document' is a string at first and a number in record 2001. Write one kind"):
        load_posts(str(path))


@pytest.mark.parametrize("name, content, advice", [
    ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "'git lfs pull'"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "'git lfs pull'"),
    ("a.csv", "document,summary\na,b\n".encode("utf-16"), "save it as UTF-8"),
    ("a.csv", "document,summary\nZürich,b\n".encode("cp1252"), "save it as UTF-8"),
    ("a.jsonl", '{"document": "Zürich"}\n'.encode("cp1252"), "save it as UTF-8"),
    ("a.jsonl", b"<!DOCTYPE html>\n<html>", "download the file itself"),
    ("a.csv", b"<!DOCTYPE html>\n<html>", "download the file itself"),
    ("a.jsonl.gz", b'{"document": "a"}\n', "call it a.jsonl"), ("a.json", b"", "copy it again"),
    ("a.csv", b"", "copy it again"), ("a.parquet", b"", "copy it again"),
    ("a.jsonl.gz", gzip.compress(b'{"document": "a, b"}\n' * 99)[:-12], "copy it again")])
def test_a_file_that_is_not_what_its_name_says_is_called_by_its_own(tmp_path, name, content, advice):
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_posts(str(tmp_path / name))
    assert str(caught.value).endswith(f"{advice}.")
