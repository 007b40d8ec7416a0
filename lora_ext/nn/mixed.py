"""A layer whose rows have different adapters: one call of the op for the adapters with the same
dropout and dtype, and one more for each other dropout and dtype.

    y[m] = base(x)[m] + s_g ((drop(x)[m] A_g^T) B_g^T + bias_g)        g: the adapter of row m
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import HALVES
from ..functional import base_linear, lora_linear, lora_update
from ..torch_state import compute_dtype, is_autocast
from .row_index import RowIndex
from .updates import Update


def mixed_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    updates: Sequence[Update],
    rows: RowIndex,
) -> Tensor:
    """The product with a weight, plus the updates of the adapters that the layer has.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, or its pack.
        bias: ``[out]`` or None.
        updates: at least one, in the order of the block's names.
        rows: the block.
    """
    if any(update.bias is not None for update in updates):
        return mixed_onto(base_linear(x, weight, bias), x, updates, rows)
    y = None
    for part in _by_call(updates, x):
        lora_a, lora_b, scaling, p, index = _operands(part, x, rows)
        if y is None:
            y = lora_linear(x, weight, lora_a, lora_b, bias, scaling, p, index=index)
        else:
            y = lora_update(y, x, lora_a, lora_b, scaling, p, index=index)
    assert y is not None
    return y


def mixed_onto(y: Tensor, x: Tensor, updates: Sequence[Update], rows: RowIndex) -> Tensor:
    """The updates added onto y, the output of any base for x, as a new tensor of y's dtype."""
    dtype_of_base = y.dtype
    y = _with_biases(y, x.shape[:-1], updates, rows)
    for part in _by_call(updates, x):
        given = x
        dtype = part[0].lora_a.dtype
        if not (is_autocast(x) or (x.dtype in HALVES and dtype == torch.float32)):
            given = x.to(dtype)
        lora_a, lora_b, scaling, p, index = _operands(part, given, rows)
        y = lora_update(y, given, lora_a, lora_b, scaling, p, index=index)
    return y.to(dtype_of_base)


def mixed_lookup(
    y: Tensor,
    ids: Tensor,
    updates: Sequence[Update],
    rows: RowIndex,
    look_up: Callable[[Tensor], Tensor],
) -> Tensor:
    """The updates added onto y, an embedding's output for ids. S of a row is a column of A:

        y[m] + s_g A_g[:, ids[m]]^T B_g^T

    S is computed by one lookup for each adapter over all rows, r numbers a row; the product with B
    is computed by `lora_update` with an identity as A.

    Args:
        y: ``[..., dim]``.
        ids: ``[...]``.
        updates: at least one, with lora_a ``[r, vocab]``.
        rows: the block.
        look_up: looks up the ids in a table ``[vocab, r]``.
    """
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


def _operands(
    part: Sequence[Update], x: Tensor, rows: RowIndex
) -> tuple[list[Tensor], list[Tensor], Any, float, Tensor]:
    """(lora_a, lora_b, scaling, dropout_p, index) of one call."""
    lora_a = [update.lora_a for update in part]
    lora_b = [update.lora_b for update in part]
    scalings = tuple([update.scaling for update in part])
    if part[0].lora_b.dtype is torch.float64:  # a float32 scaling would be too coarse
        lora_b = [b * s for b, s in zip(lora_b, scalings, strict=True)]
        scalings = (1.0,) * len(part)
    scaling = rows.scaling_of(scalings, x.device)
    names = [update.name for update in part]
    return lora_a, lora_b, scaling, part[0].dropout, rows.index_of(x.shape[:-1], x.device, names)


def _with_biases(y: Tensor, lead: torch.Size, updates: Sequence[Update], rows: RowIndex) -> Tensor:
    """y plus each row's scaled lora_bias, in at least float32; y itself if there is none."""
    biased = [update for update in updates if update.bias is not None]
    if not biased:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    table = [update.bias.to(wide) * update.scaling for update in biased if update.bias is not None]
    table = torch.stack([torch.zeros_like(table[0]), *table])
    index = rows.index_of(lead, y.device, [update.name for update in biased])
    added = F.embedding(index + 1, table).view(*lead, -1)
    return y + added
