"""One projection of all experts on rows that are sorted by expert, forward and backward.

    y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T         for the rows of each expert e

    g = dy:      dx' = g W_e + s mask * ((g B_e) A_e)
    weights w:   dx = w dx',  dw = <x, dx'> + <g, b_e>
                 dA_e = s (g B_e)^T (w drop(x)),  dB_e = s g^T (w drop(x) A_e^T)

Here drop(x) is mask * x, and s is multiplied by keep_scale (`operands`). With weights, y is
multiplied by them later, and g is the gradient of the sum of these products: so y is not needed for
dw. W has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import lora_ext._C as _C

from ..quantized.stack import QuantizedStack
from . import by_kernels, expert_groups, few_rows, one_pass, products
from .expert_groups import ExpertGroup
from .factors import Updates
from .operands import Backward, Projection, part_of
from .products import GroupGrad
from .routing import sum_of_slots

__all__ = ["Backward", "backward", "forward", "sum_of_slots"]  # the passes, as those of `ops`


def _numbers(projection: Projection, given: Tensor | None) -> tuple[list[int] | None, list[int]]:
    """(ends of the routes, as of `Updates`; offs as Python numbers, empty if they are known only on
    the device) of a call, with rows that are used in place, not gathered."""
    routes, weight = projection.routes, projection.weight
    _check_invariant(projection)
    is_whole = products.are_grouped(weight, len(routes.perm), given)
    if is_whole and routes.ends is None:
        return None, []
    ends = expert_groups.on_host_numbers(routes.offs if routes.ends is None else routes.ends)
    kinds = len(ends) // weight.shape[0]
    return ends, [] if is_whole else ends[kinds - 1 :: kinds]


# Rows of an expert, on average, below which its product takes the time to read its matrix.
_FEW_ROWS = 16


def _is_by_kernels(projection: Projection, given: Tensor | None) -> bool:
    """Whether `by_kernels` computes a call. Torch's grouped product, where it is a kernel that
    takes the call, is faster for more than few rows, but not than kernels on wgmma."""
    if not by_kernels.supports(projection):
        return False
    weight, rows = projection.weight, len(projection.routes.perm)
    is_by_row = projection.routes.ends is not None  # others read these on the host
    are_faster = rows < _FEW_ROWS * len(weight) or by_kernels.have_wgmma(weight.device)
    return is_by_row or are_faster or not products.are_grouped(weight, rows, given)


def _groups(projection: Projection, bounds: list[int]) -> tuple[Any, list[ExpertGroup]]:
    """(the module that computes them, the groups)."""
    weight, routes = projection.weight, projection.routes
    if not bounds:
        return products, [ExpertGroup(0, len(routes.perm), routes.offs, None)]
    run = one_pass if one_pass.supports(projection) else products
    is_alone = run is one_pass and isinstance(weight, QuantizedStack)
    return run, expert_groups.on_host(bounds, weight.device, int(is_alone))


def _check_invariant(projection: Projection) -> None:
    """Raises NotImplementedError if a row's bits are not to depend on the number of rows, but
    would."""
    dtype = projection.weight.dtype
    if projection.row_block and _C.cpu_panels(dtype, batch_invariant=True) is None:
        raise NotImplementedError(
            "lora_ext.batch_invariant: expected experts in a dtype whose products by panels give "
            f"every row the same bits on this processor, but got {dtype}; make this call outside "
            "of the block, or in another dtype"
        )


def forward(x: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """(y ``[S, out]``, s ``[S, R]``): s is drop(x) A^T in at least float32, empty if no factors.

    Args:
        x: ``[T, in]`` if its rows are tokens, else ``[S, in]``, sorted.
    """
    weight, token = projection.weight, projection.token()
    given = x if token is None else None
    if _is_by_kernels(projection, given):
        done = by_kernels.forward(x, projection)
        if done is not None:
            return done
    ends, bounds = _numbers(projection, given)
    found = few_rows.forward(x, projection, ends) if bounds else None
    if found is not None:
        return found
    run, groups = _groups(projection, bounds)
    size, wide = len(projection.routes.perm), torch.promote_types(weight.dtype, torch.float32)
    y = weight.new_empty(size, weight.shape[1]) if bounds else None
    is_one = not bounds and ends is None and projection.rank() > 0  # S is that of the one update
    s = None if is_one else weight.new_empty(size, projection.rank(), dtype=wide)
    for group, update in Updates(projection, ends).of(groups):
        where = slice(group.begin, group.end)
        part, out = part_of(x, token, group), None if y is None else y[where]
        sums, own = run.forward(part, token is not None, projection, group, update, out)
        y = sums if y is None else y
        if s is None:
            s = own
        elif own is not None:
            s[where, : own.shape[1]] = own
    assert y is not None and s is not None
    expert_groups.clear_rest(groups, y, s if bounds else None)
    return y, s


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor | None,
    projection: Projection,
    s: Tensor,
    want_x: bool,
    want_a: Sequence[bool],
    want_b: Sequence[bool],
) -> Backward:
    """The gradients of the equations above.

    Args:
        grad: ``[S, out]``, sorted; with weights ``[T, out]``.
        x: as of `forward`.
        weights: ``[S]`` by slot, or None for 1.
    """
    weight, bias, token = projection.weight, projection.bias, projection.token()
    given = grad if weights is None else None
    if _is_by_kernels(projection, given):
        done = by_kernels.backward(grad, x, weights, projection, s, want_x, want_a, want_b)
        if done is not None:
            return done
    perm, by_slot = projection.routes.perm, weights
    weights = None if by_slot is None else by_slot.index_select(0, perm).to(s.dtype)
    grad_token = None if weights is None else projection.routes.token
    ends, bounds = _numbers(projection, given)
    run, groups = _groups(projection, bounds)
    updates = Updates(projection, ends, want_a, want_b)
    dx = weight.new_empty(len(s), weight.shape[2]) if want_x and bounds else None
    wants_weights = want_x and weights is not None
    is_by_dot = not bounds and projection.routes.place is not None  # of all rows at once
    dweights = s.new_empty(len(s)) if wants_weights and not is_by_dot else None
    needs_x = weights is not None or any(want_a)
    of_slots = None
    for group, update in updates.of(groups):
        where = slice(group.begin, group.end)
        g = part_of(grad, grad_token, group)
        part = part_of(x, token, group) if needs_x else None
        own_weights = None if weights is None else weights[where]
        rows = GroupGrad(g, part, token is not None, own_weights, s[where], want_x)
        dpart = run.backward(rows, projection, group, update, None if dx is None else dx[where])
        if wants_weights and is_by_dot:
            assert part is not None and dpart is not None and by_slot is not None
            of_slots = by_kernels.dot(grad, part, dpart, by_slot, projection)
        elif dweights is not None and own_weights is not None:
            assert part is not None and dpart is not None
            dweights[where] = products.dot(part, dpart)
            if bias is not None:
                dweights[where] += products.dot_bias(g, bias, group)
            dpart *= own_weights[:, None]
        dx = dpart if dx is None else dx
    # The kernels do not sum rows of no expert.
    is_summed = projection.is_first and projection.routes.place is not None
    expert_groups.clear_rest(groups, None if is_summed else dx, dweights)
    if dweights is not None and by_slot is not None:
        of_slots = torch.empty_like(by_slot)
        of_slots[perm] = dweights.to(by_slot.dtype)
    return Backward(dx, of_slots, updates.dlora_a, updates.dlora_b)
