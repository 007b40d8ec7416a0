"""One projection of all experts on rows that are sorted by expert, forward and backward.

    y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T         for the rows of each expert e

    g = dy:      dx' = g W_e + s mask * ((g B_e) A_e)
    weights w:   dx = w dx',  dw = <x, dx'> + <g, b_e>
                 dA_e = s (g B_e)^T (w drop(x)),  dB_e = s g^T (w drop(x) A_e^T)

Here drop(x) is mask * x, and s is multiplied by keep_scale (`dropout`). With weights, y is
multiplied by them later, and g is the gradient of the sum of these products: so y is not needed for
dw. W has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..quantized.stack import QuantizedStack
from . import expert_groups, few_rows, one_pass, products
from .dropout import Dropout
from .expert_groups import ExpertGroups
from .factors import Factors, Gradients, Updates
from .group_backward import Operands, in_one_pass, in_passes
from .row_factors import RowGradients, RowUpdates

_ops = torch.ops.lora_ext


class Projection(NamedTuple):
    """Attributes:
    weight: ``[E, out, in]``, any strides, or quantised.
    bias: ``[E, out]`` or None.
    factors: of the active adapters, or of those that rows have; or None.
    row_block: the op's, positive in `lora_ext.batch_invariant`.
    """

    weight: Tensor | QuantizedStack
    bias: Tensor | None
    factors: Factors | None
    row_block: int = 0


class Rows(NamedTuple):
    """Sorted rows: the rows of a tensor, or indices into one.

    Attributes:
        values: ``[S, n]``, or ``[T, n]`` with token.
        token: ``[S]``, the index of each row, or None.
    """

    values: Tensor
    token: Tensor | None = None

    def part(self, begin: int, end: int) -> Tensor:
        if self.token is None:
            return self.values[begin:end]
        return self.values.index_select(0, self.token[begin:end])

    @property
    def is_gathered(self) -> bool:
        """Whether `part` makes a copy."""
        return self.token is not None

    @property
    def size(self) -> int:
        return len(self.values) if self.token is None else len(self.token)


def _on_device(rows: Rows, weight: Tensor | QuantizedStack, offs: Tensor) -> ExpertGroups | None:
    """All experts as one group, if the grouped product supports it; else None."""
    given = rows.values if rows.token is None else None
    if products.are_grouped(weight, rows.size, given):
        return expert_groups.on_device(offs, rows.size)
    return None


def _updates_of(factors: Factors, experts: int, dtype: torch.dtype) -> Updates | RowUpdates:
    make = Updates if factors.ends is None else RowUpdates
    return make(factors, experts, dtype)


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


def forward(
    x: Rows, projection: Projection, offs: Tensor, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """(y ``[S, out]``, s ``[S, R]``): s is drop(x) A^T in at least float32, empty if no factors."""
    weight, bias, factors, row_block = projection
    _check_invariant(projection)
    taken = _on_device(x, weight, offs)
    if taken is None:
        bounds = expert_groups.on_host_numbers(offs)
        if dropout is None and not row_block:
            numbers = few_rows.numbers_of(bounds, x.size, weight, factors)
            if numbers:
                return few_rows.forward(*x, weight, bias, factors, numbers)
        taken = expert_groups.on_host(bounds, weight.device)
    experts, out_features, _ = weight.shape
    rank = 0 if factors is None else factors.rank(experts)
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = weight.new_empty(0 if taken.is_whole else x.size, out_features)
    s = weight.new_empty(x.size, rank, dtype=wide)
    updates = None if factors is None else _updates_of(factors, experts, weight.dtype)
    is_one_pass = not taken.is_whole and one_pass.supports(weight, factors)
    for group in taken.each:
        where = slice(group.begin, group.end)
        part = x.part(group.begin, group.end)
        update = None if updates is None else updates.of(group)
        if is_one_pass:
            own = one_pass.forward(part, weight, bias, group, update, dropout, row_block, y[where])
            s[where, : own.shape[1]] = own
            continue
        sums = products.forward(part, weight, bias, group)
        if update is not None:
            if dropout is not None:
                part = dropout.drop(part, group, in_place=x.is_gathered)
            sums, own = _ops.lora_grouped_forward(
                part, None, sums, **update.arguments(), row_block=row_block
            )
            s[where, : own.shape[1]] = own
        if taken.is_whole:
            y = sums
        else:
            y[where] = sums
    taken.clear_rest(y, s)
    return y, s


class Backward(NamedTuple):
    """Attributes:
    dx: ``[S, in]``, or None.
    dweights: ``[S]`` in at least float32, or None.
    dlora_a, dlora_b: one for each adapter, None if not requested.
    """

    dx: Tensor | None
    dweights: Tensor | None
    dlora_a: list[Tensor | None]
    dlora_b: list[Tensor | None]


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
    """The gradients of the equations above; weights ``[S]``, sorted, or None for 1."""
    weight, bias, factors, row_block = projection
    experts, _, in_features = weight.shape
    weights = None if weights is None else weights.to(s.dtype)
    taken = _on_device(grad, weight, offs)
    if taken is None:
        taken = expert_groups.on_host(expert_groups.on_host_numbers(offs), weight.device)
    gradients = updates = None
    if factors is not None:
        updates = _updates_of(factors, experts, weight.dtype)
        if factors.ends is None:
            gradients = Gradients(factors, experts, weight.dtype, want_a, want_b, taken.has_all)
        else:
            gradients = RowGradients(factors, experts, want_a, want_b)
    dx = None
    if want_x:
        dx = weight.new_empty(0 if taken.is_whole else len(s), in_features)
    dweights = s.new_empty(len(s)) if want_x and weights is not None else None
    needs_x = weights is not None or any(want_a)
    is_one_pass = not taken.is_whole and one_pass.supports(weight, factors)
    for group in taken.each:
        where = slice(group.begin, group.end)
        g = grad.part(group.begin, group.end)
        part = x.part(group.begin, group.end) if needs_x else None
        own_weights = None if weights is None else weights[where]
        update = None if updates is None else updates.of(group)
        out = None if dx is None or taken.is_whole else dx[where]
        operands = Operands(g, part, x.is_gathered, own_weights, s[where], want_x)
        run = in_one_pass if is_one_pass else in_passes
        dpart = run(operands, weight, row_block, group, update, gradients, dropout, out)
        if dweights is not None and own_weights is not None:
            assert part is not None and dpart is not None
            dweights[where] = products.dot(part, dpart)
            if bias is not None:
                dweights[where] += products.dot_bias(g, bias, group)
            dpart *= own_weights[:, None]
        if taken.is_whole:
            dx = dpart
    taken.clear_rest(dx, dweights)
    if gradients is None:
        return Backward(dx, dweights, [], [])
    gradients.finish()
    return Backward(dx, dweights, gradients.lora_a, gradients.lora_b)
