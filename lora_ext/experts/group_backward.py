"""The backward of a group of rows: in one pass on a CPU, elsewhere as the base's product and a pass
for the update onto it. Both write the gradients of the factors and return dX' (`projection`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quantized.stack import QuantizedStack
from . import one_pass, products
from .dropout import Dropout
from .expert_groups import ExpertGroup
from .factors import is_any

_ops = torch.ops.lora_ext


class Operands(NamedTuple):
    """The rows of a group in a backward.

    Attributes:
        grad: ``[rows, out]``.
        x: ``[rows, in]``, or None if it is not read.
        is_own_x: whether x may be overwritten.
        weights: ``[rows]``, or None for 1.
        s: ``[rows, R]`` of forward.
        wants_x: whether dX is requested.
    """

    grad: Tensor
    x: Tensor | None
    is_own_x: bool
    weights: Tensor | None
    s: Tensor
    wants_x: bool

    def rows(self, weight: Tensor | QuantizedStack) -> tuple[Tensor, Tensor]:
        """(x, of which only shape and dtype are used if there is none; S times the weights)."""
        x, s = self.x, self.s
        if x is None:
            x = weight.new_empty(()).expand(len(self.grad), weight.shape[2])
        return x, s if self.weights is None else s * self.weights[:, None]


def in_one_pass(
    operands: Operands,
    weight: Tensor | QuantizedStack,
    row_block: int,
    group: ExpertGroup,
    update: Any,
    gradients: Any,
    dropout: Dropout | None,
    out: Tensor | None,
) -> Tensor | None:
    """Writes the gradients of the factors, and returns dX' in `out`.

    Args:
        row_block: the op's.
        update: of the group, of `Updates` or `RowUpdates`; None: no row has one.
        gradients: of the same kind.
    """
    x, s = operands.rows(weight)
    dlora_a, dlora_b = ([], []) if update is None else gradients.targets(update)
    one_pass.backward(
        operands.grad,
        x,
        s,
        weight,
        group,
        update,
        dropout,
        row_block,
        out,
        dlora_a,
        dlora_b,
        operands.weights,  # of dS, which is not rounded, rather than of x
    )
    if update is not None:
        gradients.write(group, update, dlora_a, dlora_b)
    return out


def in_passes(
    operands: Operands,
    weight: Tensor | QuantizedStack,
    row_block: int,
    group: ExpertGroup,
    update: Any,
    gradients: Any,
    dropout: Dropout | None,
    out: Tensor | None,
) -> Tensor | None:
    """The same by the base's product, and a pass for the update onto it."""
    grad, wants_x = operands.grad, operands.wants_x
    dx = products.backward(grad, weight, group, out) if wants_x else None
    if update is None:
        return dx
    wants_a, wants_b = is_any(gradients.lora_a), is_any(gradients.lora_b)
    (x, s), is_own_x = operands.rows(weight), operands.is_own_x
    if operands.weights is not None:
        x, is_own_x = (x * operands.weights[:, None]).to(x.dtype), True
    if dropout is not None and operands.x is not None and wants_a:
        x = dropout.drop(x, group, in_place=is_own_x)
    arguments = update.arguments()
    lists = len(arguments["lora_a"])
    wanted = ([wants_x, False], [wants_a] * lists, [wants_b] * lists)
    low_rank, da, db, _ = _ops.lora_grouped_backward(
        grad,
        s[:, : update.rank].contiguous(),
        *wanted,
        x,
        None,
        None,
        **arguments,
        row_block=row_block,
    )
    gradients.copy(group, update, da, db)
    if dx is not None:
        dx += low_rank if dropout is None else dropout.drop(low_rank, group, in_place=True)
    return dx
