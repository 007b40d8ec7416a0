"""`use_adapters` on our own layers alone: inits that subtract, packs, biases, whole models."""

import io
from functools import partial

import pytest
import torch
from helpers import BF16, F32, F64
from layer_helpers import make_input, make_layer, randomize
from torch import nn

import lora_ext
from lora_ext import LoRALinear, set_adapter
from lora_ext.nn import AdapterSpec, LoRAConv2d, LoRAEmbedding

NAMES = ["a", None, "b", "a"]


def specs(**first):
    return {"a": AdapterSpec(3, 5.0, **first), "b": AdapterSpec(2, 4.0)}


def one_by_one(layer, names, x):
    """Each sample alone, with its adapter active."""
    found = []
    for name, sample in zip(names, x.split(1), strict=True):
        layer.set_adapter([] if name is None else [name])
        found.append(layer(sample))
    layer.set_adapter(list(layer.adapters))
    return torch.cat(found)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_inits_that_subtract_their_first_product(kind, init):
    """One row has W + s (B A - B0 A0), its neighbour W alone."""
    torch.manual_seed(3)
    layer = make_layer(kind, specs(init_lora_weights=init), F64)
    x = make_input(kind, F64).repeat(2, *[1] * (3 if kind == "conv2d" else 2))[:4]
    steps = []
    for forward in (by_rows, partial(one_by_one, names=NAMES)):
        layer.zero_grad()
        y = forward(layer, x=x)
        y.square().sum().backward()
        factors = [table[name].grad for table in (layer.lora_a, layer.lora_b) for name in "ab"]
        steps.append([y, *factors])
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-10)
    assert layer.lora_a_init["a"].grad is None
    fresh = LoRALinear(12, 18, r=0, dtype=F64)
    fresh.add_adapter("a", AdapterSpec(3, 5.0, init_lora_weights=init))
    fresh.add_adapter("b", AdapterSpec(2, 4.0))
    x = make_input("linear", F64)
    with torch.no_grad(), lora_ext.use_adapters(fresh, NAMES):
        y = fresh(x)
    base = nn.functional.linear(x, fresh.weight, fresh.bias)
    torch.testing.assert_close(y, base, rtol=1e-12, atol=1e-12)


def by_rows(layer, x):
    with lora_ext.use_adapters(layer, NAMES):
        return layer(x)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_packed_weight(dtype):
    layer = make_layer("linear", specs(), dtype)
    x = make_input("linear", dtype)
    plain = by_rows(layer, x)
    layer.pack_weight()
    torch.testing.assert_close(by_rows(layer, x), plain)


def test_pixels_of_a_convolution_with_strides_have_their_samples_adapter():
    torch.manual_seed(0)
    layer = LoRAConv2d.around(nn.Conv2d(5, 7, 1, stride=2, dtype=F64))
    for name, spec in specs().items():
        layer.add_adapter(name, spec)
    randomize(layer)
    x = torch.randn(4, 5, 6, 3, dtype=F64)
    y = by_rows(layer, x)
    torch.testing.assert_close(y, one_by_one(layer, NAMES, x), rtol=1e-10, atol=1e-10)


def test_embeddings_with_a_padding_index():
    layer = LoRAEmbedding.around(nn.Embedding(9, 4, padding_idx=2, dtype=F64))
    for name, spec in specs().items():
        layer.add_adapter(name, spec)
    randomize(layer)
    set_adapter(layer, ["a", "b"])
    ids = torch.tensor([[2, 3], [2, 4], [5, 2], [2, 2]])
    by_rows(layer, ids).sum().backward()
    assert not layer.lora_a["a"].grad[:, 2].any() and layer.lora_a["a"].grad[:, 3].any()
    assert not layer.lora_a["b"].grad[:, [2, 3, 4]].any() and layer.lora_a["b"].grad[:, 5].any()


def test_a_nested_x_is_refused():
    layer = make_layer("linear", specs())
    parts = [torch.randn(n, 12) for n in (2, 3)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout)
        with (
            lora_ext.use_adapters(layer, ["a", "b"]),
            pytest.raises(TypeError, match="expected a dense x, but got a nested tensor"),
        ):
            layer(x)


def test_an_export_to_onnx_is_refused():
    pytest.importorskip("onnxscript")
    layer = make_layer("linear", specs()).eval()
    x = make_input("linear")
    with lora_ext.use_adapters(layer, NAMES), pytest.raises(Exception, match="lora_grouped"):
        torch.onnx.export(layer, (x,), io.BytesIO(), dynamo=False)
