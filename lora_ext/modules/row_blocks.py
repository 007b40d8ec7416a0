"""The low-rank part beside a base that only its own module can compute, in blocks of rows.

    S = drop(x) A^T          `shrink`        y = base + sum of s (S B^T + b)         `expand_onto`
                                             y = offset + factor * u                 `scale_rows`

The base of a quantised layer, or of one with hooks, is called as it is. What it returns is read and
never written, since others may hold it. Blocks bound the temporaries: sums are made in the widest
dtype and rounded once, as PEFT makes them, without its full-size float32 copies of x, of the update
and of the sum. Saved for backward are x, S, the factors and a seed.

Under torch.compile the same formulas are traced without blocks, which the compiler fuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import draw_seed
from .updates import Update

# Elements of a block: 4 MiB of float32, which stay in a core's cache; on a GPU, which needs more to
# be busy, 64 MiB.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 24


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
    parts = shrink(x, [(update.lora_a, update.dropout) for update in updates])
    return expand_onto(base, parts, updates)


def shrink(x: Tensor, factors: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, ...]:
    """drop(x) A^T ``[..., r]`` in A's dtype, for each (A ``[r, in]``, dropout probability)."""
    seeds = [draw_seed(x.device) if p else None for _, p in factors]
    probabilities = tuple(p for _, p in factors)
    matrices = [lora_a for lora_a, _ in factors]
    if torch.compiler.is_compiling():
        triples = zip(matrices, probabilities, seeds, strict=True)
        return tuple(_shrunk(x.to(a.dtype), a, p, seed, 0) for a, p, seed in triples)
    return _Shrink.apply(x, probabilities, seeds, *matrices)


def expand_onto(base: Tensor, parts: Sequence[Tensor], updates: Sequence[Update]) -> Tensor:
    """base ``[..., out]`` + sum of scaling * (S B^T + bias), S ``[..., r]`` of `shrink`."""
    wide = _widest(base, *parts)
    if torch.compiler.is_compiling():
        total = base.to(wide)
        for part, update in zip(parts, updates, strict=True):
            total = total + _expanded(part, update)
        return total.to(base.dtype)
    scalings = tuple(update.scaling for update in updates)
    matrices = [update.lora_b for update in updates]
    biases = [update.bias for update in updates]
    return _ExpandOnto.apply(base, scalings, *parts, *matrices, *biases)


def scale_rows(u: Tensor, factor: Tensor, offset: Tensor | None) -> Tensor:
    """offset + factor * u, in the wider dtype and rounded once to u's.

    Args:
        u: ``[..., out]``.
        factor: ``[out]``.
        offset: ``[out]``, ``[..., out]`` as u, or None for 0.
    """
    if torch.compiler.is_compiling():
        total = u.to(factor.dtype) * factor
        return (total if offset is None else total + offset).to(u.dtype)
    return _ScaleRows.apply(u, factor, offset)


class _Shrink(torch.autograd.Function):
    """S_i = drop_i(x) A_i^T; dx = sum of drop_i(dS_i A_i), dA_i = dS_i^T drop_i(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities, seeds, *matrices: Tensor) -> tuple[Tensor, ...]:
        rows = _flat(x)
        parts = [x.new_empty((len(rows), a.shape[0]), dtype=a.dtype) for a in matrices]
        with _without_autocast(x):
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
        x, saved = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        matrices, seeds = saved[:count], saved[count:]
        rows = _flat(x)
        needs_x, needs_a = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_x else None
        dmatrices = _sums_for(matrices, needs_a)
        with _without_autocast(x):
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


class _ExpandOnto(torch.autograd.Function):
    """y = base + sum of s_i (S_i B_i^T + b_i); dS_i = s_i dy B_i, dB_i = s_i dy^T S_i."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, scalings, *tensors: Tensor | None) -> Tensor:
        count = len(scalings)
        parts, matrices, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        rows = _flat(base)
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        flat = [_flat(part) for part in parts]
        with _without_autocast(base):
            for block in _blocks(rows):
                total = rows[block]
                for part, b, bias, s in zip(flat, matrices, biases, scalings, strict=True):
                    total = total + F.linear(part[block], b, bias) * s
                y[block] = total
        tensor_scalings = [s for s in scalings if isinstance(s, Tensor)]
        ctx.save_for_backward(*parts, *matrices, *tensor_scalings)
        ctx.scalings = tuple(None if isinstance(s, Tensor) else s for s in scalings)
        return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        count = len(ctx.scalings)
        saved = ctx.saved_tensors
        parts, matrices = saved[:count], saved[count : 2 * count]
        given = iter(saved[2 * count :])
        scalings = [next(given) if s is None else s for s in ctx.scalings]
        needs = ctx.needs_input_grad[2:]
        rows = _flat(grad)
        dparts = [
            torch.empty_like(_flat(part)) if wanted else None
            for part, wanted in zip(parts, needs, strict=False)
        ]
        dmatrices = _sums_for(matrices, needs[count : 2 * count])
        columns = [b[:, 0] for b in matrices]
        dbiases = _sums_for(columns, needs[2 * count :])
        flat = [_flat(part) for part in parts]
        with _without_autocast(grad):
            for block in _blocks(rows):
                for i, (b, s) in enumerate(zip(matrices, scalings, strict=True)):
                    scaled = rows[block].to(b.dtype) * s
                    if (dpart := dparts[i]) is not None:
                        dpart[block] = scaled @ b
                    if (dmatrix := dmatrices[i]) is not None:
                        dmatrix += scaled.t() @ flat[i][block]
                    if (dbias := dbiases[i]) is not None:
                        dbias += scaled.sum(0, dtype=dbias.dtype)
        dparts = [d if d is None else d.view(p.shape) for d, p in zip(dparts, parts, strict=True)]
        dbase = grad if ctx.needs_input_grad[0] else None
        rounded = (*_rounded(dmatrices, matrices), *_rounded(dbiases, columns))
        return dbase, None, *dparts, *rounded


class _ScaleRows(torch.autograd.Function):
    """y = t + f u; du = f dy, df = the sum over rows of dy u, dt = dy, or its sum over rows."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, factor: Tensor, offset: Tensor | None) -> Tensor:
        rows = _flat(u)
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        whole = offset is not None and offset.dim() > 1
        added = _flat(offset) if whole else offset
        for block in _blocks(rows):
            total = rows[block].to(factor.dtype) * factor
            if added is not None:
                total = total + (added[block] if whole else added)
            y[block] = total
        ctx.save_for_backward(u, factor)
        ctx.offset_is_row = offset is not None and not whole
        ctx.offset_dtype = None if offset is None else offset.dtype
        return y.view(u.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        u, factor = ctx.saved_tensors
        needs_u, needs_factor, needs_offset = ctx.needs_input_grad
        rows, grads = _flat(u), _flat(grad)
        du = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_u else None
        dfactor = torch.zeros_like(factor) if needs_factor else None
        for block in _blocks(rows):
            wide = grads[block].to(factor.dtype)
            if dfactor is not None:
                dfactor += (wide * rows[block]).sum(0)
            if du is not None:
                du[block] = wide * factor
        doffset = None
        if needs_offset:
            doffset = grad
            if ctx.offset_is_row:
                doffset = grads.sum(0, dtype=factor.dtype).to(ctx.offset_dtype)
        return None if du is None else du.view(u.shape), dfactor, doffset


def _shrunk(x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None, row: int) -> Tensor:
    return F.linear(_dropped(x, p, seed, row), lora_a)


def _expanded(part: Tensor, update: Update) -> Tensor:
    return F.linear(part, update.lora_b, update.bias) * update.scaling


def _dropped(x: Tensor, p: float, seed: Tensor | None, row: int) -> Tensor:
    """x ``[..., in]`` with the mask of its rows, counted from `row`."""
    if seed is None:
        return x
    keep = torch.ops.lora_ext.dropout_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p, row, 0)
    return torch.where(keep.view(x.shape), x * keep_scale(p), 0.0)


def keep_scale(p: float) -> float:
    """1 / the probability with which `lora_ext.dropout_mask` keeps an element."""
    return 65536 / max(1, int((1 - p) * 65536 + 0.5))


def _sums_for(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Zeros for sums over blocks of rows, at least float32; None where no gradient is wanted."""
    return [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if w else None
        for t, w in zip(tensors, wanted, strict=True)
    ]


def _rounded(sums: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The sums in the dtypes of the tensors that they are gradients of."""
    pairs = zip(sums, tensors, strict=True)
    return [None if total is None else total.to(tensor.dtype) for total, tensor in pairs]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    count, width = rows.shape
    step = max(1, (_CPU_BLOCK if rows.is_cpu else _GPU_BLOCK) // max(1, width))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def _widest(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    return torch.autocast(tensor.device.type, enabled=False)
