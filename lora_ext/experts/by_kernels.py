"""A projection of experts by the kernels of a GPU.

Rows are read where they are, base and update are one sum that is rounded once, and nothing is read
on the host, so that a CUDA graph can capture it. The factors of all experts are copied into pools
of halves for each call: in PEFT's B the expert is the fastest index. For few rows A is read as it
is. Quantised experts are dequantised and multiplied a slice after the other, each by one launch. Of
experts without rows neither reads anything. Where each row has one of several adapters, or none,
those of an expert with the same one are a group, which has factors of its own and the expert's W.
The functions are those of `projection`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import lora_ext._C as _C

from ..dtypes import HALVES
from ..quantized.stack import QuantizedStack
from .expert_groups import Rows
from .operands import Backward, Gradient, Projection
from .routing import for_kernels

_ops = torch.ops.lora_ext


def supports(projection: Projection) -> bool:
    """Whether a projection is computed in this way: halves, rows sorted by the kernels."""
    weight, place = projection.weight, projection.routes.place
    if place is None or 0 in weight.shape:
        return False
    if isinstance(weight, QuantizedStack):
        return len(place) > 0 and weight.has_slices
    return weight.dtype in HALVES and 1 in weight.stride()[1:]


@functools.cache
def have_wgmma(device: torch.device) -> bool:
    """Whether the kernels reach torch's rate on a device: the planner takes wgmma there."""
    if device.type != "cuda":
        return False
    card, problem = _C.cuda_card(device), _C.Problem(4096, 4096, 4096, 16)
    asked = {"backward": False, "choice": "kernel", "groups": 8, "own_weights": True}
    return _C.plan_as_asked(card, problem, **asked).wgmma


# Rows of an expert, on average, below which its product takes the time to read its matrix.
_READ_BOUND_ROWS = 16


def takes(rows: Rows) -> bool:
    return supports(rows.projection)


def are_faster(projection: Projection) -> bool:
    """Than torch's grouped product, where that is a kernel which takes the call."""
    weight, routes = projection.weight, projection.routes
    are_few = len(routes.perm) < _READ_BOUND_ROWS * len(weight)
    is_by_row = routes.ends is not None  # others read these on the host
    return supports(projection) and (is_by_row or are_few or have_wgmma(weight.device))


def _slices(projection: Projection, x: Tensor) -> Iterable[tuple[int, Tensor]]:
    weight = projection.weight
    return [(0, weight)] if isinstance(weight, Tensor) else weight.slices(x, projection.routes.offs)


class _Pools(NamedTuple):
    """The factors of all adapters, as the kernels take them.

    Attributes:
        lora_a, lora_b: ``[G, C, in]`` and ``[G, out, C]``; C is the rank in whole chunks, and twice
            that if they are two halves of float32. G is E, or where rows have adapters of their own
            E (n + 1): of each expert zeros, for none, then those of each adapter.
        rank: the sum of the adapters', or of those the largest.
        scaling: what the update is multiplied by.
        scalings: what each B was multiplied by.
    """

    lora_a: Tensor
    lora_b: Tensor
    rank: int
    scaling: float
    scalings: Sequence[float]


def _pools(
    projection: Projection, x: Tensor | None = None
) -> tuple[_Pools, Tensor | None, Tensor | None]:
    """The pools; and for the few rows of an x, s ``[S, R]`` and s by scaling in two terms, beside
    which the pool of lora_a is not written."""
    weight, ends = projection.weight, projection.routes.kind_ends
    experts, out, within = weight.shape
    if projection.rank() == 0:
        pool_a, pool_b = (
            torch.zeros(len(ends), *sizes, dtype=weight.dtype, device=weight.device)
            for sizes in ((8, within), (out, 8))
        )
        return _Pools(pool_a, pool_b, 1, 0.0, ()), None, None
    lora_a, lora_b = (
        [for_kernels(each, weight.dtype) for each in factors]
        for factors in (projection.lora_a, projection.lora_b)
    )
    scaling, *others = projection.scalings
    is_in_b = any(other != scaling for other in others)  # scalings that differ are
    scalings = list(projection.scalings) if is_in_b else [1.0] * len(lora_a)
    scaling = 1.0 if is_in_b else scaling
    # B is not rounded to half once more.
    is_half = not is_in_b and all(each.dtype == weight.dtype for each in (*lora_a, *lora_b))
    terms = 1 if is_half else 2
    s = t = None
    if x is None:
        words = scalings, experts, weight.dtype, terms, ends, projection.routes.ends is not None
        pool_a, pool_b = _ops.experts_factors(lora_a, lora_b, *words)
    else:
        words = scalings, scaling, experts, terms, ends, projection.token()
        pool_a, pool_b, s, t = _ops.experts_low_rank(x, lora_a, lora_b, *words)
    return _Pools(pool_a, pool_b, projection.rank(), scaling, scalings), s, t


def _in_rows(rows: Tensor) -> Tensor:
    """With unit stride, and rows that do not overlap, as those of an expanded gradient do."""
    is_ordered = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]
    return rows if is_ordered else rows.contiguous()


def _mask(projection: Projection) -> tuple:
    """(the mask's row of each row, the probability, the seed)."""
    if projection.seed is None:
        return None, 0.0, None
    return projection.mask_rows, projection.dropout_p, projection.seed


# The most rows that take two launches, in which A is read once for each row.
_MOST_IN_TWO_LAUNCHES = 64


def forward(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor] | None:
    """None if quantised experts cannot take the kernels."""
    x, projection = _in_rows(x), rows.projection
    are_two = 0 < len(rows) <= _MOST_IN_TWO_LAUNCHES and projection.routes.ends is None
    if are_two and projection.rank() and projection.seed is None:
        done = _forward(x, projection, *_pools(projection, x))
        if done is not None:
            return done
    return _forward(x, projection, *_pools(projection))


def _forward(
    x: Tensor, projection: Projection, pools: _Pools, own_s: Tensor | None, t: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    routes = projection.routes
    own = *pools[:4], routes.kind_ends, projection.token(), *_mask(projection)
    y = s = workspace = None
    for first, weight in _slices(projection, x):
        given = projection.bias, *own, first, y, workspace, routes.tables, t, routes.kinds
        found = _ops.experts_product(x, weight, *given)
        if first:
            continue
        y, s, workspace = found
        # The first slice of several, or a call with t, has taken no kernels.
        if (t is not None or len(weight) < len(projection.weight)) and not len(workspace):
            return None
    assert y is not None and s is not None
    s = s if own_s is None else own_s
    return y, s if projection.rank() else s[:, :0]


def backward(gradient: Gradient, x: Tensor, rows: Rows) -> Backward | None:
    """None as `forward`."""
    (grad, weights, s, want_x, want_a, want_b), projection = gradient, rows.projection
    (pools, *_), routes = _pools(projection), projection.routes
    grad, x = _in_rows(grad), _in_rows(x)
    row_weights = None
    if weights is not None and (any(want_a) or any(want_b)):
        row_weights = for_kernels(weights, grad.dtype)
    s = s if projection.rank() else s.new_empty(len(s), 1)
    wanted = [want_x, any(want_a), any(want_b)]
    grad_rows = None if weights is None else routes.token
    own = *pools[:4], routes.kind_ends, projection.token(), grad_rows, *_mask(projection)
    slices = _slices(projection, x)
    if not want_x and isinstance(projection.weight, QuantizedStack):
        slices = [(0, x.new_empty(1, *projection.weight.shape[1:]))]  # which nothing reads
    dx = da = db = workspace = None
    for first, weight in slices:
        given = row_weights, wanted, weight, *own, first, dx, workspace, routes.tables
        found = _ops.experts_product_backward(grad, x, s, *given, routes.perm, routes.kinds)
        if first:
            continue
        dx, da, db, workspace = found
        if len(weight) < len(projection.weight) and not len(workspace):
            return None
    dweights = None
    if dx is not None and weights is not None:
        dweights = dot(grad, x, dx, weights, projection)
    groups = len(projection.weight), routes.kinds
    # In PEFT's layout, with the groups for experts.
    of_a = () if da is None else da.view(*groups, pools.rank, -1).unbind(1)
    of_b = () if db is None else db.view(-1, pools.rank, *groups).unbind(3)
    ranks = projection.ranks()
    return Backward(
        dx,
        dweights,
        _taken_apart(of_a, projection.lora_a, ranks, want_a),
        _taken_apart(of_b, projection.lora_b, ranks, want_b, pools.scalings),
    )


def dot(grad: Tensor, x: Tensor, dx: Tensor, weights: Tensor, projection: Projection) -> Tensor:
    """The gradient of the weights, by slot; dx, without them before, is multiplied by them."""
    routes, bias = projection.routes, projection.bias
    own = for_kernels(weights, dx.dtype)
    of_bias = {} if bias is None else {"grad": _in_rows(grad), "bias": bias.to(dx.dtype)}
    slots = len(routes.perm) // max(1, len(grad))
    found = _ops.experts_dot(
        _in_rows(x), dx, routes.perm, routes.offs, own, max(1, slots), **of_bias
    )
    return found.to(weights.dtype)


def _taken_apart(
    kinds: Sequence[Tensor],
    factors: Sequence[Tensor],
    ranks: Sequence[int],
    wanted: Sequence[bool],
    scalings: Sequence[float] = (),
) -> list[Tensor | None]:
    """The gradient of each adapter. Ranks are dimension 1 of `kinds`: of one kind those of all
    adapters are joined, else kind i + 1 is adapter i's."""
    parts = [of_kind[:, :rank] for of_kind, rank in zip(kinds[1:], ranks, strict=False)]
    parts = kinds[0].split(list(ranks), 1) if len(kinds) == 1 else parts
    found: list[Tensor | None] = [None] * len(factors)
    for place, part in enumerate(parts):
        if wanted[place]:
            own = part.reshape(factors[place].shape)
            if scalings and scalings[place] != 1.0:
                own = own * scalings[place]
            found[place] = own.to(factors[place].dtype)
    return found
