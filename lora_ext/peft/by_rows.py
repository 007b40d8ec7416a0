"""PEFT's layers with an adapter for each sample or token: `adapter_names`, or `use_adapters`.

PEFT's own loop over adapters computes it too, for samples; what a layer cannot do by the op is left
to that, and by token refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..nn.row_adapters import (
    Left,
    RowAdapters,
    added_by_rows,
    check_rows_can_be_told,
    linear_by_rows,
    rows_in_use,
)
from ..nn.updates import Update, is_plain
from .operands import matrix_of, update_of
from .reasons import adapter_reason, adapters_state, base_obstacle, dtype_obstacle, input_reason

BASE = "__base__"


def forward(
    layer: Any, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any], reads_base: bool = True
) -> Tensor | None:
    """y of a linear layer, or None: then its other paths compute it, or PEFT's forward with these
    kwargs, which may have become others.

    reads_base: the base is a weight that the op may take, and not only to be called
    """
    rows = rows_of_call(layer, x, args, kwargs)
    if rows is None:
        return None
    tables = layer._modules
    reason = "" if adapters_state(layer) is None else "hooks or ONNX"
    reason = reason or input_reason(layer, x)
    updates: list[Update | None] = []
    for name in rows.names:
        if name not in tables["lora_A"]._modules:
            updates.append(None)
            continue
        variant = "a variant of LoRA, such as DoRA" if name in layer.lora_variant else ""
        reason = reason or variant or adapter_reason(layer, name)
        if reason:
            return leave_to_peft(rows, x, kwargs, reason)
        updates.append(update_of(layer, name))
    if reason:
        return leave_to_peft(rows, x, kwargs, reason)
    base = tables["base_layer"]
    if reads_base and not _obstacle(base, x, updates):
        return linear_by_rows(x, matrix_of(base), base.bias, updates, rows)
    y = base(x)
    if not is_plain(y) or y.dtype not in FLOATS or y.shape[:-1] != x.shape[:-1]:
        return leave_to_peft(rows, x, kwargs, "the base returned another kind of tensor")
    return added_by_rows(y, x, updates, rows)


def rows_of_call(
    layer: Any, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> RowAdapters | None:
    """Whose the rows of x are; None where the call is not one of rows, or PEFT's own."""
    names = kwargs.get("adapter_names")
    if names is None:
        rows = rows_in_use(layer)
        if rows is None or layer._disable_adapters:
            return None
        check_rows_can_be_told(layer, x)
        if args or kwargs:
            raise RuntimeError(
                "lora_ext.use_adapters: expected a forward without further arguments, but got "
                f"{sorted(kwargs) or list(args)}"
            )
        return rows
    if layer._disable_adapters or args or len(kwargs) > 1:
        return None
    layer._check_forward_args(x, adapter_names=names)
    if torch.is_grad_enabled():
        layer.row_adapters = Left  # its checkpoint must not be computed again without the names
    return rows_of_names(names)


_last: tuple[Any, tuple[str, ...], RowAdapters] | None = None


def rows_of_names(names: Sequence[str]) -> RowAdapters:
    """PEFT gives every layer of a model the same list."""
    global _last
    last, now = _last, tuple(names)
    if last is not None and last[0] is names and last[1] == now:
        return last[2]
    distinct = tuple(dict.fromkeys(name for name in now if name != BASE))
    places = {name: place for place, name in enumerate(distinct)}
    index = torch.tensor([places.get(name, -1) for name in now], dtype=torch.int32)
    rows = RowAdapters(distinct, index)
    _last = (names, now, rows)
    return rows


def leave_to_peft(rows: RowAdapters, x: Tensor, kwargs: dict[str, Any], reason: str) -> None:
    """Has PEFT compute a call by sample, with its own argument."""
    if "adapter_names" in kwargs:
        return
    batch = len(rows.index)
    if rows.index.dim() != 1 or x.dim() == 0 or len(x) % batch:
        raise RuntimeError(
            "lora_ext.use_adapters: expected layers that the op can compute by token, but got one "
            f"that it cannot: {reason}; give an index [batch], by sample"
        )
    names = [rows.names[place] if place >= 0 else BASE for place in rows.index.tolist()]
    kwargs["adapter_names"] = [name for name in names for _ in range(len(x) // batch)]


def _obstacle(base: Any, x: Tensor, updates: Sequence[Update | None]) -> str:
    """Why base and updates are not one call of the op, or ""."""
    found = base_obstacle(base)
    if found or (base.weight.requires_grad and torch.is_grad_enabled()):
        return found or "the base weight is trained"
    for update in updates:
        if update is not None:
            found = found or dtype_obstacle(x, base.weight, update.lora_a.dtype)
    return found
