"""Calls a module once for the rows of each adapter, each time with W + B A of one adapter: as of a
router, whose forward goes on to softmax and top-k after its product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_state import is_traced


def by_adapter(
    call: Callable[[str | None, Tensor], Any], x: Tensor, index: Tensor, names: Sequence[str]
) -> Any:
    """The outputs of all rows, in their order.

    Args:
        call: the module with the weight of one adapter, None for its own, for some rows of x, whose
            dimensions before the last but one are then 1: returns a tensor, or a tuple of tensors,
            which begin with the dimensions of its x without the features, or with the rows.
        x: ``[..., in]``.
        index: int32 ``[rows]``, the place of each row's adapter in names, or -1.
        names: of the adapters.

    Returns:
        As from a call with x.

    Raises:
        ValueError: the module returns something else than rows.
    """
    lead = x.shape[:-1]
    if is_traced():  # how many rows each has is not known: all rows with each
        outputs = [call(name, x) for name in (None, *names)]
        return _zipped(outputs, [lead] * len(outputs), lead, lambda parts: _chosen(parts, index))
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index + 1, minlength=len(names) + 1).tolist()
    here = [pair for pair in zip((None, *names), counts, strict=True) if pair[1]]
    if len(here) <= 1:
        return call(here[0][0] if here else None, x)
    back = torch.argsort(order)
    leads = [torch.Size((*[1] * (len(lead) - 1), count)) for _, count in here]
    split = x.reshape(-1, x.shape[-1])[order].split([count for _, count in here])
    outputs = [
        call(name, part.view(*own, -1))
        for (name, _), part, own in zip(here, split, leads, strict=True)
    ]
    return _zipped(outputs, leads, lead, lambda parts: torch.cat(parts)[back])


def _chosen(parts: list[Tensor], index: Tensor) -> Tensor:
    """Of each row the output of its adapter; parts begin with that of the base."""
    own = (index + 1).long().view(-1, *[1] * (parts[0].dim() - 1))
    chosen = parts[0]
    for place, part in enumerate(parts[1:], 1):
        chosen = torch.where(own == place, part, chosen)
    return chosen


def _zipped(
    outputs: list[Any],
    leads: list[torch.Size],
    lead: torch.Size,
    join: Callable[[list[Tensor]], Tensor],
) -> Any:
    """The joined outputs.

    Args:
        leads: of the x of each output the shape without the features.
        lead: of the x of all rows.
        join: of tensors whose first dimension is the rows.
    """
    if isinstance(outputs[0], tuple):
        columns = list(zip(*outputs, strict=True))
        return tuple(_zipped(list(column), leads, lead, join) for column in columns)
    pairs = list(zip(outputs, leads, strict=True))
    if all(isinstance(each, Tensor) and each.shape[: len(own)] == own for each, own in pairs):
        last = len(lead) - 1
        return join([each.flatten(0, last) for each in outputs]).unflatten(0, lead)
    for each, own in pairs:
        count = own.numel()
        if not isinstance(each, Tensor) or each.dim() == 0 or len(each) != count:
            got = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                "lora_ext.use_adapters: expected a module with adapters on its matrices to return "
                f"tensors of {count} rows, as a router, but got {got}; use one adapter for the "
                "whole batch, or leave the module out of the adapters"
            )
    return join(outputs)
