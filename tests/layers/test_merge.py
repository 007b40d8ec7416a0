"""Merging in one layer: a second weight beside W, which is never written."""

import itertools

import pytest
import torch
from helpers import BF16, F16, F32, F64, short
from layer_helpers import (
    KINDS,
    adapter_parameters,
    assert_same_state,
    bits,
    delta,
    exact,
    make_input,
    make_layer,
    randomize,
    snapshot,
)
from torch import nn

from lora_ext.nn import AdapterSpec


def three_specs(kind):
    bias = kind != "embedding"
    return {
        "a": AdapterSpec(4, 6.0, lora_bias=bias),
        "b": AdapterSpec(3, -2.0, use_rslora=True),
        "c": AdapterSpec(1, 0.5, lora_bias=bias),
    }


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_no_subset_changes_the_output(kind):
    """peft#3763: merging some of the active adapters dropped the others."""
    x, specs = make_input(kind, F64), three_specs(kind)
    for n_active in (1, 2, 3):
        for active in itertools.permutations("abc", n_active):
            layer = make_layer(kind, specs, F64).eval()
            layer.set_adapter(active)
            wanted = exact(layer, x)
            for n_merged in range(n_active + 1):
                for names in itertools.combinations(active, n_merged):
                    layer.merge(names)
                    assert layer.merged_adapters == names
                    assert layer.merged == bool(names)
                    assert torch.allclose(layer(x), wanted, rtol=1e-10, atol=1e-10)
                    assert (layer.path()[0] == "merged") == (n_merged == n_active)
                    if 0 < n_merged < n_active:
                        assert layer.path()[1].endswith(f"; merged: {', '.join(names)}")
            layer.merge(name for name in active)
            assert layer.merged_adapters == active


def test_only_active_adapters_merge(kind):
    layer = make_layer(kind, {"a": AdapterSpec(4, 6.0), "b": AdapterSpec(3, 1.0)})
    layer.set_adapter("a")
    layer.merge()
    for names in ("b", ["a", "b"]):
        with pytest.raises(ValueError, match=r"active adapters, which are \['a'\].*set_adapter"):
            layer.merge(names)
    assert layer.merged_adapters == ("a",)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=short)
def test_the_sum_is_rounded_once(kind, dtype):
    """To within half a unit of the float64 sum, whatever the number of adapters."""
    layer = make_layer(kind, three_specs(kind), dtype)
    layer.merge()
    wanted = layer.weight.double() + sum(delta(layer, name) for name in "abc")
    error = (layer.merged_weight.double() - wanted).abs()
    unit = torch.finfo(dtype).eps * torch.exp2(wanted.abs().log2().floor())
    accumulated = 2e-6 if dtype != F64 else 1e-14  # in float32, or float64
    assert (error <= 0.5 * unit + accumulated).all()
    assert layer.merged_weight.dtype == dtype
    assert layer.merged_weight.stride() == layer.weight.stride()
    if kind != "embedding":
        bias = layer.bias.double()
        for name in "ac":
            bias = bias + layer.lora_bias[name].double() * layer.adapters[name].scaling
        assert torch.allclose(layer.merged_bias.double(), bias, rtol=torch.finfo(dtype).eps)
        assert layer.merged_bias.dtype == dtype


def test_merging_is_idempotent(kind):
    """peft#1355: a second merge added the update again."""
    layer = make_layer(kind, three_specs(kind), BF16)
    x = make_input(kind, BF16)
    layer.merge()
    first, y = layer.merged_weight.clone(), layer(x)
    layer.merge()
    layer.merge(["a", "b", "c"])
    assert torch.equal(layer.merged_weight, first)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    layer.unmerge()
    assert layer.merged_weight is None
    assert layer.merged_bias is None
    randomize(layer, seed=4)
    layer.merge()
    assert not torch.equal(layer.merged_weight, first)
    layer.merge([])
    assert not layer.merged


def test_unmerging_is_exact_and_w_is_never_written(kind):
    layer = make_layer(kind, three_specs(kind), BF16)
    x = make_input(kind, BF16)
    weight, data = bits(layer.weight).clone(), layer.weight.data_ptr()
    version = layer.weight._version
    before, y = snapshot(layer), layer(x)
    for step in (
        layer.merge,
        lambda: layer.set_adapter("b"),
        lambda: layer.merge("b"),
        layer.train,
        layer.eval,
        layer.merge,
        lambda: layer(x),
        lambda: layer.set_adapter(["a", "b", "c"]),
        layer.merge,
        lambda: layer.load_state_dict(layer.state_dict()),
        layer.unmerge,
    ):
        step()
        assert torch.equal(bits(layer.weight), weight)
        assert layer.weight.data_ptr() == data
    assert_same_state(layer, before)
    assert torch.equal(layer(x), y)
    assert layer.weight._version == version + 1  # load_state_dict alone


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_merging_within_other_modes(kind, context):
    """The same bits, no graph, and no inference tensors: x may want a gradient afterwards."""
    layer = make_layer(kind, three_specs(kind))
    layer.merge()
    wanted = layer.merged_weight.clone()
    layer.unmerge()
    with context(), torch.autocast("cpu", BF16):
        layer.merge()
    for merged in (layer.merged_weight, layer.merged_bias):
        if merged is not None:
            assert not merged.requires_grad
            assert not merged.is_inference()
    assert torch.equal(layer.merged_weight, wanted)
    x = make_input(kind)
    if x.is_floating_point():
        x.requires_grad_()
        for _ in range(2):
            layer(x).sum().backward()
        (wanted_dx,) = torch.autograd.grad(exact(layer, x).sum(), x)
        assert torch.allclose(x.grad, 2 * wanted_dx, atol=1e-5)
        assert all(p.grad is None for p in adapter_parameters(layer))


@pytest.mark.parametrize("where", ["lora_a", "lora_b", "lora_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_updates_that_are_not_finite(where, value):
    spec = AdapterSpec(4, 40.0, lora_bias=True)
    layer = make_layer("linear", {"good": AdapterSpec(2, 1.0), "bad": spec})
    layer.merge("good")
    kept = layer.merged_weight
    with torch.no_grad():
        getattr(layer, where)["bad"].view(-1)[1] = value
    with pytest.raises(RuntimeError, match=r"finite update, but adapter 'bad'.*nothing was merged"):
        layer.merge()
    assert layer.merged_weight is kept
    assert layer.merged_adapters == ("good",)


def test_sums_beyond_the_weights_dtype():
    layer = make_layer("linear", {"a": AdapterSpec(1, 1.0, lora_bias=True)}, F16)
    nn.init.constant_(layer.lora_b["a"], 300.0)
    nn.init.constant_(layer.lora_a["a"], 300.0)
    with pytest.raises(RuntimeError, match=r"range of torch.float16, but got a sum of up to 9e"):
        layer.merge()
    nn.init.zeros_(layer.lora_a["a"])
    nn.init.constant_(layer.lora_bias["a"], 1e5)
    with pytest.raises(RuntimeError, match=r"range of torch.float16"):
        layer.merge()
    assert not layer.merged
    layer.weight[0, 0] = float("inf")  # as in a model that masks with it
    nn.init.zeros_(layer.lora_bias["a"])
    layer.merge()
    assert layer.merged
