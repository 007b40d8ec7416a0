"""The passes of `projection` and `routing` as ops of torch.library, for traced programs.

The number of rows of each expert is read on the host inside an op, so that it causes no graph
break; what the kernels of a GPU compute reads none. Eager calls use the functions directly, without
the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantized.stacks import flat_weight, weight_from_flat
from . import by_kernels, routing
from . import projection as eager
from .operands import Backward, Gradient, Projection
from .routing import Routes

# A `Projection`: its weight, bias and routes, then its other fields but slots.
_FLAT = (
    "Tensor[] weight, SymInt[] numbers, ScalarType dtype, Tensor? bias, Tensor perm, Tensor token, "
    "Tensor offs, Tensor? ends, Tensor? place, Tensor? tables, Tensor[] lora_a, Tensor[] lora_b, "
    "float[] scalings, bool is_first, SymInt row_block, float dropout_p, Tensor? seed"
)


def _flat(projection: Projection) -> tuple:
    weight, bias, routes, *lists, is_first, row_block, p, seed, _ = projection
    return *flat_weight(weight), bias, *routes, *map(list, lists), is_first, row_block, p, seed


def _projection(weight, numbers, dtype, bias, *rest) -> Projection:
    count = len(Routes._fields)
    own = weight_from_flat(weight, numbers, dtype), bias, Routes(*rest[:count])
    return Projection(*own, *rest[count:])


def forward(x: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """`projection.forward`, as an op."""
    return _forward[_may_be_captured(projection)](x, *_flat(projection))


def backward(gradient: Gradient, x: Tensor, projection: Projection) -> Backward:
    """`projection.backward`, as an op."""
    grad, weights, s, want_x, want_a, want_b = gradient
    wanted = [want_x, want_x and weights is not None, *want_a, *want_b]
    run = _backward[_may_be_captured(projection)]
    found = iter(run(grad, x, weights, s, wanted, *_flat(projection)))
    dx, dweights, *factors = [next(found) if wants else None for wants in wanted]
    return Backward(dx, dweights, factors[: len(want_a)], factors[len(want_a) :])


def sum_of_slots(rows: Tensor, routes: Routes, weights: Tensor | None, slots: int) -> Tensor:
    """`routing.sum_of_slots`, as an op."""
    return _sum_of_slots(rows, routes.perm, routes.offs, routes.place, weights, slots)


def _may_be_captured(projection: Projection) -> bool:
    return projection.weight.is_cpu or by_kernels.supports(projection)


def _ops_of(name: str, operands: str, result: str, run: Any, fake: Any) -> dict[bool, Any]:
    """The op of a function, by whether a CUDA graph may contain it."""
    made = {}
    for may, tags, suffix in ((True, (), ""), (False, (torch.Tag.cudagraph_unsafe,), "_on_host")):
        op: Any = torch.library.custom_op(
            f"lora_ext::experts_{name}{suffix}",
            run,
            mutates_args=(),
            schema=f"({operands}, {_FLAT}) -> {result}",
            tags=tags,
        )
        op.register_fake(fake)
        made[may] = op
    return made


def _run_forward(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    return eager.forward(x, _projection(*flat))


def _fake_forward(x, *flat):
    projection = _projection(*flat)
    dtype, rows = projection.weight.dtype, projection.routes.perm.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    y = x.new_empty(rows, projection.weight.shape[1], dtype=dtype)
    return y, x.new_empty(rows, projection.rank(), dtype=wide)


def _run_backward(grad, x, weights, s, wanted, *flat: Any) -> list[Tensor]:
    projection = _projection(*flat)
    half = 2 + len(projection.lora_a)
    gradient = Gradient(grad, weights, s, wanted[0], wanted[2:half], wanted[half:])
    found = eager.backward(gradient, x, projection)
    every = (found.dx, found.dweights, *found.dlora_a, *found.dlora_b)
    return [gradient for gradient in every if gradient is not None]


def _fake_backward(grad, x, weights, s, wanted, *flat):
    projection = _projection(*flat)
    rows, dtype = s.shape[0], projection.weight.dtype
    factors = (*projection.lora_a, *projection.lora_b)
    every = (
        s.new_empty(rows, projection.weight.shape[2], dtype=dtype),
        s.new_empty(rows) if weights is None else torch.empty_like(weights),
        *(torch.empty_like(factor, memory_format=torch.contiguous_format) for factor in factors),
    )
    return [gradient for gradient, wants in zip(every, wanted, strict=True) if wants]


_forward = _ops_of("forward", "Tensor x", "(Tensor, Tensor)", _run_forward, _fake_forward)
_backward = _ops_of(
    "backward",
    "Tensor grad, Tensor x, Tensor? weights, Tensor s, bool[] wanted",
    "Tensor[]",
    _run_backward,
    _fake_backward,
)


@torch.library.custom_op("lora_ext::experts_sum_of_slots", mutates_args=())
def _sum_of_slots(
    rows: Tensor,
    perm: Tensor,
    offs: Tensor,
    place: Tensor | None,
    weights: Tensor | None,
    slots: int,
) -> Tensor:
    return routing.sum_of_slots(rows, Routes(perm, perm, offs, None, place), weights, slots)


@_sum_of_slots.register_fake
def _(rows, perm, offs, place, weights, slots):
    return rows.new_empty(perm.shape[0] // slots, rows.shape[1])
