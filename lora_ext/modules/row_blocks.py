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
from .updates import Update

# Elements of a block: 1 MiB of float32, which stays in a core's cache; on a GPU, which needs more
# to be busy, 64 MiB.
_CPU_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 24


def add_updates(base: Tensor, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """base + sum over updates of scaling * ((drop(x) A^T) B^T + bias) as a new tensor.

    Each update draws its own dropout mask, as PEFT's do; see `lora_ext.dropout_mask`.

    Args:
        base: ``[..., out]``, what the base module returned for x.
        x: ``[..., in]``, any floating dtype.
        updates: their factors and biases in any floating dtypes.

    Returns:
        ``[..., out]`` in the base's dtype: sums in the widest of the dtypes, rounded once.
    """
    seeds = [draw_seed(x.device) if update.dropout else None for update in updates]
    return combine(base, parts=shrink(x, updates, seeds), updates=updates)


def shrink(
    x: Tensor, updates: Sequence[Update], seeds: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """drop(x) A^T ``[..., r]`` in A's dtype for each update, its mask from its seed."""
    if torch.compiler.is_compiling():
        pairs = zip(updates, seeds, strict=True)
        return tuple(_shrunk(x.to(u.lora_a.dtype), u.lora_a, u.dropout, s, 0) for u, s in pairs)
    probabilities = tuple(update.dropout for update in updates)
    return _Shrink.apply(x, probabilities, tuple(seeds), *(update.lora_a for update in updates))


def combine(
    base: Tensor | None,
    u: Tensor | None = None,
    factor: Tensor | None = None,
    parts: Sequence[Tensor] = (),
    updates: Sequence[Update] = (),
) -> Tensor:
    """base + factor * u + sum of scaling * (S B^T + bias), rounded once.

    Args:
        base: ``[..., out]``; ``[out]`` beside u; None for 0 beside u.
        u: ``[..., out]`` or None.
        factor: ``[out]``, of u.
        parts: S ``[..., r]`` for each update, of `shrink`.
        updates: of which B, the scaling and the bias are used.

    Returns:
        A new tensor of u's shape and dtype, or, without u, of the base's.
    """
    if torch.compiler.is_compiling():
        return _combined(base, u, factor, parts, updates)
    scalings = tuple(update.scaling for update in updates)
    matrices = [update.lora_b for update in updates]
    biases = [update.bias for update in updates]
    return _Combine.apply(base, u, factor, scalings, *parts, *matrices, *biases)


def _combined(base, u, factor, parts, updates) -> Tensor:
    like = base if u is None else u
    total = base
    if u is not None:
        total = factor * u if base is None else base + factor * u
    for part, update in zip(parts, updates, strict=True):
        total = total + F.linear(part, update.lora_b, update.bias) * update.scaling
    return total.to(like.dtype)


class _Shrink(torch.autograd.Function):
    """S_i = drop_i(x) A_i^T; dx = sum of drop_i(dS_i A_i), dA_i = dS_i^T drop_i(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities, seeds, *matrices: Tensor) -> tuple[Tensor, ...]:
        rows = _flat(x)
        parts = [x.new_empty((len(rows), a.shape[0]), dtype=a.dtype) for a in matrices]
        with without_autocast(x):
            for block in _blocks(rows):
                wide: dict[torch.dtype, Tensor] = {}
                for part, a, p, seed in zip(parts, matrices, probabilities, seeds, strict=True):
                    if a.dtype not in wide:
                        wide[a.dtype] = rows[block].to(a.dtype)
                    part[block] = _shrunk(wide[a.dtype], a, p, seed, block.start)
        ctx.save_for_backward(x, *matrices, *seeds)
        ctx.probabilities = probabilities
        return tuple(part.view(*x.shape[:-1], part.shape[-1]) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        count = len(ctx.probabilities)
        x, *saved = ctx.saved_tensors  # once: a checkpoint unpacks each tensor once
        matrices, seeds = saved[:count], saved[count:]
        rows = _flat(x)
        needs_x, needs_a = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_x else None
        dmatrices = _sums_for(matrices, needs_a)
        with without_autocast(x):
            for block in _blocks(rows):
                total = None
                for i, (grad, a, p, seed) in enumerate(
                    zip(grads, matrices, ctx.probabilities, seeds, strict=True)
                ):
                    ds = _flat(grad)[block]
                    dmatrix = dmatrices[i]
                    if dmatrix is not None:
                        dropped = _dropped(rows[block].to(a.dtype), p, seed, block.start)
                        dmatrix += ds.t() @ dropped
                    if dx is not None:
                        part = _dropped(ds @ a, p, seed, block.start)
                        total = part if total is None else total + part
                if dx is not None:
                    dx[block] = total
        dx = None if dx is None else dx.view(x.shape)
        return dx, None, None, *_rounded(dmatrices, matrices)


class _Combine(torch.autograd.Function):
    """y = base + f u + sum of s_i (S_i B_i^T + b_i).

    dbase = dy, du = f dy, df = sum over rows of dy u, dS_i = s_i dy B_i, dB_i = s_i dy^T S_i,
    db_i = s_i times the sum over rows of dy.
    """

    @staticmethod
    def forward(ctx: Any, base, u, factor, scalings, *tensors: Tensor | None) -> Tensor:
        count = len(scalings)
        parts, matrices, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        like = base if u is None else u
        rows = _flat(like)
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        base_is_row = base is not None and base.dim() == 1 and u is not None
        bases = base if base is None or base_is_row else _flat(base)
        scaled = None if u is None else _flat(u)
        flat = [_flat(part) for part in parts]
        with without_autocast(like):
            for block in _blocks(rows):
                total = bases if bases is None or base_is_row else bases[block]
                if scaled is not None:
                    total = _sum(factor * scaled[block], total)
                for part, b, bias, s in zip(flat, matrices, biases, scalings, strict=True):
                    total = _sum(F.linear(part[block], b, bias).mul_(s), total)
                y[block] = total
        tensor_scalings = [s for s in scalings if isinstance(s, Tensor)]
        ctx.save_for_backward(u, factor, *parts, *matrices, *tensor_scalings)
        ctx.scalings = tuple(None if isinstance(s, Tensor) else s for s in scalings)
        ctx.row_dtype = base.dtype if base_is_row else None
        return y.view(like.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        count = len(ctx.scalings)
        u, factor, *saved = ctx.saved_tensors
        parts, matrices = saved[:count], saved[count : 2 * count]
        given = iter(saved[2 * count :])
        scalings = [next(given) if s is None else s for s in ctx.scalings]
        needs_base, needs_u, needs_factor, _, *needs = ctx.needs_input_grad
        rows, flat = _flat(grad), [_flat(part) for part in parts]
        scaled = None if u is None else _flat(u)
        dbase = grad if needs_base else None
        if needs_base and ctx.row_dtype is not None:
            dbase = rows.sum(0, dtype=_at_least_float32(grad.dtype)).to(ctx.row_dtype)
        du = torch.empty_like(scaled, memory_format=torch.contiguous_format) if needs_u else None
        dfactor = torch.zeros_like(factor) if needs_factor else None
        dparts = [
            torch.empty_like(part) if wanted else None
            for part, wanted in zip(flat, needs[:count], strict=True)
        ]
        columns = [b[:, 0] for b in matrices]
        dmatrices = _sums_for(matrices, needs[count : 2 * count])
        dbiases = _sums_for(columns, needs[2 * count :])
        with without_autocast(grad):
            for block in _blocks(rows):
                dy = rows[block]
                if du is not None:
                    du[block] = dy * factor
                if dfactor is not None:
                    dfactor += (dy.to(dfactor.dtype) * scaled[block]).sum(0)
                for i, (b, s) in enumerate(zip(matrices, scalings, strict=True)):
                    wide = dy.to(b.dtype) * s
                    if (dpart := dparts[i]) is not None:
                        dpart[block] = wide @ b
                    if (dmatrix := dmatrices[i]) is not None:
                        dmatrix += wide.t() @ flat[i][block]
                    if (dbias := dbiases[i]) is not None:
                        dbias += wide.sum(0, dtype=dbias.dtype)
        du = None if du is None else du.view(u.shape)
        dparts = [d if d is None else d.view(p.shape) for d, p in zip(dparts, parts, strict=True)]
        sums = (*_rounded(dmatrices, matrices), *_rounded(dbiases, columns))
        return dbase, du, dfactor, None, *dparts, *sums


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


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x ``[..., in]`` as `shrink` sees it: the mask of the seed, what is kept divided by its
    probability."""
    return _dropped(x, p, seed, 0)


def _sums_for(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Zeros for sums over blocks of rows, at least float32; None where no gradient is wanted."""
    return [
        torch.zeros_like(t, dtype=_at_least_float32(t.dtype)) if w else None
        for t, w in zip(tensors, wanted, strict=True)
    ]


def _rounded(sums: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The sums in the dtypes of the tensors that they are gradients of."""
    pairs = zip(sums, tensors, strict=True)
    return [None if total is None else total.to(tensor.dtype) for total, tensor in pairs]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
