"""What other scripts than Latin do otherwise: no blanks between words, full stops and quotes of their own."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# Scripts that are written without blanks: Chinese, Japanese, their marks, Thai, Lao, Tibetan, Burmese, Khmer.
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
                      "\uf900-\ufaff\uff01-\uff0f\uff1a-\uff20\uff61-\uff9f\U00020000-\U0003ffff]")
THAI = re.compile("[\u0e01-\u0e7f\u0e81-\u0eff]")  # Thai and Lao put a blank between sentences, and no full stop
FULL_STOPS = ".!?\u203c\u203d\u2047\u2048\u2049\u3002\uff01\uff0e\uff1f\uff61\u061f\u06d4\u0964\u0965\u0589\u1362" \
             "\u1367\u104b\u17d4\u17d5\u0f0d"  # ... of Chinese and Japanese, Arabic, Urdu, Hindi, Armenian, Amharic...


def by_character(words: Sequence[str]) -> Sequence[str]:
    """Words, of which those in scripts without blanks are cut into their characters; others stay as they are.

    >>> by_character(("in", "2023年东京塔", "fell"))
    ['in', '2023', '年', '东', '京', '塔', 'fell']
    """
    text = " ".join(words)
    if text.isascii() or not UNSPACED.search(text):
        return words
    return UNSPACED.sub(lambda found: f" {found.group()} ", text).split()


def ends_a_sentence(text: str) -> bool:
    """Whether a full stop of any script is the last of it, quotes and brackets after it aside.

    >>> [ends_a_sentence(text) for text in ("It did.", "他走了。”", "« Non. »", "क्या हुआ।", "It did,", "他走了")]
    [True, True, True, True, False, False]
    """
    end = len(text)
    while end and (text[end - 1] in "\"'" or text[end - 1].isspace()
                   or unicodedata.category(text[end - 1]) in ("Pe", "Pf", "Pi")):  # closing ones; “ closes in German
        end -= 1
    return end > 0 and (text[end - 1] in FULL_STOPS or THAI.match(text[end - 1]) is not None)


def without_rouge(references: Iterable[str]) -> str:
    """A sentence for a run whose summaries hold few or no words that ROUGE counts; empty where they do."""
    letters = [letter for text in references for letter in text[:500] if letter.isalnum()]
    if 2 * sum(map(str.isascii, letters)) >= len(letters):
        return ""
    return ("ROUGE-L counts words of a-z and 0-9 only, as rouge_score does, and these summaries have few or none: it "
            "is about 0 whatever is written, and teaches nothing. Take bleu or meteor; where a script has no blanks "
            "between words, char_bleu (sacreBLEU's, of characters).")
