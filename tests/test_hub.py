"""Downloads, as a lesson in pessimism: the hub is busy, gated, misspelt or gone, the line drops and the disk is full.

The hub is a server on this machine (loopback.py) that answers as the real one does, and those who ask it are the real
huggingface_hub and `datasets`. Whatever happens, a file that is there is whole, what was fetched is not fetched again,
and the user gets one sentence.
"""

import csv
import doctest
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

import task
import train
from model import load
from plumbing import hub
from plumbing.folder import find_folder
from plumbing.posts import TINY, Post, load_posts, load_split
from tests.helpers import disk_full_after, refusal
from tests.loopback import Hub

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub, empty caches, and no time to lose: `server.waits` holds the seconds that would have been slept."""
    server = Hub()
    server.waits = []
    monkeypatch.setattr("time.sleep", server.waits.append)
    for name, value in {"CRISP_CACHE": str(tmp_path / "posts"), "HF_ENDPOINT": server.url,
                        "HF_HOME": str(tmp_path / "home"), "HF_UPDATE_DOWNLOAD_COUNTS": "0",
                        "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub and datasets read the environment once, when they are imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "models"))
    for name, value in {"HF_ENDPOINT": server.url, "HF_DATASETS_CACHE": tmp_path / "arrow",
                        "DOWNLOADED_DATASETS_PATH": tmp_path / "files", "HF_UPDATE_DOWNLOAD_COUNTS": False}.items():
        monkeypatch.setattr(datasets.config, name, value)
    yield server
    server.close()


def test_the_examples_in_the_docstrings_hold():
    for module in (hub, task):
        results = doctest.testmod(module)
        assert results.failed == 0 and results.attempted > 0


# --------------------------------------------------------------------------------------------------------- models

NEEDED = [file.name for file in TINY.iterdir() if file.suffix in (".json", ".safetensors")]
NAME = "crisp/tiny"


@pytest.fixture
def repository(server):
    """The embedded model as a repository of the hub, with all that people put beside one."""
    server.models[NAME] = {name: (TINY / name).read_bytes() for name in NEEDED} | dict.fromkeys([
        "README.md", "pytorch_model.bin", "model.gguf", "onnx/config.json", "onnx/model.onnx", "original/params.json",
        "original/consolidated.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "trainer.json",
    ], b"x" * 100)
    return server


def bodies(server):
    """The files that were really sent since the last call."""
    return sorted(path.split("/")[-1] for method, path, _ in server.asked("/resolve/") if method == "GET")


def test_a_model_is_downloaded_once_and_only_what_is_needed(repository):
    folder = find_folder(NAME)
    assert sorted(file.name for file in folder.iterdir()) == sorted(NEEDED) == bodies(repository)
    assert all((folder / name).read_bytes() == (TINY / name).read_bytes() for name in NEEDED)
    ours, _ = load(NAME, "cpu")
    assert bodies(repository) == []  # the second time there is nothing to fetch
    assert torch.equal(ours.head, load(TINY, "cpu")[0].head)
    repository.close()
    assert find_folder(NAME) == folder  # and without a connection it is still there


def test_sharded_weights_come_with_their_index(server):
    files = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
             "model-00002-of-00002.safetensors"]
    server.models[NAME] = dict.fromkeys(files, b"x")
    assert sorted(file.name for file in find_folder(NAME).iterdir()) == sorted(files)


def test_a_download_that_breaks_off_goes_on_where_it_was(repository, monkeypatch):
    """Twice in the middle of the weights: what has arrived is not asked for again (but for the last 10 MB of it)."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    size = len(repository.models[NAME]["model.safetensors"])
    repository.fail("model.safetensors", 300_000, 200_000)
    folder = find_folder(NAME)
    ranges = [r for method, path, r in repository.asked("model.safetensors") if method == "GET"]
    assert ranges[0] == "" and len(ranges) == 3
    begun = [int(r.removeprefix("bytes=").split("-")[0]) for r in ranges[1:]]
    assert 250_000 <= begun[0] <= 300_000 and 400_000 <= begun[1] <= 500_000 < size
    assert (folder / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_files_that_are_whole_survive_a_failed_download(repository):
    repository.fail("model.safetensors", *[1000] * 40)
    assert NAME in refusal(OSError, find_folder, NAME)
    assert not list(Path(constants.HF_HUB_CACHE).glob("**/snapshots/*/model.safetensors"))
    repository.faults.clear()
    repository.asked()
    find_folder(NAME)
    assert bodies(repository) == ["model.safetensors"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again(repository, status, capsys):
    repository.fail("/api/models/", (status, {}), (status, {}))
    assert find_folder(NAME).is_dir()
    assert repository.waits[:2] == [1, 4] and str(status) in capsys.readouterr().err
    shutil.rmtree(constants.HF_HUB_CACHE)
    repository.fail("/api/models/", *[(status, {})] * 40)
    message = refusal(OSError, find_folder, NAME)
    assert NAME in message and str(status) in message


def test_gated_and_misspelt_models_are_told_apart(repository):
    repository.gated.add(NAME)
    message = refusal(OSError, find_folder, NAME)
    assert "gated" in message and f"https://huggingface.co/{NAME}" in message and "HF_TOKEN" in message
    message = refusal(OSError, find_folder, "crisp/tyni")
    assert "crisp/tyni" in message and "spelling" in message
    assert repository.waits == []  # neither gets better by waiting


def test_without_a_connection_a_model_cannot_be_had(repository, monkeypatch):
    repository.close()
    message = refusal(OSError, find_folder, NAME)
    assert NAME in message and "connection" in message and "local folder" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(OSError, find_folder, NAME)


def test_a_full_disk_ends_a_download(repository):
    with disk_full_after(100_000):
        message = refusal(OSError, find_folder, NAME)
    assert "no room" in message and "HF_HOME" in message
    assert (find_folder(NAME) / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_a_model_in_other_formats_only_is_refused(server):
    server.models[NAME] = {"config.json": b"{}", "pytorch_model.bin": b"x", "model.gguf": b"x"}
    assert "model.safetensors" in refusal(OSError, find_folder, NAME)


# ------------------------------------------------------------------------------------------------- data sets by name

DATA = "mlabonne/smoltldr"
CARD = b"---\nlicense: mit\n---\n# A data set\n"


def rows(n, word="train"):
    return [{"prompt": f"POST: a {word} post, number {i}, ‘quoted’.\u2028TL;DR:", "completion": f" Sum {i}."}
            for i in range(n)]


def posts(n, word="train", first=0):
    return [Post(row["prompt"], row["completion"].strip(), str(i)) for i, row in enumerate(rows(n, word), 1)][first:]


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def data(server):
    """Parquet files, as the hub has most data sets: the training posts in three of them."""
    every = rows(250)
    server.datasets[DATA] = {
        "README.md": CARD, "data/validation-00000-of-00001.parquet": parquet(rows(20, "validation")),
        "data/test-00000-of-00001.parquet": parquet(rows(7, "test")),
        **{f"data/train-0000{i}-of-00003.parquet": parquet(every[100 * i:100 * (i + 1)]) for i in range(3)}}
    return server


def without(server, *splits):
    """The data set again without these splits, to somebody who has never seen it."""
    server.datasets[DATA] = {name: content for name, content in server.datasets[DATA].items()
                             if not name.startswith(tuple(f"data/{split}" for split in splits))}
    shutil.rmtree(os.environ["CRISP_CACHE"], ignore_errors=True)


def kept(tmp_path):
    return sorted(file.name for file in (tmp_path / "posts").glob("*"))


def test_a_data_set_of_the_hub_is_streamed_once(data, tmp_path, monkeypatch):
    assert load_posts(DATA) == posts(250)
    assert data.asked("parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what is here needs no hub, and no package either
    assert load_posts(DATA) == posts(250)
    assert load_posts(DATA, max_posts=30) == posts(30)  # the whole serves for a part
    assert data.asked() == []
    assert kept(tmp_path) == ["mlabonne--smoltldr--train.jsonl.gz", "mlabonne--smoltldr.json"]
    assert not list(tmp_path.glob("arrow/**/*.arrow"))  # nor does anybody keep a second copy
    data.close()
    assert load_posts(DATA) == posts(250)


def test_no_more_is_read_than_needed(data, tmp_path):
    assert load_posts(DATA, max_posts=20) == posts(20)
    assert not data.asked("train-00002")
    assert "mlabonne--smoltldr--train-first-20.jsonl.gz" in kept(tmp_path)
    assert load_posts(DATA, max_posts=220) == posts(220)  # three files
    assert load_posts(DATA, max_posts=1000) == posts(250)  # there are no more


def test_posts_that_are_too_short_do_not_count(data):
    """150 of these have a number of three digits, so that their documents are longer. A post keeps its number."""
    longer = len(rows(250)[100]["prompt"])
    assert load_posts(DATA, max_posts=80, min_chars=longer) == posts(180, first=100)
    assert load_posts(DATA, min_chars=longer) == posts(250, first=100)
    assert load_posts(DATA, max_posts=3, min_chars=2, document="completion")[0].document == "Sum 0."
    assert "at least 999 characters" in refusal(ValueError, load_posts, DATA, min_chars=999)


@pytest.mark.parametrize("blank", [None, " \n", float("nan")], ids=str)
def test_rows_without_a_text_are_what_they_are_in_a_file(data, blank, tmp_path, capsys):
    """Refused with advice that helps, or left out and counted, from the hub, from what was kept of it, and from a file
    of each form. They use up no --max-posts."""
    nan = blank != blank
    every = [{"prompt": f"Post {i}.", "completion": f"{i}."} for i in range(8)]
    every[2]["prompt"] = every[5]["prompt"] = blank
    data.datasets[DATA] = {"train.jsonl": lines(every)}
    places = [DATA, DATA]
    for name in ("a.jsonl", *(() if nan else ("a.json", "a.csv", "a.parquet"))):  # NaN is no text of a column of text
        places.append(write(tmp_path / name, every))
    for source in places:
        assert "--min-chars 1" in refusal(ValueError, load_posts, source)
        capsys.readouterr()
        found = load_posts(source, min_chars=1, max_posts=4)
        assert [post.document for post in found] == ["Post 0.", "Post 1.", "Post 3.", "Post 4."]
        assert ": rows without a text, left out: 1; posts: 4." in capsys.readouterr().err
        assert len(load_posts(source, min_chars=1)) == 6
        assert ": rows without a text, left out: 2; posts: 6." in capsys.readouterr().err


def test_the_split_to_train_on_can_be_named(data, tmp_path):
    """And whatever it is, the posts that are held out are others."""
    assert load_split(DATA, split="test") == (posts(7, "test"), posts(20, "validation"))
    assert load_split(DATA, split="validation") == (posts(20, "validation"), posts(7, "test"))
    message = refusal(FileNotFoundError, load_split, DATA, split="train_sft")
    assert "'train_sft'" in message and "train, validation, test" in message and "--split" in message
    folder = tmp_path / "local"
    folder.mkdir()
    for name in ("train_sft", "test"):
        (folder / f"{name}.jsonl").write_bytes(lines(rows(3, name)))
    assert load_split(str(folder), split="train_sft") == (posts(3, "train_sft"), posts(3, "test"))
    assert "--split" in refusal(FileNotFoundError, load_posts, folder, "train")
    assert "--eval-data" in refusal(FileNotFoundError, load_split, str(folder), split="test")
    assert load_split(DATA, str(folder)) == (posts(250), posts(3, "test"))  # held-out data of its own
    (folder / "test.jsonl").rename(folder / "dev.jsonl")
    assert load_split(DATA, str(folder)) == (posts(250), posts(3, "test"))


def test_what_was_begun_is_what_is_resumed(data):
    """The hub has other posts by now: the run that was begun has not."""
    assert load_split(DATA, max_posts=5) == (posts(5), posts(5, "validation"))
    data.datasets[DATA] = {"train.jsonl": lines(rows(250, "other"))}
    assert load_split(DATA, max_posts=5) == (posts(5), posts(5, "validation"))


@pytest.mark.parametrize("asked", ["val", "valid", "validation", "dev"])
def test_the_validation_split_has_many_names(data, asked, tmp_path):
    assert load_posts(DATA, asked) == posts(20, "validation")
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "val.jsonl").write_bytes(lines(rows(1)))
    assert len(load_posts(folder, asked)) == 1  # of a folder's file too


def test_posts_to_train_on_and_to_hold_out(data):
    assert load_split(DATA) == (posts(250), posts(20, "validation"))
    without(data, "validation")
    assert load_split(DATA, max_posts=9) == (posts(9), posts(7, "test"))
    data.close()
    assert load_split(DATA, max_posts=9) == (posts(9), posts(7, "test"))  # that there is no "val" is known offline


def test_a_split_that_is_not_there(data):
    without(data, "validation", "test")
    message = refusal(FileNotFoundError, load_split, DATA)
    assert "it has train" in message and "--eval-data" in message


def test_a_data_set_of_several_configs_wants_one_named(server):
    card = "---\nconfigs:\n" + "".join(f"- config_name: {config}\n  data_files: {config}/train.jsonl\n"
                                       for config in ("short", "long"))
    server.datasets["news/both"] = {"README.md": f"{card}---\n".encode(), "short/train.jsonl": lines(rows(3, "short")),
                                    "long/train.jsonl": lines(rows(3, "long"))}
    message = refusal(ValueError, load_posts, "news/both")
    assert "news/both/short, news/both/long" in message
    assert load_posts("news/both/long") == posts(3, "long") and load_posts("news/both/short") == posts(3, "short")
    message = refusal(ValueError, load_posts, "news/both/wide")
    assert "wide" in message and "news/both/short, news/both/long" in message
    server.datasets["news/both"]["README.md"] = f"{card}  default: true\n---\n".encode()
    assert load_posts("news/both") == posts(3, "long")


@pytest.mark.parametrize("where", ["README.md", "/revision/", "/tree/", "train-00001", "/cdn/"])
@pytest.mark.parametrize("fault", [(429, {"Retry-After": "7"}), (503, {}), (500, {}), 40, 0], ids=str)
def test_what_fails_is_asked_for_again(data, where, fault, capfd):
    data.datasets[DATA]["README.md"] += b"x" * 40
    data.fail(where, fault)
    assert load_posts(DATA) == posts(250)
    assert data.faults == [] and (data.waits or isinstance(fault, int))
    assert len(capfd.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("where", ["README.md", "/revision/", "/tree/", "train-00001", "/cdn/"])
def test_a_hub_that_stays_busy_is_a_sentence(data, where, tmp_path):
    data.fail(where, *[(503, {})] * 400)
    message = refusal(OSError, load_posts, DATA)
    assert DATA in message and "503" in message and sum(data.waits) >= 20
    assert not list((tmp_path / "posts").glob("*.gz"))  # half a data set is none
    data.faults.clear()
    assert load_posts(DATA) == posts(250)


def test_one_bar_is_on_the_screen_and_nothing_else(data, monkeypatch):
    data.datasets[DATA]["README.md"] = b"no card" * 500
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    assert load_posts(DATA, max_posts=5) == posts(5)
    shown = screen.getvalue().replace("\n", "\r").split("\r")
    assert {line.split(":")[0] for line in shown if line.strip()} == {f"{DATA} train"}
    assert not are_progress_bars_disabled()  # a model that comes after it shows its own


def test_two_runs_may_fetch_the_same_at_once(data):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load_posts(DATA))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [posts(250)] * 4


def test_data_sets_that_nobody_shows_you(data):
    """Misspelt; gated, to somebody who has not logged in; gated, to somebody whom the owner has not let in."""
    for name, hidden in (("mlabonne/smoltdlr", set()), (DATA, data.gated), (DATA, data.denied)):
        hidden.add(DATA)
        message = refusal(OSError, load_posts, name)
        assert f"no file or folder {name}" in message and "spelling" in message and "gated" in message
        assert f"https://huggingface.co/datasets/{name} " in message and "hf auth login" in message
        hidden.clear()
    assert data.waits == []  # none of it gets better by waiting


def test_data_sets_that_cannot_be_read(server, tmp_path):
    whole = gzip.compress(lines(rows(5000)))
    for files, says in (({"README.md": CARD}, "any data files"), ({"smoltldr.py": b"1"}, "scripts"),
                        ({"train.parquet": parquet(rows(9))[:-9]}, "Parquet"),
                        ({"train.jsonl": lines(rows(9))[:-9]}, ""),
                        ({"train.jsonl.gz": whole[:-9]}, "ended before"), ({"train.jsonl.gz": b"no gzip" * 9}, ""),
                        ({"train.jsonl.gz": whole[:5000] + b"xxxx" + whole[5004:]}, ""),
                        ({"train.csv": b"prompt\n\xff\xfe\n"}, "codec"), ({"train.json": b""}, "")):
        server.datasets[DATA] = files
        message = refusal(OSError, load_posts, DATA)
        assert f"The hub's {DATA} cannot be read" in message and says in message, message
        assert not list((tmp_path / "posts").glob("*.gz"))
        shutil.rmtree(tmp_path / "posts", ignore_errors=True)


@pytest.mark.parametrize("where", ["/tree/", "/cdn/"])
def test_a_page_to_log_in_on_is_no_data(data, where):
    data.fail(where, *[(200, {})] * 400)
    assert DATA in refusal(OSError, load_posts, DATA)


def test_without_a_connection(data, monkeypatch):
    data.close()
    message = refusal(OSError, load_posts, "mlabonne/other")
    assert "connection" in message and "mlabonne/other" in message
    data.waits.clear()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(OSError, load_posts, "mlabonne/other") and data.waits == []


@pytest.mark.parametrize("room", [10, 1000])
def test_a_full_disk_leaves_no_half_data_set(data, room, tmp_path):
    with disk_full_after(room):
        message = refusal(OSError, load_posts, DATA)
    assert "space" in message and ("HF_HOME" in message or str(tmp_path / "posts") in message)
    assert not list((tmp_path / "posts").glob("*.gz*"))
    assert load_posts(DATA) == posts(250)


def test_what_is_here_is_not_looked_for_there(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mlabonne").mkdir()
    Path("mlabonne/smoltldr").write_bytes(lines(rows(1)))
    assert load_posts(DATA) == posts(1)
    for name in ("posts/train.jsonl", "./posts/train", "a/b/c/d", "posts.jsonl.gz", "/posts/train", "~/posts",
                 "posts/train.csv", "posts/train.parquet", "posts/all/train.json"):
        assert "There is no" in refusal(FileNotFoundError, load_posts, name)  # none of them a name of the hub
    assert data.asked() == []


# --------------------------------------------------------------------------------------------------------- streams

C4 = "allenai/c4/realnewslike"
FILE = "realnewslike/c4-train.{:05d}-of-00512.json.gz"


def article(i, length):
    return {"text": f"Article {i}. {os.urandom(length // 2).hex()}"[:length], "timestamp": "2019-04-25T12:57:54Z",
            "url": "u"}


@pytest.fixture
def c4(server):
    """Many files; every tenth article is long; random text, because gzip would make nothing of the same letter."""
    server.articles = [article(i, 900 if i % 10 == 0 else 300) for i in range(1000)]
    card = ["---", "configs:"]
    for config in ("en", "realnewslike"):
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - {{split: {split}, path: {config}/c4-{split}.*.json.gz}}" for split in ("train", "validation")]
    files = [server.articles[:500], server.articles[500:], *[server.articles[:1]] * 28]
    server.datasets["allenai/c4"] = {
        "README.md": "\n".join([*card, "---", ""]).encode(), **{FILE.format(i): gzip.compress(lines(rows), mtime=0)
                                                                for i, rows in enumerate(files)},
        **{f"en/c4-{split}.00000-of-00001.json.gz": gzip.compress(lines(server.articles[:2]), mtime=0)
           for split in ("train", "validation")},
        "realnewslike/c4-validation.00000-of-00001.json.gz": gzip.compress(lines(server.articles[:20]), mtime=0)}
    return server


def test_long_documents_are_found_in_a_stream_which_ends_with_the_last_one(c4, tmp_path):
    """Eight articles of at least 800 characters are among the first 71: the next file is never downloaded."""
    found = load_posts(C4, max_posts=8, min_chars=800)
    assert [post.document for post in found] == [c4.articles[i]["text"] for i in range(0, 80, 10)]
    assert {post.reference for post in found} == {""} and [post.id for post in found][:3] == ["1", "11", "21"]
    assert {path.split("/")[-1] for _, path, _ in c4.asked("/cdn/")} == {FILE.format(0).split("/")[-1]}
    assert load_posts(C4, max_posts=8, min_chars=800) == found and c4.asked() == []
    assert kept(tmp_path) == ["allenai--c4--realnewslike--train-first-8-min-800.jsonl.gz",
                              "allenai--c4--realnewslike.json"]
    with gzip.open(tmp_path / "posts" / kept(tmp_path)[0]) as file:
        assert len(file.readlines()) == 8  # and what did not count is not kept


def test_a_stream_goes_on_in_the_next_file(c4):
    found = load_posts(C4, max_posts=70, min_chars=800)
    assert [post.document for post in found] == [row["text"] for row in c4.articles[:700:10]]


def test_the_validation_stream_may_be_taken_whole(c4):
    assert [post.document for post in load_posts(C4, "val")] == [row["text"] for row in c4.articles[:20]]
    trained, held_out = load_split(C4, max_posts=5, min_chars=800)
    assert len(trained) == 5 and [post.document for post in held_out] == [c4.articles[i]["text"] for i in (0, 10)]
    message = refusal(ValueError, load_posts, C4)  # the real one has 512 of them
    assert "30 large files" in message and "--max-posts" in message
    assert "train, validation" in refusal(FileNotFoundError, load_posts, C4, "test")
    assert "allenai/c4/en, allenai/c4/realnewslike" in refusal(ValueError, load_posts, "allenai/c4", max_posts=3)


# --------------------------------------------------------------------------------------------------- files of yours

ROWS = [{"id": "007", "document": "One, \"two\",\nthree ‘four’.", "summary": "1-4"},
        {"id": "b", "document": "NA", "summary": "null"}, {"id": "c", "document": "No reference.", "summary": ""}]


def write(path, rows=ROWS):
    """The rows in the form that the file's name promises."""
    form = path.name.split(".", 1)[1].removesuffix(".gz")
    if form == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8-sig")  # as spreadsheets save it
    else:
        content = {"parquet": parquet, "jsonl": lines, "json": lambda rows: json.dumps(rows, indent=1).encode(),
                   "lines.json": lines}[form](rows)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.csv.gz", "a.parquet", "a.json", "a.json.gz", "a.lines.json",
                                  "a.lines.json.gz"])
def test_a_file_of_any_form_holds_the_same_posts(name, tmp_path, server, capfd):
    folder = tmp_path / "posts [1] of *"  # no pattern, a name
    folder.mkdir()
    path = write(folder / name)
    expected = [Post(row["document"], row["summary"], row["id"]) for row in ROWS]
    assert load_posts(path) == load_posts(path, "test") == expected
    assert load_posts(path, max_posts=1) == expected[:1] and load_posts(path, min_chars=3) == [expected[0], expected[2]]
    assert load_posts(path, document="summary", reference="document", max_posts=1)[0].document == "1-4"
    many = [{"document": f"Post {i}.", "summary": f"{i}."} for i in range(20)]
    write(path, many)  # the same name, other posts: nobody remembers the old ones
    trained, held_out = load_split(str(path))
    assert [post.document for post in trained + held_out] == [row["document"] for row in many] and len(held_out) == 2
    assert server.asked() == [] and not list(tmp_path.glob("arrow/**/*.arrow"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "json.gz"])
def test_a_folder_may_hold_its_splits_in_any_form(ending, tmp_path):
    write(tmp_path / f"train.{ending}")
    write(tmp_path / f"validation.{ending}", ROWS[:2])
    assert list(map(len, load_split(str(tmp_path)))) == [3, 2]
    write(tmp_path / "train.jsonl", ROWS[:1])
    assert len(load_posts(tmp_path)) == 1  # which goes first, as ever
    message = refusal(FileNotFoundError, load_posts, tmp_path, "test")
    assert "test.jsonl" in message and "test.parquet" in message


@pytest.mark.parametrize("name, content", [
    ("a.csv", b"document,summary\na,b\nc,d,e,f\n"), ("a.csv", b""), ("a.csv", b"document\n\xe4\n"),
    ("a.parquet", parquet(ROWS)[:-9]), ("a.json", b'[{"document": "a"'), ("a.json", b""), ("a.json", b"[]"),
    ("a.json", b'{"document": "\\ud83d"}\n'), ("a.json.gz", gzip.compress(lines(ROWS), mtime=0)[:-9]),
    ("a.json", b'{"data": ["a", "b"]}'), ("a.csv", b"title,id\nx,1\n"), ("a.csv", b"document\nd\n\"\"\n"),
], ids=str)
def test_a_file_that_is_not_what_it_is_called(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = refusal(ValueError, load_posts, tmp_path / name)
    assert str(tmp_path / name) in message


def test_without_the_package_everything_but_its_forms_works(tmp_path, monkeypatch, server):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_posts("tiny", "val") and len(load_posts(write(tmp_path / "a.jsonl"))) == 3
    assert len(load_posts(write(tmp_path / "train.jsonl.gz").parent)) == 3
    for source in (DATA, C4, write(tmp_path / "a.csv"), write(tmp_path / "a.json.gz"), write(tmp_path / "a.parquet")):
        message = refusal(ValueError, load_posts, source)
        assert str(source) in message and "pip install datasets" in message
    assert server.asked() == []


# ----------------------------------------------------------------------------------------------- as a user meets it


def test_rewards_that_compare_refuse_posts_without_summaries(c4, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--data", C4, "--max-posts", "20", "--min-chars", "800", "--stages", "rouge_l:1", "--prompts", "1"]
    assert train.main(args) == 1
    assert "no summaries for rouge_l" in capsys.readouterr().err
    assert train.main(["--max-posts", "-1"]) == 1
    assert "--max-posts" in capsys.readouterr().err


@pytest.fixture
def process(tmp_path):
    """Runs a command in a process of its own, with nothing but the environment to tell it where the hub is."""
    def run(*args, **more):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, cwd=tmp_path)
    return run


def test_names_instead_of_folders_on_the_command_line(repository, data, process):
    """Model and posts by name, then misspelt, then again with the hub gone."""
    args = ["--data", DATA, "--target", "6", "--n", "3"]
    first = process(ROOT / "eval.py", NAME, *args, HF_HUB_DISABLE_PROGRESS_BARS="1")  # but for the model's own
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert first.stdout.splitlines()[1].split()[:2] == [NAME, "3"]
    wrong = process(ROOT / "eval.py", "crisp/tyni", *args)
    assert wrong.returncode == 1 and wrong.stderr.startswith("eval.py: There is no folder crisp/tyni")
    assert wrong.stderr.count("\n") == 1
    wrong = process(ROOT / "eval.py", "tiny", "--data", "mlabonne/smoltdlr")
    assert wrong.returncode == 1 and wrong.stderr.startswith("eval.py: There is no file or folder mlabonne/smoltdlr")
    assert wrong.stderr.count("\n") == 1
    repository.close()
    again = process(ROOT / "eval.py", NAME, *args)  # but for the time that it took

    def timeless(out):
        return [line for line in out.splitlines() if not line.startswith("summaries a ")]

    assert timeless(again.stdout) == timeless(first.stdout)


def test_a_run_on_streamed_posts_resumes_without_a_connection(data, process, tmp_path):
    """Killed after the second step or a later one, the hub gone and the package forbidden to ask: the same log as the
    run that was left alone."""
    def log(run):
        lines = (tmp_path / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")} for line in lines]

    args = ["--data", DATA, "--max-posts", "30", "--min-chars", "20", "--stages", "length:4", "--prompts", "2",
            "--group", "2", "--target", "4", "--save-every", "1", "--eval-posts", "2"]
    whole = process(ROOT / "train.py", *args, "--run", "whole")
    assert whole.returncode == 0 and whole.stderr == "", whole.stderr
    shutil.rmtree(tmp_path / "posts")  # the one that is killed has to stream for itself
    killed = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args, "--run", "killed"], cwd=tmp_path,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    while killed.poll() is None and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 2):
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    data.close()
    again = process(ROOT / "train.py", "--run", "killed", "--resume", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert log("killed") == log("whole") and len(log("whole")) == 4
