"""`lora_linear` on a quantised weight: the op on a dequantised weight, forward and backward.

    W  = dequantize(weight)        into a workspace, in forward and again in backward
    y  = x W^T + bias + scaling * (drop(x) A^T) B^T
    dX = dY W + ...                (the op's equations)

Saved for backward: the tensors that the op saves, and the quantised weight itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.function import once_differentiable

from .base import is_autocast
from .weight import QuantizedWeight, Versions, dense

_ops = torch.ops.lora_ext


class Call(NamedTuple):
    """The arguments of a call other than tensors with a gradient.

    Attributes:
        weight: the base's weight.
        adapters: number of adapters; with `groups` many, as a list or a pool.
        scaling: a number, or with many adapters a float32 tensor.
        dropout_p, seed: as in `lora_linear`.
        groups: (index, offs, ranks) for many adapters, or None.
        row_block: the op's, positive in `lora_ext.batch_invariant`.
    """

    weight: QuantizedWeight
    scaling: Any
    dropout_p: float
    seed: Tensor | None
    groups: tuple[Tensor | None, ...] | None = None
    row_block: int = 0


def quantized_linear(
    call: Call,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """y with one adapter or many, in the autocast dtype of x, or in x's dtype."""
    _check(call.weight, x)
    if not is_autocast(x):
        return _apply(call, x, bias, lora_a, lora_b)
    # As in the op's own autocast, float32 adapters are never rounded.
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    x = x.to(dtype)
    lora_a, lora_b = (
        [f if f.dtype in (dtype, torch.float32) else f.to(dtype) for f in factors]
        for factors in (lora_a, lora_b)
    )
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _apply(call, x, bias, lora_a, lora_b)


def _apply(
    call: Call, x: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> Tensor:
    if torch.is_grad_enabled():
        if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "lora_ext.lora_linear: expected a call outside of torch.func's transforms with a "
                "quantised weight, but got one within; give it weight.dequantize(x.dtype), or take "
                "lora_ext.reference.lora_linear_reference"
            )
        return _QuantizedLinear.apply(call, x, bias, *lora_a, *lora_b)
    # needs_input_grad is true without grad mode too, so S would be computed without being used.
    with dense(call.weight, x) as weight:
        return _forward(call, x, weight, lora_a, lora_b, bias)


def quantized_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x W^T + bias of the dequantised weight, in x's dtype or autocast's; nothing is saved."""
    _check(weight, x)
    if not is_autocast(x):
        return _QuantizedProduct.apply(weight, x, bias if bias is None else bias.to(x.dtype))
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _QuantizedProduct.apply(weight, x, bias if bias is None else bias.to(x.dtype))


def _check(weight: QuantizedWeight, x: Tensor) -> None:
    if x.device != weight.device:
        raise RuntimeError(
            f"lora_ext.lora_linear: expected the quantised weight on x's device, {x.device}, but "
            f"got it on {weight.device}"
        )
    if x.dtype == torch.float64:
        raise TypeError(
            "lora_ext.lora_linear: expected x in float32, bfloat16 or float16 with a quantised "
            "weight, but got float64"
        )


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        # One *args for all: torch.compile decides by the number of parameters whether there is a
        # ctx, and with only the factors in *args it mistakes a call with one adapter for one
        # without ctx.
        call, x, bias, *factors = operands
        half = len(factors) // 2
        lora_a, lora_b = factors[:half], factors[half:]
        wants = ctx.needs_input_grad
        with dense(call.weight, x) as weight:
            if not any(wants):
                return _forward(call, x, weight, lora_a, lora_b, bias)
            y, s = _forward_for_backward(call, x, weight, lora_a, lora_b, bias)
        ctx.call, ctx.has_bias, ctx.versions = call, bias is not None, Versions(call.weight)
        tensors = (call.seed, *(call.groups or (None, None, None)))
        scaling = call.scaling if call.groups is not None else None
        ctx.save_for_backward(x, s, scaling, *tensors, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, s, scaling, seed, *rest = ctx.saved_tensors
        groups, factors = tuple(rest[:3]), rest[3:]
        half = len(factors) // 2
        lora_a, lora_b = factors[:half], factors[half:]
        _, want_x, want_bias, *want = ctx.needs_input_grad
        call = ctx.call._replace(seed=seed)
        if call.groups is not None:
            call = call._replace(scaling=scaling, groups=groups)
        want_bias = want_bias and ctx.has_bias
        if want_x:
            ctx.versions.check()
            with dense(call.weight, x) as weight:
                return None, *_backward(
                    call, grad, x, weight, lora_a, lora_b, s, want_x, want_bias, want
                )
        # It is read only for dX.
        weight = x.new_empty(()).expand(call.weight.shape)
        return None, *_backward(call, grad, x, weight, lora_a, lora_b, s, want_x, want_bias, want)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: QuantizedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.like, ctx.versions = weight, x.new_empty(0), Versions(weight)
        with dense(weight, x) as matrix:
            return F.linear(x, matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, want_x, want_bias = ctx.needs_input_grad
        dx = dbias = None
        if want_x:
            ctx.versions.check()
            with dense(ctx.weight, ctx.like) as matrix:
                dx = grad.matmul(matrix)
        if want_bias:
            dbias = grad.sum_to_size(grad.shape[-1:])
        return None, dx, dbias


def _options(call: Call) -> dict[str, Any]:
    """What the op takes beside tensors with a gradient."""
    options = {
        "scaling": call.scaling,
        "dropout_p": call.dropout_p,
        "seed": call.seed,
        "row_block": call.row_block,
    }
    if call.groups is None:
        return options
    index, offs, ranks = call.groups
    return options | {"index": index, "offs": offs, "ranks": ranks}


def _forward(
    call: Call,
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    if call.groups is None:
        return _ops.lora(x, weight, None, *lora_a, *lora_b, bias=bias, **_options(call))
    return _ops.lora_grouped(x, weight, None, lora_a, lora_b, bias=bias, **_options(call))


def _forward_for_backward(
    call: Call,
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if call.groups is None:
        return _ops.lora_forward(x, weight, None, *lora_a, *lora_b, bias=bias, **_options(call))
    return _ops.lora_grouped_forward(x, weight, None, lora_a, lora_b, bias=bias, **_options(call))


def _backward(
    call: Call,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor,
    want_x: bool,
    want_bias: bool,
    want: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, dbias, gradients of the factors), None if not requested."""
    if call.groups is None:
        wanted = [want_x, *want, want_bias]
        dx, da, db, dbias = _ops.lora_backward(
            grad, s, wanted, x, weight, None, *lora_a, *lora_b, **_options(call)
        )
        found = (dx, dbias, da, db)
        flags = (want_x, want_bias, *want)
        return tuple(g if wants else None for g, wants in zip(found, flags, strict=True))
    half = len(want) // 2
    wanted = ([want_x, want_bias], list(want[:half]), list(want[half:]))
    dx, da, db, dbias = _ops.lora_grouped_backward(
        grad, s, *wanted, x, weight, None, lora_a, lora_b, **_options(call)
    )
    found = iter((*da, *db))  # only those that are requested
    gradients = [next(found) if wants else None for wants in want]
    return dx if want_x else None, dbias if want_bias else None, *gradients
