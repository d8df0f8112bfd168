"""The teacher of --teacher: a frozen model that says of every sampled token how likely it would have been."""

from collections.abc import Callable

from tokenizers import Tokenizer


def load_teacher(config, model, tokenizer: Tokenizer, load: Callable):
    """-> the frozen model, or None without --teacher. `load(name, config)` -> (model, tokenizer), as the policy's own.

    Raises ValueError where it has other words than the policy: it is asked about the policy's tokens, by number.
    """
    if not config.teacher:
        return None
    teacher, its = load(config.teacher, config)
    refuse_other_words(config.teacher, (teacher, its), config.model, (model, tokenizer))
    return teacher.requires_grad_(False)


def refuse_other_words(name: str, teacher: tuple, of_policy: str, policy: tuple) -> None:
    """ValueError unless each token number that the policy may sample means the same text to the teacher.

    A pair is (model, tokenizer). Rows beyond the words pad a matrix and mean nothing: Qwen2.5's 0.5B has 151,936 and
    its 7B 152,064, for the same 151,665 words. So the teacher may have more rows than the policy, but not fewer.
    """
    advice = "Take a teacher of the same family: the policy's larger sister, or a run that began with the same model."
    its, own = ({i: text for text, i in tokenizer.get_vocab().items()} for _, tokenizer in (teacher, policy))
    other = sorted(i for i in its.keys() | own.keys() if its.get(i) != own.get(i))
    if other:
        said = " and ".join(repr(words[other[0]]) if other[0] in words else "nothing" for words in (its, own))
        raise ValueError(f"--teacher {name} has another vocabulary than {of_policy}: token {other[0]} means {said}, "
                         f"and {len(other):,} tokens in all differ. {advice}")
    rows, needed = (model.config.vocab_size for model, _ in (teacher, policy))
    if rows < needed:
        raise ValueError(f"--teacher {name} predicts {rows:,} words, and {of_policy} {needed:,}: of those that it "
                         f"lacks it could say nothing. {advice}")
