"""A group's rows by a product for each expert, its rows times its matrix, and passes for the update
onto them.

    forward      y = x W_e^T + b_e, then + s (drop(x) A_e^T) B_e^T
    backward     dX = g W_e, then + mask * (s (g B_e) A_e), and the gradients of A_e and B_e

On a CPU these are calls that `one_pass` does not compute. Quantised experts are dequantised one at
a time for their product, those with rows alone.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..quantized.stack import QuantizedStack
from .expert_groups import ExpertGroup, Update
from .operands import Gradient, part_of

_ops = torch.ops.lora_ext


def forward(x: Tensor, group: ExpertGroup, y: Tensor) -> Tensor | None:
    """Writes to y ``[rows, out]``; S ``[rows, R]`` in at least float32, or None without an update.

    Args:
        x: ``[rows, in]``, which may be overwritten if it was gathered: in the first projection.
    """
    projection = group.projection
    # [E, in, out], as of a product from the left.
    _of_base(x, projection.weight.transpose(1, 2), projection.bias, group, y)
    if group.update is None:
        return None
    sums, s = add_update(x, group, group.update, y)
    y.copy_(sums)
    return s


def add_update(x: Tensor, group: ExpertGroup, update: Update, y: Tensor) -> tuple[Tensor, Tensor]:
    """(y with the update of the group, S)."""
    projection = group.projection
    x = projection.drop(x, group.where, in_place=projection.is_first)
    words = {"row_block": projection.row_block}
    return _ops.lora_grouped_forward(x, None, y, *update.arguments(), **words)


def of_group(gradient: Gradient, x: Tensor, group: ExpertGroup) -> tuple[Gradient, Tensor]:
    """(that of a group's rows, all sorted, with s times the weights; their x, of which only shape
    and dtype are used where neither the weights nor lora_a need more)."""
    (grad, weights, s, *_), projection, where = gradient, group.projection, group.where
    routes, s = projection.routes, s[where]
    grad = part_of(grad, None if weights is None else routes.token, where)
    if weights is not None:
        weights = weights.index_select(0, routes.perm[where]).to(s.dtype)
        s = s * weights[:, None]
    if weights is not None or any(gradient.want_a):
        x = part_of(x, projection.token(), where)
    else:
        x = x.new_empty(()).expand(len(grad), x.shape[1])
    return gradient._replace(grad=grad, weights=weights, s=s), x


def backward(gradient: Gradient, x: Tensor, group: ExpertGroup, dx: Tensor | None) -> None:
    """Writes the gradients of the factors, and dX where it is requested; gradient and x as of
    `of_group`."""
    if dx is not None:
        _of_base(gradient.grad, group.projection.weight, None, group, dx)
    if group.update is not None:
        add_gradients(gradient, x, group, group.update, dx)


def add_gradients(
    gradient: Gradient, x: Tensor, group: ExpertGroup, update: Update, dx: Tensor | None
) -> None:
    """Writes the gradients of the factors, and adds the update's part to dx."""
    projection, has_a = group.projection, len(update.dlora_a) > 0
    (grad, weights, s, *_), is_own_x = gradient, projection.is_first
    if weights is not None:
        x, is_own_x = (x * weights[:, None]).to(x.dtype), True
    if has_a:
        x = projection.drop(x, group.where, is_own_x)
    count = len(update.lora_a)
    wanted = [dx is not None, False], [has_a] * count, [len(update.dlora_b) > 0] * count
    given = s[:, : update.rank].contiguous(), *wanted, x, None, None, *update.arguments()
    words = {"row_block": projection.row_block}
    low_rank, da, db, _ = _ops.lora_grouped_backward(grad, *given, **words)
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
