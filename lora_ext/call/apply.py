"""One call: low-rank updates on a base, of the same adapters for all rows or of each row's own.

    y    = base(x)    + sum over updates of s ((drop(x) A^T) B^T + bias)      rows: None
    y[m] = base(x)[m] + s_g ((drop(x)[m] A_g^T) B_g^T + bias_g)               rows: g of each m

It is one call of `lora_linear` if the base is a weight, and one of `lora_update` if its y is given;
rows with adapters of other dropout or dtype take one more `lora_update` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import FLOATS, HALVES
from ..invariance import refuse
from ..packed_weight import PackedWeight
from ..quantized.base import QuantizedBase
from ..torch_state import compute_dtype, is_autocast, is_onnx_export, is_plain, is_transformed
from .op import base_linear, lora_linear, lora_update
from .row_index import RowIndex
from .updates import Slots, Update, obstacle


class Dense(NamedTuple):
    """A dense weight as the base.

    Attributes:
        weight: ``[out, in]``, or its pack.
        bias: ``[out]`` or None.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None


Base = Dense | QuantizedBase | Tensor


def apply(
    base: Base, x: Tensor, updates: Sequence[Update] | Slots, rows: RowIndex | None = None
) -> Tensor:
    """The base of x plus the updates, in the dtype of the base.

    Updates on a weight have to be ones that the op takes (`updates_obstacle`, with rows
    `dtypes_obstacle`); onto a given y all are added, by torch if need be.

    Args:
        base: a weight, dense, packed or quantised, or ``[..., out]``, the y of any other base for
            x. It may be in use elsewhere, so it is never written.
        x: ``[..., in]``.
        updates: at least one; with rows in the order of the block's names. Or slots of a pool, with
            rows alone; no gradient reaches them.
        rows: the adapter of each row of x; None: all have all the updates.

    Returns:
        A new tensor ``[..., out]``.
    """
    y: Any = None
    weight: Any = None
    bias = dtype = None
    if isinstance(base, Tensor):
        if rows is None and _needs_torch(base, x, updates):
            return _by_torch(base, x, updates)
        y, dtype = base, base.dtype
    elif isinstance(base, Dense):
        weight, bias = base
    else:
        weight, bias, dtype, x = base.weight, base.call_bias, base.y_dtype, x.to(base.dtype)
    if not isinstance(updates, Slots) and any(update.bias is not None for update in updates):
        if rows is None:
            bias = _with_biases(bias, updates)
        elif y is None:
            y = apply(base_linear(x, weight, bias), x, updates, rows)
            return y if dtype is None else y.to(dtype)
        else:
            y = _with_biases_of_rows(y, x.shape[:-1], updates, rows)
    for lora_a, lora_b, scaling, p, groups in _calls(x, updates, rows):
        if y is None:
            y = lora_linear(x, weight, lora_a, lora_b, bias, scaling, p, **groups)
            continue
        given = (lora_a if isinstance(lora_a, Tensor) else lora_a[0]).dtype
        is_fit = is_autocast(x) or (x.dtype in HALVES and given == torch.float32)
        y = lora_update(y, x if is_fit else x.to(given), lora_a, lora_b, scaling, p, **groups)
    return y if dtype is None else y.to(dtype)


def _calls(
    x: Tensor, updates: Any, rows: RowIndex | None
) -> list[tuple[Any, Any, Any, float, dict[str, Any]]]:
    """(lora_a, lora_b, scaling, dropout_p, index and ranks) of each call of the op."""
    if rows is None:
        return [(*stacked(updates, x), updates[0].dropout, {})]
    if isinstance(updates, Slots):
        groups = {"index": rows.index_of(x.shape[:-1], x.device, None), "ranks": updates.ranks}
        return [(*updates[:3], 0.0, groups)]
    return [_call_of_rows(part, x, rows) for part in _by_call(updates, x)]


def stacked(updates: Sequence[Update], x: Tensor) -> tuple[Tensor, Tensor, float]:
    """(A ``[R, in]``, B ``[out, R]``, scaling) whose product is the sum of the updates.

    Half adapters become float32 if their dtype differs from that of x in the op.
    """
    first = updates[0]
    scalings = [update.scaling for update in updates]
    in_tensors = any(isinstance(scaling, Tensor) for scaling in scalings)
    one_scaling = not in_tensors and all(scaling == scalings[0] for scaling in scalings)
    factors = [(update.lora_a, update.lora_b) for update in updates]
    dtype = first.lora_a.dtype
    # A half B times a scaling would be rounded again.
    if dtype in HALVES and not (one_scaling and dtype == compute_dtype(x)):
        factors = [(a.float(), b.float()) for a, b in factors]
    if not one_scaling:
        pairs = zip(factors, scalings, strict=True)
        factors = [(a, b * scaling) for (a, b), scaling in pairs]
    scaling = float(scalings[0]) if one_scaling else 1.0
    if len(updates) == 1:
        return *factors[0], scaling
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1), scaling


def _with_biases(bias: Tensor | None, updates: Sequence[Update]) -> Tensor | None:
    """The base's bias plus those of the updates, summed in float32: the op rounds it once."""
    for update in updates:
        if update.bias is not None:
            added = update.bias * update.scaling
            if update.bias.dtype in HALVES:
                added = update.bias.float() * update.scaling
            bias = added if bias is None else bias + added
    return bias


def _by_call(updates: Sequence[Update], x: Tensor) -> list[list[Update]]:
    """The updates, grouped into lists that can be one call each, with factors for the op."""
    first = updates[0]
    dtype, dropout = first.lora_a.dtype, first.dropout
    alike = all(u.lora_a.dtype is dtype and u.dropout == dropout for u in updates)
    if alike and (dtype not in HALVES or dtype is compute_dtype(x)):
        return [list(updates)]
    parts: dict[Any, list[Update]] = {}
    for update in updates:
        dtype = update.lora_a.dtype
        if dtype in HALVES and dtype is not compute_dtype(x):
            update = update._replace(lora_a=update.lora_a.float(), lora_b=update.lora_b.float())
            dtype = torch.float32
        parts.setdefault((dtype, update.dropout), []).append(update)
    return list(parts.values())


def _call_of_rows(part: Sequence[Update], x: Tensor, rows: RowIndex) -> Any:
    lora_a = [update.lora_a for update in part]
    lora_b = [update.lora_b for update in part]
    scalings = tuple([update.scaling for update in part])
    if part[0].lora_b.dtype is torch.float64:  # a float32 scaling would be too coarse
        lora_b = [b * s for b, s in zip(lora_b, scalings, strict=True)]
        scalings = (1.0,) * len(part)
    scaling = rows.scaling_of(scalings, x.device)
    index = rows.index_of(x.shape[:-1], x.device, [update.name for update in part])
    return lora_a, lora_b, scaling, part[0].dropout, {"index": index}


def _with_biases_of_rows(
    y: Tensor, lead: torch.Size, updates: Sequence[Update], rows: RowIndex
) -> Tensor:
    """y plus each row's scaled lora_bias, in at least float32."""
    biased = [update for update in updates if update.bias is not None]
    wide = torch.promote_types(y.dtype, torch.float32)
    table = [update.bias.to(wide) * update.scaling for update in biased if update.bias is not None]
    table = torch.stack([torch.zeros_like(table[0]), *table])
    index = rows.index_of(lead, y.device, [update.name for update in biased])
    return y + F.embedding(index + 1, table).view(*lead, -1)


def _needs_torch(y: Tensor, x: Tensor, updates: Any) -> bool:
    """Whether `lora_update` cannot add the updates: a transform or an exporter that does not know
    it, y has a shape or kind that torch has to resolve, there is a bias, which is added in the
    widest dtype, or they cannot be one call."""
    lora_a, lora_b = updates[0].lora_a, updates[0].lora_b
    if not (takes_op(x) and is_plain(x) and is_plain(y)):
        return True
    if y.dtype not in FLOATS or y.device != x.device:
        return True
    if y.shape != (*x.shape[:-1], lora_b.shape[0]) or obstacle(updates, y.dtype):
        return True
    if is_autocast(x) and torch.float64 in (x.dtype, lora_a.dtype):
        return True
    return any(update.bias is not None for update in updates)


def takes_op(x: Tensor) -> bool:
    """Whether the op takes such an x, and the tracer or transform of the call the op."""
    return not (x.is_nested or is_onnx_export() or is_transformed())


def _by_torch(base: Tensor, x: Tensor, updates: Any) -> Tensor:
    """The updates added to the base's y in PEFT's order: in the widest dtype, rounded once."""
    refuse("updates that torch adds")
    total = base
    for update in updates:
        dropped = F.dropout(x.to(update.lora_a.dtype), update.dropout)
        shrunk = F.linear(dropped, update.lora_a)
        total = total + F.linear(shrunk, update.lora_b, update.bias) * update.scaling
    return total.to(base.dtype)


def mixed_lookup(
    y: Tensor,
    ids: Tensor,
    updates: Sequence[Update],
    rows: RowIndex | None,
    look_up: Callable[[Tensor], Tensor],
) -> Tensor:
    """The updates added onto y, an embedding's output for ids. S of a row is a column of A:

        y    + sum over updates of s A[:, ids]^T B^T
        y[m] + s_g A_g[:, ids[m]]^T B_g^T               rows: g of each m

    S is computed by one lookup for each adapter over all rows, r numbers a row; the product with B
    is computed by torch, or for rows of their own by `lora_update` with an identity as A.

    Args:
        y: ``[..., dim]``.
        ids: ``[...]``.
        updates: at least one, with lora_a ``[r, vocab]``.
        rows: as in `apply`.
        look_up: looks up the ids in a table ``[vocab, r]``.
    """
    if rows is None:
        refuse("an embedding")
        total = y
        for update in updates:
            total = total + (look_up(update.lora_a.t()) @ update.lora_b.t()) * update.scaling
        return total.to(y.dtype)
    index = rows.index_of(ids.shape, y.device, [update.name for update in updates])
    mine = index.view(*ids.shape, 1)
    width = max(update.lora_a.shape[0] for update in updates)
    part: Any = 0.0
    wide = torch.promote_types(y.dtype, torch.float32)
    for place, update in enumerate(updates):
        column = look_up(update.lora_a.t()).to(wide)
        column = torch.where(mine == place, column, 0.0)
        part = part + F.pad(column, (0, width - column.shape[-1]))
    eye = torch.eye(width, dtype=wide, device=y.device)
    lora_a = [eye[: update.lora_a.shape[0]] for update in updates]
    lora_b = [update.lora_b.to(wide) * update.scaling for update in updates]
    with torch.autocast(y.device.type, enabled=False):
        return lora_update(y, part, lora_a, lora_b, index=index)
