"""Posts: what there is to summarise, from the embedded set, from files and from the hub."""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from plumbing import hub

TINY = Path(__file__).resolve().parents[1] / "tiny"  # the embedded model and its posts

# The names under which the usual data sets keep the two texts, in the order in which they are looked for.
DOCUMENT_FIELDS = ("document", "post", "prompt", "article", "text", "body", "content")
REFERENCE_FIELDS = ("reference", "summary", "completion", "tldr", "highlights")


# Files that `datasets` reads; its readers, and what to tell them: a "NA" or "null" in a CSV file is a text like others.
ENDINGS = (".csv", ".parquet", ".json", ".csv.gz", ".json.gz", ".csv.zst", ".json.zst", ".jsonl.zst")
READERS = {"csv": {"keep_default_na": False, "na_filter": False}, "parquet": {}, "json": {}}


@dataclass(frozen=True)
class Post:
    """A text to summarise, its author's or editor's own summary ("" where there is none), and a name for messages."""

    document: str
    reference: str
    id: str


def load_posts(source: str | Path, split: str = "train", document: str | None = None, reference: str | None = None,
               max_posts: int = 0, min_chars: int = 0) -> list[Post]:
    """`tiny`, one file (whatever the split), a folder with a file `SPLIT.jsonl` or the like in it, or a data set of
    the hub, `owner/name` or `owner/name/config`, which is fetched once -> posts.

    Files are `.jsonl[.gz]`, one JSON object a line, or what `datasets` reads: `.csv`, `.parquet`, `.json`, `.json.gz`.
    `document` and `reference` name the fields where they are not among the usual ones. Only posts whose document has at
    least `min_chars` characters, and of them the first `max_posts` (0: all).
    Raises OSError or ValueError with file and line for whatever cannot be read: a post left out silently would shift
    every batch after it.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    if on_hub(source):
        def counts(row: dict) -> bool:
            text = row.get(document or next((f for f in DOCUMENT_FIELDS if f in row), None))
            return not isinstance(text, str) or len(text.strip()) >= min_chars  # what is no text is named below

        note = f"-min-{min_chars}" + f"-of-{document}" * bool(document) if min_chars else ""
        path = hub.fetch(str(source), split, max_posts, counts, note)
    if path.is_dir():
        path = find_split(path, split)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: --data takes 'tiny', a folder with train.jsonl and test.jsonl, "
                                f"a .jsonl, .csv, .json or .parquet file, or a data set of the hub, owner/name.")
    posts = []
    with closing(rows_of(path)) as rows:
        for where, number, row in rows:
            post = _post(row, f"{path} {where} {number}", number, document, reference, min_chars)
            posts += [post] if post else []
            if max_posts and len(posts) == max_posts:
                break
    if not posts:
        raise ValueError(f"{path} holds no posts{f' of at least {min_chars} characters' if min_chars else ''}.")
    return posts


def find_split(folder: Path, split: str) -> Path:
    """The file of a split: of its spellings the first that is there, and of its forms the .jsonl."""
    found = [file for name in hub.spellings(split) for ending in (".jsonl", ".jsonl.gz", *ENDINGS)
             if (file := folder / f"{name}{ending}").exists()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {split}.jsonl or {split}.jsonl.gz (one JSON object a line, with the "
                                f"fields document and summary) and no {split}.csv, {split}.json or {split}.parquet.")
    return found[0]


def rows_of(path: Path) -> Iterator[tuple[str, int, object]]:
    """("line" or "row", its number from 1 on, what it holds) of a file. Blank lines are left out and counted."""
    if path.name.endswith(ENDINGS):
        ending = next(ending for ending in ENDINGS if path.name.endswith(ending))
        reader = ending.split(".")[1].replace("jsonl", "json")
        options = {"data_files": glob.escape(str(path.resolve())), "split": "train", **READERS[reader]}
        with hub.calm(str(path)) as datasets:  # streamed: no cache holds a copy of it
            rows = datasets.load_dataset(reader, streaming=True, **options)
            columns = next(iter(rows), {}) if reader == "csv" else {}
            if columns:  # all of them text: a guess would make 7.0 of the summary "7."
                features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
                rows = datasets.load_dataset(reader, streaming=True, features=features, **options)
            yield from (("row", number, row) for number, row in enumerate(rows, 1))
        return
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield "line", number, json.loads(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} breaks off or is not text after {number} lines ({e}): copy it again.") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} line {number} is not valid JSON ({e}): mend or delete that line.") from e


def on_hub(source: str | Path) -> bool:
    """A name like a hub data set's, and nothing of that name here."""
    return bool(hub.NAME.fullmatch(str(source))) and not Path(source).expanduser().exists()


def has_splits(source: str) -> bool:
    """Whether `source` brings a split for training and others for testing; a single file does not."""
    return source == "tiny" or on_hub(source) or Path(source).expanduser().is_dir()


def load_split(data: str, eval_data: str = "", max_posts: int = 0,
               min_chars: int = 0) -> tuple[list[Post], list[Post]]:
    """Posts to train on, and posts held out: `eval_data`, the data's own val or test split, or a file's last tenth."""
    which = {"max_posts": max_posts, "min_chars": min_chars}
    posts = load_posts(data, "train", **which)
    if eval_data:
        return posts, load_posts(eval_data, "test", **which)
    if has_splits(data):
        try:
            return posts, load_posts(data, "val", **which)
        except FileNotFoundError:
            return posts, load_posts(data, "test", **which)
    if len(posts) < 10:
        raise ValueError(f"{data} has only {len(posts)} posts, too few to hold some out: give --eval-data.")
    return posts[:-(len(posts) // 10)], posts[-(len(posts) // 10):]


def _post(row: object, where: str, number: int, document: str | None, reference: str | None, min_chars: int):
    """A row of a file -> the Post, or None where its document is shorter than `min_chars`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object: write {{\"document\": ..., \"summary\": ...}}.")
    d = document or next((f for f in DOCUMENT_FIELDS if f in row), None)
    r = reference or next((f for f in REFERENCE_FIELDS if f in row and f != d), None)
    text, summary = row.get(d), row.get(r) or ""
    if isinstance(text, str) and len(text.strip()) < min_chars:
        return None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text in the field '{d or DOCUMENT_FIELDS[0]}': its fields are "
                         f"{', '.join(row) or 'none'}. Mend the line, name the field that holds the text, or leave "
                         f"empty posts out with --min-chars 1.")
    if not isinstance(summary, str) or (reference and reference not in row):
        raise ValueError(f"{where} has no summary text in the field '{r}'.")
    try:
        (text + summary).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where} holds half a character, which no tokenizer takes ({e}): mend that line.") from e
    return Post(text.strip(), summary.strip(), str(row.get("id", number)))


def posts_that_fit(posts: Sequence[Post], prompt_of: Callable[[Post], list[int]], *, max_prompt: int, new_tokens: int,
                   context: int) -> tuple[list[Post], list[list[int]]]:
    """-> (the posts whose prompts fit into the context beside the new tokens, their prompts).

    `max_prompt` (0: none) leaves out the posts of longer prompts. What does not fit then is refused, by its name.
    """
    room = context - new_tokens
    if room < 1:
        raise ValueError(f"{new_tokens} new tokens leave no room for a prompt in the model's context of {context}: "
                         f"lower --target, --budgets or --max-new-tokens.")
    kept, prompts = [], []
    for post in posts:
        prompt = prompt_of(post)
        if max_prompt and len(prompt) > max_prompt:
            continue
        if len(prompt) > room:
            raise ValueError(f"Post {post.id} has a prompt of {len(prompt)} tokens; with {new_tokens} new ones it does "
                             f"not fit into the model's context of {context}. Leave such posts out (--max-prompt {room}"
                             f"), or cut their documents (--max-document).")
        kept.append(post)
        prompts.append(prompt)
    return kept, prompts
