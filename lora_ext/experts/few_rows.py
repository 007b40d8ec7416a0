"""A projection of experts that have few rows each on a CPU, as when a model generates: one op.

A product of so few rows is a read of the expert's matrix, for which the kernel of an update's first
half is faster than torch's `mm`. B, whose fastest index is the expert, is read as it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..dtypes import HALVES
from .factors import Factors

# Rows of one expert. Of 16 experts x (1536, 2048), r = 16, the op takes .68 of a product for each
# expert and the update after it with one row, .70 with two, .85 with three, .80 with four.
MOST_ROWS = 4

_op = torch.ops.lora_ext.experts_few_rows


def numbers_of(
    bounds: Sequence[int], rows: int, weight: Tensor, factors: Factors | None
) -> list[int]:
    """The expert of each row; nothing where the op does not take them.

    Args:
        bounds: where each expert's rows end.
        rows: all of them.
    """
    if not weight.is_cpu or weight.dtype not in HALVES or 1 not in weight.stride()[1:]:
        return []
    if bounds[-1] < rows or _C.cpu_isa() == "library":
        return []
    if factors is not None:
        every = (*factors.lora_a, *factors.lora_b)
        if any(each.dtype not in (*HALVES, torch.float32) for each in every):
            return []
    numbers, last = [], 0
    for number, end in enumerate(bounds):
        if end > last:
            if end - last > MOST_ROWS:
                return []
            numbers += [number] * (end - last)
            last = end
    return numbers


def forward(
    x: Tensor,
    token: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors | None,
    numbers: list[int],
) -> tuple[Tensor, Tensor]:
    """(y ``[S, out]``, s ``[S, R]`` in float32).

    Args:
        x: ``[S, in]``, or ``[T, in]`` with tokens.
        token: ``[S]``: where in x each row is.
        weight: ``[E, out, in]``.
        bias: ``[E, out]`` or None.
        factors: of the active adapters, or None.
        numbers: the expert of each row.
    """
    lora_a, lora_b, scalings = factors or ((), (), ())
    return _op(
        x if x.stride(1) == 1 else x.contiguous(),
        token,
        weight,
        None if bias is None else bias.contiguous(),
        [each.contiguous() for each in lora_a],
        [each.contiguous() for each in lora_b],
        list(scalings),
        numbers,
    )
