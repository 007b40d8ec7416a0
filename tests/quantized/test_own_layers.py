"""Layers of this package over quantised bases: their numbers, gradients and lifecycle."""

import copy

import pytest
import torch
from helpers import BF16, F16, F32, short
from own_helpers import (
    DTYPES,
    FEW,
    HEIGHT,
    KINDS,
    ROWS,
    WIDTH,
    base,
    exact,
    gradients,
    make_x,
    one_layer,
    weight_of,
)
from torch import nn

from lora_ext.nn import AdapterSpec, LoRALinear, LoRAQuantizedLinear


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_b_is_the_base(kind, dtype):
    """In training and in eval mode, on the op or not, up to roundings of each of the terms: the
    products are two calls of the library, and some bases round in between. 2.2 units were found."""
    layer, x = base(kind, dtype), make_x(dtype)
    ours = LoRAQuantizedLinear.from_linear(copy.deepcopy(layer), r=8)
    assert isinstance(ours, type(layer)) and ours.path()[0] == "fused"
    terms = x.double().abs() @ weight_of(layer, x).abs().t() + layer.bias.double().abs()
    limit = 4 * torch.finfo(dtype).eps
    for mode in (True, False):
        y, wanted = ours.train(mode)(x), layer.train(mode)(x)
        assert y.dtype == wanted.dtype
        assert ((y.double() - wanted.double()).abs() <= limit * terms).all()


@pytest.mark.parametrize("kind", FEW)
def test_several_adapters(kind):
    """One call for those that are alike; by torch where they differ in dropout or dtype."""
    layer, x = one_layer(kind), make_x()
    layer.add_adapter("more", AdapterSpec(4, 3.0, use_rslora=True))
    layer.add_adapter("other", AdapterSpec(2, 3.0, lora_dropout=0.5))
    for name in ("more", "other"):
        nn.init.normal_(layer.lora_b[name], std=0.3)
    layer.set_adapter(["default", "more"])
    assert layer.path()[0] == "fused"
    torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-5, atol=1e-4)
    layer.set_adapter(["default", "other"])
    assert layer.path() == ("added", "adapters 'default' and 'other' differ in dropout")
    draws = torch.stack([layer(x).detach() for _ in range(2)])
    assert not torch.equal(draws[0], draws[1])
    layer.set_adapter(())
    assert layer.path() == ("base", "no adapter is active")
    assert torch.equal(layer(x), base(kind)(x))


@pytest.mark.parametrize("kind", FEW)
def test_dropout(kind):
    """The mean over masks is the update without; eval has none; a mask is drawn from the seed."""
    layer, x = one_layer(kind, lora_dropout=0.25), make_x()[:ROWS]
    with torch.no_grad():
        wanted = exact(layer, x)
        draws = torch.stack([layer(x) for _ in range(600)])
        spread = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - wanted).abs() <= 6 * spread + 1e-4).all() and spread.max() > 0
        torch.manual_seed(5)
        first = layer(x)
        torch.manual_seed(5)
        assert torch.equal(first, layer(x)) and not torch.equal(first, layer(x))
        layer.eval()  # in which bitsandbytes has other products of its own
        update = 2 * x @ layer.lora_a["default"].t() @ layer.lora_b["default"].t()
        wanted = layer.base_forward(x) + update
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", FEW)
def test_autocast(kind, adapter_dtype):
    layer = one_layer(kind, BF16, adapter_dtype=adapter_dtype)
    x = make_x(F32)
    with torch.autocast("cpu", BF16):
        y, plain = layer(x), base(kind, BF16)(x)
        found = gradients(layer, x)
    assert y.dtype == plain.dtype
    wanted = exact(layer, x.to(BF16))
    assert (y.double() - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert found["x"].dtype == F32 and found["lora_a.default"].dtype == adapter_dtype


def test_an_x_of_another_dtype_is_the_bases_matter():
    """bitsandbytes rounds it to its compute_dtype; the update keeps it."""
    pytest.importorskip("bitsandbytes")
    layer, x = one_layer("nf4", BF16), make_x(F32)
    y = layer(x)
    update = x @ layer.lora_a["default"].t() @ layer.lora_b["default"].t()
    wanted = base("nf4", BF16)(x) + 2 * update
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)


def test_functional_transforms_take_torch():
    """The op has no batching rule: the base is called, and torch adds."""
    pytest.importorskip("torchao")
    layer, x = one_layer("torchao"), make_x(lead=(3, ROWS))
    update = torch.func.vmap(lambda part: layer(part) - layer.base_forward(part))(x)
    torch.testing.assert_close(update, layer(x) - layer.base_forward(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", FEW)
def test_inits_from_the_weight(kind, init, dtype):
    """They start from the dequantised weight, which stays: the start is the base."""
    layer, x = base(kind, dtype), make_x(dtype)
    ours = LoRAQuantizedLinear.from_linear(layer, r=8, init_lora_weights=init)
    if init == "pissa":
        lora_a, lora_b = ours.lora_a["default"].double(), ours.lora_b["default"].double()
        left = weight_of(ours, x) - lora_b @ lora_a
        singular = torch.linalg.svdvals(weight_of(ours, x))
        assert torch.linalg.matrix_norm(left, 2) <= singular[8] * 1.01
    limit = 1e-5 if dtype == F32 else 1e-2
    wanted = base(kind, dtype)(x)
    assert (ours(x) - wanted).abs().max() <= limit * wanted.abs().max()
    assert ours.rank("default") == 16


def test_inits_from_a_weight_that_cannot_be_had():
    pytest.importorskip("bitsandbytes")
    layer = LoRAQuantizedLinear.around(base("int8").eval())
    with pytest.raises(
        ValueError, match="in eval it quantises x, too; choose init_lora_weights=True"
    ):
        layer.add_adapter("a", AdapterSpec(4, 4.0, init_lora_weights="pissa"))
    assert not layer.adapters and not len(layer.lora_a)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_around_a_base_and_back(kind):
    """The layer shares the base's tensors, mode and hooks, and gives all of them back."""
    layer, seen = base(kind).eval(), []
    layer.note = "kept"
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    ours = LoRAQuantizedLinear.from_linear(layer, r=4)
    assert ours.in_features == WIDTH and ours.matrix_shape == (HEIGHT, WIDTH)
    assert ours.stored_weight is next(iter(layer.parameters())) and not ours.training
    ours(make_x())
    assert seen == [type(ours)]
    restored = ours.restored()
    assert type(restored) is type(layer) and set(restored.__dict__) == set(layer.__dict__)
    assert dict(restored.named_parameters()) == dict(layer.named_parameters())
    assert dict(restored.named_buffers()) == dict(layer.named_buffers())
    assert torch.equal(restored(make_x()), layer(make_x()))
    handle.remove()
    assert not restored._forward_hooks and not ours._forward_hooks


def test_what_has_no_place_in_it():
    pytest.importorskip("bitsandbytes")
    for other in (nn.Linear(3, 4), LoRALinear(3, 4), one_layer("nf4")):
        with pytest.raises(TypeError, match="expected a quantised linear layer"):
            LoRAQuantizedLinear.around(other)
    layer = base("nf4")
    layer.forward = layer.forward
    with pytest.raises(TypeError, match="forward was replaced"):
        LoRAQuantizedLinear.around(layer)


@pytest.mark.parametrize("kind", FEW)
def test_path_and_workspace(kind):
    layer = one_layer(kind, BF16)
    path, reason = layer.path()
    dtype = F32 if kind in ("int8", "gguf") else BF16
    assert path == "fused" and "dequantised into" in reason
    assert layer.decision().workspace_bytes == HEIGHT * WIDTH * dtype.itemsize
    layer.eval()
    if kind == "int8":
        assert layer.path() == ("added", "in eval it quantises x, too")
        assert layer.decision().workspace_bytes == 0
    assert layer.pack_weight().reason == "the weight is quantised" and layer.packed is None


def test_eval_of_eight_bits_adds_to_the_base():
    pytest.importorskip("bitsandbytes")
    layer, x = one_layer("int8", F16).eval(), make_x(F16)
    update = x.float() @ layer.lora_a["default"].t() @ layer.lora_b["default"].t()
    wanted = base("int8", F16).eval()(x).float() + 2 * update
    assert (layer(x) - wanted).abs().max() <= 1e-3 * wanted.abs().max()
