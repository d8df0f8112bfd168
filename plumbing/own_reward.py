"""A reward that somebody wrote, asked with care: what is wrong is told by its name, and an error keeps its place.

An error inside of it is a mistake in a program, so the traceback is shown. What it gives back and should not is a
sentence.
"""

import math
from collections.abc import Callable, Iterable, Sequence


class Refused(ValueError):
    """A sentence for the user about how a reward was asked; no mistake in the reward."""


def asked(name: str, reward: Callable, given):
    """reward(given). RuntimeError with the reward's name and, by its cause, with the traceback, where it fails.

    A ConnectionError passes: a server that does not answer is no mistake in a program.
    """
    try:
        return reward(given)
    except (Refused, ConnectionError):
        raise
    except Exception as e:
        raise RuntimeError(f"The reward '{name}' failed with {type(e).__name__}; the lines above show where.") from e


def numbers(name: str, values: object, group: Sequence) -> list[float]:
    """The values [G] of a reward as floats, one for each summary of the group. ValueError with name and value."""
    if isinstance(values, str | dict) or not isinstance(values, Iterable):
        raise ValueError(f"The reward '{name}' gave {values!r:.60} for {len(group)} summaries: it should give a list "
                         f"of as many numbers.")
    values = list(values)
    if len(values) != len(group):
        raise ValueError(f"The reward '{name}' gave {len(values)} values for {len(group)} summaries: one for each.")
    return [number(name, value, summary.text) for value, summary in zip(values, group)]


def number(name: str, value, text: str) -> float:
    try:
        x = math.nan if isinstance(value, str | bytes) else float(value)  # float("0.5") would hide a mistake
    except (TypeError, ValueError, RuntimeError, OverflowError):  # tensors of two numbers raise RuntimeError
        x = math.nan
    if not math.isfinite(x):
        raise ValueError(f"The reward '{name}' gave {value!r:.60} for the summary {text[:60]!r}: a reward is a number, "
                         f"neither NaN nor infinite. For what it cannot measure, let it give its worst value.")
    return x
