"""One projection of all experts on rows that are sorted by expert, forward and backward.

    y = x W_e^T + b_e + s (x A_e^T) B_e^T         for the rows of each expert e

    g = dy:      dx' = g W_e + s (g B_e) A_e
    weights w:   dx = w dx',  dw = <x, dx'> + <g, b_e>
                 dA_e = s (g B_e)^T (w x),  dB_e = s g^T (w x A_e^T)

With weights, y is what they multiply later, and g the gradient of the product's sum: so y is not
needed to get dw. W has no gradient.

Experts are taken in runs of a few hundred rows: what is gathered for a run, and the run's product,
stay in the cache until the update is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import few_rows
from .factors import Factors, Gradients, pools_of

_ops = torch.ops.lora_ext

# Rows at which a run of experts ends.
_RUN = 512


class Projection(NamedTuple):
    """Attributes:
    weight: ``[E, out, in]``, any strides.
    bias: ``[E, out]`` or None.
    factors: of the active adapters, or None.
    """

    weight: Tensor
    bias: Tensor | None
    factors: Factors | None


class Rows(NamedTuple):
    """Sorted rows: those of a tensor, or where each is in it.

    Attributes:
        values: ``[S, n]``, or ``[T, n]`` with a token.
        token: ``[S]``, or None.
    """

    values: Tensor
    token: Tensor | None = None

    def part(self, begin: int, end: int) -> Tensor:
        if self.token is None:
            return self.values[begin:end]
        return self.values.index_select(0, self.token[begin:end])


class _Run(NamedTuple):
    """Consecutive experts, of those that have rows.

    Attributes:
        begin, end: their rows.
        experts: (number, begin, end) of each, counted from the run's first row.
    """

    begin: int
    end: int
    experts: list[tuple[int, int, int]]

    def hit(self, all_experts: int, device: torch.device) -> Tensor | None:
        if len(self.experts) == all_experts:
            return None
        return torch.tensor([number for number, _, _ in self.experts], device=device)

    def offs(self, device: torch.device) -> Tensor:
        return torch.tensor([end for _, _, end in self.experts], dtype=torch.int32, device=device)


def _runs(bounds: Sequence[int]) -> Iterator[_Run]:
    first, last, experts = 0, 0, []
    for number, end in enumerate(bounds):
        if end > last:
            experts.append((number, last - first, end - first))
            last = end
        if last - first >= _RUN:
            yield _Run(first, last, experts)
            first, experts = last, []
    if experts:
        yield _Run(first, last, experts)


def forward(x: Rows, projection: Projection, offs: Tensor) -> tuple[Tensor, Tensor]:
    """(y ``[S, out]``, s ``[S, R]``); s is x A^T in at least float32, empty without adapters."""
    weight, bias, factors = projection
    rows = len(x.values) if x.token is None else len(x.token)
    experts, out_features, _ = weight.shape
    device = weight.device
    y = weight.new_empty(rows, out_features)
    rank = 0 if factors is None else factors.rank(experts)
    s = weight.new_empty(rows, rank, dtype=torch.promote_types(weight.dtype, torch.float32))
    bounds = offs.tolist()
    for run in _runs(bounds):
        part, place = x.part(run.begin, run.end), y[run.begin : run.end]
        product = place if factors is None else torch.empty_like(place)
        if few_rows.takes(weight, run.experts):
            product = few_rows.product(part, weight, bias, [e for e, _, _ in run.experts])
        else:
            _multiply(part, weight, bias, run, product)
        if factors is None:
            if product is not place:
                place.copy_(product)
            continue
        pools = pools_of(factors, experts, run.hit(experts, device), weight.dtype)
        sums, s[run.begin : run.end] = _ops.lora_update_grouped_forward(
            product,
            part,
            [pools.lora_a],
            [pools.lora_b],
            pools.scaling,
            None,
            run.offs(device),
            None,
            0.0,
            None,
            0,
            0,
        )
        place.copy_(sums)
    if bounds and bounds[-1] < rows:
        y[bounds[-1] :] = 0
        s[bounds[-1] :] = 0
    return y, s


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, run: _Run, out: Tensor) -> None:
    """x W_e^T + b_e of a run's rows."""
    for expert, begin, end in run.experts:
        matrix = weight[expert].t()
        if bias is None:
            torch.mm(x[begin:end], matrix, out=out[begin:end])
        else:
            torch.addmm(bias[expert], x[begin:end], matrix, out=out[begin:end])


class Backward(NamedTuple):
    """Attributes:
    dx: ``[S, in]``, or None.
    dweights: ``[S]`` in at least float32, or None.
    dlora_a, dlora_b: one for each adapter, None where not wanted.
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
) -> Backward:
    """The gradients of the equations above; weights ``[S]``, sorted, or None for 1."""
    weight, bias, factors = projection
    rows = len(s)
    experts, _, in_features = weight.shape
    device = weight.device
    weights = None if weights is None else weights.to(s.dtype)
    bounds = offs.tolist()
    has_all = all(end > begin for begin, end in zip([0, *bounds], bounds, strict=False))
    gradients = None
    if factors is not None:
        gradients = Gradients(factors, experts, weight.dtype, want_a, want_b, has_all)
    dx = weight.new_empty(rows, in_features) if want_x else None
    dweights = None
    if want_x and weights is not None:
        dweights = torch.empty(rows, dtype=s.dtype, device=device)
    for run in _runs(bounds):
        where = slice(run.begin, run.end)
        g = grad.part(run.begin, run.end)
        needs_x = weights is not None or any(want_a)
        part = x.part(run.begin, run.end) if needs_x else None
        dpart = None
        if dx is not None:
            dpart = dx[where]
            for expert, begin, end in run.experts:
                torch.mm(g[begin:end], weight[expert], out=dpart[begin:end])
        if gradients is not None:
            run_weights = None if weights is None else weights[where]
            low_rank = _update_backward(
                g, part, run_weights, projection, s[where], run, gradients, want_x
            )
            if dpart is not None and low_rank is not None:
                dpart += low_rank
        if dweights is not None and weights is not None:
            assert part is not None and dpart is not None
            dweights[where] = _dot(part, dpart)
            if bias is not None:
                for expert, begin, end in run.experts:
                    dweights[where][begin:end] += _dot(g[begin:end], bias[expert])
            dpart *= weights[where, None]
    if bounds and bounds[-1] < rows:
        for rest in (dx, dweights):
            if rest is not None:
                rest[bounds[-1] :] = 0
    if gradients is None:
        return Backward(dx, dweights, [], [])
    return Backward(dx, dweights, gradients.lora_a, gradients.lora_b)


def _dot(rows: Tensor, others: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows * others.to(wide)).sum(-1)


def _update_backward(
    grad: Tensor,
    x: Tensor | None,
    weights: Tensor | None,
    projection: Projection,
    s: Tensor,
    run: _Run,
    gradients: Gradients,
    want_x: bool,
) -> Tensor | None:
    """dx' of the update; the factors' gradients are written."""
    weight, _, factors = projection
    assert factors is not None
    experts = len(weight)
    want_a = any(a is not None for a in gradients.lora_a)
    want_b = any(b is not None for b in gradients.lora_b)
    hit = run.hit(experts, weight.device)
    if weights is not None:
        assert x is not None
        x, s = (x * weights[:, None]).to(x.dtype), s * weights[:, None]
    if x is None:  # only its shape and dtype are looked at
        x = weight.new_empty(()).expand(len(grad), weight.shape[2])
    pools = pools_of(factors, experts, hit, weight.dtype)
    dx, (*da,), (*db,) = _ops.lora_update_grouped_backward(
        grad,
        x,
        [pools.lora_a],
        [pools.lora_b],
        s.contiguous(),
        pools.scaling,
        None,
        run.offs(weight.device),
        None,
        0.0,
        None,
        0,
        0,
        want_x,
        [want_a],
        [want_b],
    )
    gradients.write(hit, da[0] if da else None, db[0] if db else None)
    return dx
