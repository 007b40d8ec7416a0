"""A group's rows by the base's products, the rows of each expert times its matrix, and passes for
the update onto them.

    forward      y = x W_e^T + b_e, then + s (drop(x) A_e^T) B_e^T
    backward     dX = g W_e, then + mask * (s (g B_e) A_e), and the gradients of A_e and B_e

torch's grouped product computes all experts at once on a GPU, in bfloat16 and if its alignment
rules hold; otherwise there is one product for each expert. On a CPU these are calls that `one_pass`
does not compute. Quantised experts are dequantised one at a time for their product, those with rows
alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ..quantized.stack import QuantizedStack
from .expert_groups import ExpertGroup
from .factors import Update
from .operands import Projection

_ops = torch.ops.lora_ext

# The devices on which the grouped product is one kernel, and the major compute capabilities of
# cards. On others torch loops over all experts, whose numbers of rows it reads on the host.
DEVICES = ("cuda",)
_CARDS = (9, 10)
_ALIGNMENT = 16  # bytes


def are_grouped(weight: Tensor | QuantizedStack, rows: int, given: Tensor | None) -> bool:
    """Whether the grouped product supports a call, forward and backward.

    Args:
        weight: ``[E, out, in]``.
        rows: the number of rows of the call.
        given: rows that are used in place, not gathered.
    """
    if weight.device.type not in DEVICES or weight.dtype != torch.bfloat16 or rows == 0:
        return False
    if isinstance(weight, QuantizedStack):
        return False
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] not in _CARDS:
        return False
    # The rows of y and dx, and gathered rows, have the width of one of the weight's dimensions.
    are_wide = all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    return are_wide and _is_aligned(weight) and (given is None or _is_aligned(given))


def _is_aligned(matrices: Tensor) -> bool:
    """Whether matrices have unit stride in a dimension, and own rows aligned to 16 bytes."""
    strides = matrices.stride()
    if 1 not in strides[-2:] or matrices.data_ptr() % _ALIGNMENT:
        return False
    others = [stride for stride in strides if stride != 1]
    return all(stride and stride * matrices.element_size() % _ALIGNMENT == 0 for stride in others)


class GroupGrad(NamedTuple):
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
    y: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(Y ``[rows, out]``, S ``[rows, R]`` in at least float32, or None without an update).

    Args:
        x: ``[rows, in]``.
        is_own_x: whether x may be overwritten.
        update: of the group; None: no row has one.
        y: where Y is written; None if all experts are one product, of a new tensor.
    """
    # [E, in, out], as of a product from the left.
    sums, s = _of_base(x, projection.weight.transpose(1, 2), projection.bias, group, y), None
    if update is not None:
        x, row_block = projection.drop(x, group, is_own_x), projection.row_block
        sums, s = _ops.lora_grouped_forward(x, None, sums, *update.arguments(), row_block=row_block)
        sums = sums if y is None else y.copy_(sums)
    return sums, s


def backward(
    rows: GroupGrad,
    projection: Projection,
    group: ExpertGroup,
    update: Update | None,
    dx: Tensor | None,
) -> Tensor | None:
    """Writes the gradients of the factors, and returns dX if it is requested: in `dx`, None
    if all experts are one product."""
    found = _of_base(rows.grad, projection.weight, None, group, dx) if rows.wants_x else None
    if update is None:
        return found
    x, s = rows.x_and_s(projection.weight, update.rank)
    is_own_x, has_a = rows.is_own_x, len(update.dlora_a) > 0
    if rows.weights is not None:
        x, is_own_x = (x * rows.weights[:, None]).to(x.dtype), True
    if rows.x is not None and has_a:
        x = projection.drop(x, group, is_own_x)
    count = len(update.lora_a)
    wanted = [rows.wants_x, False], [has_a] * count, [len(update.dlora_b) > 0] * count
    low_rank, da, db, _ = _ops.lora_grouped_backward(
        rows.grad,
        s,
        *wanted,
        x,
        None,
        None,
        *update.arguments(),
        row_block=projection.row_block,
    )
    for own, given in zip((*update.dlora_a, *update.dlora_b), (*da, *db), strict=True):
        own.copy_(given)
    if found is not None:
        found += projection.drop(low_rank, group, in_place=True)
    return found


def _of_base(
    rows: Tensor,
    weight: Tensor | QuantizedStack,
    bias: Tensor | None,
    group: ExpertGroup,
    out: Tensor | None,
) -> Tensor:
    """row W_e + b_e ``[rows, n]`` for a weight ``[E, k, n]``."""
    if group.experts is None:
        assert isinstance(weight, Tensor)
        found = grouped_mm(rows, weight, offs=group.offs)
        if bias is not None:
            found += bias[group.numbers(len(bias))]
        return found
    assert out is not None
    for expert, begin, end in group.experts:
        is_dense = isinstance(weight, Tensor)
        with nullcontext(weight[expert]) if is_dense else weight.matrix(expert, rows) as matrix:
            if bias is None:
                torch.mm(rows[begin:end], matrix, out=out[begin:end])
            else:
                torch.addmm(bias[expert], rows[begin:end], matrix, out=out[begin:end])
    return out


def dot_bias(grad: Tensor, bias: Tensor, group: ExpertGroup) -> Tensor:
    """<g, b_e> ``[rows]`` in at least float32."""
    if group.experts is None:
        return dot(grad, bias[group.numbers(len(bias))])
    parts = [dot(grad[begin:end], bias[expert]) for expert, begin, end in group.experts]
    return torch.cat(parts)


def dot(rows: Tensor, others: Tensor) -> Tensor:
    """<row, other> ``[rows]`` in at least float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows * others.to(wide)).sum(-1)
