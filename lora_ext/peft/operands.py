"""Converts the contents of a linear layer of PEFT to operands of the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..call.updates import Update
from ..dtypes import FLOATS
from ..packed_weight import PackedWeight


def update_of(layer: Any, name: str) -> Update:
    """The update of one adapter of a PEFT layer."""
    tables = layer._modules
    lora_b = tables["lora_B"]._modules[name]
    dropout = tables["lora_dropout"]._modules[name]
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    lora_a = tables["lora_A"]._modules[name].weight
    return Update(name, lora_a, lora_b.weight, lora_b.bias, layer.scaling[name], p)


def fast_path_updates(layer: Any, names: Sequence[str]) -> list[Update] | None:
    """`update_of` each name in a microsecond, or None if one is not plain, by the conditions of
    `adapter_reason`."""
    tables = layer._modules
    first, second = tables["lora_A"]._modules, tables["lora_B"]._modules
    dropouts, scalings = tables["lora_dropout"]._modules, layer.scaling
    found = []
    for name in names:
        lora_a, lora_b, dropout = first[name], second[name], dropouts[name]
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return None
        for module in (lora_a, lora_b, dropout):
            state = module.__dict__
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return None
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout and dropout.p < 1.0:
            p = dropout.p if dropout.training else 0.0
        else:
            return None
        own, other = lora_a._parameters, lora_b._parameters
        a, b = own.get("weight"), other.get("weight")
        if type(a) is not nn.Parameter or type(b) is not nn.Parameter or own["bias"] is not None:
            return None
        if a.dtype is not b.dtype or a.dtype not in FLOATS:
            return None
        found.append(Update(name, a, b, other["bias"], scalings[name], p))
    return found


def operand_of(layer: Any) -> Tensor | PackedWeight:
    """The weight ``[out, in]`` of a layer's base, or its pack."""
    base = layer._modules["base_layer"]
    return layer.pack_of(base.weight) or matrix_of(base)


def matrix_of(base: Any) -> Tensor:
    """The base's weight as ``[out, in]``."""
    weight = base.weight
    return weight if type(base) is nn.Linear else weight.t()
