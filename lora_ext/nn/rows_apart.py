"""Calls a module once for the rows of each adapter, each time with W + B A of one adapter: as of a
router, whose forward goes on to softmax and top-k after its product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_state import is_traced


def by_adapter(call: Callable[[int, Tensor], Any], x: Tensor, index: Tensor, adapters: int) -> Any:
    """The outputs of all rows, in their order.

    Args:
        call: the module with the weight of one adapter, -1 for its own, for some rows of x:
            returns a tensor, or a tuple of tensors, whose first dimension is the rows.
        x: ``[..., in]``.
        index: int32 ``[rows]``, the adapter of each row, or -1.
        adapters: their number.

    Returns:
        As from a call with all rows of an x of two dimensions.

    Raises:
        ValueError: the module returns something else than rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    if is_traced():  # how many rows each has is not known: all rows with each
        outputs = [call(place, rows) for place in range(-1, adapters)]
        return _zipped(outputs, [len(rows)] * len(outputs), lambda parts: _chosen(parts, index))
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index + 1, minlength=adapters + 1).tolist()
    here = [(place - 1, count) for place, count in enumerate(counts) if count]
    if len(here) <= 1:
        return call(here[0][0] if here else -1, rows)
    back = torch.argsort(order)
    split = rows[order].split([count for _, count in here])
    outputs = [call(place, part) for (place, _), part in zip(here, split, strict=True)]
    return _zipped(outputs, [count for _, count in here], lambda parts: torch.cat(parts)[back])


def _chosen(parts: list[Tensor], index: Tensor) -> Tensor:
    """Of each row the output of its adapter; parts begin with that of the base."""
    own = (index + 1).long().view(-1, *[1] * (parts[0].dim() - 1))
    chosen = parts[0]
    for place, part in enumerate(parts[1:], 1):
        chosen = torch.where(own == place, part, chosen)
    return chosen


def _zipped(outputs: list[Any], rows: list[int], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """The joined outputs; of each output its rows are the first dimension."""
    first = outputs[0]
    if isinstance(first, tuple):
        columns = list(zip(*outputs, strict=True))
        return tuple(_zipped(list(column), rows, join) for column in columns)
    for each, count in zip(outputs, rows, strict=True):
        if not isinstance(each, Tensor) or each.dim() == 0 or len(each) != count:
            got = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                "lora_ext.use_adapters: expected a module with adapters on its matrices to return "
                f"tensors of {count} rows, as a router, but got {got}; use one adapter for the "
                "whole batch, or leave the module out of the adapters"
            )
    return join(outputs)
