"""The torch autograd Functions of the two projections.

    Projected       z ``[S, N]`` of x ``[T, H]``, or of sorted rows
    GateDown        out ``[T, H]`` of z ``[S, N]`` and the router's weights

Saved for backward: x (not gathered), z (the input of the gate), the routes, and of each projection
W, S ``[S, R]`` and the seed of dropout; not the gathered rows, not a mask, not h = gate(z), which
is computed again, and not y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..quantized.weight import Versions
from ..torch_state import is_captured
from . import ops, projection
from .operands import Gradient, Projection
from .routing import Routes


def passes() -> Any:
    """The passes for this call: in a traced program the ops, else without the dispatcher."""
    return ops if torch.compiler.is_compiling() else projection


def with_factors(call: Projection, factors: list[Tensor]) -> Projection:
    half = len(factors) // 2
    return call._replace(lora_a=factors[:half], lora_b=factors[half:])


def _forward(ctx: Any, call: Projection, x: Tensor, factors: list[Tensor], *kept: Tensor) -> Tensor:
    """y of a projection; saves what `_backward` needs, and other tensors."""
    y, s = passes().forward(x, with_factors(call, factors))
    # If W is changed in place before backward, autograd refuses it, or the stack's versions do.
    weight: Any = call.weight
    dense, stack = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    ctx.versions = None if stack is None else Versions(stack)
    ctx.call = call._replace(weight=stack, bias=None, routes=None, seed=None)  # pyright: ignore[reportArgumentType]
    ctx.save_for_backward(dense, call.bias, *call.routes, call.seed, s, *kept, *factors)
    return y


def _saved(ctx: Any, reads_weight: bool, kept: int) -> tuple[Projection, list[Tensor]]:
    """(the projection with its factors, [S, the other tensors])."""
    # Once: a checkpoint unpacks each tensor once.
    dense, bias, *tensors = ctx.saved_tensors
    count = len(Routes._fields)
    routes, seed, tensors = Routes(*tensors[:count]), tensors[count], tensors[count + 1 :]
    if reads_weight and ctx.versions is not None:
        ctx.versions.check()
    weight = ctx.call.weight if dense is None else dense
    call = ctx.call._replace(weight=weight, bias=bias, routes=routes, seed=seed)
    return with_factors(call, tensors[kept + 1 :]), tensors[: kept + 1]


def _gradient(
    grad: Tensor, weights: Tensor | None, s: Tensor, want_x: bool, wants: list[bool]
) -> Gradient:
    half = len(wants) // 2
    return Gradient(grad, weights, s, want_x, wants[:half], wants[half:])


class Projected(torch.autograd.Function):
    """y ``[S, out]`` for x: ``[T, in]`` if its rows are tokens, else ``[S, in]``, sorted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Three parameters, here and below: torch.compile leaves ctx out of a frozen call with as
        # many operands as parameters, and these are an even number.
        call, *factors = operands
        return _forward(ctx, call, x, factors, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        want_x, _, *wants = ctx.needs_input_grad
        call, (s, x) = _saved(ctx, want_x, 1)
        found = passes().backward(_gradient(grad, None, s, want_x, wants), x, call)
        dx = found.dx
        if dx is not None and call.is_first:
            dx = passes().sum_of_slots(dx, call.routes, None, call.slots)
        return dx, None, *found.dlora_a, *found.dlora_b


def _generator(z: Tensor) -> torch.Generator:
    return torch.cuda.default_generators[z.get_device()] if z.is_cuda else torch.default_generator


class GateDown(torch.autograd.Function):
    """out ``[T, H]`` for z ``[S, N]`` and the router's weights ``[T, k]``.

    h = gate(z) is computed again in backward, from forward's random numbers. As in forward this
    runs without autocast, which may be on where the caller runs backward. If no gate is passed, z
    is h: a compiler decides itself what to compute again, and the gradients of a trained gate must
    be recorded by autograd.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, *operands: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, gate, weights, *factors = operands
        before = None if gate is None or is_captured(z) else _generator(z).get_state()
        h = z if gate is None else gate(z)
        is_random = before is not None and not torch.equal(before, _generator(z).get_state())
        ctx.random_state = before if is_random else None
        ctx.gate = gate
        y = _forward(ctx, call, h, factors, z, weights)
        return passes().sum_of_slots(y, call.routes, weights.reshape(-1), call.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        want_z, _, _, want_weights, *wants = ctx.needs_input_grad
        call, (s, z, weights) = _saved(ctx, want_z or want_weights, 2)
        h = leaf = z
        if ctx.gate is not None:
            with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
                leaf = z.detach().requires_grad_(want_z)
                state = ctx.random_state
                with torch.random.fork_rng([z.device] * z.is_cuda, state is not None):
                    if state is not None:
                        _generator(z).set_state(state)
                    h = ctx.gate(leaf)
        own_weights, want_x = weights.reshape(-1), want_z or want_weights
        gradient = _gradient(grad, own_weights, s, want_x, wants)
        found = passes().backward(gradient, h.detach(), call)
        dz = found.dx if want_z else None
        if dz is not None and ctx.gate is not None:
            with torch.autocast(z.device.type, enabled=False):
                (dz,) = torch.autograd.grad(h, leaf, dz)
        dweights = None
        if want_weights and found.dweights is not None:
            dweights = found.dweights.view(weights.shape)
        return dz, None, None, dweights, *found.dlora_a, *found.dlora_b
