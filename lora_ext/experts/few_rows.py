"""A projection of experts with few rows each on a CPU, as when a model generates, as one op.

With so few rows the time of a product is that of reading the expert's matrix; the kernel that
computes an update's first half (shrink) is then faster than torch's `mm`. B, in which the expert is
the fastest index, is read in this layout. Experts in 4 bits are dequantised in strips of some rows,
each right before its product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lora_ext._C as _C

from ..dtypes import HALVES
from ..quantized.codes import FourBits
from ..quantized.stack import QuantizedStack
from .operands import Projection

# The most rows of one expert. With 16 experts x (1536, 2048), r = 16, the op takes .68 of the time
# of a product for each expert with the update after it for one row, .70 for two, .85 for three,
# .80 for four.
MOST_ROWS = 4

_op = torch.ops.lora_ext.experts_few_rows


def forward(
    x: Tensor, projection: Projection, ends: list[int] | None
) -> tuple[Tensor, Tensor] | None:
    """(y ``[S, out]``, s ``[S, R]`` in float32), or None if the op does not support the call.

    Args:
        x: ``[S, in]``, or ``[T, in]`` if the projection has its rows by token.
        ends: of the routes, as Python numbers; as of `Updates`.
    """
    weight, bias = projection.weight, projection.bias
    is_plain = projection.seed is None and not projection.row_block
    found = _places_of(ends, projection) if is_plain and ends and _supports(projection) else None
    if found is None:
        return None
    blocks: dict[str, Any] = {}
    if not isinstance(weight, Tensor):
        codes, (count, rows, columns) = weight.codes, weight.sizes
        assert isinstance(codes, FourBits)
        weight = codes.codes.view(count, rows, columns // 2)
        blocks = codes.words() | {"scale": codes.scale}
    return _op(
        x if x.stride(1) == 1 else x.contiguous(),
        projection.token(),
        weight,
        None if bias is None else bias.contiguous(),
        [each.contiguous() for each in projection.lora_a],
        [each.contiguous() for each in projection.lora_b],
        list(projection.scalings),
        *found,
        **blocks,
    )


def _supports(projection: Projection) -> bool:
    weight = projection.weight
    if not (weight.is_cpu and weight.dtype in HALVES and _has_layout(weight)):
        return False
    every = (*projection.lora_a, *projection.lora_b)
    is_known = all(each.dtype in (*HALVES, torch.float32) for each in every)
    return is_known and _C.cpu_isa() != "library"


def _has_layout(weight: Tensor | QuantizedStack) -> bool:
    """Whether the op reads matrices that are stored like this."""
    if isinstance(weight, Tensor):
        return 1 in weight.stride()[1:]
    if not isinstance(weight.codes, FourBits) or weight.is_transposed:
        return False
    return weight.sizes[2] % weight.codes.block == 0


def _places_of(
    ends: list[int], projection: Projection
) -> tuple[list[int], list[int] | None] | None:
    """(the expert of each row; its adapter, or -1, if rows have one each); None if some expert has
    too many rows, or a row no expert."""
    kinds, is_by_row = len(ends) // projection.weight.shape[0], projection.routes.ends is not None
    experts, adapters, last = [], [], 0
    if ends[-1] < len(projection.routes.perm):
        return None
    for place, end in enumerate(ends):
        if end > last:
            expert = place // kinds
            if end - (ends[expert * kinds - 1] if expert else 0) > MOST_ROWS:
                return None
            experts += [expert] * (end - last)
            adapters += [place % kinds - 1] * (end - last)
            last = end
    return experts, adapters if is_by_row else None
