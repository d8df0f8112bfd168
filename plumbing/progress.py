"""A progress bar, where somebody waits for more than a few seconds and looks at a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from plumbing import ranks


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable]:
    """Inside, each call of what is yielded counts one of `total` (or as many as it says). It leaves no line behind."""
    from tqdm import tqdm  # it comes with tokenizers
    with tqdm(total=total, desc=what, unit="", delay=3, leave=False, dynamic_ncols=True,
              disable=not (ranks.first() and sys.stderr and sys.stderr.isatty())) as progress:
        yield lambda n=1: progress.update(n)
