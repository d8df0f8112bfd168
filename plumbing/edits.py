"""A line or two of a function, edited in the memory of this process: the file stays as it is.

Studies make with it what the story has no flag for. An edit is words that a function has once, and what stands in their
place; so a story that changes is told of, and nothing is edited that is not what it was.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Edit(NamedTuple):
    """A few words of a function of the story, and what stands there instead."""

    function: Callable
    old: str
    new: str

    def code(self, source: str) -> str:
        """The function's source with the edit in it. ValueError where the words are not there, or not once."""
        return replaced(source, self.old, self.new, self.function.__qualname__)

    def lines(self) -> str:
        """The edit as a diff shows it."""
        marked = [(sign, line) for sign, text in (("-", self.old), ("+", self.new)) for line in text.splitlines()]
        return (f"# {self.function.__module__}.{self.function.__qualname__}\n"
                + "".join(f"{sign} {line}\n" for sign, line in marked))


def replaced(source: str, old: str, new: str, where: str) -> str:
    """`source` with `new` in the one place of `old`. ValueError where it is not there, or not once."""
    if source.count(old) != 1:
        raise ValueError(f"{where} has {old!r} {source.count(old)} times, and not once: the story has changed, so "
                         f"write the edit anew in the study.")
    return source.replace(old, new)


@contextmanager
def edited(edits: Sequence[Edit]) -> Iterator[None]:
    """Inside, the functions do what the edits make of them, whoever has imported them; afterwards, what they did."""
    sources: dict[Callable, str] = {}
    for edit in edits:
        f = inspect.unwrap(edit.function)  # `sample` without its no_grad
        sources[f] = edit.code(sources.get(f) or textwrap.dedent(inspect.getsource(f)))
    before = {f: f.__code__ for f in sources}
    for f, source in sources.items():
        made: dict = {}
        exec(compile(source, f"<{f.__qualname__}, edited>", "exec"), f.__globals__, made)
        f.__code__ = inspect.unwrap(made[f.__name__]).__code__
    try:
        yield
    finally:
        for f, code in before.items():
            f.__code__ = code
