"""Accelerated PEFT models over quantised layers, beyond `contract`: casts and state dicts."""

import copy

import pytest
from helpers import BF16, F32
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
