"""A projection of experts with few rows each on a CPU, as when a model generates, as one op.

With so few rows the time of a product is that of reading the expert's matrix; the kernel that
computes an update's first half (shrink) is then faster than torch's `mm`. B, in which the expert is
the fastest index, is read in this layout. Experts in 4 bits are dequantised in strips of some rows,
each right before its product.
"""

from __future__ import annotations

from operator import sub
from typing import Any

import torch
from torch import Tensor

import lora_ext._C as _C

from ..dtypes import HALVES
from ..quantized.codes import FourBits
from ..quantized.stack import QuantizedStack
from .expert_groups import Rows

# The most rows of one expert. With 16 experts x (1536, 2048), r = 16, the op takes .68 of the time
# of a product for each expert with the update after it for one row, .70 for two, .85 for three,
# .80 for four.
MOST_OF_AN_EXPERT = 4

_op = torch.ops.lora_ext.experts_few_rows


def takes(rows: Rows) -> bool:
    """Whether the op computes a forward."""
    projection = rows.projection
    weight, factors = projection.weight, (*projection.lora_a, *projection.lora_b)
    return (
        weight.is_cpu
        and weight.dtype in HALVES
        and not (projection.dropout_p or projection.row_block)
        and _has_layout(weight)
        and all(each.dtype in (*HALVES, torch.float32) for each in factors)
        and _C.cpu_isa() != "library"
        and _are_few(rows)
    )


def forward(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """s is in float32."""
    projection = rows.projection
    weight, bias = projection.weight, projection.bias
    runs = list(rows.runs(0, len(weight)))
    experts, adapters = ([run[i] for run in runs for _ in range(run[2])] for i in range(2))
    blocks: dict[str, Any] = {}
    if not isinstance(weight, Tensor):
        codes, (count, out, within) = weight.codes, weight.sizes
        assert isinstance(codes, FourBits)
        weight = codes.codes.view(count, out, within // 2)
        blocks = codes.words() | {"scale": codes.scale}
    return _op(
        x if x.stride(1) == 1 else x.contiguous(),
        projection.token(),
        weight,
        None if bias is None else bias.contiguous(),
        [each.contiguous() for each in projection.lora_a],
        [each.contiguous() for each in projection.lora_b],
        list(projection.scalings),
        experts,
        None if projection.routes.ends is None else adapters,
        **blocks,
    )


def _has_layout(weight: Tensor | QuantizedStack) -> bool:
    """Whether the op reads matrices that are stored like this."""
    if isinstance(weight, Tensor):
        return 1 in weight.stride()[1:]
    if not isinstance(weight.codes, FourBits) or weight.is_transposed:
        return False
    return weight.sizes[2] % weight.codes.block == 0


def _are_few(rows: Rows) -> bool:
    """Whether each row has an expert, and no expert too many."""
    most = max(map(sub, rows.bounds, [0, *rows.bounds]))
    return most <= MOST_OF_AN_EXPERT and rows.bounds[-1] == len(rows)
