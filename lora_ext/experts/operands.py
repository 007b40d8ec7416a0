"""What the passes of a projection take besides rows: `Projection`.

    y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T           for the rows of each expert e
    drop(x)[j] = keep_scale * mask[rows[j]] * x[j]        for the sorted row j

The mask of x, the input of the first projection, has a row for each token; that of h, the input of
the second, a row for each slot: rows[j] is the token t, or t k + slot. So a mask depends on the
seed and on the place of a row, not on how rows are sorted, and a token has the same mask of x for
each of its experts.

Masks are never stored. Kept elements are not scaled here, so that a masked row is exact in half
precision: keep_scale is a factor of the update's scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantized.stack import QuantizedStack
from .expert_groups import ExpertGroup
from .routing import Routes


class Projection(NamedTuple):
    """One projection of all experts.

    Attributes:
        weight: ``[E, out, in]``, any strides, or quantised.
        bias: ``[E, out]`` or None.
        routes: those of the rows.
        lora_a, lora_b: one tensor for each adapter, in PEFT's layout.
        scalings: one number for each adapter.
        is_first: whether x, and the mask, have a row for each token; else one for each slot.
        row_block: the op's, positive in `lora_ext.batch_invariant`.
        dropout_p: the probability that an element is dropped.
        seed: that of the mask, int64, one element; None: no dropout.
        slots: k, the number of rows of each token.
    """

    weight: Tensor | QuantizedStack
    bias: Tensor | None
    routes: Routes
    lora_a: Sequence[Tensor] = ()
    lora_b: Sequence[Tensor] = ()
    scalings: Sequence[float] = ()
    is_first: bool = False
    row_block: int = 0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    slots: int = 1

    def ranks(self) -> list[int]:
        """The rank of one expert, for each adapter."""
        return [len(a) // self.weight.shape[0] for a in self.lora_a]

    def rank(self) -> int:
        """The number of columns of S = drop(x) A^T: all ranks, or the largest if each row has one
        of the adapters."""
        return (sum if self.routes.ends is None else max)(self.ranks() or [0])

    def token(self) -> Tensor | None:
        """For each sorted row its index in x; None if x has the sorted rows."""
        return self.routes.token if self.is_first else None

    def mask_rows(self, group: ExpertGroup) -> Tensor:
        """int64, the mask's row of each row of a group."""
        rows = self.routes.token if self.is_first else self.routes.perm
        return rows[group.begin : group.end]

    def drop(self, values: Tensor, group: ExpertGroup, in_place: bool) -> Tensor:
        """The rows of a group with zeros where the mask drops.

        Args:
            values: ``[rows, n]``.
            in_place: whether they may be written to.
        """
        if self.seed is None:
            return values
        values = values if in_place else values.clone(memory_format=torch.contiguous_format)
        torch.ops.lora_ext.drop_rows(values, self.mask_rows(group), self.seed, self.dropout_p)
        return values


def part_of(values: Tensor, token: Tensor | None, group: ExpertGroup) -> Tensor:
    """The rows of a group: of sorted rows, or of those that token gives the indices of."""
    where = slice(group.begin, group.end)
    return values[where] if token is None else values.index_select(0, token[where])
