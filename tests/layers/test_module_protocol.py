"""A layer of ours as an nn.Module, beyond what `contract/test_protocol` asks of PEFT's layers, too:
names of adapters, what is trained, hooks of the base, state dicts."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import F32, F64
from layer_helpers import (
    IN,
    MATRIX_KINDS,
    OUT,
    adapter_parameters,
    assert_same_state,
    exact,
    make_input,
    make_layer,
    snapshot,
)
from torch import nn

from lora_ext import LoRALinear
from lora_ext.nn import AdapterSpec

SPEC = AdapterSpec(4, 6.0)

# ---- adapters by name ----


@pytest.mark.parametrize(
    "name", ["", "a.b", "keys", "items", "update", "training", "_keys", "_parameters", "forward"]
)
def test_names_that_cannot_be_used(name):
    layer = make_layer("linear")
    before = snapshot(layer)
    with pytest.raises(ValueError, match="expected a name"):
        layer.add_adapter(name, SPEC)
    assert_same_state(layer, before)
    layer.train().eval()


@pytest.mark.parametrize("name", ["weight", "bias", "0", "ä b", "lora_a", "x" * 200])
def test_odd_names_work(name):
    layer = make_layer("linear", {name: SPEC, "other": SPEC})
    loaded = make_layer("linear", {name: SPEC, "other": SPEC})
    loaded.load_state_dict(layer.state_dict())
    x = make_input("linear")
    assert torch.equal(layer(x), loaded(x))
    copy.deepcopy(layer).delete_adapter(name)


def test_unknown_and_repeated_names():
    layer = make_layer("linear", {"a": SPEC, "b": SPEC})
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("a", SPEC)
    for method in (layer.set_adapter, layer.merge):
        for names in ("c", ["a", "c"], ["a", "a"]):
            with pytest.raises(ValueError, match=r"distinct names out of \['a', 'b'\]"):
                method(names)
    with pytest.raises(ValueError, match="delete_adapter"):
        layer.delete_adapter("c")
    assert layer.active_adapters == ("a", "b")


def test_what_is_trained():
    layer = LoRALinear(6, 5, r=0)
    layer.add_adapter("a", SPEC)
    layer.add_adapter("b", AdapterSpec(2, 1.0, lora_bias=True))

    def trained():
        return {n for n, p in layer.named_parameters() if p.requires_grad}

    assert layer.active_adapters == ("a",)
    assert trained() == {"bias", "lora_a.a", "lora_b.a"}
    layer.set_adapter("b")
    assert trained() == {"bias", "lora_a.b", "lora_b.b", "lora_bias.b"}
    layer.set_adapter(name for name in ("b", "a"))
    assert layer.active_adapters == ("b", "a")
    layer.bias.requires_grad_(False)
    layer.set_adapter([])
    assert trained() == set()
    layer.add_adapter("c", SPEC)
    assert layer.active_adapters == ()
    assert trained() == set()
    for name in ("a", "b", "c"):
        layer.delete_adapter(name)
    layer.add_adapter("d", AdapterSpec(2, 1.0, init_lora_weights="pissa"))
    assert trained() == {"lora_a.d", "lora_b.d"}  # and not what is subtracted


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("at", ["initialize", "zeros"])
def test_adding_is_all_or_nothing(monkeypatch, error, at):
    layer = make_layer("linear", {"a": SPEC})
    layer.bias.requires_grad_(False)
    before, parameters = snapshot(layer), [p.requires_grad for p in layer.parameters()]

    def fail(*args, **kwargs):
        raise error("here")

    if at == "initialize":
        monkeypatch.setattr(layer, "initialize", fail)
    else:
        monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(error):
        layer.add_adapter("b", AdapterSpec(4, 4.0, lora_bias=True))
    assert_same_state(layer, before)
    assert list(layer.adapters) == ["a"]
    assert [p.requires_grad for p in layer.parameters()] == parameters


def test_adapters_made_in_inference_mode_can_train():
    layer = LoRALinear(6, 5, r=0)
    with torch.inference_mode():
        layer.add_adapter("a", AdapterSpec(2, 2.0, lora_bias=True, init_lora_weights="pissa"))
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(layer))


# ---- hooks ----


def test_hooks_move_and_their_handles_still_remove_them():
    base, calls = nn.Linear(IN, OUT), []

    def note(name):
        return lambda *args, **kwargs: calls.append(name)

    handles = [
        base.register_forward_pre_hook(note("pre")),
        base.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True),
        base.register_forward_hook(note("post"), always_call=True),
        base.register_forward_hook(note("post with kwargs"), with_kwargs=True),
        base.register_full_backward_hook(note("backward")),
        base.register_full_backward_pre_hook(note("backward pre")),
    ]
    layer = LoRALinear.from_linear(base)
    handles.append(layer.register_forward_hook(note("later")))
    del base
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    expected = ["pre", "pre with kwargs", "post", "post with kwargs", "later"]
    assert calls == [*expected, "backward pre", "backward"]
    restored = layer.as_base(layer.weight, layer.bias)
    calls.clear()
    restored(x).sum().backward()
    assert calls == [*expected, "backward pre", "backward"]
    calls.clear()
    for handle in handles:
        handle.remove()
    layer(x).sum().backward()
    restored(x).sum().backward()
    assert calls == []


def test_a_layer_holds_nothing_alive():
    """torchtune#904: a cache on methods did. Without the collector: there are no cycles."""
    base = nn.Linear(64, 64)
    layer, freed = LoRALinear.from_linear(base), weakref.ref(base)
    del base
    gc.collect()
    assert freed() is None
    layer.pack_weight(backward=True)
    layer.merge()
    gc.disable()
    try:
        freed = weakref.ref(layer.merged_weight)
        layer.unmerge()
        assert freed() is None
        watched = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(layer.packed)]
        del layer
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


# ---- copies and state ----


def test_state_dict_keys():
    layer = make_layer("linear", {"a": AdapterSpec(2, 1.0, lora_bias=True)})
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a.a", "lora_b.a", "lora_bias.a"]
    layer.merge()
    assert len(layer.state_dict()) == 5
    pissa = LoRALinear(6, 5, r=2, init_lora_weights="pissa")
    assert [k for k in pissa.state_dict() if "init" in k] == [
        "lora_a_init.default",
        "lora_b_init.default",
    ]


def test_checkpoints_of_the_base_load(tmp_path):
    base = nn.Linear(IN, OUT)
    for assign in (False, True):
        layer = make_layer("linear")
        layer.pack_weight()
        layer.merge()
        result = layer.load_state_dict(base.state_dict(), strict=False, assign=assign)
        assert result.unexpected_keys == []
        assert set(result.missing_keys) == {"lora_a.default", "lora_b.default"}
        assert torch.equal(layer.weight, base.weight)
        assert not layer.weight.requires_grad
        assert not layer.merged
        assert layer.packed is None
        x = torch.randn(40, IN)
        assert torch.allclose(layer(x).double(), exact(layer, x), atol=1e-5)


def test_a_state_dict_restores_what_is_subtracted():
    layer = make_layer("linear", {"a": AdapterSpec(2, 1.0, init_lora_weights="pissa")})
    other = make_layer("linear", {"a": AdapterSpec(2, 1.0, init_lora_weights="pissa")})
    other.weight.requires_grad_(False).normal_()
    x = make_input("linear")
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_casting_drops_the_packed_and_casts_the_merged_weight(kind):
    layer = make_layer(kind, dtype=F32)
    layer.pack_weight()
    layer.merge()
    layer.double()
    assert layer.packed is None
    assert layer.merged_weight.dtype == F64
    x = make_input(kind, F64)
    assert torch.allclose(layer(x), exact(layer, x), atol=1e-5)


def test_repr_is_one_line():
    layer = make_layer("linear", {"a": SPEC, "b": AdapterSpec(2, 1.0, 0.1)})
    layer.set_adapter("b")
    assert repr(layer) == (
        "LoRALinear(in_features=12, out_features=18, bias=True, "
        "adapters={a (inactive): r=4, lora_alpha=6, lora_dropout=0; "
        "b: r=2, lora_alpha=1, lora_dropout=0.1})"
    )
