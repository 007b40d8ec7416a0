"""A projection of experts by torch's grouped product, which computes all of them at once on a GPU,
and passes for the update onto it.

It takes bfloat16, if its alignment rules hold. The host reads how many rows each expert has only
where rows have adapters of their own. The functions are those of `projection`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from . import by_kernels, products
from .expert_groups import ExpertGroup, Rows
from .factors import Updates
from .operands import Backward, Gradient, part_of
from .routing import by_slot

# The devices on which the grouped product is one kernel, and the major compute capabilities of
# cards. On others torch loops over all experts, whose numbers of rows it reads on the host.
DEVICES = ("cuda",)
_CARDS = (9, 10)
_ALIGNMENT = 16  # bytes


def takes(rows: Rows) -> bool:
    """Whether it computes a call, forward and backward: where it is faster than our kernels."""
    weight, in_place = rows.projection.weight, rows.in_place
    if weight.device.type not in DEVICES or weight.dtype != torch.bfloat16 or len(rows) == 0:
        return False
    if not isinstance(weight, Tensor):
        return False
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] not in _CARDS:
        return False
    # The rows of y and dx, and gathered rows, have the width of one of the weight's dimensions.
    are_wide = all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    are_aligned = _is_aligned(weight) and (in_place is None or _is_aligned(in_place))
    return are_wide and are_aligned and not by_kernels.are_faster(rows.projection)


def _is_aligned(matrices: Tensor) -> bool:
    """Whether matrices have unit stride in a dimension, and own rows aligned to 16 bytes."""
    strides = matrices.stride()
    if 1 not in strides[-2:] or matrices.data_ptr() % _ALIGNMENT:
        return False
    others = [stride for stride in strides if stride != 1]
    return all(stride and stride * matrices.element_size() % _ALIGNMENT == 0 for stride in others)


def forward(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    projection, group = rows.projection, _whole(rows)
    weight: Any = projection.weight
    x = part_of(x, projection.token(), group.where)
    # [E, in, out], as of a product from the left.
    y = grouped_mm(x, weight.transpose(1, 2), offs=group.offs)
    if projection.bias is not None:
        y += projection.bias[_numbers(rows)]
    s = y.new_empty(len(rows), projection.rank(), dtype=torch.float32)
    for each in _updates(rows).of([group]):
        if each.update is not None:
            y, own = products.add_update(x, each, each.update, y)
            s = torch.nn.functional.pad(own, (0, s.shape[1] - own.shape[1]))
    _clear_rest(rows, y)
    return y, s


def backward(gradient: Gradient, x: Tensor, rows: Rows) -> Backward:
    projection, weights, group = rows.projection, gradient.weights, _whole(rows)
    own, part = products.of_group(gradient, x, group)
    weight: Any = projection.weight
    dx = grouped_mm(own.grad, weight, offs=group.offs) if gradient.want_x else None
    updates = _updates(rows, gradient)
    for each in updates.of([group]):
        if each.update is not None:
            products.add_gradients(own, part, each, each.update, dx)
    dweights, routes = None, projection.routes
    if dx is not None and weights is not None and own.weights is not None:
        if routes.place is not None:
            dweights = by_kernels.dot(gradient.grad, part, dx, weights, projection)
        else:
            found = products.dot(part, dx)
            if projection.bias is not None:
                found += products.dot(own.grad, projection.bias[_numbers(rows)])
            dx *= own.weights[:, None]
            _clear_rest(rows, found)
            dweights = by_slot(found, weights, routes)
    if dx is not None and not (projection.is_first and routes.place is not None):
        _clear_rest(rows, dx)  # the kernels do not sum rows of no expert
    return Backward(dx, dweights, updates.dlora_a, updates.dlora_b)


def _updates(rows: Rows, gradient: Gradient | None = None) -> Updates:
    return Updates(rows, gradient, are_all_written=rows.projection.routes.ends is None)


def _whole(rows: Rows) -> ExpertGroup:
    """All rows, and all experts, whose ends are on the device."""
    offs = rows.projection.routes.offs
    return ExpertGroup(rows.projection, slice(0, len(rows)), range(len(offs)), (), offs)


def _numbers(rows: Rows) -> Tensor:
    """The expert of each row; rows after those of the last expert get the last expert."""
    offs = rows.projection.routes.offs
    numbers = torch.arange(len(rows), device=offs.device, dtype=torch.int32)
    return torch.searchsorted(offs, numbers, right=True).clamp_(max=len(offs) - 1)


def _clear_rest(rows: Rows, tensor: Tensor) -> None:
    """Writes zeros to the rows after those of the last expert."""
    is_rest = torch.arange(len(rows), device=tensor.device) >= rows.projection.routes.offs[-1]
    tensor.masked_fill_(is_rest.view(-1, *[1] * (tensor.dim() - 1)), 0)
