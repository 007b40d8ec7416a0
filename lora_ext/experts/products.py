"""A group's rows by a product for each expert, its rows times its matrix, and passes for the update
onto them.

    forward      y = x W_e^T + b_e, then + s (drop(x) A_e^T) B_e^T
    backward     dX = g W_e, then + mask * (s (g B_e) A_e), and the gradients of A_e and B_e

On a CPU these are calls that `one_pass` does not compute. Quantised experts are dequantised one at
a time for their product, those with rows alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantized.stack import QuantizedStack
from .expert_groups import ExpertGroup
from .factors import Update
from .operands import Projection

_ops = torch.ops.lora_ext


class GroupGrad(NamedTuple):
    """The rows of a group in a backward.

    Attributes:
        grad: ``[rows, out]``.
        x: ``[rows, in]``, or None if it is not read.
        is_own_x: whether x may be overwritten.
        weights: ``[rows]``, or None for 1.
        s: ``[rows, R]`` of forward.
    """

    grad: Tensor
    x: Tensor | None
    is_own_x: bool
    weights: Tensor | None
    s: Tensor

    def x_and_s(self, weight: Tensor | QuantizedStack, rank: int) -> tuple[Tensor, Tensor]:
        """(x, of which only shape and dtype are used if there is none; S of an update)."""
        x, s = self.x, self.s if self.weights is None else self.s * self.weights[:, None]
        if x is None:
            x = weight.new_empty(()).expand(len(self.grad), weight.shape[2])
        return x, s[:, :rank].contiguous()


def forward(
    x: Tensor,
    is_own_x: bool,
    projection: Projection,
    group: ExpertGroup,
    update: Update | None,
    y: Tensor,
) -> Tensor | None:
    """Writes to y ``[rows, out]``; S ``[rows, R]`` in at least float32, or None without an update.

    Args:
        x: ``[rows, in]``.
        is_own_x: whether x may be overwritten.
        update: of the group; None: no row has one.
    """
    # [E, in, out], as of a product from the left.
    _of_base(x, projection.weight.transpose(1, 2), projection.bias, group, y)
    if update is None:
        return None
    sums, s = add_update(x, is_own_x, projection, group, update, y)
    y.copy_(sums)
    return s


def add_update(
    x: Tensor,
    is_own_x: bool,
    projection: Projection,
    group: ExpertGroup,
    update: Update,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y with the update of the group, S)."""
    x, words = projection.drop(x, group.where, is_own_x), {"row_block": projection.row_block}
    return _ops.lora_grouped_forward(x, None, y, *update.arguments(), **words)


def backward(
    rows: GroupGrad,
    projection: Projection,
    group: ExpertGroup,
    update: Update | None,
    dx: Tensor | None,
) -> None:
    """Writes the gradients of the factors, and dX where it is requested."""
    if dx is not None:
        _of_base(rows.grad, projection.weight, None, group, dx)
    if update is not None:
        add_gradients(rows, projection, group, update, dx)


def add_gradients(
    rows: GroupGrad,
    projection: Projection,
    group: ExpertGroup,
    update: Update,
    dx: Tensor | None,
) -> None:
    """Writes the gradients of the factors, and adds the update's part to dx."""
    x, s = rows.x_and_s(projection.weight, update.rank)
    is_own_x, has_a = rows.is_own_x, len(update.dlora_a) > 0
    if rows.weights is not None:
        x, is_own_x = (x * rows.weights[:, None]).to(x.dtype), True
    if rows.x is not None and has_a:
        x = projection.drop(x, group.where, is_own_x)
    count = len(update.lora_a)
    wanted = [dx is not None, False], [has_a] * count, [len(update.dlora_b) > 0] * count
    given = rows.grad, s, *wanted, x, None, None, *update.arguments()
    low_rank, da, db, _ = _ops.lora_grouped_backward(*given, row_block=projection.row_block)
    for own, found in zip((*update.dlora_a, *update.dlora_b), (*da, *db), strict=True):
        own.copy_(found)
    if dx is not None:
        dx += projection.drop(low_rank, group.where, in_place=True)


def _of_base(
    rows: Tensor,
    weight: Tensor | QuantizedStack,
    bias: Tensor | None,
    group: ExpertGroup,
    out: Tensor,
) -> None:
    """Writes row W_e + b_e ``[rows, n]`` for a weight ``[E, k, n]``."""
    for expert, part in group.parts():
        is_dense = isinstance(weight, Tensor)
        with nullcontext(weight[expert]) if is_dense else weight.matrix(expert, rows) as matrix:
            if bias is None:
                torch.mm(rows[part], matrix, out=out[part])
            else:
                torch.addmm(bias[expert], rows[part], matrix, out=out[part])


def dot_bias(grad: Tensor, bias: Tensor, group: ExpertGroup) -> Tensor:
    """<g, b_e> ``[rows]`` in at least float32."""
    return torch.cat([dot(grad[part], bias[expert]) for expert, part in group.parts()])


def dot(rows: Tensor, others: Tensor) -> Tensor:
    """<row, other> ``[rows]`` in at least float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows * others.to(wide)).sum(-1)
