"""Posts: what there is to summarise, from the embedded set, from files and from the hub."""

import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from plumbing import hub
from plumbing.data_forms import check_columns, looks_like, other_form, parted_by, refuse_shape

TINY = Path(__file__).resolve().parents[1] / "tiny"  # the embedded model and its posts

# The names under which the usual data sets keep the two texts, in the order in which they are looked for. `content`
# goes before `body`, in which the TL;DR corpus keeps text and answer, and a text before the instruction beside it.
DOCUMENT_FIELDS = ("document", "article", "dialogue", "post", "report", "text", "content", "body", "documents",
                   "transcript", "input", "prompt", "instruction")
REFERENCE_FIELDS = ("reference", "summary", "highlights", "abstract", "tldr", "completion", "output")

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
               max_posts: int = 0, min_chars: int = 0, advice: str = "name one with --split") -> list[Post]:
    """`tiny`, one file (whatever the split), a folder with a file `SPLIT.jsonl` or the like in it, or a data set of
    the hub, `owner/name` or `owner/name/config`, which is fetched once -> posts.

    Files are `.jsonl[.gz]`, one JSON object a line, or what `datasets` reads: `.csv`, `.parquet`, `.json`, `.json.gz`.
    `document` and `reference` name the fields where they are not among the usual ones. Only posts whose document has at
    least `min_chars` characters, and of them the first `max_posts` (0: all).
    Raises OSError or ValueError with file and line for whatever cannot be read: a post left out silently would shift
    every batch after it. Rows without a text (null, NaN, blank) are left out under `min_chars`, and their number said.
    `advice`: what to do where there is no such split.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    if on_hub(source):
        def counts(row: dict) -> bool | None:
            text = row.get(fields_of(row, document, reference)[0])
            if is_blank(text) and min_chars:
                return None  # kept, to be counted below
            return not isinstance(text, str) or len(text.strip()) >= min_chars  # what is no text is named below

        note = f"-min-{min_chars}" + f"-of-{document}" * bool(document) if min_chars else ""
        path = hub.fetch(str(source), split, max_posts, counts, note, advice)
    if path.is_dir():
        path = find_split(path, split, advice)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: --data takes 'tiny', a folder with train.jsonl and test.jsonl, "
                                f"a .jsonl, .csv, .json or .parquet file, or a data set of the hub, owner/name.")
    posts, blank = [], []
    with closing(rows_of(path)) as rows:
        for where, number, row in rows if on_hub(source) else records_of(rows, path, document):
            at = f"{path} {where} {number}"
            if ".csv" in path.suffixes:
                check_columns(row, at)
            text, summary = texts_of(row, at, document, reference)
            if is_blank(text):
                blank.append(no_text(row, at, document, reference))
                if not min_chars:
                    raise ValueError(blank[0])
            elif len(text.strip()) >= min_chars:
                named = row.get("id")  # in a table null where others have one
                posts.append(Post(text.strip(), summary.strip(), str(number if named is None else named)))
            if max_posts and len(posts) == max_posts:
                break
    if not posts:
        raise ValueError(blank[0] if blank else
                         f"{path} holds no posts{f' of at least {min_chars} characters' if min_chars else ''}.")
    if blank:
        print(f"{path}: rows without a text, left out: {len(blank):,}; posts: {len(posts):,}.",
              file=sys.stderr, flush=True)
    return posts


def find_split(folder: Path, split: str, advice: str) -> Path:
    """The file of a split: of its spellings the first that is there, and of its forms the .jsonl."""
    found = [file for name in hub.spellings(split) for ending in (".jsonl", ".jsonl.gz", *ENDINGS)
             if (file := folder / f"{name}{ending}").exists()]
    if not found:
        if shards := sorted(folder.rglob(f"{split}-*-of-*.parquet")):  # of a data set that was copied from the hub
            raise FileNotFoundError(f"{folder} has no {split}.parquet, but {len(shards)} of its parts: give one in "
                                    f"place of the folder, {shards[0]}, or write them into one {split}.parquet.")
        raise FileNotFoundError(f"{folder} has no {split}.jsonl or {split}.jsonl.gz (one JSON object a line, with the "
                                f"fields document and summary) and no {split}.csv, {split}.json or {split}.parquet: "
                                f"{advice}.")
    return found[0]


def rows_of(path: Path) -> Generator[tuple[str, int, Any], None, None]:
    """("line" or "row", its number from 1 on, what it holds) of a file. Blank lines are left out and counted."""
    if path.name.endswith(ENDINGS):
        ending = next(ending for ending in ENDINGS if path.name.endswith(ending))
        if other := other_form(path):
            raise ValueError(f"{path} cannot be read: {other}.")
        reader = ending.split(".")[1].replace("jsonl", "json")
        options = {"data_files": glob.escape(str(path.resolve())), "split": "train", **READERS[reader]}
        with hub.calm(str(path)) as datasets:  # streamed: no cache holds a copy of it
            if reader == "json" and hub.mixes_types():  # else one number among the texts puts all of them in quotes
                options["on_mixed_types"] = None
            rows = datasets.load_dataset(reader, streaming=True, **options)
            columns: dict = next(iter(rows), {}) if reader == "csv" else {}
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
        advice = "save it as UTF-8" if isinstance(e, UnicodeDecodeError) else "copy it again"
        raise ValueError(f"{path} breaks off or is not text after {number} lines ({e}): "
                         f"{looks_like(path) or advice}.") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} line {number} is not valid JSON ({e}): "
                         f"{looks_like(path) or 'mend or delete that line'}.") from e


def records_of(rows: Iterator[tuple[str, int, Any]], path: Path, named: str | None) -> Iterator[tuple[str, int, Any]]:
    """The same rows; but of a .json that is one object around a list, {"data": [{...}, ...]}, the objects in that list.

    ValueError, with a command that mends it, where there are several lists, or columns in place of rows. `named`:
    --document-field. A list under the name of a text (the messages of a chat) is no such list.
    """
    ahead = list(islice(rows, 2))
    if len(ahead) == 1 and ".json" in path.suffixes and isinstance(row := ahead[0][2], dict):
        texts = [row[field] for field in (named, *DOCUMENT_FIELDS) if not is_blank(row.get(field))]
        lists = [key for key, value in row.items() if isinstance(value, list) and value
                 and all(isinstance(each, dict) for each in value)]
        columns = [text for text in texts if isinstance(text, list | dict) and all(
            isinstance(each, str) for each in (text.values() if isinstance(text, dict) else text))]
        if len(lists) == 1 and not texts:
            print(f"{path}: the posts are what stands under '{lists[0]}'.", file=sys.stderr, flush=True)
            ahead = [(f"'{lists[0]}' record", number, each) for number, each in enumerate(row[lists[0]], 1)]
        elif lists and not texts:
            most = max(lists, key=lambda key: len(row[key]))
            refuse_shape(path, f"several lists: {', '.join(lists)}. Take one", f"json; json.dump(json.load(open("
                         f"'{path.as_posix()}', encoding='utf-8'))['{most}'], open('{path.stem}-posts.json', 'w'))")
        elif columns:
            refuse_shape(path, "columns, and not a post in each row. Write rows", f"pandas; pandas.read_json("
                         f"'{path.as_posix()}', dtype=False).to_json('{path.stem}-posts.json', orient='records')")
    yield from ahead
    yield from rows


def on_hub(source: str | Path) -> bool:
    """A name like a hub data set's, and nothing of that name here."""
    return bool(hub.NAME.fullmatch(str(source))) and not Path(source).expanduser().exists()


def has_splits(source: str) -> bool:
    """Whether `source` brings a split for training and others for testing; a single file does not."""
    return source == "tiny" or on_hub(source) or Path(source).expanduser().is_dir()


def load_split(data: str, eval_data: str = "", max_posts: int = 0, min_chars: int = 0, split: str = "", *,
               document: str | None = None, reference: str | None = None) -> tuple[list[Post], list[Post]]:
    """Posts to train on, and posts held out: `eval_data`, the data's own val or test split, or a file's last tenth.

    `split`: the one to train on where it is not "train".
    """
    which: dict = {"max_posts": max_posts, "min_chars": min_chars, "document": document, "reference": reference}
    posts = load_posts(data, split or "train", **which)
    if eval_data:
        return posts, first_split(eval_data, ["test", "val"], which)
    if has_splits(data):
        return posts, first_split(data, [name for name in ("val", "test") if split not in hub.spellings(name)], which)
    if len(posts) < 10:
        raise ValueError(f"{data} has only {len(posts)} posts, too few to hold some out: give --eval-data.")
    return posts[:-(len(posts) // 10)], posts[-(len(posts) // 10):]


def first_split(data: str, names: list[str], which: dict) -> list[Post]:
    """Of the splits with these names the first that there is."""
    advice = "hold out other posts with --eval-data, a file or what has a split test or val"
    for name in names[:-1]:
        with suppress(FileNotFoundError):
            return load_posts(data, name, **which)
    return load_posts(data, names[-1], **which, advice=advice)


def is_blank(text: object) -> bool:
    """Null, NaN (a null that went through a table of numbers), "" or blanks."""
    return text is None or text != text or isinstance(text, str) and not text.strip()


def fields_of(row: dict, document: str | None, reference: str | None) -> tuple[str | None, str | None]:
    """The names of a row's two texts: those that are named, or the first of the usual ones that it has."""
    d = document or next((f for f in DOCUMENT_FIELDS if f in row and f != reference), None)
    return d, reference or next((f for f in REFERENCE_FIELDS if f in row and f != d), None)


def no_text(row: dict, where: str, document: str | None, reference: str | None) -> str:
    """What to say of a row whose text is missing."""
    d, has = fields_of(row, document, reference)[0], f"its fields are {', '.join(row) or 'none'}"
    if apart := parted_by(row):
        return f"{where} has one field, {''.join(row)!r}: {apart!r} parts its columns. Save it with commas."
    if d is None or d not in row:
        return (f"{where} has no text in a field '{d or DOCUMENT_FIELDS[0]}': {has}. Name the one that holds the text "
                f"with --document-field, or leave such rows out with --min-chars 1.")
    return (f"{where} has no text in the field '{d}': {has}. Leave such rows out with --min-chars 1, or name another "
            f"field with --document-field.")


def texts_of(row: object, where: str, document: str | None, reference: str | None) -> tuple:
    """A row of a file -> (its text, which may be blank, and its summary, "" where there is none)."""
    if not isinstance(row, dict):
        array = ". An array of objects is read from a file that is called .json" if isinstance(row, list) else ""
        raise ValueError(f"{where} is not a JSON object: write {{\"document\": ..., \"summary\": ...}}{array}.")
    d, r = fields_of(row, document, reference)
    text, summary = row.get(d), row.get(r)
    summary = "" if is_blank(summary) else summary
    if is_blank(text):
        return None, ""
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text in the field '{d}', but a {type(text).__name__}: its fields are "
                         f"{', '.join(row)}. Name the one that holds the text with --document-field.")
    if not isinstance(summary, str) or reference and reference not in row:
        raise ValueError(f"{where} has no summary text in the field '{r}': its fields are {', '.join(row)}. Name the "
                         f"one that holds the summary with --summary-field.")
    try:
        (text + summary).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where} holds half a character, which no tokenizer takes ({e}): mend that line.") from e
    return text, summary


def say_references(posts: Sequence[Post], held_out: Sequence[Post], compared: Sequence[str], data: str) -> None:
    """Refuse rewards that compare where no post has a summary, and say how many have none."""
    without = sum(not post.reference for post in posts)
    if compared and without == len(posts):
        raise ValueError(f"{data} has no summaries for {', '.join(compared)} to compare with: name their field with "
                         f"--summary-field, or train with --stages length:N or squish:N.")
    if compared and without:
        print(f"{without:,} of {len(posts):,} posts have no summary for {', '.join(compared)} to compare with: all of "
              f"their completions earn 0 from it, and where nothing else is paid their groups are flat.", flush=True)
    if compared and not any(post.reference for post in held_out):
        print(f"None of the held-out posts has a summary: {', '.join(compared)} will be 0 there.", flush=True)


def say_differences(measured: dict[str, tuple[str, list[Post]]], comparing: bool) -> None:
    """Beside eval.py's table, on stderr: what its rows do not share, and how many of their posts have a reference.

    measured: {model: (data and task in words, its posts)}. `comparing`: a reward needs references, too.
    """
    for name, (_, posts) in measured.items():
        n = sum(bool(post.reference) for post in posts)
        if n < len(posts) and (n or comparing):
            none = "" if n else ", so there are none: name the field of the summaries with --summary-field"
            print(f"{name}: {n} of {len(posts)} posts have a reference. ROUGE-L, METEOR, BLEU and a reward that needs "
                  f"one are means over those{none}.", file=sys.stderr)
    # Numbers of other posts, or for another size, may stand in one table, but nobody should compare them unawares.
    first, *others = measured.values()
    if any(other != first for other in others):
        rows = "; ".join(f"{name}: {len(posts)} posts of {task}" for name, (task, posts) in measured.items())
        print(f"These rows do not measure the same. {rows}.", file=sys.stderr)


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
