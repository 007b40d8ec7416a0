"""The launches of this package's routes, as `lora_ext.plan` has them."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

import lora_ext
from lora_ext import _C

from .launch import (
    BYTES,
    FLOAT,
    SHARE_OF_DRAM,
    Launch,
    Shape,
    blocks_of,
    ends_of,
    passes,
    product,
    spare_of,
    wave_flop,
)
from .machine import Machine
from .others import frozen_backward, merged_forward


def _plans(machine: Machine, s: Shape, route: str = "kernel") -> lora_ext.CallPlan:
    return lora_ext.plan(
        s.m,
        s.k,
        s.n,
        s.r,
        card=machine.card,
        adapter_dtype=torch.float32 if s.wide else torch.bfloat16,
        dropout=s.dropout,
        route=route,
    )


# A job that makes T of a pair of row blocks, as a share of a pair of tiles of 128 x 256: it fills
# stages of a third of the bytes, each in about that share of the time that a tile multiplies one.
_JOB = 0.3


def _lora_gemm(machine: Machine, plan, s: Shape, m: int, n: int, k: int) -> Launch:
    rows, columns = (int(number) for number in re.findall(r"\d+", plan.tile))
    terms = 3 if s.wide else 1
    depth = k + terms * 16 * blocks_of(s.r, 16)
    moved = BYTES * (m * k + n * k + m * n + terms * s.r * (m + n))
    if not plan.wgmma:
        flop = wave_flop(machine, m, n, depth, (rows, columns))
        return Launch("lora_gemm", moved, flop, machine.mma_share * plan.tile_efficiency)
    # Pairs of blocks, one below the other, on pairs of SMs.
    pairs, row_pairs = machine.sms // 2, blocks_of(m, 2 * rows)
    together = plan.pairs_per_ticket
    making = blocks_of(row_pairs, together) if plan.in_grid else 0
    if s.dropout:  # masked tiles begin with T: clusters that make none wait for it
        making = pairs * blocks_of(making, pairs)
    jobs = [_JOB * 256 / columns * together] * making
    ends = ends_of([*jobs, *[1.0] * (row_pairs * blocks_of(n, columns))], pairs)
    flop = 2.0 * pairs * 2 * rows * columns * depth  # of a wave
    moved += BYTES * (s.r * k + m * s.r) if plan.in_grid else 0
    share = machine.wgmma_share * plan.tile_efficiency
    launch = Launch("lora_gemm", moved, ends[-1] * flop, share)
    # From the end of the first main loops on, since a block has T before its own loop ends; and
    # only what lora_gemm itself leaves of DRAM.
    wave_s = flop / (machine.tflops * 1e12 * share)
    bandwidth = machine.dram_gb_s * 1e9 - moved / (ends[-1] * wave_s)
    return replace(
        launch,
        spare_bytes=max(0.0, bandwidth) * wave_s * spare_of(ends, 1.0, SHARE_OF_DRAM),
        spare_flop=machine.tflops * 1e12 * wave_s * spare_of(ends, 1.0),
    )


# A draw for eight elements, some 80 instructions of which an SM issues 128 a clock, in operations
# that mma.sync makes on an H100's SM meanwhile, for each element.
_DRAW_FLOP = 150.0


def _skinny(machine: Machine, name: str, moved: float, elements: int, columns: int, dropout: bool):
    """A product of a large operand's elements with so many columns, which come in 64s."""
    flop = elements * (2.0 * 64 * blocks_of(columns, 64) + (_DRAW_FLOP if dropout else 0.0))
    return Launch(name, moved, flop, machine.mma_share)


def ours_forward(machine: Machine, s: Shape) -> list[Launch]:
    """The kernels of `lora_ext.plan`, in order."""
    plan = _plans(machine, s).forward
    return _forward(machine, s, plan, _lora_gemm(machine, plan, s, s.m, s.n, s.k))


def _forward(machine: Machine, s: Shape, plan, gemm: Launch) -> list[Launch]:
    columns = plan.columns
    launches = []
    if s.wide:
        launches.append(Launch("lora_split", s.r * (s.k + s.n) * (FLOAT + 2 * BYTES)))
    if not plan.in_grid:
        sums = plan.shrink_splits * s.m * columns * FLOAT
        moved = BYTES * (s.m * s.k + s.r * s.k) + sums
        launches.append(_skinny(machine, "lora_shrink", moved, s.m * s.k, columns, s.dropout))
        launches.append(Launch("lora_reduce", sums + s.m * columns * (BYTES + FLOAT)))
    else:
        launches.append(Launch("flags", 0.0))
    return [*launches, gemm]


def ours_backward(machine: Machine, s: Shape) -> list[Launch]:
    """The kernels of `lora_ext.plan`, in order."""
    plan = _plans(machine, s).backward
    return _backward(machine, s, plan, _lora_gemm(machine, plan, s, s.m, s.k, s.n))


def _backward(machine: Machine, s: Shape, plan, gemm: Launch) -> list[Launch]:
    columns, halves = plan.columns, BYTES * s.m * plan.columns
    split = s.m * s.r * FLOAT + halves
    if s.wide:
        split += s.r * (s.k + s.n) * (FLOAT + 2 * BYTES)
    grads_b = plan.dlora_b_splits * columns * s.n * FLOAT
    grads_a = plan.dlora_a_splits * columns * s.k * FLOAT
    panels = plan.panels if plan.one_pass else plan.shrink_splits
    sums = panels * s.m * columns * FLOAT
    launches = [Launch("lora_split", split)]
    if plan.one_pass:
        moved = BYTES * s.m * s.n + halves + sums + grads_b
        launches.append(Launch("lora_dsdb", moved, 4.0 * s.m * s.n * columns, machine.mma_share))
    elif not plan.in_grid:
        moved = BYTES * s.m * s.n + sums
        launches.append(_skinny(machine, "lora_shrink", moved, s.m * s.n, columns, False))
    launches.append(Launch("flags", 0.0) if plan.in_grid else Launch("lora_reduce", sums + halves))
    moved = BYTES * s.m * s.k + halves + grads_a
    wgrad = _skinny(machine, "lora_wgrad", moved, s.m * s.k, columns, s.dropout)
    if not plan.one_pass:
        moved = BYTES * s.m * s.n + halves + grads_b
        b = _skinny(machine, "lora_wgrad", moved, s.m * s.n, columns, False)
        wgrad = replace(wgrad, bytes=wgrad.bytes + b.bytes, flop=wgrad.flop + b.flop)
    if plan.early_wgrad:
        wgrad = wgrad.after(gemm)
    return [*launches, gemm, wgrad, Launch("lora_reduce_wgrad", grads_a + grads_b)]


def _wide_blocks(s: Shape) -> list[Shape]:
    """Of rows, as the library route with float32 adapters takes them."""
    rows = _C.rows_of_block(max(s.k, s.n), torch.float32, torch.device("cuda"))
    return [replace(s, m=min(rows, s.m - begin)) for begin in range(0, s.m, rows)]


def _wide_x(s: Shape) -> list[Launch]:
    launches = [Launch("x to float32", s.m * s.k * (BYTES + FLOAT))]
    if s.dropout:
        launches.append(passes("dropout of x", s.m * s.k, 2, FLOAT))
    return launches


def _wide_forward(s: Shape) -> list[Launch]:
    return [
        *_wide_x(s),
        Launch("x A^T", s.m * s.k * FLOAT),
        Launch("S B^T", s.m * s.n * FLOAT),
        passes("times s", s.m * s.n, 2, FLOAT),
        Launch("plus", s.m * s.n * (BYTES + 2 * FLOAT)),
        Launch("round", s.m * s.n * (FLOAT + BYTES)),
    ]


def _wide_backward(s: Shape) -> list[Launch]:
    launches = [
        Launch("dY to float32", s.m * s.n * (BYTES + FLOAT)),
        passes("times s", s.m * s.n, 2, FLOAT),
        Launch("dB", s.m * s.n * FLOAT),
        Launch("dS", s.m * s.n * FLOAT),
        *_wide_x(s),
        Launch("dA", s.m * s.k * FLOAT),
        Launch("dS A", s.m * s.k * FLOAT),
    ]
    if s.dropout:
        launches.append(passes("dropout of dS A", s.m * s.k, 2, FLOAT))
    return [
        *launches,
        Launch("round", s.m * s.k * (FLOAT + BYTES)),
        passes("plus", s.m * s.k, 3),
    ]


def library_forward(machine: Machine, s: Shape) -> list[Launch]:
    """csrc/library_route.cpp: the expand first, the base onto it; float32 adapters by blocks."""
    if s.wide:
        launches = merged_forward(machine, s)
        return launches + [each for block in _wide_blocks(s) for each in _wide_forward(block)]
    launches = [product(machine, "x A^T", s.m, s.r, s.k)]
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * 2 * BYTES))
    launches.append(product(machine, "S B^T", s.m, s.n, s.r))
    return [*launches, product(machine, "base", s.m, s.n, s.k, accumulate=True)]


def library_backward(machine: Machine, s: Shape) -> list[Launch]:
    """csrc/library_route.cpp."""
    if s.wide:
        launches = frozen_backward(machine, s)
        return launches + [each for block in _wide_blocks(s) for each in _wide_backward(block)]
    launches = [
        product(machine, "dB", s.n, s.r, s.m),
        *frozen_backward(machine, s),
        product(machine, "dS", s.m, s.r, s.n),
        product(machine, "dA", s.r, s.k, s.m),
    ]
    if not s.dropout:
        return [*launches, product(machine, "dS A", s.m, s.k, s.r, accumulate=True)]
    return [
        *launches,
        Launch("dropout of x", s.m * s.k * 2 * BYTES),
        product(machine, "dS A", s.m, s.k, s.r),
        Launch("dropout of dS A", s.m * s.k * 2 * BYTES),
        passes("plus", s.m * s.k, 3),
    ]


def _expand(s: Shape, rows: int, columns: int) -> Launch:
    """lora_gemm without a base product: Y written, T and U read."""
    terms = 3 if s.wide else 1
    return Launch("lora_gemm", BYTES * (rows * columns + terms * s.r * (rows + columns)))


def hybrid_forward(machine: Machine, s: Shape) -> list[Launch]:
    """`ours_forward` with the low-rank product alone, and the library's base onto it."""
    plan = _plans(machine, s, "hybrid").forward
    return [
        *_forward(machine, s, plan, _expand(s, s.m, s.n)),
        product(machine, "base", s.m, s.n, s.k, accumulate=True),
    ]


def hybrid_backward(machine: Machine, s: Shape) -> list[Launch]:
    """`ours_backward` with the low-rank product alone, and the library's dY W onto it."""
    plan = _plans(machine, s, "hybrid").backward
    kernels = _backward(machine, s, plan, _expand(s, s.m, s.k))
    return [*kernels, product(machine, "dX", s.m, s.k, s.n, accumulate=True)]


def auto_forward(machine: Machine, s: Shape) -> list[Launch]:
    """The planner's choice."""
    return (hybrid_forward if s.wide or s.dropout else library_forward)(machine, s)
