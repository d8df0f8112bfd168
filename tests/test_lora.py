"""LoRA: a model that is trained through small adapters, and is its own base when they are switched off."""

import json

import pytest
import torch
from helpers import assert_same, byte_bpe, edit_json, gradients, refusal, tiny_model, tokens

import grpo
from config import Config
from lora import add_lora, load_adapters, merge_lora, projections, save_adapters
from model import Transformer, load, save
from plumbing.folder import file_name, file_parameters
from rollout import Group

FAMILIES = ("qwen2", "qwen3", "llama", "lfm2")


def some(family) -> tuple[str, ...]:
    return ("q_proj", "out_proj", "w2") if family == "lfm2" else ("q_proj", "o_proj", "down_proj")


def adapted(family="qwen2", seed=0, **more) -> Transformer:
    """A model whose adapters have learnt something: both factors are random."""
    model = tiny_model(family, seed, **more)
    add_lora(model, 3, 6.0, some(family))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3, generator=generator)
    return model


def adapters_of(model) -> dict:
    return {name: p for name, p in file_parameters(model).items() if p.requires_grad}


def folder_of(tmp_path, model, raw):
    model.raw_config = raw
    save(model, byte_bpe(), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_with_an_adapter_is_one_matrix_plus_a_product_of_two(family):
    """y = x (W + alpha/rank B A)^T: the same model with those sums written into its weights gives the same logits."""
    model, plain, x = adapted(family), tiny_model(family), tokens(2, 7)
    with torch.no_grad():
        for name, m in projections(plain).items():
            if name.endswith(some(family)):
                parameters = file_parameters(model)
                m.weight += 6.0 / 3 * parameters[f"{name}.lora_B"] @ parameters[f"{name}.lora_A"]
    assert_same(model(x), plain(x), 1e-5)
    assert (model(x) - tiny_model(family)(x)).abs().max() > 0.1  # the adapters do something


def test_fresh_adapters_change_nothing_and_only_they_are_trained():
    """B = 0: the first step starts at the base. A's gradient is then zero too, and B's is not."""
    model, x = tiny_model(), tokens(2, 7)
    before = model(x)
    add_lora(model, 4, 8.0)
    assert torch.equal(model(x), before)
    trained = adapters_of(model)
    assert len(trained) == 2 * 7 * 2 and all(name.endswith(("lora_A", "lora_B")) for name in trained)  # 7 on 2 layers
    loss = model(x).logsumexp(-1).sum()
    for name, g in zip(trained, torch.autograd.grad(loss, list(trained.values()))):
        assert (g.abs().max() > 0) == name.endswith("lora_B"), name


def test_with_the_adapters_off_the_model_is_its_base_bit_for_bit():
    base, model, x = tiny_model(), adapted(), tokens(2, 7)
    with model.adapters_off():
        assert torch.equal(model(x), base(x))
        with model.adapters_off():
            pass
        assert torch.equal(model(x), base(x))  # the inner one does not switch them on again
    on = model(x)
    assert not torch.equal(on, base(x))
    with pytest.raises(KeyError), model.adapters_off():
        raise KeyError
    assert torch.equal(model(x), on)  # and an error does not leave them off
    with base.adapters_off():  # a model without adapters has nothing to switch
        assert base(x).shape == on.shape


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_the_adapters_is_the_chain_rule_through_the_whole_matrix(checkpointing):
    """dL/dA = alpha/rank B^T dL/dW and dL/dB = alpha/rank dL/dW A^T, with W = W0 + alpha/rank B A."""
    model, x = adapted().double(), tokens(2, 7)
    model.checkpointing = checkpointing
    trained = adapters_of(model)
    model(x).logsumexp(-1).square().sum().backward()
    ours = {name: p.grad for name, p in trained.items()}
    whole = adapted().double()
    merge_lora(whole)
    gradients_of_weights = gradients(whole, whole(x).logsumexp(-1).square().sum())
    of_weights = {file_name(name, "qwen2"): g for name, g in gradients_of_weights.items()}
    for name in {n.rpartition(".")[0] for n in trained}:
        A, B, g = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"], of_weights[f"{name}.weight"]
        torch.testing.assert_close(ours[f"{name}.lora_A"], 2.0 * B.T @ g, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(ours[f"{name}.lora_B"], 2.0 * g @ A.T, rtol=1e-9, atol=1e-8)


def test_merging_gives_a_plain_model_with_the_same_logits():
    model, x = adapted("qwen3"), tokens(2, 7)
    with_adapters = model(x)
    merge_lora(model)
    assert_same(model(x), with_adapters, 1e-5)
    assert all(p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tiny_model("qwen3").named_parameters()}
    add_lora(model, 2, 2.0)  # and it may be adapted anew


def test_a_saved_model_has_its_adapters_in_its_weights(tmp_path):
    from helpers import raw_config
    model, x = adapted(), tokens(2, 7)
    loaded, _ = load(folder_of(tmp_path, model, raw_config()), "cpu")
    assert_same(loaded(x), model(x), 1e-5)
    assert len(adapters_of(model)) == 2 * 3 * 2  # which it keeps


def test_adapters_over_bfloat16_weights_are_float32_and_do_not_lose_small_updates():
    model = tiny_model(dtype=torch.bfloat16)
    add_lora(model, 2, 4.0)
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    assert model(tokens(1, 4)).dtype == torch.bfloat16
    p = next(iter(adapters_of(model).values()))
    before = p.detach().clone()
    with torch.no_grad():
        p.mul_(1 + 1e-4)  # bfloat16 has steps of 1/128
    assert not torch.equal(p, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_adapters_and_we_read_peft_s(tmp_path, family):
    from helpers import raw_config
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    base, x = tiny_model(family), tokens(2, 7)
    folder = folder_of(tmp_path, base, raw_config(family, torch_dtype="float32"))

    ours = adapted(family)
    save_adapters(ours, tmp_path / "ours", str(folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "ours").eval()
    assert_same(theirs(x).logits.detach(), ours(x).detach(), 1e-4)
    with theirs.disable_adapter():
        assert_same(theirs(x).logits.detach(), base(x).detach(), 1e-4)

    names = ["in_proj", "k_proj"] if family == "lfm2" else ["k_proj", "up_proj"]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=names, task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    torch.manual_seed(3)
    for name, p in theirs.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapters(base, tmp_path / "theirs")
    assert_same(theirs(x).logits.detach(), base(x).detach(), 1e-4)
    assert sorted({n.split(".")[-2] for n in adapters_of(base)}) == names


def by_peft(tmp_path, **more):
    """A base and adapters that have learnt something, made and saved by PEFT -> (base, adapters, logits as PEFT reads
    them again)."""
    from helpers import raw_config
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    folder = folder_of(tmp_path, tiny_model(), raw_config(torch_dtype="float32"))
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | more
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**config))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapters").eval()
    return folder, tmp_path / "adapters", again(tokens(2, 7)).logits.detach()


@pytest.mark.parametrize("more", [
    {"layers_to_transform": [1]}, {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": r".*layers\.1\.(self_attn\.q_proj|mlp\.down_proj)"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"rank_pattern": {"q_proj": 7}}, {"rank_pattern": {r"layers\.1\.self_attn\.v_proj": 2, "v_proj": 5}},
    {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 3}, "rank_pattern": {r".*0\..*v_proj": 6, "proj": 9}}],
    ids=lambda more: str(next(iter(more.items()))))
def test_plain_lora_of_any_beginning_and_on_some_layers_computes_what_peft_computes(tmp_path, more):
    base, adapters, want = by_peft(tmp_path, **more)
    model, _ = load(base, "cpu")
    load_adapters(model, adapters)
    assert_same(model(tokens(2, 7)).detach(), want, 1e-4)
    # Written again, they are the same adapters: PEFT would give those of left-out layers to nobody.
    save_adapters(model, tmp_path / "again", base)
    again, _ = load(base, "cpu")
    load_adapters(again, tmp_path / "again")
    assert torch.equal(again(tokens(2, 7)), model(tokens(2, 7)))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    assert {n.removeprefix("base_model.model.model.").replace(".default.weight", "")
            for n, _ in theirs.named_parameters() if "lora_" in n} == set(adapters_of(model))


@pytest.mark.parametrize(("more", "name"), [
    ({"init_lora_weights": "pissa"}, "pissa"), ({"init_lora_weights": "pissa_niter_2"}, "pissa_niter_2"),
    ({"init_lora_weights": "olora"}, "olora"), ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens")])
def test_adapters_of_another_base_or_on_some_tokens_only_are_refused_by_name(tmp_path, more, name):
    """PiSSA and OLoRA take the first product away from the base. On the plain base the logits would be wrong."""
    base, adapters, _ = by_peft(tmp_path, **more)
    model, _ = load(base, "cpu")
    assert name in refusal(ValueError, load_adapters, model, adapters)


@pytest.mark.parametrize("change", [
    {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "lora_ga"},
    {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}, {"target_parameters": ["x"]}, {"a_key_of_the_future": 1},
    {"r": 5}, {"r": "4"}, {"lora_alpha": None}, {"target_modules": "("}],
    ids=str)
def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path, change):
    folder, model, x = tmp_path / "a", tiny_model(), tokens(2, 7)
    save_adapters(adapted(), folder)
    edit_json(folder / "adapter_config.json", **change)
    before = model(x)
    message = refusal(ValueError, load_adapters, model, folder)
    key, value = next(iter(change.items()))
    assert key in message or str(value) in message or "shape" in message or "lacks" in message
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(model(x), before)


def test_settings_that_change_nothing_are_no_reason_to_refuse(tmp_path):
    save_adapters(adapted(), tmp_path)
    edit_json(tmp_path / "adapter_config.json", lora_dropout=0.1, revision="main", peft_version="0.99",
              eva_config={"rho": 1.0}, init_lora_weights="eva", qalora_group_size=16, another_key=None)
    model = tiny_model()
    load_adapters(model, tmp_path)
    assert torch.equal(model(tokens(2, 7)), adapted()(tokens(2, 7)))


def test_the_base_is_a_hub_name_or_a_folder_that_is_found_from_anywhere(tmp_path, monkeypatch):
    """PEFT reads the adapters from any directory: a path that is relative, or a run's folder, would be lost on it."""
    from helpers import raw_config
    run = tmp_path / "runs" / "b"
    (run / "checkpoint").mkdir(parents=True)
    folder_of(run, tiny_model(), raw_config()).rename(run / "model")
    monkeypatch.chdir(tmp_path)
    for base, want in (("owner/name", "owner/name"), ("runs/b", str(run / "model")),
                       ("runs/b/model", str(run / "model")), ("", "")):
        save_adapters(adapted(), tmp_path / "a", base)
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == want


def test_what_is_saved_over_bfloat16_weights_is_what_was_learnt(tmp_path):
    """A change of 1e-4 on weights near 0.3, whose neighbours in bfloat16 are 2e-3 away: rounding leaves W where it was.
    The folder is float32, for transformers as for us; the weights without an adapter are bit for bit W."""
    from helpers import raw_config
    from transformers import AutoModelForCausalLM
    base, model = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    add_lora(model, 2, 4.0, some("qwen2"))
    learnt, generator = {}, torch.Generator().manual_seed(0)
    for name, m in projections(model).items():
        if m.lora_A is not None:
            m.lora_B.data.normal_(0, 1e-4, generator=generator)
            learnt[f"{name}.weight"] = 2.0 * m.lora_B.data @ m.lora_A.data
    stored, _ = load(folder_of(tmp_path, model, raw_config(torch_dtype="bfloat16")), "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    assert theirs.dtype == torch.float32
    for of in (file_parameters(stored), dict(theirs.model.named_parameters())):
        for name, w in file_parameters(base).items():
            change = of[name].detach() - w.float()
            if name in learnt:
                assert (change - learnt[name]).norm() < 1e-3 * learnt[name].norm()
            else:
                assert change.abs().max() == 0
    merge_lora(model)  # in memory W has 8 bits: this is what would have been saved
    lost = file_parameters(model)["layers.0.self_attn.q_proj.weight"].float()
    lost = lost - file_parameters(base)["layers.0.self_attn.q_proj.weight"].float()
    wanted = learnt["layers.0.self_attn.q_proj.weight"]
    assert (lost - wanted).norm() > 0.5 * wanted.norm()


def test_adapters_go_to_a_folder_and_come_back(tmp_path):
    model, again, x = adapted(), tiny_model(), tokens(2, 7)
    save_adapters(model, tmp_path / "a", "some/base")
    load_adapters(again, tmp_path / "a")
    assert torch.equal(again(x), model(x))
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (raw["r"], raw["lora_alpha"], raw["base_model_name_or_path"]) == (3, 6.0, "some/base")


def test_bad_adapters_are_refused_with_a_sentence(tmp_path):
    assert "already" in refusal(ValueError, add_lora, adapted(), 2, 4.0)
    assert "v_prj" in refusal(ValueError, add_lora, tiny_model(), 2, 4.0, ["v_prj"])
    assert "lm_head" in refusal(ValueError, add_lora, tiny_model(), 2, 4.0, ["lm_head"])
    for rank, alpha in ((0, 1.0), (2, 0.0), (2, float("nan"))):
        assert "rank" in refusal(ValueError, add_lora, tiny_model(), rank, alpha)
    assert "add_lora" in refusal(ValueError, save_adapters, tiny_model(), tmp_path / "none")
    assert "missing" in refusal(FileNotFoundError, load_adapters, tiny_model(), tmp_path / "none")
    folder = tmp_path / "a"
    save_adapters(adapted(), folder)
    assert "for" in refusal(ValueError, load_adapters, tiny_model(hidden_size=16), folder)  # of another width
    assert "no place" in refusal(ValueError, load_adapters, tiny_model(num_hidden_layers=1), folder)
    assert "lacks" in refusal(ValueError, load_adapters, tiny_model(num_hidden_layers=3), folder)
    edit_json(folder / "adapter_config.json", use_dora=True)
    assert "use_dora" in refusal(ValueError, load_adapters, tiny_model(), folder)
    edit_json(folder / "adapter_config.json", use_dora=False)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    assert "whole" in refusal(ValueError, load_adapters, tiny_model(), folder)
    weights.unlink()
    assert "missing" in refusal(FileNotFoundError, load_adapters, tiny_model(), folder)


def test_the_model_without_adapters_is_the_reference_of_an_update():
    """The KL of one update, and the weights after it, are those with a separate copy of the base as the reference; the
    base does not move, and the gradient never reaches it."""
    def run(reference_of):
        model = adapted()
        groups = [Group(tokens(1, 5)[0], tokens(4, 6, seed=1), torch.ones(4, 6, dtype=torch.bool),
                        torch.zeros(4, 6), torch.zeros(4, dtype=torch.bool), [""] * 4,
                        rewards=torch.tensor([0.0, 1.0, 2.0, 5.0]))]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        metrics = grpo.update(model, reference_of(model), groups, optimizer, Config(beta=0.5))
        return model, metrics

    model, own = run(lambda model: model)
    other, copied = run(lambda model: tiny_model())
    assert own == copied and own["kl"] > 0.01
    for name, p in tiny_model().named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], p)
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()), 0.0)
    assert not torch.equal(adapters_of(model)["layers.0.self_attn.q_proj.lora_A"],
                           adapters_of(adapted())["layers.0.self_attn.q_proj.lora_A"])
