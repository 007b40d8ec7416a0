"""A group's product and update in one pass on a CPU: what the update adds is summed with the base's
product, and rounded once.

    forward      y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T
    backward     dX = g W_e + mask * (s (g B_e) A_e), and the gradients of A_e and B_e

The passes are those of `lora_grouped` (csrc/cpu/grouped.h), with a weight for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from .. import _C
from ..dtypes import HALVES
from ..quantized.stack import QuantizedStack
from .dropout import Dropout
from .expert_groups import ExpertGroup
from .factors import Factors, Pools
from .row_factors import RowUpdate

_ops = torch.ops.lora_ext
_DTYPES = (*HALVES, torch.float32)
_number_of_modes = torch._C._len_torch_dispatch_stack


def supports(weight: Tensor | QuantizedStack, factors: Factors | None) -> bool:
    """Whether a projection is computed in this way. Modes that see each op, such as torch's FLOP
    counter, know torch's products alone."""
    # torch's is_in_torch_dispatch_mode is still true in the first call of what was just compiled.
    if not weight.is_cpu or weight.dtype not in _DTYPES or _number_of_modes():
        return False
    if type(weight) not in (Tensor, Parameter) and not isinstance(weight, QuantizedStack):
        return False
    if 0 in weight.shape:
        return False
    rank = 1 if factors is None else factors.rank(weight.shape[0])
    return not _C.cpu_library_reason(weight.dtype, rank)


def forward(
    x: Tensor,
    weight: Tensor | QuantizedStack,
    bias: Tensor | None,
    group: ExpertGroup,
    update: Pools | RowUpdate | None,
    dropout: Dropout | None,
    row_block: int,
    y: Tensor,
) -> Tensor:
    """Writes y ``[rows, out]`` and returns S ``[rows, R]`` in float32.

    Args:
        x: ``[rows, in]``.
        update: of the group; None: no row has one.
    """
    x = _with_unit_stride(x)
    found = []
    for rows, experts, own, place in _pieces(group, weight, update):
        with _matrices(weight, place, x) as matrices:
            s = _ops.experts_linear(
                x[rows],
                matrices,
                _biases(bias, place),
                *experts,
                *_arguments(own, dropout, group.begin, rows),
                row_block,
                y[rows],
            )
        found.append(s)
    if len(found) == 1:
        return found[0]
    widest = max(s.shape[1] for s in found)
    return torch.cat([pad(s, (0, widest - s.shape[1])) for s in found])


def backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor | QuantizedStack,
    group: ExpertGroup,
    update: Pools | RowUpdate | None,
    dropout: Dropout | None,
    row_block: int,
    dx: Tensor | None,
    dlora_a: list[Tensor],
    dlora_b: list[Tensor],
    weights: Tensor | None,
) -> None:
    """Writes dX, if there is a tensor for it, and the gradients of the update's factors.

    Args:
        x: ``[rows, in]``; what it holds is read for the gradient of A alone.
        s: ``[rows, R]`` of forward.
        dlora_a, dlora_b: in the form of the update's factors; empty if they are not requested.
        weights: ``[rows]`` in float32, of the rows in the gradient of A; or None for 1.
    """
    grad = _with_unit_stride(grad)
    x = _with_unit_stride(x) if dlora_a else x
    for rows, experts, own, place in _pieces(group, weight, update):
        gradients = [dlora_a, dlora_b]
        if update is not None and place is not None:
            gradients = [update.gradients_of(place, each) for each in gradients]
        if dx is None and not any(gradients):
            continue
        rank = 0 if own is None else own.rank
        with _matrices(weight, place, grad, is_read=dx is not None) as matrices:
            _ops.experts_linear_backward(
                grad[rows],
                x[rows],
                s[rows, :rank].contiguous(),
                matrices,
                *experts,
                *_arguments(own, dropout, group.begin, rows),
                row_block,
                None if dx is None else dx[rows],
                *gradients,
                None if weights is None else weights[rows],
            )


def _with_unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _Piece(NamedTuple):
    """What one call of the op computes.

    Attributes:
        rows: of the group.
        experts: (numbers of matrices, the end of the rows of each).
        update: of these rows.
        place: of a quantised stack, the expert.
    """

    rows: slice
    experts: tuple[list[int], list[int]]
    update: Pools | RowUpdate | None
    place: int | None


def _pieces(
    group: ExpertGroup, weight: Tensor | QuantizedStack, update: Pools | RowUpdate | None
) -> Iterator[_Piece]:
    """The group; or each of its experts, so that one is dequantised at a time."""
    assert group.experts is not None
    if not isinstance(weight, QuantizedStack):
        numbers, ends = [e for e, _, _ in group.experts], [end for _, _, end in group.experts]
        yield _Piece(slice(0, ends[-1]), (numbers, ends), update, None)
        return
    for expert, begin, end in group.experts:
        own = None if update is None else update.part(expert, begin, end)
        yield _Piece(slice(begin, end), ([0], [end - begin]), own, expert)


@contextmanager
def _matrices(
    weight: Tensor | QuantizedStack, place: int | None, x: Tensor, is_read: bool = True
) -> Iterator[Tensor]:
    """The weight, or one dequantised expert as a stack of one; without its values if the call does
    not read them."""
    if not isinstance(weight, QuantizedStack) or place is None:
        assert isinstance(weight, Tensor)
        yield weight
    elif not is_read:
        yield x.new_empty(()).expand(1, *weight.shape[1:])
    else:
        with weight.matrix(place, x) as matrix:
            yield matrix[None]


def _biases(bias: Tensor | None, place: int | None) -> Tensor | None:
    return bias if bias is None or place is None else bias[place : place + 1]


def _arguments(
    update: Pools | RowUpdate | None, dropout: Dropout | None, first: int, rows: slice
) -> tuple:
    """Those of the op that say what the update of some rows is."""
    if update is None:
        return [], [], None, None, None, 0.0, None, None
    given = update.arguments()
    factors = given["lora_a"], given["lora_b"], given["scaling"]
    where = given.get("index"), given.get("offs")
    if dropout is None:
        return *factors, *where, 0.0, None, None
    mask_rows = dropout.rows[first + rows.start : first + rows.stop]
    return *factors, *where, dropout.p, dropout.seed, mask_rows
