"""PEFT's linear layers on the fused op, over nn.Linear and transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn

from ..call.apply import Dense, apply
from ..call.kernel_path import kernel_path
from ..call.updates import Update, updates_obstacle
from ..nn.row_adapters import current_row_adapters
from ..packed_weight import Base, Packable, writes_weight
from ..quantized.base import QuantizedBase
from . import mixed_batch
from .fast_path import fast_path_forward
from .operands import matrix_of, operand_of, update_of
from .reasons import (
    ADDED,
    BASE,
    FUSED,
    PEFT,
    ForwardPath,
    active_names,
    adapter_reason,
    adapters_state,
    base_obstacle,
    dequantized_base,
    input_reason,
)
from .variants import LINEAR, variant_of


class Linear(Packable, mixed_batch.ByRow, peft_layers.Linear):
    """`peft.tuners.lora.Linear` with another forward and nothing else.

        y = base(x) + sum over active adapters of scaling * ((drop(x) A^T) B^T + bias)

    Parameters, state dict, merging and switching are PEFT's. `lora_ext.accelerate` sets this class
    on a layer, `lora_ext.decelerate` restores PEFT's.

    Shape:
        x ``[..., in_features]`` to y ``[..., out_features]`` in the dtype that the base returns.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if getattr(self, "row_adapters", None) is not None:  # absent after `decelerate`
            rows = current_row_adapters(self)
            if rows is not None:
                return mixed_batch.linear(self, peft_layers.Linear, x, rows, args, kwargs)
        if not (args or kwargs) and type(self) is not peft_layers.Linear:
            y = fast_path_forward(self, x)
            if y is not None:
                return y
            y = computed(self, x, linear_path(self, x))
            if y is not None:
                return y
        # Called by the class's name: hooks on the instance may keep a bound method that outlives
        # `decelerate`, in which self is of PEFT's class.
        return peft_layers.Linear.forward(self, x, *args, **kwargs)

    def packable(self) -> Base | None:
        base: Any = self._modules["base_layer"]
        if base_obstacle(base):  # its own forward is called
            return None
        return Base(base.weight, base.bias, type(base) is not nn.Linear)

    merge = writes_weight(peft_layers.Linear.merge)
    unmerge = writes_weight(peft_layers.Linear.unmerge)
    update_layer = writes_weight(peft_layers.Linear.update_layer, always=False)

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """How the next forward on an x in the base's dtype is computed, and why."""
        if self.row_adapters is not None and current_row_adapters(self) is not None:
            return mixed_batch.linear_path(self, current_row_adapters(self))
        path = linear_path(self, None)
        if path.name != FUSED or path.base is not None:
            return path.name, path.reason
        return kernel_path(operand_of(self), path.updates, rows)


def linear_path(layer: Any, x: Tensor | None) -> ForwardPath:
    """The path for x, or for an x in the base's dtype if it is None."""
    state = adapters_state(layer)
    if state is not None:
        return ForwardPath(*state)
    tables = layer._modules
    names = active_names(layer, tables["lora_A"]._modules)
    if not names:
        return ForwardPath(BASE, "none of the active adapters is in this layer")
    reason = "" if x is None else input_reason(layer, x, names)
    for name in names:
        reason = reason or adapter_reason(layer, name)
    if reason:
        return ForwardPath(PEFT, reason)
    updates = [update_of(layer, name) for name in names]
    base, kept = _base_or_reason(tables["base_layer"], x, updates)
    note = "" if base is None else base.note
    variant, reason = variant_of(LINEAR, layer, names)
    if variant is not None:
        one_dimension = x is not None and x.dim() == 1  # PEFT returns one dimension more
        reason = reason or kept or (f"{variant.name} on one row" if one_dimension else "")
    if reason:
        return ForwardPath(PEFT, reason)
    if variant is not None:
        what = "torch's base product" if base is None else note
        return ForwardPath(ADDED, f"{variant.name}: added to {what}", updates, variant, base)
    return ForwardPath(ADDED if kept else FUSED, kept or note, updates, None, base)


def _base_or_reason(
    module: Any, x: Tensor | None, updates: Sequence[Update]
) -> tuple[QuantizedBase | None, str]:
    """(base, "") for a quantised base that the op supports, (None, "") for a plain base, (None,
    reason) for a base whose own forward has to be called."""
    kept = base_obstacle(module)
    if not kept:
        return None, _call_obstacle(module.weight, x, updates)
    base = dequantized_base(module, x)
    if not isinstance(base, QuantizedBase):
        return None, base or kept
    kept = updates_obstacle(base.dtype, x, updates)
    return (None, kept) if kept else (base, "")


def computed(layer: Any, x: Tensor, path: ForwardPath) -> Tensor | None:
    """y for a path that is computed here, None for PEFT's path."""
    if path.variant is not None:
        return _of_variant(layer, x, path)
    if path.name == FUSED:
        return _fused(layer, x, path.updates, path.base)
    return called(layer, x, path.updates) if path.name == ADDED else None


def _call_obstacle(weight: Tensor, x: Tensor | None, updates: Sequence[Update]) -> str:
    """Why base and updates cannot be one call of the op, or ""."""
    if weight.requires_grad and torch.is_grad_enabled():
        return "the base weight is trained"
    return updates_obstacle(weight.dtype, x, updates)


def _fused(
    layer: Any, x: Tensor, updates: Sequence[Update], quantized: QuantizedBase | None
) -> Tensor:
    """Base and updates as one call of the op."""
    if quantized is None:
        return apply(Dense(operand_of(layer), layer._modules["base_layer"].bias), x, updates)
    return apply(quantized, x, updates)


def _of_variant(layer: Any, x: Tensor, path: ForwardPath) -> Tensor:
    """The forward of a variant of LoRA, with its one update."""
    assert path.variant is not None
    (update,), found, forward = path.updates, path.base, path.variant.forward
    if found is None:
        base = layer._modules["base_layer"]
        return forward(layer, x, matrix_of(base), base.bias, update)
    y = forward(layer, x.to(found.dtype), found.weight, found.call_bias, update)
    return y.to(found.y_dtype)


def called(layer: Any, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """The base's own forward, with the updates added onto its y."""
    return apply(layer._modules["base_layer"](x), x, updates)
