"""What a model thinks aloud before it answers. Servers and templates mark it in several ways."""

MARKS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
         ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"),
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
            return answer
    return text
