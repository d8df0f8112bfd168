"""Reading a sum of rewards: what a user types, or a sentence that says what is wrong with it and how to mend it."""

import math
import re
from collections.abc import Sequence
from typing import NoReturn

_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_PIECE = re.compile(_NUMBER.pattern + r"|[A-Za-z_][A-Za-z0-9_]*|\S")


def read_sum(expression: str, known: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """"2*length-.5 * rouge_l" -> (("length", 2.0), ("rouge_l", -0.5)), of names among `known`."""

    def refuse(wrong: str, mend: str) -> NoReturn:
        raise ValueError(f"reward expression {expression!r}: {wrong}; {mend}.")

    terms: list[tuple[str, list[str]]] = [("+", [])]
    for piece in _PIECE.findall(expression):
        if piece in ("+", "-"):
            terms.append((piece, []))
        else:
            terms[-1][1].append(piece)

    weights = {}
    for sign, term in terms:
        match term:
            case [name]:
                number = "1"
            case [number, "*", name]:
                pass
            case []:
                if len(terms) == 1:
                    refuse("it is empty", f"name at least one of {', '.join(known)}")
                refuse("a '+' or '-' lacks a term on one side", "put a term on both, as in 'length - 0.1*rouge_l'")
            case [first, second] if "*" not in term:
                refuse(f"nothing joins {first!r} and {second!r}", "put '*' after a weight, '+' or '-' between rewards")
            case _:
                refuse(f"cannot read the term {' '.join(term)!r}", "write it as name or number*name, like 0.5*rouge_l")
        if not _NUMBER.fullmatch(number) or not math.isfinite(float(number)):
            refuse(f"{number!r} is not a finite number", "write a weight such as 0.5 before the '*' (rewards only add)")
        if name not in known:
            refuse(f"unknown name {name!r}", f"choose among {', '.join(known)}")
        if name in weights:
            refuse(f"{name!r} appears twice", "keep one term and give it the sum of the weights")
        weights[name] = float(sign + number)
    return tuple(weights.items())
