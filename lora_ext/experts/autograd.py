"""The torch autograd Functions of the two projections.

    Projected       z ``[S, N]`` of x ``[T, H]``, or of sorted rows
    GateDown        out ``[T, H]`` of z ``[S, N]`` and the router's weights

Saved for backward: x (not gathered), z (the input of the gate), the routes, and of each projection
W, S ``[S, R]`` and the seed of dropout; not the gathered rows, not a mask, not h = gate(z), which
is computed again, and not y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..quantized.stack import QuantizedStack
from ..quantized.weight import Versions
from ..torch_state import is_captured
from . import ops, projection, routing
from .dropout import Dropout
from .factors import Factors
from .projection import Projection, Rows
from .routing import Routes


class Call(NamedTuple):
    """The arguments of a projection other than tensors with a gradient.

    Attributes:
        weight: ``[E, out, in]``, or a quantised stack of this shape.
        bias: ``[E, out]`` or None.
        scalings: those of the adapters.
        routes: the routes of the rows.
        slots: k, the number of rows of each token.
        dropout_p: the probability of dropout of the update's input.
        seed: that of its mask; None: no dropout.
        row_block: the op's, positive in `lora_ext.batch_invariant`.
    """

    weight: Tensor | QuantizedStack
    bias: Tensor | None
    scalings: tuple[float, ...]
    routes: Routes
    slots: int
    dropout_p: float = 0.0
    seed: Tensor | None = None
    row_block: int = 0

    def dropout(self, of_tokens: bool) -> Dropout | None:
        """Whose masks have a row for each token, or for each slot."""
        if self.seed is None:
            return None
        rows = self.routes.token if of_tokens else self.routes.perm
        return Dropout(self.dropout_p, self.seed, rows)

    def projection(self, factors: tuple[Tensor, ...]) -> Projection:
        if not factors:
            return Projection(self.weight, self.bias, None, self.row_block)
        half = len(factors) // 2
        return Projection(
            self.weight,
            self.bias,
            Factors(factors[:half], factors[half:], self.scalings, self.routes.ends),
            self.row_block,
        )


class _Eager:
    """The passes as plain functions, without the dispatcher."""

    forward = staticmethod(projection.forward)
    backward = staticmethod(projection.backward)
    sum_of_slots = staticmethod(routing.sum_of_slots)


def passes() -> Any:
    """The passes for this call: in a traced program, the ops."""
    return ops if torch.compiler.is_compiling() else _Eager


def _save(ctx: Any, call: Call, *tensors: Tensor | None) -> None:
    # If W is changed in place before backward, autograd refuses it, or the stack's versions do.
    weight: Any = call.weight
    dense, stack = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    ctx.versions = None if stack is None else Versions(stack)
    ctx.call = call._replace(weight=stack, bias=None, routes=None, seed=None)  # pyright: ignore[reportArgumentType]
    ctx.save_for_backward(dense, call.bias, *call.routes, call.seed, *tensors)


def _saved(ctx: Any, reads_weight: bool) -> tuple[Call, list[Tensor]]:
    # Once: a checkpoint unpacks each tensor once.
    dense, bias, perm, token, offs, ends, seed, *tensors = ctx.saved_tensors
    if reads_weight and ctx.versions is not None:
        ctx.versions.check()
    weight = ctx.call.weight if dense is None else dense
    routes = Routes(perm, token, offs, ends)
    return ctx.call._replace(weight=weight, bias=bias, routes=routes, seed=seed), tensors


def _halves(wants: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    half = len(wants) // 2
    return wants[:half], wants[half:]


class Projected(torch.autograd.Function):
    """y ``[S, out]`` for x: ``[T, in]`` if its rows are tokens, else ``[S, in]``, sorted."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        # One *args for all: torch.compile decides by the number of parameters whether there is a
        # ctx.
        call, of_tokens, x, *factors = operands
        rows = Rows(x, call.routes.token if of_tokens else None)
        dropout = call.dropout(of_tokens)
        y, s = passes().forward(rows, call.projection(tuple(factors)), call.routes.offs, dropout)
        _save(ctx, call, x, s, *factors)
        ctx.of_tokens = of_tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, _, want_x, *wants = ctx.needs_input_grad
        call, (x, s, *factors) = _saved(ctx, want_x)
        found = passes().backward(
            Rows(grad),
            Rows(x, call.routes.token if ctx.of_tokens else None),
            None,
            call.projection(tuple(factors)),
            s,
            call.routes.offs,
            want_x,
            *_halves(tuple(wants)),
            call.dropout(ctx.of_tokens),
        )
        dx = found.dx
        if dx is not None and ctx.of_tokens:
            dx = passes().sum_of_slots(dx, call.routes.perm, None, call.slots)
        return None, None, dx, *found.dlora_a, *found.dlora_b


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
    def forward(ctx: Any, *operands: Any) -> Tensor:
        call, gate, z, weights, *factors = operands
        before = None if gate is None or is_captured(z) else _generator(z).get_state()
        h = z if gate is None else gate(z)
        is_random = before is not None and not torch.equal(before, _generator(z).get_state())
        ctx.random_state = before if is_random else None
        own = call.projection(tuple(factors))
        y, s = passes().forward(Rows(h), own, call.routes.offs, call.dropout(False))
        _save(ctx, call, z, weights, s, *factors)
        ctx.gate = gate
        return passes().sum_of_slots(y, call.routes.perm, weights.reshape(-1), call.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, _, want_z, want_weights, *wants = ctx.needs_input_grad
        call, (z, weights, s, *factors) = _saved(ctx, want_z or want_weights)
        h = leaf = z
        if ctx.gate is not None:
            with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
                leaf = z.detach().requires_grad_(want_z)
                state = ctx.random_state
                with torch.random.fork_rng([z.device] * z.is_cuda, state is not None):
                    if state is not None:
                        _generator(z).set_state(state)
                    h = ctx.gate(leaf)
        perm = call.routes.perm
        found = passes().backward(
            Rows(grad, call.routes.token),
            Rows(h.detach()),
            weights.reshape(-1)[perm],
            call.projection(tuple(factors)),
            s,
            call.routes.offs,
            want_z or want_weights,
            *_halves(tuple(wants)),
            call.dropout(False),
        )
        dz = found.dx if want_z else None
        if dz is not None and ctx.gate is not None:
            with torch.autocast(z.device.type, enabled=False):
                (dz,) = torch.autograd.grad(h, leaf, dz)
        dweights = None
        if want_weights and found.dweights is not None:
            dweights = weights.new_empty(weights.numel())
            dweights[perm] = found.dweights.to(weights.dtype)
            dweights = dweights.view(weights.shape)
        return None, None, dz, dweights, *found.dlora_a, *found.dlora_b
