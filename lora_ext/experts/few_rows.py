"""Products of experts that have one row each, as when a model generates.

A product of one row is a read of the matrix. Shrink, the first half of an update, reads a matrix
faster than torch's `mm` does, and takes an expert a thread: so matrices are seen as a pool of
factors, each of the largest rank that the op knows, whose S is the product.

    S = x W_e[c]^T        for each expert e and each cut c of its output
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import HALVES
from ..nn.adapter_spec import MAX_RANK

_update = torch.ops.lora_ext.lora_update_grouped_forward


def takes(weight: Tensor, experts: Sequence[tuple[int, int, int]]) -> bool:
    """Whether `product` is the faster one for (number, begin, end) of each expert."""
    if not weight.is_cpu or weight.dtype not in HALVES or weight.shape[1] % _cuts(weight):
        return False
    return all(end - begin == 1 for _, begin, end in experts)


def _cuts(weight: Tensor) -> int:
    return -(-weight.shape[1] // MAX_RANK)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Sequence[int]) -> Tensor:
    """x W_e^T + b_e ``[rows, out]`` in float32.

    Args:
        x: ``[rows, in]``.
        weight: ``[E, out, in]``.
        bias: ``[E, out]`` or None.
        experts: of each row.
    """
    cuts = _cuts(weight)
    pool = weight.unflatten(1, (cuts, -1))
    rank = pool.shape[2]
    first = [part for expert in experts for part in pool[expert].unbind()]
    nothing = weight.new_zeros(1, rank)  # the other half of the update adds to one column
    rows = x.repeat_interleave(cuts, 0)
    _, s = _update(
        x.new_zeros(len(rows), 1),
        rows,
        first,
        [nothing] * len(first),
        torch.ones(len(first)),
        torch.arange(len(first), dtype=torch.int32),
        None,
        None,
        0.0,
        None,
        0,
        0,
    )
    y = s.view(len(x), -1)
    return y if bias is None else y + bias[list(experts)]
