"""What the policy is asked: prompt templates, and how a post becomes the tokens of a prompt."""

import re

from tokenizers import Tokenizer

from model import Transformer
from plumbing.posts import Post, load_posts

__all__ = ["TEMPLATES", "Post", "choose_template", "fill", "load_posts", "render", "tokenize"]

# What a chat model is asked for when SQUISH measures it.
REQUEST = "Summarise the document in at most {target} {unit}, about {goal}. Write the summary, and nothing else, " \
          "between <summary> and </summary>."
# --- your experiment starts here: a prompt is a string with {target} and {document} in it ---
TEMPLATES = {
    # What the chat templates of Qwen2.5, Qwen3 and LFM2 make of one system and one user message. The system message is
    # always written out, because Qwen2.5's template fills in one of its own where there is none.
    "chatml": "<|im_start|>system\nSummarise the post in about {target} tokens.<|im_end|>\n"
              "<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n",
    # For models that only continue text; the model ends with its end-of-text token.
    "plain": "Post:\n{document}\n\nSummary in about {target} tokens:\n",
    # For SQUISH: the target is the budget, and the summary ends with </summary>. To a base model, with the tag opened;
    # to a base model that may write what it likes first; and to a chat model.
    "tagged": "A document, and a summary of it in at most {target} {unit}, about {goal}.\n<document>\n{document}\n"
              "</document>\n<summary>\n",
    "notes": "A document, then notes on what matters in it, then a summary in at most {target} {unit}, about {goal}, "
             "between <summary> and </summary>.\n<document>\n{document}\n</document>\nNotes:\n",
    "tagged_chatml": f"<|im_start|>system\n{REQUEST}<|im_end|>\n"
                     "<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n",
}
# Qwen3 with thinking switched off: it has thought already, and nothing. Otherwise its thoughts would be the summary.
TEMPLATES["qwen3"] = TEMPLATES["chatml"] + "<think>\n\n</think>\n\n"
_MARKS = re.compile(r"(<\|im_start\|>|<\|im_end\|>)")


def choose_template(model: Transformer, tokenizer: Tokenizer) -> str:
    """A chat model is one that ends with `<|im_end|>`; Qwen3's is told not to think where its own template can say so.

    The tokenizer alone does not tell: the base models of Qwen and SmolLM2 have the same marks, and Qwen's even ship the
    chat template, but they end with `<|endoftext|>`. Where this guesses wrong there is --template.
    """
    if tokenizer.token_to_id("<|im_end|>") not in model.config.eos_token_ids:
        return "plain"
    own = b"".join(model.sidecars.get(name, b"") for name in ("chat_template.jinja", "tokenizer_config.json"))
    return "qwen3" if b"enable_thinking" in own else "chatml"


def render(post: Post, template: str, target: int, unit: str = "characters") -> str:
    """The prompt as text. `target` is in tokens, and in `unit` where the template says {unit}.

    >>> render(Post("I lost a shoe.", "", "1"), "plain", 8)
    'Post:\\nI lost a shoe.\\n\\nSummary in about 8 tokens:\\n'
    """
    return fill(_template(template), post, target, unit)


def tokenize(tokenizer: Tokenizer, post: Post, template: str, target: int, unit: str = "characters") -> list[int]:
    """The prompt as token ids [P], beginning with whatever the tokenizer itself puts first (a bos, or nothing).

    Only the template's own marks become control tokens. A post that spells `<|im_end|>` is a post about chat
    templates, not the end of the user's turn, so its text is encoded as text.
    """
    pieces = _MARKS.split(_template(template))
    ids = tokenizer.encode("").ids
    as_text, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        for piece in pieces:
            if _MARKS.fullmatch(piece):
                mark = tokenizer.token_to_id(piece)
                if mark is None:
                    raise ValueError(f"The tokenizer has no {piece}: take --template plain for this model.")
                ids.append(mark)
            elif piece:
                ids += tokenizer.encode(fill(piece, post, target, unit), add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = as_text
    return ids


def _template(name: str) -> str:
    if name not in TEMPLATES:
        raise ValueError(f"There is no prompt template '{name}': take one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def fill(text: str, post: Post, target: int, unit: str) -> str:
    """A template's places filled in; {goal} is nine tenths of the target."""
    for name, value in (("{target}", str(target)), ("{goal}", str(round(0.9 * target))), ("{unit}", unit),
                        ("{document}", post.document)):  # the document last: it may spell {target}
        text = text.replace(name, value)
    return text
