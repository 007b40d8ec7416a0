"""The base's products of a group: the rows of each expert times its matrix.

    forward      x W_e^T + b_e
    backward     g W_e

torch's grouped product computes all experts at once on a GPU, in bfloat16 and if its alignment
rules hold; otherwise there is one product for each expert. On a CPU these are calls that `one_pass`
does not compute. Quantised experts are dequantised one at a time for their product, those with rows
alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ..quantized.stack import QuantizedStack
from .expert_groups import ExpertGroup

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


def forward(
    x: Tensor,
    weight: Tensor | QuantizedStack,
    bias: Tensor | None,
    group: ExpertGroup,
) -> Tensor:
    """The products ``[rows, out]`` for the rows of the group."""
    if group.experts is None:
        assert isinstance(weight, Tensor)
        y = grouped_mm(x, weight.transpose(1, 2), offs=group.offs)
        if bias is not None:
            y += bias[group.numbers(len(bias))]
        return y
    y = weight.new_empty(len(x), weight.shape[1])
    for expert, begin, end in group.experts:
        own_bias = None if bias is None else bias[expert]
        with _matrix(weight, expert, x) as matrix:
            _product(x[begin:end], matrix.t(), own_bias, y[begin:end])
    return y


def backward(
    grad: Tensor,
    weight: Tensor | QuantizedStack,
    group: ExpertGroup,
    out: Tensor | None,
) -> Tensor:
    """The products ``[rows, in]`` for the rows of the group, written into `out`, which is needed if
    each expert has its own product."""
    if group.experts is None:
        assert isinstance(weight, Tensor)
        return grouped_mm(grad, weight, offs=group.offs)
    assert out is not None
    for expert, begin, end in group.experts:
        with _matrix(weight, expert, grad) as matrix:
            _product(grad[begin:end], matrix, None, out[begin:end])
    return out


def _matrix(
    weight: Tensor | QuantizedStack, expert: int, x: Tensor
) -> AbstractContextManager[Tensor]:
    """Within a block, the matrix ``[out, in]`` of an expert, in x's dtype."""
    if isinstance(weight, QuantizedStack):
        return weight.matrix(expert, x)
    return nullcontext(weight[expert])


def _product(p: Tensor, q: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = p q + bias."""
    if bias is None:
        torch.mm(p, q, out=out)
    else:
        torch.addmm(bias, p, q, out=out)


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
