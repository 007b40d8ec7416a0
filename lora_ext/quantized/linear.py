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
from torch.autograd.function import once_differentiable

from ..torch_state import compute_dtype, is_autocast, transforms
from .weight import QuantizedWeight, Versions, dense

_ops = torch.ops.lora_ext


class Call(NamedTuple):
    """The arguments of a call other than tensors with a gradient.

    Attributes:
        weight: the base's weight.
        adapters: number of adapters; with `groups` many, as a list or a pool.
        scaling: a number, or with many adapters a float32 tensor.
        dropout_p, seed: as in `lora_linear`.
        groups: (index, offs, ranks), of which one adapter has none.
        row_block: the op's, positive in `lora_ext.batch_invariant`.
    """

    weight: QuantizedWeight
    scaling: Any = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    groups: tuple[Tensor | None, ...] = (None, None, None)
    row_block: int = 0

    @property
    def is_grouped(self) -> bool:
        return any(each is not None for each in self.groups)


def quantized_linear(
    call: Call, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    """y with one adapter, many or none, in the autocast dtype of x, or in x's dtype; factors: first
    each lora_a, then each lora_b."""
    _check(call.weight, x)
    if is_autocast(x):
        # As in the op's own autocast, float32 adapters are never rounded.
        dtype = compute_dtype(x)
        factors = [f if f.dtype in (dtype, torch.float32) else f.to(dtype) for f in factors]
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return quantized_linear(call, x.to(dtype), bias, factors)
    if not factors:
        return _QuantizedProduct.apply(call.weight, x, None if bias is None else bias.to(x.dtype))
    if not torch.is_grad_enabled():
        # needs_input_grad is true here too, so S would be computed without being used.
        with dense(call.weight, x) as weight:
            return _op("lora", call, (x, weight, None), factors, bias=bias)
    if not torch.compiler.is_compiling() and transforms() is not None:
        raise NotImplementedError(
            "lora_ext.lora_linear: expected a call outside of torch.func's transforms with a "
            "quantised weight, but got one within; give it weight.dequantize(x.dtype), or take "
            "lora_ext.reference.lora_linear_reference"
        )
    return _QuantizedLinear.apply(call, x, bias, *factors)


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
        with dense(call.weight, x) as weight:
            if not any(ctx.needs_input_grad):
                return _op("lora", call, (x, weight, None), factors, bias=bias)
            y, s = _op("lora_forward", call, (x, weight, None), factors, bias=bias)
        ctx.call, ctx.has_bias, ctx.versions = call, bias is not None, Versions(call.weight)
        scaling = call.scaling if isinstance(call.scaling, Tensor) else None
        ctx.save_for_backward(x, s, scaling, call.seed, *call.groups, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, s, scaling, seed, *rest = ctx.saved_tensors
        groups, factors = tuple(rest[:3]), rest[3:]
        scaling = ctx.call.scaling if scaling is None else scaling
        call = ctx.call._replace(scaling=scaling, seed=seed, groups=groups)
        _, want_x, want_bias, *want = ctx.needs_input_grad
        wants = (want_x, want_bias and ctx.has_bias, *want)
        if want_x:
            ctx.versions.check()
            with dense(call.weight, x) as weight:
                return None, *_backward(call, grad, s, x, weight, factors, wants)
        # It is read only for dX.
        weight = x.new_empty(()).expand(call.weight.shape)
        return None, *_backward(call, grad, s, x, weight, factors, wants)


class _QuantizedProduct(torch.autograd.Function):
    """x W^T + bias of the dequantised weight; nothing is saved."""

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


def _op(
    name: str, call: Call, operands: Sequence[Any], factors: Sequence[Tensor], **more: Any
) -> Any:
    """An op of one adapter, or its namesake of many."""
    words = {"scaling": call.scaling, "dropout_p": call.dropout_p, "seed": call.seed}
    words |= {"row_block": call.row_block, **more}
    if not call.is_grouped:
        return getattr(_ops, name)(*operands, *factors, **words)
    half = len(factors) // 2
    words |= dict(zip(("index", "offs", "ranks"), call.groups, strict=True))
    many = name.replace("lora", "lora_grouped")
    return getattr(_ops, many)(*operands, factors[:half], factors[half:], **words)


def _backward(
    call: Call,
    grad: Tensor,
    s: Tensor,
    x: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, dbias, gradients of the factors), None if not requested."""
    want_x, want_bias, *want = wants
    half = len(want) // 2
    wanted: tuple[list[bool], ...] = ([want_x, *want, want_bias],)
    if call.is_grouped:
        wanted = [want_x, want_bias], want[:half], want[half:]
    operands = (grad, s, *wanted, x, weight, None)
    dx, da, db, dbias = _op("lora_backward", call, operands, factors)
    if not call.is_grouped:
        da, db = [da] * want[0], [db] * want[1]
    found = iter((*da, *db))  # only those that are requested
    gradients = [next(found) if wants else None for wants in want]
    return dx if want_x else None, dbias if want_bias else None, *gradients
