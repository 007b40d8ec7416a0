"""The low-rank part beside a base product that is there already, in blocks of rows.

    S = drop(x) A^T                                            `shrink`
    y = base + factor * u + sum of s (S B^T + b)               `combine`

The base of a quantised layer, or of one with hooks, is called as it is. What it returns is read and
never written, since others may hold it. Blocks bound the temporaries: sums are made in the widest
dtype and rounded once, as PEFT makes them, without its full-size float32 copies of x, of the update
and of the sum. Saved for backward are x, S, u, the factors and a seed.

Under torch.compile the same formulas are traced without blocks, which the compiler fuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import draw_seed, dropout_mask
from .updates import HALVES, Update, added_in_turn

# Elements of a block: 1 MiB of float32, which stays in a core's cache; on a GPU, which needs more
# to be busy, 64 MiB.
_CPU_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 24


def add_updates(base: Tensor, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """base + sum over updates of scaling * ((drop(x) A^T) B^T + bias) as a new tensor.

    Each update draws its own dropout mask, as PEFT's do; see `lora_ext.functional.dropout_mask`.

    Args:
        base: ``[..., out]``, what the base module returned for x.
        x: ``[..., in]``, any floating dtype.
        updates: their factors and biases in any floating dtypes.

    Returns:
        ``[..., out]`` in the base's dtype: sums in the widest of the dtypes, rounded once.
    """
    if base.shape != (*x.shape[:-1], updates[0].lora_b.shape[0]):
        return added_in_turn(base, x, updates)  # a base that changes shapes: torch broadcasts
    seeds = [draw_seed(x.device) if update.dropout else None for update in updates]
    return combine(base, parts=shrink(x, updates, seeds), updates=updates)


def shrink(
    x: Tensor, updates: Sequence[Update], seeds: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """drop(x) A^T ``[..., r]`` in at least float32 for each update, its mask from its seed."""
    matrices = [_at_least_float32(update.lora_a) for update in updates]
    probabilities = tuple(update.dropout for update in updates)
    if torch.compiler.is_compiling():
        triples = zip(matrices, probabilities, seeds, strict=True)
        return tuple(_shrunk(x.to(a.dtype), a, p, seed, 0) for a, p, seed in triples)
    return _Shrink.apply(x, probabilities, tuple(seeds), *matrices)


def combine(
    base: Tensor | None,
    u: Tensor | None = None,
    factor: Tensor | None = None,
    parts: Sequence[Tensor] = (),
    updates: Sequence[Update] = (),
) -> Tensor:
    """base + factor * u + sum of scaling * (S B^T + b), rounded once.

    Args:
        base: ``[..., out]``; ``[out]`` beside u; None for 0 beside u.
        u: ``[..., out]`` or None.
        factor: ``[out]``, of u, at least float32.
        parts: S ``[..., r]`` for each update, of `shrink`.
        updates: of which B, the scaling and the bias are used, in at least float32.

    Returns:
        A new tensor of u's shape and dtype, or, without u, of the base's.
    """
    parts = [_at_least_float32(part) for part in parts]
    matrices = [_at_least_float32(update.lora_b) for update in updates]
    biases = [u.bias if u.bias is None else _at_least_float32(u.bias) for u in updates]
    scalings = tuple(update.scaling for update in updates)
    if torch.compiler.is_compiling():
        return _combined(base, u, factor, parts, matrices, biases, scalings)
    return _Combine.apply(base, u, factor, scalings, *parts, *matrices, *biases)


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x ``[..., in]`` as `shrink` sees it: the mask of the seed, what is kept divided by its
    probability."""
    return _dropped(x, p, seed, 0)


def _combined(base, u, factor, parts, matrices, biases, scalings) -> Tensor:
    total, like = base, base if u is None else u
    if u is not None:
        total = factor * u if base is None else base + factor * u
    for part, b, bias, s in zip(parts, matrices, biases, scalings, strict=True):
        total = total + F.linear(part, b, bias) * s
    return total.to(like.dtype)


class _Shrink(torch.autograd.Function):
    """S_i = drop_i(x) A_i^T; dx = sum of drop_i(dS_i A_i), dA_i = dS_i^T drop_i(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities, seeds, *matrices: Tensor):
        rows = _flat(x)
        parts = tuple(x.new_empty((*x.shape[:-1], len(a)), dtype=a.dtype) for a in matrices)
        flat = [_flat(part) for part in parts]
        with without_autocast(x):
            for block in _blocks(rows):
                for part, a, p, seed in zip(flat, matrices, probabilities, seeds, strict=True):
                    part[block] = _shrunk(rows[block].to(a.dtype), a, p, seed, block.start)
        ctx.save_for_backward(x, *matrices, *seeds)
        ctx.probabilities = probabilities
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *saved = ctx.saved_tensors  # once: a checkpoint unpacks each tensor once
        count = len(ctx.probabilities)
        matrices, seeds = saved[:count], saved[count:]
        needs_x, needs_matrices = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = x.new_empty(x.shape) if needs_x else None
        dmatrices = _zeros_for(matrices, needs_matrices)
        rows, drows = _flat(x), None if dx is None else _flat(dx)
        calls = [*zip(grads, matrices, dmatrices, ctx.probabilities, seeds, strict=True)]
        with without_autocast(x):
            for block in _blocks(rows):
                total = None
                for grad, a, da, p, seed in calls:
                    ds = _flat(grad)[block]
                    if da is not None:
                        dropped = _dropped(rows[block].to(a.dtype), p, seed, block.start)
                        da.addmm_(ds.t(), dropped)
                    if drows is not None:
                        total = _sum(_dropped(ds @ a, p, seed, block.start), total)
                if drows is not None and total is not None:
                    drows[block] = total
        return dx, None, None, *dmatrices


class _Combine(torch.autograd.Function):
    """y = base + f u + sum of s_i (S_i B_i^T + b_i).

    dbase = dy, du = f dy, df = sum over rows of dy u, dS_i = s_i dy B_i, dB_i = s_i dy^T S_i,
    db_i = s_i times the sum over rows of dy.
    """

    @staticmethod
    def forward(ctx: Any, base: Any, u: Any, factor: Any, scalings: Any, *tensors: Tensor | None):
        parts, matrices, biases = _thirds(tensors)
        like = base if u is None else u
        y = like.new_empty(like.shape)
        is_row = base is not None and u is not None and base.dim() == 1
        bases = None if base is None else _flat(base)
        scaled = None if u is None else _flat(u)
        flat, out = [_flat(part) for part in parts], _flat(y)
        with without_autocast(like):
            for block in _blocks(out):
                total: Any = bases if bases is None or is_row else bases[block]
                if scaled is not None:
                    total = _sum(factor * scaled[block], total)
                for part, b, bias, s in zip(flat, matrices, biases, scalings, strict=True):
                    total = _sum(F.linear(part[block], b, bias).mul_(s), total)
                out[block] = total
        tensor_scalings = [s for s in scalings if isinstance(s, Tensor)]
        ctx.save_for_backward(u, factor, *parts, *matrices, *tensor_scalings)
        ctx.scalings = tuple(None if isinstance(s, Tensor) else s for s in scalings)
        ctx.row_dtype = base.dtype if base is not None and is_row else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        u, factor, *saved = ctx.saved_tensors
        count = len(ctx.scalings)
        parts, matrices = saved[:count], saved[count : 2 * count]
        given = iter(saved[2 * count :])
        scalings = [next(given) if s is None else s for s in ctx.scalings]
        needs_base, needs_u, needs_factor, _, *needs = ctx.needs_input_grad
        needs_parts, needs_matrices, needs_biases = _thirds(needs)
        rows = _flat(grad)
        wide = torch.promote_types(grad.dtype, torch.float32)
        dbase = grad if needs_base and ctx.row_dtype is None else None
        drow = rows.new_zeros(rows.shape[1], dtype=wide) if needs_base and dbase is None else None
        du = u.new_empty(u.shape) if needs_u else None
        dfactor = torch.zeros_like(factor) if needs_factor else None
        pairs = zip(parts, needs_parts, strict=True)
        dparts = [part.new_empty(part.shape) if wanted else None for part, wanted in pairs]
        dmatrices = _zeros_for(matrices, needs_matrices)
        dbiases = _zeros_for([b[:, 0] for b in matrices], needs_biases)
        calls = [*zip(parts, matrices, scalings, dparts, dmatrices, dbiases, strict=True)]
        with without_autocast(grad):
            for block in _blocks(rows):
                dy = rows[block].to(wide)
                if drow is not None:
                    drow += dy.sum(0)
                if dfactor is not None:
                    dfactor += (_flat(u)[block] * dy).sum(0)
                if du is not None:
                    _flat(du)[block] = factor * dy
                for part, b, s, dpart, db, dbias in calls:
                    ds = dy.to(b.dtype) * s
                    if dpart is not None:
                        _flat(dpart)[block] = ds @ b
                    if db is not None:
                        db.addmm_(ds.t(), _flat(part)[block])
                    if dbias is not None:
                        dbias += ds.sum(0)
        if drow is not None:
            dbase = drow.to(ctx.row_dtype)
        return dbase, du, dfactor, None, *dparts, *dmatrices, *dbiases


def _sum(own: Tensor, other: Tensor | None) -> Tensor:
    """other + own in the wider dtype; own, which nobody else holds, is written where it can be."""
    if other is None:
        return own
    wide = torch.promote_types(own.dtype, other.dtype)
    return own.add_(other) if wide == own.dtype else other + own


def _shrunk(x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None, row: int) -> Tensor:
    return F.linear(_dropped(x, p, seed, row), lora_a)


def _dropped(x: Tensor, p: float, seed: Tensor | None, row: int) -> Tensor:
    """x ``[..., in]`` with the mask of its rows, counted from `row`."""
    if seed is None:
        return x
    keep = dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], p, row)
    keep_scale = 65536 / max(1, int((1 - p) * 65536 + 0.5))
    return torch.where(keep.view(x.shape), x * keep_scale, 0.0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _zeros_for(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Where sums over blocks of rows start; None where no gradient is wanted."""
    pairs = zip(tensors, wanted, strict=True)
    return [torch.zeros_like(tensor) if want else None for tensor, want in pairs]


def _thirds(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    count = len(items) // 3
    return items[:count], items[count : 2 * count], items[2 * count :]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    count, width = rows.shape
    step = max(1, (_CPU_BLOCK if rows.is_cpu else _GPU_BLOCK) // max(1, width))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Products in the dtypes that they are given, on the tensor's device."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
