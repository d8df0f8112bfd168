"""A model from the Hugging Face hub: fetched once, into the hub's own cache."""

import errno
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def download(name: str, files: Sequence[str], weight_files: Callable[[Path], Sequence[str]]) -> Path:
    """The local copy of a hub repository: what is not here yet is fetched, a dropped connection is resumed.

    Only `files`, since a repository may hold the same weights in five formats, and then the shards, which may have any
    name: `weight_files` reads them in the folder's index. A busy hub is asked again. Raises OSError with a sentence
    that says what to do.
    """
    folder = fetch(name, files)
    if (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists():
        try:
            shards = weight_files(folder)
        except ValueError:  # a broken index: whoever loads the folder will be told
            shards = ["model-*.safetensors"]
        if not all((folder / shard).exists() for shard in shards):
            folder = fetch(name, [*files, *shards])
    elif not (folder / "model.safetensors").exists() and not (folder / "adapter_config.json").exists():
        raise OSError(f"{name} has no model.safetensors on the hub: take a model that has, or convert it with "
                      f"transformers and pass that folder.")
    return folder


def fetch(name: str, files: Sequence[str]) -> Path:
    """The folder of a repository's files that have these names."""
    from huggingface_hub import snapshot_download  # comes with tokenizers; slow to import, needed for names only
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    waits = iter((1, 4, 16))  # seconds
    while True:
        try:
            return Path(snapshot_download(name, allow_patterns=list(files)))
        except GatedRepoError as e:
            raise OSError(f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
                          f"'hf auth login' or set HF_TOKEN.") from e
        except RepositoryNotFoundError as e:
            raise OSError(f"There is no folder {name}, and the hub shows you no model of that name: check the "
                          f"spelling; if it is private, log in with 'hf auth login' or set HF_TOKEN.") from e
        except Exception as e:  # offline, a full disk, a broken answer: many types, as versions go
            status = getattr(getattr(e.__cause__ or e, "response", None), "status_code", None)
            if status in (429, 500, 502, 503, 504) and (wait := next(waits, None)):
                print(f"{name}: the hub answers {status}; trying again in {wait} s.", file=sys.stderr, flush=True)
                time.sleep(wait)
                continue
            if isinstance(e, OSError) and errno.errorcode.get(e.errno or 0) in ("ENOSPC", "EDQUOT", "EFBIG"):
                raise OSError(f"There is no room for {name} ({e.strerror}): free some space, or set HF_HOME to a "
                              f"folder on a larger disk. The files that are whole are kept.") from e
            why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise OSError(f"There is no folder {name}, and the hub did not give a model of that name ({why}). "
                          f"Check the spelling and the connection, or pass a local folder.") from e
