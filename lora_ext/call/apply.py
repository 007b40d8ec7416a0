"""One call: low-rank updates on a base, of the same adapters for all rows or of each row's own.

    y    = base(x)    + sum over updates of s ((drop(x) A^T) B^T + bias)      rows: None
    y[m] = base(x)[m] + s_g ((drop(x)[m] A_g^T) B_g^T + bias_g)               rows: g of each m

It is one call of `lora_linear` if the base is a weight, and one of `lora_update` if its y is given;
rows with adapters of other dropout or dtype take one more `lora_update` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_ext._C as _C

from ..dtypes import FLOATS, HALVES
from ..invariance import refuse
from ..packed_weight import PackedWeight
from ..quantized.weight import QuantizedBase
from ..rows.row_index import RowIndex
from ..torch_state import compute_dtype, is_autocast, is_onnx_export, is_plain, is_transformed
from .op import base_linear, lora_linear, lora_update

MAX_RANK = _C.max_rank


class Update(NamedTuple):
    """scaling * ((drop(x) lora_a^T) lora_b^T + bias), the update of one active adapter.

    Attributes:
        name: of the adapter, for messages.
        lora_a: ``[r, in]``.
        lora_b: ``[out, r]``.
        bias: ``[out]``, PEFT's lora_bias.
        scaling: a float, or a tensor of one element, which can change without a new graph.
        dropout: the probability for this call, 0 outside training.
    """

    name: str
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout: float


class Slots(NamedTuple):
    """The updates of all slots of a pool, of which each row has one, or none.

    Attributes:
        lora_a: ``[capacity, max_rank, in]``.
        lora_b: ``[capacity, out, max_rank]``.
        scaling: float32 ``[capacity]``.
        ranks: int32 ``[capacity]``.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    ranks: Tensor


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

    Updates on a weight have to be ones that the op takes (`updates_obstacle`); onto a given y all
    are added, by torch if need be.

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
    bias = dtype = rounded_to = index_of = None
    is_biased = has_bias(updates)
    if rows is not None:
        index_of = partial(rows.index_of, x.shape[:-1], x.device)
    if isinstance(base, Tensor):
        if rows is None and (is_biased or _needs_torch(base, x, updates)):
            return _by_torch(base, x, updates)
        y, dtype = base, base.dtype
    elif isinstance(base, Dense):
        weight, bias = base
    else:
        weight, bias, dtype, x = base.weight, base.call_bias, base.y_dtype, x.to(base.dtype)
    if is_biased and index_of is None:
        bias = _with_biases(bias, updates)
    elif is_biased:
        y = base_linear(x, weight, bias) if y is None else y
        rounded_to = y.dtype  # with the biases y is in at least float32
        y = _with_biases_of_rows(y, updates, index_of)
    for lora_a, lora_b, scaling, p, groups in _calls(updates, compute_dtype(x), rows, index_of):
        if y is None:
            y = lora_linear(x, weight, lora_a, lora_b, bias, scaling, p, **groups)
            continue
        given = (lora_a if isinstance(lora_a, Tensor) else lora_a[0]).dtype
        is_fit = is_autocast(x) or (x.dtype in HALVES and given == torch.float32)
        y = lora_update(y, x if is_fit else x.to(given), lora_a, lora_b, scaling, p, **groups)
    y = y if rounded_to is None else y.to(rounded_to)
    return y if dtype is None else y.to(dtype)


def has_bias(updates: Sequence[Update] | Slots) -> bool:
    """Whether any update has a lora_bias."""
    return not isinstance(updates, Slots) and any(each.bias is not None for each in updates)


def _calls(
    updates: Any, dtype: torch.dtype, rows: RowIndex | None, index_of: Any
) -> list[tuple[Any, Any, Any, float, dict[str, Any]]]:
    """(lora_a, lora_b, scaling, dropout_p, index and ranks) of each call of the op.

    Args:
        dtype: in which the op has x.
        index_of: names of adapters -> the index of x's rows into them; None: into slots.
    """
    if rows is None:
        return [(*stacked(updates, dtype), updates[0].dropout, {})]
    if isinstance(updates, Slots):
        return [(*updates[:3], 0.0, {"index": index_of(None), "ranks": updates.ranks})]
    calls = []
    for part in _by_call(updates, dtype):
        lora_a = [update.lora_a for update in part]
        lora_b = [update.lora_b for update in part]
        scalings = tuple([update.scaling for update in part])
        if lora_b[0].dtype is torch.float64:  # a float32 scaling would be too coarse
            lora_b = [b * s for b, s in zip(lora_b, scalings, strict=True)]
            scalings = (1.0,) * len(part)
        index = index_of([update.name for update in part])
        scaling = rows.scaling_of(scalings, index.device)
        calls.append((lora_a, lora_b, scaling, part[0].dropout, {"index": index}))
    return calls


def stacked(updates: Sequence[Update], x_dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
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
    if dtype in HALVES and not (one_scaling and dtype == x_dtype):
        factors = [(a.float(), b.float()) for a, b in factors]
    if not one_scaling:
        pairs = zip(factors, scalings, strict=True)
        factors = [(a, b * scaling) for (a, b), scaling in pairs]
    scaling = float(scalings[0]) if one_scaling else 1.0
    if len(updates) == 1:
        return *factors[0], scaling
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1), scaling


def _with_biases(bias: Tensor | None, updates: Any) -> Tensor | None:
    """The base's bias plus those of the updates, summed in float32: the op rounds it once."""
    for update in updates:
        if update.bias is not None:
            added = update.bias * update.scaling
            if update.bias.dtype in HALVES:
                added = update.bias.float() * update.scaling
            bias = added if bias is None else bias + added
    return bias


def _by_call(updates: Sequence[Update], x_dtype: torch.dtype) -> list[list[Update]]:
    """The updates, grouped into lists that can be one call each, with factors for the op."""
    first = updates[0]
    dtype, dropout = first.lora_a.dtype, first.dropout
    alike = all(u.lora_a.dtype is dtype and u.dropout == dropout for u in updates)
    if alike and (dtype not in HALVES or dtype is x_dtype):
        return [list(updates)]
    parts: dict[Any, list[Update]] = {}
    for update in updates:
        dtype = update.lora_a.dtype
        if dtype in HALVES and dtype is not x_dtype:
            update = update._replace(lora_a=update.lora_a.float(), lora_b=update.lora_b.float())
            dtype = torch.float32
        parts.setdefault((dtype, update.dropout), []).append(update)
    return list(parts.values())


def _with_biases_of_rows(y: Tensor, updates: Any, index_of: Any) -> Tensor:
    """y plus each row's scaled lora_bias, in at least float32."""
    biased = [update for update in updates if update.bias is not None]
    wide = torch.promote_types(y.dtype, torch.float32)
    table = [update.bias.to(wide) * update.scaling for update in biased]
    table = torch.stack([torch.zeros_like(table[0]), *table])
    index = index_of([update.name for update in biased])
    return y + F.embedding(index + 1, table).view(y.shape)


def _needs_torch(y: Tensor, x: Tensor, updates: Any) -> bool:
    """Whether `lora_update` cannot add the updates: a transform or an exporter that does not know
    it, y has a shape or kind that torch has to resolve, or they cannot be one call."""
    lora_a, lora_b = updates[0].lora_a, updates[0].lora_b
    if not (takes_op(x) and is_plain(x) and is_plain(y)):
        return True
    if y.dtype not in FLOATS or y.device != x.device:
        return True
    if y.shape != (*x.shape[:-1], lora_b.shape[0]) or obstacle(updates, y.dtype):
        return True
    return is_autocast(x) and torch.float64 in (x.dtype, lora_a.dtype)


def takes_op(x: Tensor) -> bool:
    """Whether the op takes such an x, and the tracer or transform of the call the op."""
    return not (x.is_nested or is_onnx_export() or is_transformed())


def _by_torch(base: Tensor, x: Tensor, updates: Any) -> Tensor:
    """The updates, some with a bias, added to the base's y in PEFT's order: in the widest dtype,
    rounded once."""
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


def obstacle(updates: Sequence[Update], dtype: torch.dtype) -> str:
    """Why updates on a base in this dtype cannot be one call of the op, or ""."""
    for update in updates:
        if update.bias is not None and update.bias.itemsize > dtype.itemsize:
            return f"the lora_bias of {update.name!r} has a wider dtype than the layer's output"
    first = updates[0]
    for update in updates[1:]:
        if update.lora_a.dtype != first.lora_a.dtype:
            return f"adapters {first.name!r} and {update.name!r} differ in dtype"
        if update.dropout != first.dropout:
            return f"adapters {first.name!r} and {update.name!r} differ in dropout"
    if sum(update.lora_a.shape[0] for update in updates) > MAX_RANK:
        return f"the ranks of the active adapters sum to more than {MAX_RANK}"
    return ""


def dtype_obstacle(x: Tensor, weight: torch.dtype, adapter: torch.dtype) -> str:
    """Why these dtypes cannot be in one call of the op, or ""."""
    if is_autocast(x):
        if torch.float64 in (x.dtype, weight, adapter):
            return "float64 under autocast"
        return ""
    if x.dtype != weight:
        return "x and the base weight differ in dtype"
    if adapter == x.dtype or (x.dtype in HALVES and adapter in (torch.float32, *HALVES)):
        return ""
    if x.dtype == torch.float32 and adapter in HALVES:
        return ""
    return "the adapters have neither x's dtype nor float32"


def updates_obstacle(
    dtype: torch.dtype,
    x: Tensor | None,
    updates: Sequence[Update] | Slots,
    rows: RowIndex | None = None,
) -> str:
    """Why updates on a base that multiplies in `dtype` cannot be one call of the op, or "".

    Args:
        x: None: the dtypes of x are not looked at.
        rows: None if all rows have all updates; else only dtypes can be an obstacle.
    """
    if isinstance(updates, Slots):
        return ""
    if rows is None and dtype in HALVES and any(update.bias is not None for update in updates):
        # The op would round the sum of both biases, and sum dy over a float32 copy of it.
        return "a lora_bias beside a 16-bit base weight"
    dtypes = dict.fromkeys(update.lora_a.dtype for update in updates)
    reasons = () if x is None else (dtype_obstacle(x, dtype, each) for each in dtypes)
    return next(filter(None, reasons), "") or (obstacle(updates, dtype) if rows is None else "")
