"""What our own layers compute beyond `contract/test_numerics`: any adapters together, their ranks,
dtypes and biases; dropout's statistics; inputs of other kinds."""

import pytest
import torch
from helpers import BF16, F32, F64, KERNEL_ROWS, max_error, rms_error, short
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_helpers import IN, KINDS, OUT, exact, in_peft_order, make_input, make_layer, randomize
from torch import nn

from lora_ext import LoRALinear
from lora_ext.nn import AdapterSpec, LoRAConv2d, LoRAEmbedding

SPECS = {"a": AdapterSpec(4, 6.0), "b": AdapterSpec(3, 2.0, use_rslora=True)}


def assert_no_worse_than_peft(layer, x):
    """The rules of docs/numerics.md, with room for the last bit of a sum of a few numbers."""
    with torch.no_grad():
        y, wanted, plain = layer(x), exact(layer, x), in_peft_order(layer, x)
    assert y.dtype == plain.dtype
    assert y.shape == plain.shape
    floor = torch.finfo(F32 if y.dtype != F64 else F64).eps * wanted.abs().max().item()
    assert max_error(y, wanted) <= 2 * max_error(plain, wanted) + 4 * floor
    assert rms_error(y, wanted) <= 1.05 * rms_error(plain, wanted) + floor


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_combination_of_adapters(data):
    kind = data.draw(st.sampled_from(KINDS))
    draw_spec = st.builds(
        AdapterSpec,
        r=st.integers(1, 5),
        lora_alpha=st.floats(-4, 4),
        lora_dropout=st.sampled_from([0.0, 0.3]),
        use_rslora=st.booleans(),
        lora_bias=st.booleans() if kind != "embedding" else st.just(False),
    )
    specs = data.draw(st.dictionaries(st.sampled_from("abcd"), draw_spec, min_size=1))
    active = data.draw(st.lists(st.sampled_from(sorted(specs)), unique=True))
    layer = make_layer(kind, specs, F64).eval()
    layer.set_adapter(active)
    lead = data.draw(st.sampled_from([(0,), (1,), (3,), (2, 3), (1, 0, 2), (KERNEL_ROWS,)]))
    x = make_input(kind, F64, lead)
    assert torch.allclose(layer(x), exact(layer, x), rtol=1e-10, atol=1e-10)
    wanted = {id(p) for name in active for p in parameters_of(layer, name)}
    assert {id(p) for p in layer.parameters() if p.requires_grad} - {id(layer.bias)} == wanted


def parameters_of(layer, name):
    tables = (layer.lora_a, layer.lora_b, layer.lora_bias)
    return [table[name] for table in tables if name in table]


@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_of_any_gradient(sparse):
    """With sparse=True too, whose gradient of a table cannot be transposed."""
    base = nn.Embedding(9, 6, padding_idx=1, scale_grad_by_freq=not sparse, sparse=sparse).double()
    layer = LoRAEmbedding.around(base)
    layer.add_adapter("a", AdapterSpec(3, 1.0))
    randomize(layer)
    ids = torch.tensor([[1, 2, 2], [0, 8, 1]])
    layer(ids).sum().backward()
    grad = layer.lora_a["a"].grad
    assert grad[:, 1].eq(0).all()  # the padding
    assert grad[:, [0, 2, 8]].ne(0).all()
    assert grad[:, [3, 4, 5, 6, 7]].eq(0).all()
    assert torch.allclose(layer(ids), exact(layer, ids))


# ---- several adapters ----


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_a_small_lora_bias_is_not_lost(dtype):
    """On a half base a float32 lora_bias is added in float32, as PEFT does, and not rounded."""
    layer = make_layer("linear", {"a": AdapterSpec(4, 4.0, lora_bias=True)}, dtype)
    nn.init.ones_(layer.bias)
    nn.init.constant_(layer.lora_bias["a"], 2.0**-10)  # lost beside a bfloat16 bias of 1
    x = make_input("linear", dtype, (2000,))
    assert_no_worse_than_peft(layer, x)
    with torch.no_grad():
        assert (layer(x).double() - exact(layer, x)).mean().abs() < 2e-4
    assert (layer.path()[0] == "added") == (dtype == BF16)


# ---- dropout ----


def see_through_layer(*dropouts):
    layer = LoRALinear(IN, IN, bias=False, r=0)
    nn.init.zeros_(layer.weight)
    for i, dropout in enumerate(dropouts):
        layer.add_adapter(f"a{i}", AdapterSpec(IN, float(IN), dropout))
        nn.init.eye_(layer.lora_a[f"a{i}"])
        nn.init.eye_(layer.lora_b[f"a{i}"])
    layer.set_adapter(list(layer.adapters))
    return layer


def test_masks_of_several_adapters():
    """One mask for adapters of one dropout; masks of their own for others, none without dropout."""
    x = torch.ones(500, IN)
    with torch.no_grad():
        one = see_through_layer(0.5, 0.5)(x)
        assert set(one.unique().tolist()) == {0.0, 4.0}
        two = see_through_layer(0.5, 0.75)(x)
        assert set(two.unique().tolist()) == {0.0, 2.0, 4.0, 6.0}
        assert set(see_through_layer(0.0, 0.5)(x).unique().tolist()) == {1.0, 3.0}
        assert set(see_through_layer(0.5, 0.75).eval()(x).unique().tolist()) == {2.0}


# ---- inputs ----


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_contiguous(kind):
    layer = make_layer(kind, SPECS, F64)
    x = make_input(kind, F64, (6, 8))
    for strided in (x.transpose(0, -1).contiguous().transpose(0, -1), x.flip(0), x[1:][:, ::2]):
        if kind == "conv2d" and strided.shape[1] != IN:
            continue
        assert torch.allclose(layer(strided), exact(layer, strided))
    if kind == "conv2d":
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(layer(last), exact(layer, x))
        assert torch.allclose(layer(x[0]), exact(layer, x)[0])


def test_a_strided_convolution():
    base = nn.Conv2d(IN, OUT, 1, stride=(2, 3)).double()
    layer = LoRAConv2d.around(base)
    layer.add_adapter("a", AdapterSpec(4, 6.0))
    randomize(layer)
    x = torch.randn(2, IN, 7, 8, dtype=F64, requires_grad=True)
    wanted = exact(layer, x)
    assert torch.allclose(layer(x), wanted)
    (ours,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(ours, torch.autograd.grad(wanted.sum(), x)[0])


def test_keyword_arguments_of_the_base():
    """Callers may name the argument as nn.Linear, nn.Conv2d and nn.Embedding do."""
    for kind in ("linear", "conv2d", "embedding"):
        layer, x = make_layer(kind), make_input(kind)
        assert torch.equal(layer(input=x), layer(x))


def test_nested_tensors():
    """torch's encoder hands them on; the op has no kernel for them, torch's products have."""
    layer = make_layer("linear", SPECS, F64).eval()
    parts = [torch.randn(n, IN, dtype=F64) for n in (3, 5)]
    with torch.no_grad():
        y = layer(torch.nested.nested_tensor(parts))
        for part, value in zip(parts, y.unbind(), strict=True):
            assert torch.allclose(value, exact(layer, part))


# ---- errors ----


def test_wrong_inputs_are_named():
    layer = make_layer("linear")
    with pytest.raises(RuntimeError, match=r"lora_ext\.lora_linear: expected x of shape"):
        layer(torch.randn(3, IN + 1))
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(3, IN, dtype=F64))
    with pytest.raises(RuntimeError, match=r"LoRAConv2d: expected x of shape"):
        make_layer("conv2d")(torch.randn(3, IN))
    with pytest.raises(IndexError):
        make_layer("embedding")(torch.tensor([99]))
