"""A fast path for the most common forward of a `LoRALinear`: one plain adapter, in a microsecond.

`FusedLoRALayer.decide` handles all cases; with one row its checks would take as long as the
product. If the conditions here hold, it would call the op with the same operands (tested).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..dtypes import HALVES
from ..torch_state import is_autocast, is_traced, is_transformed

_Parameter = nn.Parameter


def fast_path_operands(layer: Any, x: Tensor) -> tuple | None:
    """(weight, lora_a, lora_b, bias, scaling, dropout_p) for `lora_linear`, or None."""
    state = layer.__dict__
    names = state["active_adapters"]
    if (
        len(names) != 1
        or state["merged_adapters"]
        or state["_disabled"]
        or state["fan_in_fan_out"]
        or type(x) is not Tensor
        or x.is_nested
        or is_traced()
        or is_transformed()
    ):
        return None
    name, tables, own = names[0], state["_modules"], state["_parameters"]
    if name in tables["lora_a_init"]._parameters or name in tables["lora_bias"]._parameters:
        return None
    weight = own.get("weight")
    lora_a = tables["lora_a"]._parameters.get(name)
    lora_b = tables["lora_b"]._parameters.get(name)
    if type(weight) is not _Parameter or lora_a is None or lora_b is None:
        return None  # parametrized, or quantised in the meantime
    if lora_a.dtype in HALVES and (lora_a.dtype is not x.dtype or is_autocast(x)):
        return None
    packed = state["packed"]
    if packed is not None:
        if packed.weight is not weight or not packed.is_packed:
            return None
        weight = packed
    spec = state["adapters"][name]
    dropout_p = spec.lora_dropout if state["training"] else 0.0
    return weight, lora_a, lora_b, own.get("bias"), spec.scaling, dropout_p
