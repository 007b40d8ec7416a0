"""PEFT's linear layers on the fused op, over nn.Linear and transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn

from ..call import Call, Decision, Path
from ..call.apply import Dense, Update, apply, updates_obstacle
from ..call.decision import by_row, example, fused
from ..call.op import lora_linear
from ..dtypes import FLOATS, HALVES
from ..nn.adapter_spec import MAX_RANK
from ..packed_weight import Base, Packable, PackedWeight, writes_weight
from ..quantized.weight import QuantizedBase
from ..rows.row_adapters import RowAdapters, current_row_adapters
from ..torch_state import has_any_global_hook, is_forward_ad, is_plain, is_traced, transforms
from .layer import Accelerated, by_peft, forward_over, names_of, settled
from .reasons import base_obstacle, dequantized_base, input_reason, update_of
from .variants import LINEAR, variant_of

_Parameter, _Linear, _Identity, _Dropout = nn.Parameter, nn.Linear, nn.Identity, nn.Dropout
_is_autocast_enabled = torch.is_autocast_enabled


class OverLinear(Accelerated):
    """A mix-in placed before PEFT's class of a layer over any linear base."""

    def decide(self: Any, call: Call) -> Decision:
        rows, tables = call.rows, self._modules
        names = names_of(self, tables["lora_A"]._modules, rows)
        found = settled(self, call, names)
        if found is not None:
            return found
        reason = input_reason(self, call.x, names)
        updates: Any = [] if reason else [update_of(self, name) for name in names]
        reason = reason or next((each for each in updates if isinstance(each, str)), "")
        if reason:
            return by_peft(self, call, reason)
        base, kept = _base_or_reason(self, call, updates)
        variant, reason = (None, "") if rows is not None else variant_of(LINEAR, self, names)
        if variant is not None:
            one_dimension = call.x.dim() == 1  # PEFT returns one dimension more
            reason = reason or kept or (f"{variant.name} on one row" if one_dimension else "")
        if reason:
            return by_peft(self, call, reason)
        if variant is not None:
            what, dequantized = "x W^T by torch", None
            if isinstance(base, QuantizedBase):
                what, dequantized = base.note, base
            run = partial(_of_variant, self, variant.forward, updates[0], base)
            reason = f"{variant.name}: added to {what}"
            return Decision(run, Path.ADDED, reason, None, dequantized)
        if kept:
            run = partial(_added, self, call, updates)
            return Decision(run, Path.ADDED, by_row(call, names, kept))
        return fused(call, base, updates)

    def example(self: Any, rows: int | None, block: RowAdapters | None) -> Tensor:
        base = self._modules["base_layer"]
        found = dequantized_base(base, None)
        stored = (base._parameters.get("weight"), *self._modules["lora_A"].parameters())
        dtypes = [tensor.dtype for tensor in stored if tensor is not None]
        dtype = next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)
        dtype = found.dtype if isinstance(found, QuantizedBase) else dtype
        return example(self, dtype, rows, block, self.in_features)


_forward = forward_over(peft_layers.Linear)


class Linear(Packable, OverLinear, peft_layers.Linear):
    """`peft.tuners.lora.Linear` with another forward and nothing else.

        y = base(x) + sum over active adapters of scaling * ((drop(x) A^T) B^T + bias)

    Parameters, state dict, merging and switching are PEFT's. `lora_ext.accelerate` sets this class
    on a layer, `lora_ext.decelerate` restores PEFT's.

    Shape:
        x ``[..., in_features]`` to y ``[..., out_features]`` in the dtype that the base returns.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_ours = not (args or kwargs) and type(self) is not peft_layers.Linear
        if is_ours and (self.row_adapters is None or current_row_adapters(self) is None):
            operands = fast_path_operands(self, x)
            if operands is not None:
                return lora_linear(x, *operands)
        return _forward(self, x, *args, **kwargs)

    def packable(self) -> Base | None:
        base: Any = self._modules["base_layer"]
        if base_obstacle(base):  # its own forward is called
            return None
        return Base(base.weight, base.bias, type(base) is not nn.Linear)

    merge = writes_weight(peft_layers.Linear.merge)
    unmerge = writes_weight(peft_layers.Linear.unmerge)
    update_layer = writes_weight(peft_layers.Linear.update_layer, always=False)


def _base_or_reason(layer: Any, call: Call, updates: Sequence[Update]) -> tuple[Any, str]:
    """(`Dense` or `QuantizedBase`, "") for a base that the op takes, (_, reason) for one whose own
    forward has to be called."""
    module, x, rows = layer._modules["base_layer"], call.x, call.rows
    kept = base_obstacle(module)
    if not kept:
        weight = module.weight
        if weight.requires_grad and torch.is_grad_enabled():
            return None, "the base weight is trained"
        matrix = weight if type(module) is nn.Linear else weight.t()
        base = Dense(layer.pack_of(weight) or matrix, module.bias)
        return base, updates_obstacle(weight.dtype, x, updates, rows)
    base = dequantized_base(module, x)
    if not isinstance(base, QuantizedBase):
        return None, base or kept
    return base, "" if rows is not None else updates_obstacle(base.dtype, x, updates)


def _of_variant(layer: Any, compute: Any, update: Update, base: Any, x: Tensor) -> Tensor:
    """The forward of a variant of LoRA, with its one update."""
    if isinstance(base, Dense):
        weight = base.weight.matrix if isinstance(base.weight, PackedWeight) else base.weight
        return compute(layer, x, weight, base.bias, update)
    y = compute(layer, x.to(base.dtype), base.weight, base.call_bias, update)
    return y.to(base.y_dtype)


def _added(layer: Any, call: Call, updates: Sequence[Update], x: Tensor) -> Tensor:
    """The base's own forward, with the updates added onto its y."""
    y = layer._modules["base_layer"](x)
    if call.rows is not None and (not is_plain(y) or y.shape[:-1] != x.shape[:-1]):
        return by_peft(layer, call, "the base layer's output has another shape or class").run(x)
    return apply(y, x, updates, call.rows)


def fast_path_operands(layer: Any, x: Tensor) -> tuple | None:
    """(weight, lora_a, lora_b, bias, scaling, dropout_p) of one plain adapter on a plain nn.Linear,
    the most common forward, for `lora_linear`; or None.

    `OverLinear.decide` handles all cases and gives the reason; with small inputs it would take as
    long as the products. Here the decision takes a few microseconds; the conditions imply that it
    would be "fused" with the same operands (tested).
    """
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
        or has_any_global_hook()
        or transforms() is not None
        or is_forward_ad()
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
