"""A fast path for the most common forward: one plain adapter on a plain nn.Linear.

`OverLinear.decide` handles all cases and gives the reason; with small inputs it would take as long
as the products. Here the decision takes a few microseconds; the conditions imply that it would be
"fused" with the same operands (tested).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.module import _has_any_global_hook

from ..call.op import lora_linear
from ..dtypes import FLOATS, HALVES
from ..nn.adapter_spec import MAX_RANK
from ..torch_state import is_traced

_Parameter, _Linear, _Identity, _Dropout = nn.Parameter, nn.Linear, nn.Identity, nn.Dropout
_is_autocast_enabled = torch.is_autocast_enabled
_transforms, _forward_ad = peek_interpreter_stack, torch.autograd.forward_ad


def fast_path_forward(layer: Any, x: Tensor) -> Tensor | None:
    """y of a `lora_ext.peft.linear.Linear`, or None where `decide` has to."""
    operands = fast_path_operands(layer, x)
    return None if operands is None else lora_linear(x, *operands)


def fast_path_operands(layer: Any, x: Tensor) -> tuple | None:
    """(weight, lora_a, lora_b, bias, scaling, dropout_p) for `lora_linear`, or None."""
    state = layer.__dict__
    name = state["_active_adapter"]
    if type(name) is list and len(name) == 1:
        name = name[0]
    scaling = state["scaling"].get(name) if type(name) is str else None
    if (
        type(scaling) is not float
        or state["_disable_adapters"]
        or state["merged_adapters"]
        or state["lora_variant"]
        or not state["cast_input_dtype_enabled"]
        or type(x) is not Tensor
        or not (x.is_cpu or x.is_cuda)
        or is_traced()
        or _has_any_global_hook()
        or _transforms() is not None
        or _forward_ad._current_level >= 0
    ):
        return None
    tables = state["_modules"]
    base = tables["base_layer"]
    first, second = tables["lora_A"]._modules[name], tables["lora_B"]._modules[name]
    dropout = tables["lora_dropout"]._modules[name]
    if not (type(base) is type(first) is type(second) is _Linear) or "forward" in base.__dict__:
        return None
    for module in (base, first, second, dropout):
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return None
    kept = base._parameters
    weight, a, b = kept.get("weight"), first._parameters, second._parameters
    lora_a, lora_b = a.get("weight"), b.get("weight")
    if not (type(weight) is type(lora_a) is type(lora_b) is _Parameter):
        return None
    if type(dropout) is _Identity:
        p = 0.0
    elif type(dropout) is _Dropout and dropout.p < 1.0:
        p = dropout.p if dropout.training else 0.0
    else:
        return None
    dtype, adapter_dtype = x.dtype, lora_a.dtype
    if (
        a.get("bias") is not None
        or b.get("bias") is not None
        or weight.requires_grad
        or dtype is not weight.dtype
        or adapter_dtype is not lora_b.dtype
        or dtype not in FLOATS
        or not (adapter_dtype is dtype or (adapter_dtype is torch.float32 and dtype in HALVES))
        or lora_a.size(0) > MAX_RANK
        or x.is_nested
        or x.dim() == 0
        or _is_autocast_enabled("cpu" if x.is_cpu else "cuda")
        or "forward" in first.__dict__
        or "forward" in second.__dict__
    ):
        return None
    if state.get("packed") is not None:
        weight = layer.pack_of(weight) or weight
    return weight, lora_a, lora_b, kept.get("bias"), scaling, p
