"""Downloads, as a lesson in pessimism: the hub is busy, gated, misspelt or gone, the line drops and the disk is full.

The hub is a server on this machine (loopback.py) that answers as the real one does. Whatever happens, a file that is
there is whole, what was fetched is not fetched again, and the user gets one sentence.
"""

import doctest
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from email.utils import formatdate
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

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
    for name, value in {"CRISP_CACHE": str(tmp_path / "posts"), "CRISP_DATASETS_SERVER": server.url,
                        "HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub reads the environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "models"))
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


# ------------------------------------------------------------------------------------------------------------ rows

DATA = "mlabonne/smoltldr"


def rows(n, word="train"):
    return [{"prompt": f"POST: a {word} post, number {i}, ‘quoted’.\u2028TL;DR:", "completion": f" Sum {i}."}
            for i in range(n)]


def posts(n, word="train", first=0):
    return [Post(row["prompt"], row["completion"].strip(), str(i)) for i, row in enumerate(rows(n, word), 1)][first:]


@pytest.fixture
def data(server):
    for split, n in (("train", 250), ("validation", 20), ("test", 7)):
        server.rows[DATA, "default", split] = rows(n, split)
    return server


def offsets(server):
    """The first rows of the pages that were asked for since the last call."""
    return [int(path.split("offset=")[1].split("&")[0]) for _, path, _ in server.asked("/rows?")]


def kept(tmp_path):
    return sorted(file.name for file in (tmp_path / "posts").iterdir())


def test_a_data_set_of_the_hub_is_fetched_page_by_page_and_once(data, tmp_path):
    assert load_posts(DATA) == posts(250)
    assert offsets(data) == [0, 100, 200]
    assert load_posts(DATA) == posts(250)
    assert load_posts(DATA, max_posts=30) == posts(30)  # the whole serves for a part
    assert data.asked() == []
    assert kept(tmp_path) == ["mlabonne--smoltldr--train.jsonl.gz", "mlabonne--smoltldr.json"]
    data.close()
    assert load_posts(DATA) == posts(250)  # offline


def test_no_more_pages_than_needed(data, tmp_path):
    assert load_posts(DATA, max_posts=120) == posts(120)
    assert offsets(data) == [0, 100]
    assert "mlabonne--smoltldr--train-first-120.jsonl.gz" in kept(tmp_path)
    assert load_posts(DATA, max_posts=1000) == posts(250)  # there are no more


def test_posts_that_are_too_short_do_not_count(data):
    """200 of these have a number of three digits, so that their documents are one or two characters longer."""
    longer = len(rows(250)[100]["prompt"])
    assert load_posts(DATA, max_posts=80, min_chars=longer) == posts(180, first=100)
    assert offsets(data) == [0, 100]
    assert load_posts(DATA, min_chars=longer) == posts(250, first=100)
    assert "at least 999 characters" in refusal(ValueError, load_posts, DATA, min_chars=999)


@pytest.mark.parametrize("asked", ["val", "valid", "validation", "dev"])
def test_the_validation_split_has_many_names(data, asked, tmp_path):
    assert load_posts(DATA, asked) == posts(20, "validation")
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "val.jsonl").write_text(json.dumps(rows(1)[0]), encoding="utf-8")
    assert len(load_posts(folder, asked)) == 1  # of a folder's file too


def test_posts_to_train_on_and_to_hold_out(data):
    assert load_split(DATA) == (posts(250), posts(20, "validation"))
    assert load_split(DATA, max_posts=5) == (posts(5), posts(5, "validation"))
    del data.rows[DATA, "default", "validation"]
    shutil.rmtree(os.environ["CRISP_CACHE"])
    assert load_split(DATA) == (posts(250), posts(7, "test"))
    del data.rows[DATA, "default", "test"]
    shutil.rmtree(os.environ["CRISP_CACHE"])
    message = refusal(FileNotFoundError, load_split, DATA)
    assert "it has train" in message and "--eval-data" in message


def test_a_data_set_of_several_configs_wants_one_named(server):
    for config in ("short", "long"):
        server.rows["news/both", config, "train"] = rows(3, config)
    message = refusal(ValueError, load_posts, "news/both")
    assert "news/both/short, news/both/long" in message
    assert load_posts("news/both/long") == posts(3, "long") and load_posts("news/both/short") == posts(3, "short")
    assert "news/both/long" in refusal(ValueError, load_posts, "news/both/wide")
    server.rows["news/both", "default", "train"] = rows(2, "default")
    assert load_posts("news/both") == posts(2, "default")


@pytest.mark.parametrize("fault, waits", [
    ((429, {"Retry-After": "7"}), [7]),
    ((429, {"Retry-After": "0"}), [1]),
    ((503, {}), [1]),
    ((500, {"X-Error-Code": "ResponseNotReady"}), [1]),
    (40, [1]),  # the connection drops after 40 bytes
    (0, [1]),
], ids=str)
def test_a_page_that_fails_is_asked_for_again(data, fault, waits):
    data.fail("offset=100", fault)
    assert load_posts(DATA) == posts(250)
    assert offsets(data) == [0, 100, 100, 200] and data.waits == waits


def test_each_failure_waits_longer_and_the_last_one_is_a_sentence(data, tmp_path):
    data.fail("offset=100", *[(503, {})] * 6)
    message = refusal(OSError, load_posts, DATA)
    assert DATA in message and "503" in message and data.waits == [1, 2, 4, 8, 16]
    assert not list((tmp_path / "posts").glob("*.gz"))  # half a data set is none
    data.asked()
    assert load_posts(DATA) == posts(250)
    assert offsets(data) == [100, 200]  # but what had arrived is not asked for again


def test_a_date_to_wait_for(data):
    data.fail("offset=100", (429, {"Retry-After": formatdate(hub.time.time() + 60, usegmt=True)}))
    assert load_posts(DATA) == posts(250)
    assert 57 < data.waits[0] <= 60
    data.fail("offset=0", (429, {"Retry-After": "86400"}))
    assert "429" in refusal(OSError, load_posts, DATA, "test")  # nobody waits for a day


def test_a_fetch_that_was_killed_goes_on(data, tmp_path):
    """Two pages had arrived and a third was being written: the two count, whatever the third looks like."""
    load_posts(DATA, "test")
    data.asked()
    pages = [hub.read_page(DATA, "default", "train", at) for at in (0, 100)]
    data.asked()
    for torn in ('{"offset": 200, "total": 250, "rows": [{"prom', "", "\n[1]\n", "\n{}"):
        path = tmp_path / "posts" / "mlabonne--smoltldr--train.jsonl.gz"
        path.unlink(missing_ok=True)
        Path(f"{path}.pages").write_text("\n".join(map(json.dumps, pages)) + "\n" + torn, encoding="utf-8")
        assert load_posts(DATA) == posts(250)
        assert offsets(data) == [200]
        assert not Path(f"{path}.pages").exists()
    path.unlink()
    Path(f"{path}.pages").write_text(json.dumps(pages[0]) + '\n{"offset": 100, "to', encoding="utf-8")
    data.fail("offset=200", *[(503, {})] * 6)  # stopped again: the page that followed the torn line counts as well
    refusal(OSError, load_posts, DATA)
    data.asked()
    assert load_posts(DATA) == posts(250) and offsets(data) == [200]


def test_two_runs_may_fetch_the_same_at_once(data):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load_posts(DATA))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [posts(250)] * 4


def test_data_sets_that_cannot_be_had(data, monkeypatch):
    for name in ("mlabonne/smoltdlr", DATA):
        data.gated.add(DATA)
        message = refusal(OSError, load_posts, name)
        assert name in message and "spelling" in message and "gated" in message and "HF_TOKEN" in message
    data.gated.clear()
    data.fail("/splits", (200, {}))  # a page to log in on
    assert "JSON" in refusal(OSError, load_posts, DATA)
    data.rows[DATA, "default", "train"] = []
    assert "no rows" in refusal(OSError, load_posts, DATA)
    data.close()
    message = refusal(OSError, load_posts, "mlabonne/other")
    assert "connection" in message and "mlabonne/other" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data.waits.clear()
    assert "HF_HUB_OFFLINE" in refusal(OSError, load_posts, "mlabonne/other") and data.waits == []


def test_rows_that_the_hub_cut_are_refused(data, monkeypatch):
    """The viewer cuts long cells: a document that ends in the middle would be summarised as if it were whole."""
    whole = data.answer

    def mark(path, query):
        status, headers, body = whole(path, query)
        if path == "/rows":
            value = json.loads(body)
            value["rows"][3]["truncated_cells"] = ["prompt"]
            body = json.dumps(value).encode()
        return status, headers, body

    monkeypatch.setattr(data, "answer", mark)
    assert "row 3 " in refusal(ValueError, load_posts, DATA)


@pytest.mark.parametrize("room", [10, 10_000])
def test_a_full_disk_leaves_no_half_data_set(data, room, tmp_path):
    with disk_full_after(room):
        message = refusal(OSError, load_posts, DATA)
    assert str(tmp_path / "posts") in message and "space" in message
    assert not list((tmp_path / "posts").glob("*.gz"))
    assert load_posts(DATA) == posts(250)


def test_what_is_here_is_not_looked_for_there(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mlabonne").mkdir()
    Path("mlabonne/smoltldr").write_text(json.dumps(rows(1)[0]), encoding="utf-8")
    assert load_posts(DATA) == posts(1)
    for name in ("posts/train.jsonl", "./posts/train", "a/b/c/d", "posts.jsonl.gz", "/posts/train", "~/posts"):
        assert "There is no" in refusal(FileNotFoundError, load_posts, name)  # none of them a name of the hub
    assert data.asked() == []


# --------------------------------------------------------------------------------------------------------- streams

C4 = "allenai/c4/realnewslike"
FILE = "realnewslike/c4-train.{:05d}-of-00512.json.gz"


def article(i, length):
    return {"text": f"Article {i}. {os.urandom(length // 2).hex()}"[:length], "timestamp": "2019", "url": "u"}


@pytest.fixture
def c4(server, monkeypatch):
    """Files of which every tenth article is long; random text, because gzip would make nothing of the same letter."""
    monkeypatch.setattr(hub, "PIECE", 10_000)
    server.articles = [article(i, 900 if i % 10 == 0 else 300) for i in range(1000)]
    files = [server.articles[:500], server.articles[500:]]
    server.datasets["allenai/c4"] = {
        **{FILE.format(i): lines(rows) for i, rows in enumerate(files)},
        "realnewslike/c4-validation.00000-of-00001.json.gz": lines(server.articles[:20])}
    return server


def lines(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def ranges(server):
    return [r for _, path, r in server.asked("/cdn/")]


def test_long_documents_are_found_in_a_stream_which_ends_with_the_last_one(c4, tmp_path):
    """Eight articles of at least 800 characters are among the first 71 of 1,000: the rest is never downloaded."""
    found = load_posts(C4, max_posts=8, min_chars=800)
    assert [post.document for post in found] == [c4.articles[i]["text"] for i in range(0, 80, 10)]
    assert {post.reference for post in found} == {""}
    asked = ranges(c4)
    assert asked[:2] == ["bytes=0-9999", "bytes=10000-19999"]
    size = len(c4.datasets["allenai/c4"][FILE.format(0)])
    assert len(asked) == 3 and size > 100_000
    assert load_posts(C4, max_posts=8, min_chars=800) == found and ranges(c4) == []
    assert kept(tmp_path) == ["allenai--c4--realnewslike--train-first-8-min-800.jsonl.gz"]


def test_a_stream_goes_on_in_the_next_file(c4):
    found = load_posts(C4, max_posts=70, min_chars=800)
    assert [post.document for post in found] == [row["text"] for row in c4.articles[:700:10]]


def test_the_validation_stream_may_be_taken_whole(c4):
    assert [post.document for post in load_posts(C4, "val")] == [row["text"] for row in c4.articles[:20]]
    trained, held_out = load_split(C4, max_posts=5, min_chars=800)
    assert len(trained) == 5 and [post.document for post in held_out] == [c4.articles[i]["text"] for i in (0, 10)]
    assert "--max-posts" in refusal(ValueError, load_posts, C4)  # 15 GB of them
    assert "train, validation" in refusal(FileNotFoundError, load_posts, C4, "test")


@pytest.mark.parametrize("fault", [(503, {}), (429, {"Retry-After": "3"}), 5000, 0], ids=str)
def test_a_piece_that_breaks_off_is_asked_for_again(c4, fault):
    c4.fail("/cdn/", 9_000, fault)
    found = load_posts(C4, max_posts=8, min_chars=800)
    assert [post.document for post in found] == [c4.articles[i]["text"] for i in range(0, 80, 10)]
    assert ranges(c4)[:4] == ["bytes=0-9999", "bytes=0-9999", "bytes=0-9999", "bytes=10000-19999"]


def test_streams_that_cannot_be_had(c4, tmp_path):
    files = c4.datasets["allenai/c4"]
    whole = files[FILE.format(0)]
    for broken in (whole[:20_000], b"no gzip" * 9, whole[:5000] + b"xxxx" + whole[5004:], lines(["x"])[:-9] + b"!" * 9):
        files[FILE.format(0)] = broken
        message = refusal(OSError, load_posts, C4, max_posts=600)
        assert "not whole" in message and "00000-of-00512" in message
    c4.gated.add("allenai/c4")
    assert "gated" in refusal(OSError, load_posts, C4, max_posts=8)
    c4.fail("/resolve/", (200, {}))  # a page to log in on
    assert "pieces" in refusal(OSError, load_posts, C4, max_posts=8)
    c4.close()
    assert "connection" in refusal(OSError, load_posts, C4, max_posts=8)
    assert not list((tmp_path / "posts").glob("*"))


# ----------------------------------------------------------------------------------------------- as a user meets it


def test_rewards_that_compare_refuse_posts_without_summaries(c4, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--data", C4, "--max-posts", "20", "--min-chars", "800", "--stages", "rouge_l:1", "--prompts", "1"]
    assert train.main(args) == 1
    assert "no summaries for rouge_l" in capsys.readouterr().err
    assert train.main(["--max-posts", "-1"]) == 1
    assert "--max-posts" in capsys.readouterr().err


def test_names_instead_of_folders_on_the_command_line(repository, data, tmp_path):
    """A process of its own, with nothing but the environment to tell it where the hub is: model and posts by name,
    then misspelt, then again with the hub gone."""
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def run(*args):
        return subprocess.run([sys.executable, str(ROOT / "eval.py"), *args, "--target", "6", "--n", "3"], env=env,
                              capture_output=True, text=True, cwd=tmp_path)

    first = run(NAME, "--data", DATA)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[1].split()[:2] == [NAME, "3"]
    wrong = run("crisp/tyni", "--data", DATA)
    assert wrong.returncode == 1 and wrong.stderr.startswith("eval.py: There is no folder crisp/tyni")
    assert wrong.stderr.count("\n") == 1
    repository.close()
    assert run(NAME, "--data", DATA).stdout == first.stdout
