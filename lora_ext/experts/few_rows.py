"""A projection of experts with few rows each on a CPU, as when a model generates, as one op.

With so few rows the time of a product is that of reading the expert's matrix; the kernel that
computes an update's first half (shrink) is then faster than torch's `mm`. B, in which the expert is
the fastest index, is read in this layout. Experts in 4 bits are dequantised in strips of some rows,
each right before its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..dtypes import HALVES
from ..quantized.four_bit_stack import FourBitStack
from ..quantized.stack import QuantizedStack
from .factors import Factors

# The most rows of one expert. With 16 experts x (1536, 2048), r = 16, the op takes .68 of the time
# of a product for each expert with the update after it for one row, .70 for two, .85 for three,
# .80 for four.
MOST_ROWS = 4

_op = torch.ops.lora_ext.experts_few_rows


def numbers_of(
    bounds: Sequence[int], rows: int, weight: Tensor | QuantizedStack, factors: Factors | None
) -> list[int]:
    """The expert of each row; an empty list if the op does not support the call.

    Args:
        bounds: the end of each expert's rows.
        rows: the number of all rows.
    """
    if not (weight.is_cpu and weight.dtype in HALVES and _has_layout(weight)):
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


def _has_layout(weight: Tensor | QuantizedStack) -> bool:
    """Whether the op reads matrices that are stored like this."""
    if isinstance(weight, Tensor):
        return 1 in weight.stride()[1:]
    if not isinstance(weight, FourBitStack) or weight.is_transposed:
        return False
    return weight.sizes[2] % weight.blocks.size == 0


def forward(
    x: Tensor,
    token: Tensor | None,
    weight: Tensor | QuantizedStack,
    bias: Tensor | None,
    factors: Factors | None,
    numbers: list[int],
) -> tuple[Tensor, Tensor]:
    """Returns (y ``[S, out]``, s ``[S, R]`` in float32).

    Args:
        x: ``[S, in]``, or ``[T, in]`` with tokens.
        token: ``[S]``: the index in x of each row.
        weight: ``[E, out, in]``, or quantised.
        bias: ``[E, out]`` or None.
        factors: of the active adapters, or of those that rows have; or None.
        numbers: the expert of each row.
    """
    lora_a, lora_b, scalings, ends = factors or ((), (), (), None)
    blocks: dict[str, Any] = {}
    if isinstance(weight, FourBitStack):
        weight, blocks = _codes_of(weight)
    assert isinstance(weight, Tensor)
    return _op(
        x if x.stride(1) == 1 else x.contiguous(),
        token,
        weight,
        None if bias is None else bias.contiguous(),
        [each.contiguous() for each in lora_a],
        [each.contiguous() for each in lora_b],
        list(scalings),
        numbers,
        None if ends is None else _adapters_of(ends, len(lora_a)),
        **blocks,
    )


def _adapters_of(ends: Tensor, adapters: int) -> list[int]:
    """The adapter of each row, or -1."""
    found, last = [], 0
    for place, end in enumerate(ends.tolist()):
        if end > last:
            found += [place % (adapters + 1) - 1] * (end - last)
            last = end
    return found


def _codes_of(stack: FourBitStack) -> tuple[Tensor, dict[str, Any]]:
    """The codes ``[E, out, in / 2]`` and the op's other arguments."""
    count, rows, columns = stack.sizes
    words = {"scale": stack.scale, "table": stack.blocks.table, "block": stack.blocks.size}
    if stack.nested is not None:
        names = ("scale_table", "scale_scale", "scale_offset", "scale_block")
        words |= dict(zip(names, stack.nested, strict=True))
    return stack.codes.view(count, rows, columns // 2), words
