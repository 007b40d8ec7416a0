"""A group's product and update in one pass on a CPU: what the update adds is summed with the base's
product, and rounded once.

    forward      y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T
    backward     dX = g W_e + mask * (s (g B_e) A_e), and the gradients of A_e and B_e

The passes are those of `lora_grouped` (csrc/cpu/grouped.h), with a weight for each expert. The
functions are those of `products`. A group has one expert if the experts are quantised, so that one
is dequantised at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

import lora_ext._C as _C

from ..dtypes import HALVES
from ..quantized.stack import QuantizedStack
from ..torch_state import dispatch_modes
from .expert_groups import ExpertGroup, Rows
from .operands import Gradient

_ops = torch.ops.lora_ext
_DTYPES = (*HALVES, torch.float32)


def takes(rows: Rows) -> bool:
    """Whether a projection is computed in this way. Modes that see each op, such as torch's FLOP
    counter, know torch's products alone."""
    projection = rows.projection
    weight = projection.weight
    # torch's is_in_torch_dispatch_mode is still true in the first call of what was just compiled.
    if not weight.is_cpu or weight.dtype not in _DTYPES or dispatch_modes():
        return False
    if type(weight) not in (Tensor, Parameter) and not isinstance(weight, QuantizedStack):
        return False
    if 0 in weight.shape:
        return False
    rank = projection.rank() if projection.lora_a else 1
    return not _C.cpu_library_reason(weight.dtype, rank)


def forward(x: Tensor, group: ExpertGroup, y: Tensor) -> Tensor:
    """As `products.forward`; S is in float32."""
    x = _with_unit_stride(x)
    with _experts(group, x) as (matrices, bias, *which):
        return _ops.experts_linear(x, matrices, bias, *which, *_arguments(group), y)


def backward(gradient: Gradient, x: Tensor, group: ExpertGroup, dx: Tensor | None) -> None:
    """As `products.backward`."""
    update, (grad, weights, s, *_) = group.update, gradient
    gradients = [update.dlora_a, update.dlora_b] if update is not None else [[], []]
    if dx is None and not any(gradients):
        return
    grad = _with_unit_stride(grad)
    x = _with_unit_stride(x) if gradients[0] else x
    s = s[:, : 0 if update is None else update.rank].contiguous()
    with _experts(group, grad, is_read=dx is not None) as (matrices, _, *which):
        _ops.experts_linear_backward(
            grad,
            x,
            s,
            matrices,
            *which,
            *_arguments(group),
            dx,
            *gradients,
            weights,  # of dS, which is not rounded, rather than of x
        )


def _with_unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


@contextmanager
def _experts(
    group: ExpertGroup, x: Tensor, is_read: bool = True
) -> Iterator[tuple[Tensor, Tensor | None, list[int], list[int]]]:
    """(the matrices, the biases, the numbers in them of the group's experts, the end of the rows of
    each). A quantised expert is a stack of one, without its values if the call does not read
    them."""
    weight, bias, *_ = group.projection
    numbers, ends = list(group.experts), list(group.ends)
    if isinstance(weight, Tensor):
        yield weight, bias, numbers, ends
        return
    (expert,) = numbers
    bias = None if bias is None else bias[expert][None]
    if is_read:
        with weight.matrix(expert, x) as matrix:
            yield matrix[None], bias, [0], ends
    else:
        yield x.new_empty(()).expand(1, *weight.shape[1:]), bias, [0], ends


def _arguments(group: ExpertGroup) -> tuple:
    """Those of the op that say what the update of the rows is, and the row block."""
    projection, update = group.projection, group.update
    p, seed, mask_rows = 0.0, None, None
    if update is None:
        own = [], [], None, None, None
    else:
        own = update.arguments()
        if projection.seed is not None:
            p, seed = projection.dropout_p, projection.seed
            mask_rows = projection.mask_rows[group.where].long()
    return *own, p, seed, mask_rows, projection.row_block
