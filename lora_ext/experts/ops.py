"""The passes of `projection` and `routing` as ops of torch.library, for traced programs.

The number of rows of each expert is read on the host inside an op, so that it causes no graph
break. Eager calls use the functions directly, without the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantized.stacks import flat_weight, weight_from_flat
from . import projection as eager
from . import routing
from .dropout import Dropout
from .factors import Factors
from .projection import Backward, Projection, Rows


def forward(
    x: Rows, projection: Projection, offs: Tensor, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """`projection.forward`, as an op."""
    return _forward(*x, *_flat(projection), offs, *_flat_dropout(dropout))


def backward(
    grad: Rows,
    x: Rows,
    weights: Tensor | None,
    projection: Projection,
    s: Tensor,
    offs: Tensor,
    want_x: bool,
    want_a: Sequence[bool],
    want_b: Sequence[bool],
    dropout: Dropout | None = None,
) -> Backward:
    """`projection.backward`, as an op."""
    wanted = [want_x, want_x and weights is not None, *want_a, *want_b]
    operands = (*grad, *x, weights, *_flat(projection), s, offs)
    found = iter(_backward(*operands, *_flat_dropout(dropout), wanted))
    dx, dweights, *factors = [next(found) if wants else None for wants in wanted]
    return Backward(dx, dweights, factors[: len(want_a)], factors[len(want_a) :])


def sum_of_slots(rows: Tensor, perm: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    """`routing.sum_of_slots`, as an op."""
    return _sum_of_slots(rows, perm, weights, slots)


def _flat(projection: Projection) -> tuple:
    flat, factors = flat_weight(projection.weight), projection.factors
    if factors is None:
        return *flat, projection.bias, [], [], [], None, projection.row_block
    return *flat, projection.bias, *map(list, factors[:3]), factors.ends, projection.row_block


def _flat_dropout(dropout: Dropout | None) -> tuple:
    # Not a global: a traced program would make its number an input.
    return (0.0, None, None) if dropout is None else dropout


def _dropout(p: float, seed: Tensor | None, rows: Tensor | None) -> Dropout | None:
    return None if seed is None or rows is None else Dropout(p, seed, rows)


def _projection(
    weight: list[Tensor],
    numbers: list[int],
    dtype: torch.dtype,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scalings: list[float],
    ends: Tensor | None,
    row_block: int,
) -> Projection:
    factors = Factors(lora_a, lora_b, scalings, ends) if lora_a else None
    return Projection(weight_from_flat(weight, numbers, dtype), bias, factors, row_block)


@torch.library.custom_op("lora_ext::experts_forward", mutates_args=())
def _forward(
    x: Tensor,
    token: Tensor | None,
    weight: list[Tensor],
    numbers: list[int],
    dtype: torch.dtype,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scalings: list[float],
    ends: Tensor | None,
    row_block: int,
    offs: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    mask_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    projection = _projection(
        weight, numbers, dtype, bias, lora_a, lora_b, scalings, ends, row_block
    )
    return eager.forward(Rows(x, token), projection, offs, _dropout(dropout_p, seed, mask_rows))


@_forward.register_fake
def _(x, token, weight, numbers, dtype, bias, lora_a, lora_b, scalings, ends, *rest):
    rows = (x if token is None else token).shape[0]  # len() would make it a constant
    experts, out_features, _ = weight_from_flat(weight, numbers, dtype).shape
    rank = Factors(lora_a, lora_b, scalings, ends).rank(experts) if lora_a else 0
    wide = torch.promote_types(dtype, torch.float32)
    return x.new_empty(rows, out_features, dtype=dtype), x.new_empty(rows, rank, dtype=wide)


@torch.library.custom_op("lora_ext::experts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_token: Tensor | None,
    x: Tensor,
    token: Tensor | None,
    weights: Tensor | None,
    weight: list[Tensor],
    numbers: list[int],
    dtype: torch.dtype,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scalings: list[float],
    ends: Tensor | None,
    row_block: int,
    s: Tensor,
    offs: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    mask_rows: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    adapters = len(lora_a)
    found = eager.backward(
        Rows(grad, grad_token),
        Rows(x, token),
        weights,
        _projection(weight, numbers, dtype, bias, lora_a, lora_b, scalings, ends, row_block),
        s,
        offs,
        wanted[0],
        wanted[2 : 2 + adapters],
        wanted[2 + adapters :],
        _dropout(dropout_p, seed, mask_rows),
    )
    every = (found.dx, found.dweights, *found.dlora_a, *found.dlora_b)
    return [gradient for gradient in every if gradient is not None]


@_backward.register_fake
def _(grad, grad_token, x, token, weights, weight, numbers, dtype, bias, lora_a, lora_b, *rest):
    s, wanted = rest[3], rest[-1]
    rows, shape = s.shape[0], weight_from_flat(weight, numbers, dtype).shape
    every = (
        s.new_empty(rows, shape[2], dtype=dtype),
        s.new_empty(rows),
        *(torch.empty_like(f, memory_format=torch.contiguous_format) for f in (*lora_a, *lora_b)),
    )
    return [gradient for gradient, wants in zip(every, wanted, strict=True) if wants]


@torch.library.custom_op("lora_ext::experts_sum_of_slots", mutates_args=())
def _sum_of_slots(rows: Tensor, perm: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    return routing.sum_of_slots(rows, perm, weights, slots)


@_sum_of_slots.register_fake
def _(rows, perm, weights, slots):
    return rows.new_empty(perm.shape[0] // slots, rows.shape[1])
