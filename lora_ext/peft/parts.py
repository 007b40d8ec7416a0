"""What a linear layer of PEFT holds, as operands of the op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.updates import Update


def update_of(layer: Any, name: str) -> Update:
    """What one adapter of a PEFT layer adds."""
    tables = layer._modules
    lora_b = tables["lora_B"]._modules[name]
    dropout = tables["lora_dropout"]._modules[name]
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    lora_a = tables["lora_A"]._modules[name].weight
    return Update(name, lora_a, lora_b.weight, lora_b.bias, layer.scaling[name], p)


def matrix_of(base: Any) -> Tensor:
    """The base's weight as ``[out, in]``."""
    weight = base.weight
    return weight if type(base) is nn.Linear else weight.t()
