"""The torch autograd Functions of the two projections.

Saved for backward: x as it came, z (what the gate takes), the routes and S ``[S, R]`` of each
projection; not the gathered rows, not h = gate(z), which is computed again, not y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import projection as eager
from .factors import Factors
from .projection import Projection, Rows
from .routing import Routes, sum_of_slots


class Call(NamedTuple):
    """What a projection has beside tensors with a gradient.

    Attributes:
        weight: ``[E, out, in]``.
        bias: ``[E, out]`` or None.
        scalings: of the adapters.
        routes: of the rows.
        slots: k; of the rows of each token.
    """

    weight: Tensor
    bias: Tensor | None
    scalings: tuple[float, ...]
    routes: Routes
    slots: int

    def projection(self, factors: tuple[Tensor, ...]) -> Projection:
        if not factors:
            return Projection(self.weight, self.bias, None)
        half = len(factors) // 2
        return Projection(
            self.weight, self.bias, Factors(factors[:half], factors[half:], self.scalings)
        )


def _save(ctx: Any, call: Call, *tensors: Tensor | None) -> None:
    ctx.call = call._replace(routes=None)  # pyright: ignore[reportArgumentType]
    ctx.save_for_backward(*call.routes, *tensors)


def _saved(ctx: Any) -> tuple[Call, list[Tensor]]:
    perm, token, offs, *tensors = ctx.saved_tensors  # once: a checkpoint unpacks each tensor once
    return ctx.call._replace(routes=Routes(perm, token, offs)), tensors


def _halves(wants: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    half = len(wants) // 2
    return wants[:half], wants[half:]


class Up(torch.autograd.Function):
    """z ``[S, N]`` of x ``[T, H]``."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *factors: Tensor) -> Tensor:
        rows = Rows(x, call.routes.token)
        z, s = eager.forward(rows, call.projection(factors), call.routes.offs)
        _save(ctx, call, x, s, *factors)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, (x, s, *factors) = _saved(ctx)
        _, want_x, *wants = ctx.needs_input_grad
        found = eager.backward(
            Rows(grad),
            Rows(x, call.routes.token),
            None,
            call.projection(tuple(factors)),
            s,
            call.routes.offs,
            want_x,
            *_halves(tuple(wants)),
        )
        dx = found.dx
        if dx is not None:
            dx = sum_of_slots(dx, call.routes.perm, None, call.slots)
        return None, dx, *found.dlora_a, *found.dlora_b


class Down(torch.autograd.Function):
    """y ``[S, H]`` of h ``[S, I]``, without weights: a norm comes before them."""

    @staticmethod
    def forward(ctx: Any, call: Call, h: Tensor, *factors: Tensor) -> Tensor:
        y, s = eager.forward(Rows(h), call.projection(factors), call.routes.offs)
        _save(ctx, call, h, s, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, (h, s, *factors) = _saved(ctx)
        _, want_h, *wants = ctx.needs_input_grad
        found = eager.backward(
            Rows(grad),
            Rows(h),
            None,
            call.projection(tuple(factors)),
            s,
            call.routes.offs,
            want_h,
            *_halves(tuple(wants)),
        )
        return None, found.dx, *found.dlora_a, *found.dlora_b


class GateDown(torch.autograd.Function):
    """out ``[T, H]`` of z ``[S, N]`` and the router's weights ``[T, k]``."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        gate: Callable[[Tensor], Tensor],
        z: Tensor,
        weights: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        y, s = eager.forward(Rows(gate(z)), call.projection(factors), call.routes.offs)
        _save(ctx, call, z, weights, s, *factors)
        ctx.gate = gate
        return sum_of_slots(y, call.routes.perm, weights.reshape(-1), call.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, (z, weights, s, *factors) = _saved(ctx)
        _, _, want_z, want_weights, *wants = ctx.needs_input_grad
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(want_z)
            h = ctx.gate(leaf)
        perm = call.routes.perm
        found = eager.backward(
            Rows(grad, call.routes.token),
            Rows(h.detach()),
            weights.reshape(-1)[perm],
            call.projection(tuple(factors)),
            s,
            call.routes.offs,
            want_z or want_weights,
            *_halves(tuple(wants)),
        )
        dz = torch.autograd.grad(h, leaf, found.dx)[0] if want_z else None
        dweights = None
        if want_weights:
            dweights = weights.new_empty(weights.numel())
            dweights[perm] = found.dweights.to(weights.dtype)
            dweights = dweights.view(weights.shape)
        return None, None, dz, dweights, *found.dlora_a, *found.dlora_b
