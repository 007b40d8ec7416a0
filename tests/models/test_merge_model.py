"""Merging and unloading a whole model: all layers or none."""

import pytest
import torch
from adapter_helpers import Tied, make_ids, make_zoo
from helpers import BF16, F64, short
from layer_helpers import assert_same_state, make_layer, randomize, snapshot
from torch import nn

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.models import lora_layers
from lora_ext.nn import LoRALayer, merging

TARGETS = ["emb", "q_proj", "mlp", "c_attn", "conv", "head.0", "head.1"]


def zoo_with_adapters(names=("a", "b"), dtype=F64, **words):
    model = make_zoo(dtype)
    for name in names:
        apply_lora(model, LoraConfig(TARGETS, 3, 4.0, **words), name)
    randomize(model)
    lora_ext.set_adapter(model, names)
    return model.eval()


def test_layers_without_the_adapter_go_on():
    """An adapter that some layers lack: what is merged in some is added in none of the others."""
    model = make_zoo()
    apply_lora(model, LoraConfig(["q_proj", "conv"], 2), "a")
    apply_lora(model, LoraConfig(["mlp", "conv"], 2), "b")
    randomize(model)
    lora_ext.set_adapter(model, ["a", "b"])
    y = model(make_ids())
    for names in ("a", "b", ["b", "a"], None):
        lora_ext.merge_adapter(model, names)
        assert torch.allclose(model(make_ids()), y, rtol=1e-10, atol=1e-12)
    assert model.conv.merged_adapters == ("a", "b")
    lora_ext.set_adapter(model, "a")
    with pytest.raises(ValueError, match=r"but got \['b'\] at 'layers.0.mlp'; call set_adapter"):
        lora_ext.merge_adapter(model, ["a", "b"])
    with pytest.raises(
        ValueError, match=r"lora_ext\.merge_adapter: expected distinct names out of"
    ):
        lora_ext.merge_adapter(model, "c")


def state_of_merging(model):
    return [(layer.merged_adapters, layer.merged_weight) for _, layer in lora_layers(model)]


def assert_same_merging(model, before):
    for (names, weight), (old_names, old) in zip(state_of_merging(model), before, strict=True):
        assert names == old_names
        assert weight is old


@pytest.mark.parametrize("function", [lora_ext.merge_adapter, lora_ext.merge_and_unload])
@pytest.mark.parametrize("first_merged", [False, True])
def test_nan_in_the_last_layer_changes_nothing(function, first_merged):
    model = zoo_with_adapters()
    if first_merged:
        lora_ext.merge_adapter(model, "b")
    *_, (_, last) = lora_layers(model)
    with torch.no_grad():
        last.lora_b["a"][-1, -1] = float("nan")
    state, modules, merged = snapshot(model), list(model.modules()), state_of_merging(model)
    with pytest.raises(RuntimeError, match="finite"):
        function(model)
    assert_same_state(model, state)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert_same_merging(model, merged)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("function", [lora_ext.merge_adapter, lora_ext.merge_and_unload])
def test_an_interrupt_changes_nothing(monkeypatch, function, error):
    model, calls, real = zoo_with_adapters(), [], merging._rounded

    def fail_at_the_fifth(*args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return real(*args)

    modules, merged = list(model.modules()), state_of_merging(model)
    monkeypatch.setattr(merging, "_rounded", fail_at_the_fifth)
    with pytest.raises(error):
        function(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert_same_merging(model, merged)


def test_train_and_eval_through_a_parent():
    """LoRA#34, LoRA#61: eval() and train() of the model never reached the layers."""
    model, ids = zoo_with_adapters(), make_ids()
    wanted = model(ids)
    model.train().eval()
    assert not any(layer.merged for _, layer in lora_layers(model))
    lora_ext.merge_adapter(model)
    model.eval()
    assert all(layer.merged for _, layer in lora_layers(model))
    parent = nn.Sequential(nn.ModuleDict({"inner": model}))
    parent.train(False)
    assert all(layer.merged for _, layer in lora_layers(model))
    parent.train()
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert torch.equal(model.eval()(ids), wanted)


def test_a_state_dict_taken_while_merged():
    model, plain = zoo_with_adapters(dtype=BF16), make_zoo(BF16)
    before = snapshot(model)
    lora_ext.merge_adapter(model)
    state = model.state_dict()
    assert_same_state(model, before)
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value)
    other = zoo_with_adapters(dtype=BF16)
    randomize(other, seed=5)
    lora_ext.merge_adapter(other)
    other.load_state_dict(state)
    assert not any(layer.merged for _, layer in lora_layers(other))
    lora_ext.unmerge_adapter(model)
    assert torch.equal(other(make_ids()), model(make_ids()))


@pytest.mark.parametrize("targets", [["emb"], ["last"], ["emb", "last"]])
def test_tied_weights(targets):
    """peft#2018: merging into one of two tied modules changed the other."""
    model, ids = Tied().double(), make_ids()
    apply_lora(model, LoraConfig(targets, 2), "a")
    randomize(model)
    assert model.emb.weight is model.last.weight
    weight, y = model.emb.weight.detach().clone(), model(ids)
    lora_ext.merge_adapter(model)
    assert torch.allclose(model(ids), y)
    assert model.emb.weight is model.last.weight
    lora_ext.unmerge_adapter(model)
    assert torch.equal(model(ids), y)
    lora_ext.merge_and_unload(model)
    assert torch.allclose(model(ids), y)
    for name in ("emb", "last"):
        assert torch.equal(model.get_submodule(name).weight, weight) == (name not in targets)


@pytest.mark.parametrize("dtype", [F64, BF16], ids=short)
def test_merge_and_unload(dtype):
    model, plain, ids = zoo_with_adapters(dtype=dtype), make_zoo(dtype), make_ids()
    lora_ext.merge_adapter(model)
    wanted = model(ids)
    result = lora_ext.merge_and_unload(model)
    assert result is model
    assert torch.equal(model(ids), wanted)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    for module, old in zip(model.modules(), plain.modules(), strict=True):
        assert module.__dict__.keys() == old.__dict__.keys()
        assert module.extra_repr() == old.extra_repr()
        assert module.training == old.training
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


def test_merge_and_unload_of_some():
    model, ids = zoo_with_adapters(), make_ids()
    lora_ext.set_adapter(model, "a")
    wanted = model(ids)
    lora_ext.set_adapter(model, "b")
    lora_ext.merge_adapter(model)
    lora_ext.merge_and_unload(model, "a")  # active or not
    assert torch.allclose(model(ids), wanted, rtol=1e-10)
    with pytest.raises(ValueError, match=r"merge_and_unload: expected a model with LoRA layers"):
        lora_ext.merge_and_unload(make_layer("linear"))
    with pytest.raises(ValueError, match=r"merge_and_unload: expected distinct names"):
        lora_ext.merge_and_unload(zoo_with_adapters(), "z")


def test_unload_gives_back_the_very_parameters():
    model, ids = make_zoo(BF16), make_ids()
    before, parameters, y = snapshot(model), list(model.parameters()), model(ids)
    hook = model.conv.register_forward_hook(lambda module, args, output: output + 1)
    apply_lora(model, LoraConfig(TARGETS, 3), "a")
    randomize(model)
    lora_ext.merge_adapter(model)
    lora_ext.unload(model)
    hook.remove()
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(ids), y)
