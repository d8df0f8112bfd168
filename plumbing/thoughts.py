"""What stands beside an answer: what a model thinks aloud before it, and tags that it only names.

Servers and templates mark thoughts in several ways.
"""

import re

MARKS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
         ("<thoughts>", "</thoughts>"), ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"),
         ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
         ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"),
         ("<|channel|>analysis", "<|channel|>final<|message|>"))


def without_thoughts(text: str) -> str:
    """The answer alone. It has not begun while the thoughts are not closed.

    Many templates end the prompt with the opening mark, and then only the closing one is in the text.

    >>> without_thoughts("<think>A cat?</think>A cat."), without_thoughts("A cat?</think>A cat.")
    ('A cat.', 'A cat.')
    >>> without_thoughts("<think>A cat?"), without_thoughts("A cat.")
    ('', 'A cat.')
    """
    for begin, end in MARKS:
        thoughts, closed, answer = text.partition(end)
        if text.lstrip().startswith(begin) or closed and begin not in thoughts:
            # Some think twice before they answer.
            return without_thoughts(answer) if closed and answer.lstrip().startswith(begin) else answer
    return text


# In the middle of a line, a pair with a word or two between its tags, or dots: "between <summary> and </summary>".
MENTION = re.compile(r"(?<=\S)[^\S\n]*<(\w+)>(?:[^<\n.!?。！？]{0,12}|\s*(?:\.\.\.|…)\s*)</\1>")


def is_ended(text: str, stop_text: str) -> bool:
    """Whether a completion has come to its stop text: in thoughts, or where a pair of tags is named, it has not.

    Nobody can know what will follow, so a mention is guessed by its form. Where the guess is wrong, the completion goes
    on to its own end, and the last closed pair counts.

    >>> is_ended("A cat sat.</summary>", "</summary>"), is_ended("Here: <summary>A cat.</summary>", "</summary>")
    (True, True)
    >>> is_ended("I write between <summary> and </summary>", "</summary>")
    False
    """
    return stop_text in MENTION.sub("", without_thoughts(text))
