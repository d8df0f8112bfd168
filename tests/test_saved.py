"""What `save` leaves in a folder besides the numbers: one file of weights, a true config, merges as they were."""

import json

import pytest
import torch
from helpers import byte_bpe, edit_json, raw_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from model import load, save
from plumbing.folder import read_json
from plumbing.weights import write_tensors


def written(folder, **more):
    model = tiny_model()
    model.raw_config = raw_config(**more)
    save(model, byte_bpe(), folder)
    return folder


def test_a_model_that_was_quantized_once_does_not_say_so_any_more(tmp_path):
    """The weights that are saved are plain ones: whoever reads 'gptq' would unpack them, or refuse the folder."""
    model = tiny_model()
    model.raw_config = raw_config(quantization_config={"quant_method": "gptq", "bits": 4}, dtype="float16",
                                  torch_dtype="float16", a_key_of_the_future=[1])
    save(model, None, tmp_path)
    raw = read_json(tmp_path / "config.json")
    assert "quantization_config" not in raw and raw["a_key_of_the_future"] == [1]
    assert raw["dtype"] == raw["torch_dtype"] == "float32"  # both spellings say what the file holds
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("name", ["model-0000{}-of-00002.safetensors", "model.safetensors-0000{}-of-00002.safetensors",
                                  "part{}.safetensors"])
def test_no_old_shard_stays_beside_the_new_file(tmp_path, name):
    """Whatever the index calls them: vllm reads all *.safetensors that it finds."""
    folder = written(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard_of = {key: name.format(1 + i % 2) for i, key in enumerate(weights)}
    for shard in set(shard_of.values()):
        save_file({key: weights[key] for key in weights if shard_of[key] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}), encoding="utf-8")
    (tmp_path / "mine.safetensors").write_bytes(b"x")  # which nobody calls a shard
    model, tokenizer = load(folder, "cpu")
    save(model, tokenizer, folder)
    assert sorted(f.name for f in folder.glob("*.safetensors*")) == ["mine.safetensors", "model.safetensors"]
    assert torch.equal(load(folder, "cpu")[0](tokens(1, 5)), tiny_model()(tokens(1, 5)))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": null}', '{"weight_map": {"a": 1}}',
                                   '{"weight_map": {"a": "../b/keep.safetensors", "c": "model.safetensors"}}'])
def test_an_index_that_lies_takes_nothing_else_away(tmp_path, index):
    (tmp_path / "b").mkdir()
    keep = tmp_path / "b" / "keep.safetensors"
    keep.write_bytes(b"x")
    folder = written(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    written(folder)
    assert keep.exists() and (folder / "model.safetensors").exists()
    assert not (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("as_text", [True, False])
def test_merges_keep_their_form(tmp_path, as_text):
    """"a b" or ["a", "b"]: programs from before 2024 know the first form only, and so must get it back."""
    folder = written(tmp_path / "before")
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert raw["model"]["merges"]
    form = [" ".join(pair) if as_text else pair for pair in raw["model"]["merges"]]
    raw["model"]["merges"] = form
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    model, tokenizer = load(folder, "cpu")
    save(model, tokenizer, tmp_path / "after")
    after = read_json(tmp_path / "after" / "tokenizer.json")
    assert after == raw
    again = Tokenizer.from_file(str(tmp_path / "after" / "tokenizer.json"))
    assert again.encode("the cat é").ids == tokenizer.encode("the cat é").ids


def test_a_word_with_a_blank_in_it_can_only_be_written_as_a_pair(tmp_path):
    folder = written(tmp_path)
    edit_json(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0, " ": 1, "a ": 2, "b": 3, "ab": 4},
                                                "merges": ["a b"]})
    model, _ = load(folder, "cpu")
    edit_json(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0, " ": 1, "a ": 2},
                                                "merges": [["a", " "]]})
    other = Tokenizer.from_file(str(folder / "tokenizer.json"))
    save(model, other, tmp_path / "after")
    assert read_json(tmp_path / "after" / "tokenizer.json")["model"]["merges"] == [["a", " "]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_file_written_a_tensor_at_a_time_is_what_safetensors_reads(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in (
        ("a", (3, 5)), ("é", (7,)), ("c", (1,)), ("none", (0, 4)), ("t", (2, 3, 1)))}
    state["t"] = state["t"].transpose(0, 1)  # not contiguous
    write_tensors(tmp_path / "x.safetensors", {n: t.shape for n, t in state.items()}, iter(state.values()), dtype)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == state.keys()
    assert all(read[name].dtype == dtype and torch.equal(read[name], t.to(dtype)) for name, t in state.items())
