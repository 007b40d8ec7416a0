"""One projection of all experts on rows that are sorted by expert, forward and backward.

    y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T         for the rows of each expert e

    g = dy:      dx' = g W_e + s mask * ((g B_e) A_e)
    weights w:   dx = w dx',  dw = <x, dx'> + <g, b_e>
                 dA_e = s (g B_e)^T (w drop(x)),  dB_e = s g^T (w drop(x) A_e^T)

Here drop(x) is mask * x, and s is multiplied by keep_scale (`operands`). With weights, y is
multiplied by them later, and g is the gradient of the sum of these products: so y is not needed for
dw. W has no gradient.

`WAYS` are the ways to compute one: the first that takes the rows does, and `explain` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_ext._C as _C

from ..quantized.stack import QuantizedStack
from . import by_kernels, few_rows, grouped_product, one_pass, products
from .expert_groups import ExpertGroup, Rows
from .factors import Updates
from .operands import Backward, Gradient, Projection, part_of
from .routing import by_slot, example_routes, sum_of_slots

__all__ = ["Backward", "backward", "forward", "sum_of_slots"]  # the passes, as those of `ops`


class Way(NamedTuple):
    """A way to compute a projection.

    Attributes:
        name: as `explain` shows it.
        takes: whether it is taken for these rows, unless one before it is.
        forward: that of x and its rows.
        backward: that of a gradient, x and its rows; None: by one of the next ways.

    Both return None where kernels turn out not to take the call: the next way does.
    """

    name: str
    takes: Callable[[Rows], bool]
    forward: Callable[[Tensor, Rows], tuple[Tensor, Tensor] | None]
    backward: Callable[[Gradient, Tensor, Rows], Backward | None] | None = None


def _functions(run: Any) -> tuple[Any, Any, Any]:
    return run.takes, run.forward, run.backward


def _by_groups(run: Any) -> tuple[Any, Any]:
    return partial(_forward, run), partial(_backward, run)


def _ways(rows: Rows) -> Iterator[Way]:
    """Those that take the rows, the first one first."""
    return (way for way in WAYS if way.takes(rows))


def way_of(projection: Projection) -> str:
    """The way of a forward, whatever its routes, as `explain` shows it."""
    names = []
    for rows in (1, 512):  # of each expert
        given = projection.weight.device, projection.weight.shape[0], rows
        routes = example_routes(*given, projection.routes.ends is not None)
        names.append(next(_ways(Rows(projection._replace(routes=routes), None))).name)
    few, many = names
    return many if few == many else f"{few} where rows are few, else {many}"


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
    _check_invariant(projection)
    rows = Rows(projection, x if projection.token() is None else None)
    found = (way.forward(x, rows) for way in _ways(rows))
    return next(each for each in found if each is not None)


def backward(gradient: Gradient, x: Tensor, projection: Projection) -> Backward:
    """The gradients of the equations above; x as of `forward`."""
    _check_invariant(projection)
    rows = Rows(projection, gradient.grad if gradient.weights is None else None)
    found = (way.backward(gradient, x, rows) for way in _ways(rows) if way.backward is not None)
    return next(each for each in found if each is not None)


# ---- by groups of rows, each by `one_pass` or by `products` ----


def _groups(run: Any, rows: Rows) -> list[ExpertGroup]:
    is_alone = run is one_pass and isinstance(rows.projection.weight, QuantizedStack)
    return rows.groups(int(is_alone))


def _clear_rest(groups: Sequence[ExpertGroup], *tensors: Tensor | None) -> None:
    """Writes zeros to the rows after those of the last expert."""
    end = groups[-1].where.stop if groups else 0
    for tensor in tensors:
        if tensor is not None and end < len(tensor):
            tensor[end:] = 0


def _forward(run: Any, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    projection = rows.projection
    weight, token = projection.weight, projection.token()
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = weight.new_empty(len(rows), weight.shape[1])
    s = weight.new_empty(len(rows), projection.rank(), dtype=wide)
    groups = _groups(run, rows)
    for group in Updates(rows).of(groups):
        own = run.forward(part_of(x, token, group.where), group, y[group.where])
        if own is not None:
            s[group.where, : own.shape[1]] = own
    _clear_rest(groups, y, s)
    return y, s


def _backward(run: Any, gradient: Gradient, x: Tensor, rows: Rows) -> Backward:
    weight, bias, routes, *_ = rows.projection
    weights = gradient.weights
    dx = weight.new_empty(len(rows), weight.shape[2]) if gradient.want_x else None
    dweights = None if dx is None or weights is None else gradient.s.new_empty(len(rows))
    groups, updates = _groups(run, rows), Updates(rows, gradient)
    for group in updates.of(groups):
        own, part = products.of_group(gradient, x, group)
        dpart = None if dx is None else dx[group.where]
        run.backward(own, part, group, dpart)
        if dweights is not None and dpart is not None and own.weights is not None:
            found = products.dot(part, dpart)
            if bias is not None:
                found += products.dot_bias(own.grad, bias, group)
            dweights[group.where] = found
            dpart *= own.weights[:, None]
    _clear_rest(groups, dx, dweights)
    of_slots = None
    if dweights is not None and weights is not None:
        of_slots = by_slot(dweights, weights, routes)
    return Backward(dx, of_slots, updates.dlora_a, updates.dlora_b)


# ---- the ways ----

WAYS = (
    Way("torch's grouped product, then the update", *_functions(grouped_product)),
    Way("kernels for all experts", *_functions(by_kernels)),
    Way("one op for all experts", few_rows.takes, few_rows.forward),
    Way("one pass for base and update of each expert", one_pass.takes, *_by_groups(one_pass)),
    Way("a product for each expert, then the update", lambda rows: True, *_by_groups(products)),
)
