"""Dropout of the input of a projection's update, for rows that are sorted by expert.

    drop(x)[j] = keep_scale * mask[rows[j]] * x[j]        for the sorted row j

The mask of x, the input of the first projection, has a row for each token; that of h, the input of
the second, a row for each slot: rows[j] is the token t, or t k + slot. So a mask depends on the
seed and on the place of a row, not on how rows are sorted, and a token has the same mask of x for
each of its experts.

Masks are never stored. Kept elements are not scaled here, so that a masked row is exact in half
precision: keep_scale is a factor of the update's scaling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .expert_groups import ExpertGroup

_ops = torch.ops.lora_ext


class Dropout(NamedTuple):
    """Attributes:
    p: the probability that an element is dropped.
    seed: int64, one element.
    rows: ``[S]`` int64, the mask's row of each sorted row.
    """

    p: float
    seed: Tensor
    rows: Tensor

    def drop(self, values: Tensor, group: ExpertGroup, in_place: bool) -> Tensor:
        """The rows of a group with zeros where the mask drops.

        Args:
            values: ``[rows, n]``.
            in_place: whether they may be written to.
        """
        values = values if in_place else values.clone(memory_format=torch.contiguous_format)
        _ops.drop_rows(values, self.rows[group.begin : group.end], self.seed, self.p)
        return values
