"""Sums that `lora_update` does not support, for DoRA and embeddings, in blocks of rows.

    S = drop(x) A^T                                            `shrink`
    y = base + factor * u + s S B^T                            `combine`

PEFT computes this sum in the widest dtype and rounds it once. `lora_update` has no factor: its y,
base + factor * u, would either be rounded or have the size of a float32 y. And an embedding has S
without an x. Blocks of rows limit the wide temporaries. Saved for backward are x, S, u, the factors
and a seed.

Under torch.compile the same formulas are traced without blocks, which the compiler fuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import dropout_mask, keep_scale_of
from ..dtypes import HALVES
from ..invariance import refuse

# Elements of a block: 1 MiB of float32, which stays in a core's cache; 64 MiB on a GPU, which needs
# more work at a time.
_CPU_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 24


def shrink(x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """S = drop(x) A^T ``[..., r]`` in at least float32, with the mask of the seed."""
    lora_a = _at_least_float32(lora_a)
    if torch.compiler.is_compiling():
        return F.linear(drop(x.to(lora_a.dtype), p, seed), lora_a)
    return _Shrink.apply(x, lora_a, p, seed)


def combine(
    base: Tensor | None,
    u: Tensor | None,
    factor: Tensor | None,
    part: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
) -> Tensor:
    """base + factor * u + scaling * S B^T, rounded once.

    Args:
        base: ``[..., out]``; with u also ``[out]``, or None for 0.
        u: ``[..., out]`` or None.
        factor: ``[out]``, the factor of u, at least float32.
        part: S ``[..., r]`` from `shrink`.
        lora_b: ``[out, r]``, used in at least float32.
        scaling: of S B^T.

    Returns:
        A new tensor of u's shape and dtype, or, without u, of the base's.
    """
    refuse("DoRA or an embedding")
    part, lora_b = _at_least_float32(part), _at_least_float32(lora_b)
    if torch.compiler.is_compiling():
        total: Any = base
        like: Any = base if u is None else u
        if u is not None and factor is not None:
            total = factor * u if base is None else base + factor * u
        return (total + F.linear(part, lora_b) * scaling).to(like.dtype)
    return _Combine.apply(base, u, factor, part, lora_b, scaling)


class _Shrink(torch.autograd.Function):
    """S = drop(x) A^T; dx = drop(dS A), dA = dS^T drop(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None):
        rows = _flat(x)
        part = x.new_empty((*x.shape[:-1], len(lora_a)), dtype=lora_a.dtype)
        with without_autocast(x):
            for block in _blocks(rows):
                dropped = drop(rows[block].to(lora_a.dtype), p, seed, block.start)
                _flat(part)[block] = F.linear(dropped, lora_a)
        ctx.save_for_backward(x, lora_a, seed)
        ctx.p = p
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, lora_a, seed = ctx.saved_tensors  # once: a checkpoint unpacks each tensor once
        needs_x, needs_a = ctx.needs_input_grad[:2]
        dx = x.new_empty(x.shape) if needs_x else None
        da = torch.zeros_like(lora_a) if needs_a else None
        rows = _flat(x)
        with without_autocast(x):
            for block in _blocks(rows):
                ds = _flat(grad)[block]
                if da is not None:
                    da.addmm_(ds.t(), drop(rows[block].to(lora_a.dtype), ctx.p, seed, block.start))
                if dx is not None:
                    _flat(dx)[block] = drop(ds @ lora_a, ctx.p, seed, block.start)
        return dx, da, None, None


class _Combine(torch.autograd.Function):
    """y = base + f u + s S B^T.

    dbase = dy, du = f dy, df = sum over rows of dy u, dS = s dy B, dB = s dy^T S.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Any, u: Any, factor: Any, part: Tensor, lora_b: Tensor, scaling: Any
    ):
        like = base if u is None else u
        y = like.new_empty(like.shape)
        is_row = base is not None and u is not None and base.dim() == 1
        bases = None if base is None else _flat(base)
        with without_autocast(like):
            for block in _blocks(_flat(y)):
                total: Any = bases if bases is None or is_row else bases[block]
                if u is not None:
                    total = _sum(factor * _flat(u)[block], total)
                _flat(y)[block] = _sum(F.linear(_flat(part)[block], lora_b).mul_(scaling), total)
        is_tensor = isinstance(scaling, Tensor)
        ctx.save_for_backward(u, factor, part, lora_b, scaling if is_tensor else None)
        ctx.scaling = None if is_tensor else scaling
        ctx.row_dtype = base.dtype if base is not None and is_row else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        u, factor, part, lora_b, scaling = ctx.saved_tensors
        scaling = ctx.scaling if scaling is None else scaling
        needs_base, needs_u, needs_factor, needs_part, needs_b, _ = ctx.needs_input_grad
        rows = _flat(grad)
        wide = torch.promote_types(grad.dtype, torch.float32)
        dbase = grad if needs_base and ctx.row_dtype is None else None
        drow = rows.new_zeros(rows.shape[1], dtype=wide) if needs_base and dbase is None else None
        du = u.new_empty(u.shape) if needs_u else None
        dfactor = torch.zeros_like(factor) if needs_factor else None
        dpart = part.new_empty(part.shape) if needs_part else None
        db = torch.zeros_like(lora_b) if needs_b else None
        with without_autocast(grad):
            for block in _blocks(rows):
                dy = rows[block].to(wide)
                if drow is not None:
                    drow += dy.sum(0)
                if dfactor is not None:
                    dfactor += (_flat(u)[block] * dy).sum(0)
                if du is not None:
                    _flat(du)[block] = factor * dy
                ds = dy.to(lora_b.dtype) * scaling
                if dpart is not None:
                    _flat(dpart)[block] = ds @ lora_b
                if db is not None:
                    db.addmm_(ds.t(), _flat(part)[block])
        if drow is not None:
            dbase = drow.to(ctx.row_dtype)
        return dbase, du, dfactor, dpart, db, None


def _sum(own: Tensor, other: Tensor | None) -> Tensor:
    """other + own in the wider dtype; own must not be in use elsewhere, since it is overwritten if
    possible."""
    if other is None:
        return own
    wide = torch.promote_types(own.dtype, other.dtype)
    return own.add_(other) if wide == own.dtype else other + own


def drop(x: Tensor, p: float, seed: Tensor | None, row: int = 0) -> Tensor:
    """drop(x) ``[..., in]`` with the mask of its rows, counted from `row`; what is kept is
    divided by the keep probability."""
    if seed is None:
        return x
    keep = dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], p, row)
    return torch.where(keep.view(x.shape), x * keep_scale_of(p), 0.0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    count, width = rows.shape
    step = max(1, (_CPU_BLOCK if rows.is_cpu else _GPU_BLOCK) // max(1, width))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Within the block products keep the dtypes of their operands, on the tensor's device."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
