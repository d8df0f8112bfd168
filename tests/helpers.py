"""What the tests share: models small enough to check by brute force, with weights random enough to notice mistakes."""

import functools
import json
import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import Transformer, read_config
from plumbing.folder import file_parameters

# Tiny matrices: threads would only wait for one another.
torch.set_num_threads(1)

# Few examples, and the same on every run, so that a red test is red for the next person too. The examples
# are small to begin with: searching for a smaller one would take minutes.
few = settings(max_examples=12, deadline=None, derandomize=True, database=None,
               phases=[Phase.explicit, Phase.generate])

# The rewards that the pages explain and the tests expect numbers of: one that the project takes in gets a name here.
# Yours need not be among them.
OUR_REWARDS = ("length", "rouge_l", "bleu", "char_bleu", "meteor", "char_length", "copy_rate", "repetition", "twice",
               "invented", "format", "length_binary", "length_saturating", "length_exp", "squish", "cost", "distinct",
               "embedding", "judge")

# The same of the losses, for tests that know each one's formula. The others take whatever `grpo.KINDS` holds.
OUR_LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo")

BASE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 500.0, "tie_word_embeddings": True}


def raw_config(family="qwen2", **more):
    """A `config.json`: 4 query heads on 2 key heads; head_dim explicit (and not 32 / 4) where the family has it.
    lfm2's feed-forward: 2/3 of 48 is 32, and 40 is the next multiple of 20."""
    extra = {"qwen3": {"head_dim": 12}, "lfm2": {"num_hidden_layers": 3, "block_multiple_of": 20, "norm_eps": 1e-4,
                                                 "layer_types": ["conv", "full_attention", "conv"]}}
    return {"model_type": family, **BASE, **extra.get(family, {}), **more}


def randomise(model, seed=0):
    """Initial weights would hide mistakes (zero biases, unit norms, flat attention), so every one of them is drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        named = file_parameters(model) if isinstance(model, Transformer) else dict(model.named_parameters())
        for name, p in sorted(named.items()):
            noise = torch.empty(p.shape).normal_(0, 0.1 if p.ndim == 1 else 0.3, generator=generator)
            p.copy_(noise + 1 if "norm" in name else noise)
    return model


def tiny_model(family="qwen2", seed=0, dtype=torch.float32, **more):
    return randomise(Transformer(read_config(raw_config(family, **more), "config.json")), seed).to(dtype)


def tokens(n, length, seed=0, vocab=BASE["vocab_size"]):
    return torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    """Every parameter's gradient of `loss`, by name; no parameter may be left out."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(a, b, atol):
    """Tensors, or dictionaries of tensors, equal to `atol` absolute."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    else:
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def byte_bpe():
    """A byte-level BPE like Qwen's, a thousand times smaller: any text goes in and comes out, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["system user assistant Summarise the post in about 64 tokens.\nI lost a shoe and found the other one."] * 4
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def real(path):
    """A file or folder of the real material that is never committed; the test is skipped where it is absent."""
    root = Path(os.environ.get("CRISP_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
    if not (root / path).exists():
        pytest.skip(f"needs {path} of the real material: set CRISP_DATA to the folder that holds it")
    return root / path


def refusal(kind, call, *args, **kwargs):
    """The message of the error that `call` must end in: one line, and a sentence."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert type(caught.value) in (ValueError, OSError, FileNotFoundError)  # and no accident from deep inside
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")) and len(message) > 20, message
    return message


def edit_json(path, **changes):
    """Set keys of a JSON file; a value of ... deletes the key."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}), encoding="utf-8")


@contextmanager
def disk_full_after(n_bytes):
    """No file may grow beyond n_bytes: what a full disk looks like from inside, for root as well."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The 45 files that Princeton's lexicographers wrote: nltk wants the list, which Debian's package lacks. lexnames(5WN).
LEXNAMES = """adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
    noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object
    noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape
    noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition
    verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social
    verb.stative verb.weather adj.ppl""".split()


@functools.lru_cache(maxsize=1)
def nltk_wordnet():
    """nltk's reader of the WordNet that `words.find_wordnet` found."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    from plumbing import words

    class Reader(WordNetCorpusReader):
        def map_wn(self, version="wordnet"):  # from other versions of WordNet, which are not asked for
            return None

    folder = Path(tempfile.mkdtemp())
    nltk.data.path.append(str(folder))  # it reads nothing outside these places
    for name in words._FILES:
        (folder / name).write_bytes((words.find_wordnet() / name).read_bytes())
    numbers = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    (folder / "lexnames").write_text("".join(f"{i:02d}\t{name}\t{numbers[name.split('.')[0]]}\n"
                                             for i, name in enumerate(LEXNAMES)), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no multilingual WordNet
        return Reader(str(folder), None)
