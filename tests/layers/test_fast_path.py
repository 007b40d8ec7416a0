"""The fast path of LoRALinear: taken where allowed, with the operands of the full path."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import BF16, F32, F64
from layer_helpers import IN, make_layer
from torch import nn
from torch.nn.utils import parametrize

from lora_ext import pack_weight
from lora_ext.call import Call
from lora_ext.nn import AdapterSpec
from lora_ext.nn.linear import fast_path_operands

SPECS = {"a": AdapterSpec(4, 6.0, lora_dropout=0.25), "b": AdapterSpec(3, 3.0)}


class Subclass(torch.Tensor):
    pass


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pack(layer):
    layer.packed = pack_weight(layer.weight)
    return layer.packed


def nothing(layer):
    pass


parametrized = parametrize.register_parametrization
# What changes -> (whether the fast path may still be taken, what is done to the layer).
CHANGES = {
    "nothing": (True, nothing),
    "eval": (True, lambda layer: layer.eval()),
    "trained bias": (True, lambda layer: layer.bias.requires_grad_()),
    "another adapter": (True, lambda layer: layer.set_adapter("b")),
    "half weight, float32 adapters": (True, nothing),
    "half weight and adapters": (True, nothing),
    "several": (False, lambda layer: layer.set_adapter(["a", "b"])),
    "none active": (False, lambda layer: layer.set_adapter([])),
    "merged": (False, lambda layer: layer.eval().merge()),
    "disabled": (False, nothing),
    "packed": (True, pack),
    "a dropped pack": (False, lambda layer: pack(layer).drop()),
    "autocast, half adapters": (False, nothing),
    "half adapters, x in another dtype": (False, nothing),
    "lora_bias": (False, nothing),
    "pissa": (False, nothing),
    "parametrized weight": (False, lambda layer: parametrized(layer, "weight", Doubled())),
    "parametrized factor": (False, lambda layer: parametrized(layer.lora_b, "a", Doubled())),
    "x of a subclass": (False, nothing),
}


def layer_with(change: str):
    """A LoRALinear with two adapters, the first of them active, and what is to differ."""
    own = {"lora_bias": {"lora_bias": True}, "pissa": {"init_lora_weights": "pissa"}}.get(change)
    specs = SPECS | ({} if own is None else {"a": AdapterSpec(4, 6.0, **own)})
    dtype = BF16 if "half" in change else F32
    adapters = BF16 if "half adapters" in change or "weight and adapters" in change else None
    layer = make_layer("linear", specs, dtype, adapters)
    layer.set_adapter("a")
    CHANGES[change][1](layer)
    return layer


def x_for(change: str, layer) -> torch.Tensor:
    x = torch.randn(5, IN, dtype=F64 if "another dtype" in change else layer.weight.dtype)
    return x.as_subclass(Subclass) if change == "x of a subclass" else x


@contextmanager
def region(change: str, layer):
    """In which the layer is called."""
    disabled = layer.disable_adapter() if change == "disabled" else nullcontext()
    with torch.autocast("cpu", enabled="autocast" in change), disabled:
        yield


@pytest.mark.parametrize("change", CHANGES)
def test_the_fast_path_has_the_operands_of_the_full_one(change, monkeypatch):
    layer = layer_with(change)
    x = x_for(change, layer)
    called = []
    monkeypatch.setattr("lora_ext.call.apply.lora_linear", lambda *each: called.append(each))
    with region(change, layer):
        operands = fast_path_operands(layer, x)
        if CHANGES[change][0]:
            layer.decide(Call(x)).run(x)
    assert (operands is not None) == CHANGES[change][0]
    if operands is None:
        return
    ((full_x, *full),) = called
    assert full_x is x and len(full) == len(operands)
    for fast, wanted in zip(operands, full, strict=True):
        assert fast is wanted or fast == wanted


def test_subclasses_decide_for_themselves(monkeypatch):
    layer = make_layer("merged_linear")
    monkeypatch.setattr("lora_ext.nn.linear.fast_path_operands", None)  # must not be called
    assert layer(torch.randn(5, IN)).shape == (5, layer.out_features)


def test_a_traced_forward_takes_the_full_decision(monkeypatch):
    layer = layer_with("eval")
    x, found = torch.randn(5, IN), []

    def asked(layer, x):
        found.append(fast_path_operands(layer, x))
        return found[-1]

    monkeypatch.setattr("lora_ext.nn.linear.fast_path_operands", asked)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert found == [None]
    assert torch.equal(traced(x), layer(x))
