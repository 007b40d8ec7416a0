"""Accelerated PEFT models over quantised layers under what training does to models: checkpointing,
compilation, copies, pickles, casts and state dicts."""

import copy
import pickle

import pytest
import torch
from helpers import BF16, F32, by_pickle, by_torch_save
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft_helpers import paths, randomize, step
from quantized_models import KINDS, make_x, quantized_net

import lora_ext


def fused(model):
    """The model accelerated, all its layers on the op."""
    lora_ext.accelerate(model)
    assert set(paths(model).values()) == {"fused"}
    return model


def assert_same(found, wanted, tolerance=0.0):
    assert found.keys() == wanted.keys() and len(found) == 10  # y, dx, two factors of four layers
    for name, value in wanted.items():
        scale = value.abs().max().item()
        assert scale > 0 and found[name].dtype == value.dtype
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind, dropout, reentrant):
    """The bits of the model without it, whose masks the recomputation draws again."""
    model = fused(quantized_net(kind, lora_dropout=dropout))
    wanted = step(model, make_x())
    model.base_model.model.reentrant = reentrant
    assert_same(step(model, make_x()), wanted)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training(kind, dropout, backend):
    """In one graph. Dropout draws other seeds there: the same ones each time."""
    model = fused(quantized_net(kind, lora_dropout=dropout))
    eager = step(model, make_x())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = step(compiled, make_x())
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    if dropout:
        again = step(compiled, make_x())
        assert torch.equal(again["y"], found["y"])
        assert not torch.allclose(found["y"], quantized_y(model), rtol=1e-3)
    else:
        assert_same(found, eager, 1e-5)


def quantized_y(model):
    model.eval()
    with torch.no_grad():
        return model(make_x())


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_forward(kind):
    model = fused(quantized_net(kind, BF16)).eval()
    x = make_x(BF16, 200)  # more rows than bitsandbytes has a kernel of its own for
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy(kind):
    """A copy computes the same, stays accelerated and shares nothing."""
    model = fused(quantized_net(kind))
    wanted = step(model, make_x())
    twin = copy.deepcopy(model)
    assert set(paths(twin).values()) == {"fused"}
    assert_same(step(twin, make_x()), wanted)
    randomize(twin, seed=1)
    assert_same(step(model, make_x()), wanted)
    own = {p.data_ptr() for p in model.parameters() if type(p) is torch.nn.Parameter}
    assert own.isdisjoint(p.data_ptr() for p in twin.parameters())


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("kind", KINDS)
def test_pickle(kind, way):
    if kind.startswith("torchao"):
        with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
            pickle.dumps(quantized_net(kind))
        pytest.skip("torchao's quantize_ leaves an extra_repr on the layer that has no pickle")
    model = fused(quantized_net(kind))
    wanted = step(model, make_x())
    model.zero_grad()
    twin = by_pickle(model) if way == "pickle" else by_torch_save(model)
    assert set(paths(twin).values()) == {"fused"}
    assert_same(step(twin, make_x()), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype(kind):
    """`model.to(dtype)` gives what it gives PEFT, and back again."""
    model = quantized_net(kind)
    plain = copy.deepcopy(model)
    fused(model)
    for dtype in (BF16, F32):
        model.to(dtype)
        plain.to(dtype)
        x = make_x(dtype)
        if kind == "hqq" and dtype == BF16:  # whose compute_dtype stays what it was
            for one in (model, plain):
                with pytest.raises(RuntimeError, match="same dtype"):
                    one(x)
            continue
        found, wanted = step(model, x), step(plain, x)
        assert_same(found, wanted, 1e-5 if dtype == F32 else 5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    """The keys and bytes of the model without us; adapters load into another model."""
    model = quantized_net(kind)
    before = {name: value for name, value in model.state_dict().items()}
    fused(model)
    step(model, make_x())
    after = model.state_dict()
    assert list(after) == list(before)
    other = fused(quantized_net(kind))
    randomize(other, seed=1)
    wanted = step(model, make_x())
    assert (step(other, make_x())["y"] - wanted["y"]).abs().max() > 0
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert_same(step(other, make_x()), wanted)
    adapters = {name: value for name, value in after.items() if "lora_" in name}
    assert other.load_state_dict(adapters, strict=False).unexpected_keys == []
