"""Low-rank updates of one matrix as values, and which of them can be one call of the op.

A layer of this package or of PEFT describes its active adapters as `Update`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import HALVES
from ..torch_state import is_autocast

MAX_RANK = 512  # kMaxRank of csrc/common/bounds.h


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
    dtype: torch.dtype, x: Tensor | None, updates: Sequence[Update] | Slots, rows: Any = None
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
