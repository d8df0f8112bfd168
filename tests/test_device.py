"""A device that computes something else is found before the first step. Here it is the CPU that lies, one operation at
a time, until its own exact copy is asked."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

import train
from grpo import group_logprobs
from lora import add_lora
from plumbing import device
from rollout import sample

PROMPT = [3, 9, 4, 7, 5, 11, 8, 6]
FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")


def check(model):
    device.compare(device.first_layers(model), PROMPT, sample, group_logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_honest_device_passes(family, dtype):
    check(tiny_model(family, dtype=dtype))


def test_an_honest_device_passes_with_adapters_and_recomputed_layers():
    model = tiny_model("qwen3")
    add_lora(model, 2, 4.0)
    model.checkpointing = True
    check(model)


def leaks(real):
    """Attention that lets a token see the future: the causal mask is not obeyed."""
    return lambda q, k, v, attn_mask=None, **more: real(q, k, v, attn_mask=None, **more)


def strided(real):
    """Attention that reads permuted keys as if they lay in order."""
    return lambda q, k, v, **more: real(q, k.contiguous().flip(-2), v, **more)


def half(real):
    """Boolean masks of which only the first half is read."""
    def fill(x, mask, value):
        mask = mask.clone()
        mask[..., mask.shape[-1] // 2:] = False
        return real(x, mask, value)
    return fill


def backwards(real):
    """A sort that gives the largest last."""
    return lambda x, *args, **more: real(x, *args, **more).flip(1)


@pytest.mark.parametrize("family, where, name, lie", [
    ("qwen2", F, "scaled_dot_product_attention", leaks), ("llama", F, "scaled_dot_product_attention", strided),
    ("qwen3", torch.Tensor, "masked_fill", half), ("lfm2", torch.Tensor, "argsort", backwards)])
def test_a_device_that_lies_is_named(family, where, name, lie, monkeypatch):
    real, exact = getattr(where, name), device.on_cpu
    false = lie(real)
    lying = [True]
    monkeypatch.setattr(where, name, lambda *args, **more: (false if lying[0] else real)(*args, **more))
    monkeypatch.setattr(device, "on_cpu", lambda small: lying.clear() or lying.append(False) or exact(small))
    with pytest.raises(device.Lies, match=f"On cpu, with torch .*{torch.__version__[:4]}.* differs? from the CPU's by"):
        check(tiny_model(family))


def test_a_wrong_gradient_alone_is_named(monkeypatch):
    """All values right, and the embedding's gradient scaled: what masked_scatter or an index_put may do in backward."""
    model, exact = tiny_model("qwen2"), device.on_cpu
    handle = model.embed_tokens.weight.register_hook(lambda g: 2 * g)
    monkeypatch.setattr(device, "on_cpu", lambda small: handle.remove() or exact(small))
    with pytest.raises(device.Lies, match="the gradient differs"):
        check(model)


def test_the_check_leaves_the_model_as_it_was():
    model = tiny_model("lfm2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    check(model)
    assert len(model.layers) == 3 and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_layers_of_each_kind_are_asked():
    kinds = ["conv", "conv", "full_attention", "conv"]
    small = device.first_layers(tiny_model("lfm2", num_hidden_layers=4, layer_types=kinds))
    assert [type(layer.operator).__name__ for layer in small.layers] == ["ShortConv", "Attention"]


def test_a_run_asks_its_device_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.chdir(tmp_path)

    def lies(model, prompt, *_):
        asked.append(len(prompt))
        raise device.Lies("On here, the gradient differs.")

    monkeypatch.setattr(train, "check_device", lies)
    assert train.main(["--stages", "length:1", "--eval-posts", "2", "--run", "r"]) == 1
    assert asked and capsys.readouterr().err == "train.py: On here, the gradient differs.\n"
