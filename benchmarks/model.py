"""What a LoRA linear should cost on a card: rooflines and schedules, the one place for constants.

A call is a sequence of launches. A launch takes the longest of

    arithmetic   whole waves of tiles, one tile an SM at a time, at the card's sustained rate
    DRAM         its operands and results once, at the card's sustained bandwidth

and a gap before the next. That is all: no L2, no clocks that fall, no host that is late (a graph
replay). `calibrated` puts two measured ceilings of a card in place of the table's. Half precision;
times in microseconds, sizes as in `lora_ext.plan`.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

import lora_ext

from .shapes import BACKWARD, FORWARD, Cell

BYTES = 2  # of a half
FLOAT = 4
_MICRO = 1e6


@dataclass(frozen=True)
class Machine:
    """Sustained figures of a card.

    Attributes:
        card: its name in ``lora_ext.CARDS``.
        tflops: of the library's dense half product at 4096 x 4096 x 4096.
        mma_share: the part of it that mma.sync reaches: about 1 where the library uses it, too.
        wgmma_share: the part of it that our kernels on wgmma reach, where there are some.
        dram_gb_s: of a copy, read and written bytes together.
        gap_us: from the end of a kernel to the start of the next, in a graph.
        calibrated: whether tflops and dram_gb_s were measured on the card at hand.
    """

    card: str
    tflops: float
    mma_share: float
    dram_gb_s: float
    gap_us: float = 1.5
    wgmma_share: float = 0.97
    calibrated: bool = False

    @property
    def sms(self) -> int:
        """Streaming multiprocessors."""
        return lora_ext.CARDS[self.card].sms


# Vendors' dense rates times 0.8 and bandwidths times 0.9; H100's are those of one card.
MACHINES = {
    "A100": Machine("A100", 250.0, 0.9, 1830.0),
    "A10": Machine("A10", 100.0, 0.9, 540.0),
    "L40S": Machine("L40S", 290.0, 0.9, 780.0),
    "H100": Machine("H100", 790.0, 0.55, 3000.0),
    "B200": Machine("B200", 1800.0, 0.25, 7000.0),
    "RTX 5090": Machine("RTX 5090", 170.0, 0.9, 1600.0),
}


def machine_named(name: str) -> Machine | None:
    """The entry that a device's name contains, "NVIDIA H100 80GB HBM3" for one; else None."""
    found = [key for key in MACHINES if key.replace(" ", "") in name.replace(" ", "")]
    return MACHINES[max(found, key=len)] if found else None


def calibrated(machine: Machine, tflops: float, dram_gb_s: float) -> Machine:
    """The machine with measured ceilings."""
    return replace(machine, tflops=tflops, dram_gb_s=dram_gb_s, calibrated=True)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


@dataclass(frozen=True)
class Launch:
    """One kernel: arithmetic in waves of equal tiles, and DRAM bytes."""

    name: str
    bytes: float
    flop: float = 0.0  # of all waves, idle SMs included
    share: float = 1.0  # of the machine's rate

    def us(self, machine: Machine) -> float:
        """The longer of arithmetic and DRAM, and the gap."""
        arithmetic = self.flop / (machine.tflops * 1e12 * self.share) * _MICRO
        memory = self.bytes / (machine.dram_gb_s * 1e9) * _MICRO
        return max(arithmetic, memory) + machine.gap_us


def _wave_flop(machine: Machine, m: int, n: int, k: int, tile: tuple[int, int]) -> float:
    """Of whole waves of tiles, one an SM."""
    waves = _blocks(_blocks(m, tile[0]) * _blocks(n, tile[1]), machine.sms)
    return 2.0 * waves * machine.sms * tile[0] * tile[1] * k


# What the library chooses among, the smaller tiles at a lower rate.
_LIBRARY_TILES = (((128, 256), 1.0), ((128, 128), 0.9), ((128, 64), 0.75), ((64, 64), 0.55))


def product(
    machine: Machine, name: str, m: int, n: int, k: int, accumulate: bool = False
) -> Launch:
    """The library's Y [m, n] = P [m, k] Q; it splits k where there are few tiles."""
    times = []
    for tile, rate in _LIBRARY_TILES:
        flop = _wave_flop(machine, m, n, k, tile)
        tiles = _blocks(m, tile[0]) * _blocks(n, tile[1])
        splits = max(1, min(machine.sms // max(1, tiles), _blocks(k, 512)))
        times.append(flop / splits / rate)
    moved = BYTES * (m * k + n * k + (2 if accumulate else 1) * m * n)
    return Launch(name, moved, min(times))


def _passes(name: str, elements: int, passes: int, size: int = BYTES) -> Launch:
    return Launch(name, float(elements * passes * size))


@dataclass(frozen=True)
class _Shape:
    m: int
    n: int
    k: int
    r: int
    dropout: bool
    wide: bool  # float32 adapters


def _shape(cell: Cell, wide: bool) -> _Shape:
    return _Shape(
        cell.rows, cell.out_features, cell.in_features, cell.rank, cell.dropout_p > 0, wide
    )


def _plans(machine: Machine, s: _Shape) -> lora_ext.CallPlan:
    return lora_ext.plan(
        s.m,
        s.k,
        s.n,
        s.r,
        card=machine.card,
        adapter_dtype=torch.float32 if s.wide else torch.bfloat16,
        dropout=s.dropout,
        route="kernel",
    )


def _makespan(jobs: Iterable[float], workers: int) -> float:
    """When the last job ends, each in its turn taken by the worker that is free first."""
    free = [0.0] * workers
    for job in jobs:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


# A job that makes T of a pair of row blocks, as a share of a pair of tiles of 128 x 256: it fills
# stages of a third of the bytes, each in about that share of the time that a tile multiplies one.
_JOB = 0.3


def _lora_gemm(machine: Machine, plan, s: _Shape, m: int, n: int, k: int) -> Launch:
    rows, columns = (int(number) for number in re.findall(r"\d+", plan.tile))
    terms = 3 if s.wide else 1
    depth = k + terms * 16 * _blocks(s.r, 16)
    moved = BYTES * (m * k + n * k + m * n + terms * s.r * (m + n))
    if not plan.wgmma:
        flop = _wave_flop(machine, m, n, depth, (rows, columns))
        return Launch("lora_gemm", moved, flop, machine.mma_share * plan.tile_efficiency)
    # Pairs of blocks, one below the other, on pairs of SMs.
    pairs, row_pairs = machine.sms // 2, _blocks(m, 2 * rows)
    together = plan.pairs_per_ticket
    jobs = [_JOB * 256 / columns * together] * (_blocks(row_pairs, together) if plan.in_grid else 0)
    tiles = _makespan([*jobs, *[1.0] * (row_pairs * _blocks(n, columns))], pairs)
    flop = 2.0 * tiles * pairs * 2 * rows * columns * depth
    moved += BYTES * (s.r * k + m * s.r) if plan.in_grid else 0
    return Launch("lora_gemm", moved, flop, machine.wgmma_share * plan.tile_efficiency)


def ours_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """The kernels of `lora_ext.plan`, in order."""
    plan = _plans(machine, s).forward
    assert plan is not None
    columns = plan.columns
    launches = []
    if s.wide:
        launches.append(Launch("lora_split", s.r * (s.k + s.n) * (FLOAT + 2 * BYTES)))
    if not plan.in_grid:
        sums = plan.shrink_splits * s.m * columns * FLOAT
        launches.append(Launch("lora_shrink", BYTES * (s.m * s.k + s.r * s.k) + sums))
        launches.append(Launch("lora_reduce", sums + s.m * columns * (BYTES + FLOAT)))
    else:
        launches.append(Launch("flags", 0.0))
    return [*launches, _lora_gemm(machine, plan, s, s.m, s.n, s.k)]


def ours_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """The kernels of `lora_ext.plan`, in order."""
    plan = _plans(machine, s).backward
    assert plan is not None
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
        launches.append(Launch("lora_dsdb", BYTES * s.m * s.n + halves + sums + grads_b))
    elif not plan.in_grid:
        launches.append(Launch("lora_shrink", BYTES * s.m * s.n + sums))
    launches.append(Launch("flags", 0.0) if plan.in_grid else Launch("lora_reduce", sums + halves))
    launches.append(_lora_gemm(machine, plan, s, s.m, s.k, s.n))
    wgrad = BYTES * s.m * s.k + halves + grads_a
    if not plan.one_pass:
        wgrad += BYTES * s.m * s.n + halves + grads_b
    launches.append(Launch("lora_wgrad", wgrad))
    launches.append(Launch("lora_reduce_wgrad", grads_a + grads_b))
    return launches


def merged_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """One product of the library."""
    return [product(machine, "base", s.m, s.n, s.k)]


def frozen_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """dX alone."""
    return [product(machine, "dX", s.m, s.k, s.n)]


def naive_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """Base, dropout, A, B, times s, plus."""
    launches = merged_forward(machine, s)
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * BYTES + 1)))
    return [
        *launches,
        product(machine, "x A^T", s.m, s.r, s.k),
        product(machine, "S B^T", s.m, s.n, s.r),
        _passes("times s", s.m * s.n, 2),
        _passes("plus", s.m * s.n, 3),
    ]


def naive_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """As autograd runs it."""
    launches = [
        _passes("times s", s.m * s.n, 2),
        product(machine, "dB", s.n, s.r, s.m),
        product(machine, "dS", s.m, s.r, s.n),
        product(machine, "dA", s.r, s.k, s.m),
        product(machine, "dS A", s.m, s.k, s.r),
        *frozen_backward(machine, s),
        _passes("plus", s.m * s.k, 3),
    ]
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * BYTES + 1)))
    return launches


def peft_default_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """Naive with float32 adapters: x and the update are float32."""
    launches = merged_forward(machine, s)
    launches.append(Launch("x to float32", s.m * s.k * (BYTES + FLOAT)))
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * FLOAT + 1)))
    return [
        *launches,
        Launch("x A^T", s.m * s.k * FLOAT),
        Launch("S B^T", s.m * s.n * FLOAT),
        _passes("times s", s.m * s.n, 2, FLOAT),
        Launch("plus", s.m * s.n * (BYTES + 2 * FLOAT)),
        Launch("round", s.m * s.n * (FLOAT + BYTES)),
    ]


def peft_default_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """As autograd runs it."""
    launches = [
        Launch("dY to float32", s.m * s.n * (BYTES + FLOAT)),
        _passes("times s", s.m * s.n, 2, FLOAT),
        Launch("dB", s.m * s.n * FLOAT),
        Launch("dS", s.m * s.n * FLOAT),
        Launch("dA", s.m * s.k * FLOAT),
        Launch("dS A", s.m * s.k * FLOAT),
        *frozen_backward(machine, s),
        Launch("round", s.m * s.k * (FLOAT + BYTES)),
        _passes("plus", s.m * s.k, 3),
    ]
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * (2 * FLOAT + 1)))
    return launches


def unsloth_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """Base, x A^T, and addmm_ onto the base's result."""
    return [
        *merged_forward(machine, s),
        product(machine, "x A^T", s.m, s.r, s.k),
        product(machine, "addmm_", s.m, s.n, s.r, accumulate=True),
    ]


def unsloth_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """dY B once, S again, dB, dA, dX, addmm_ onto it."""
    return [
        product(machine, "dS", s.m, s.r, s.n),
        product(machine, "x A^T", s.m, s.r, s.k),
        product(machine, "dB", s.n, s.r, s.m),
        product(machine, "dA", s.r, s.k, s.m),
        *frozen_backward(machine, s),
        product(machine, "addmm_", s.m, s.k, s.r, accumulate=True),
    ]


def library_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """csrc/library_route.cpp: the expand first, the base onto it; float32 adapters by blocks."""
    if s.wide:
        return peft_default_forward(machine, s)
    launches = [product(machine, "x A^T", s.m, s.r, s.k)]
    if s.dropout:
        launches.append(Launch("dropout", s.m * s.k * 2 * BYTES))
    launches.append(product(machine, "S B^T", s.m, s.n, s.r))
    return [*launches, product(machine, "base", s.m, s.n, s.k, accumulate=True)]


def library_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """csrc/library_route.cpp."""
    if s.wide:
        return peft_default_backward(machine, s)
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
        _passes("plus", s.m * s.k, 3),
    ]


def _expand(s: _Shape, rows: int, columns: int) -> Launch:
    """lora_gemm without a base product: Y written, T and U read."""
    terms = 3 if s.wide else 1
    return Launch("lora_gemm", BYTES * (rows * columns + terms * s.r * (rows + columns)))


def hybrid_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """`ours_forward` with the low-rank product alone, and the library's base onto it."""
    return [
        *ours_forward(machine, s)[:-1],
        _expand(s, s.m, s.n),
        product(machine, "base", s.m, s.n, s.k, accumulate=True),
    ]


def hybrid_backward(machine: Machine, s: _Shape) -> list[Launch]:
    """`ours_backward` with the low-rank product alone, and the library's dY W onto it."""
    kernels = ours_backward(machine, s)
    place = [launch.name for launch in kernels].index("lora_gemm")
    kernels[place] = _expand(s, s.m, s.k)
    return [*kernels, product(machine, "dX", s.m, s.k, s.n, accumulate=True)]


def auto_forward(machine: Machine, s: _Shape) -> list[Launch]:
    """The planner's choice."""
    return (hybrid_forward if s.wide or s.dropout else library_forward)(machine, s)


_SEQUENCES = {
    "merged": (merged_forward, None, False),
    "frozen": (merged_forward, frozen_backward, False),
    "ours": (auto_forward, hybrid_backward, False),
    "ours_fp32": (auto_forward, hybrid_backward, True),
    "ours_fp32_kernel": (ours_forward, ours_backward, True),
    "ours_kernel": (ours_forward, ours_backward, False),
    "ours_library": (library_forward, library_backward, False),
    "ours_fp32_library": (library_forward, library_backward, True),
    "naive": (naive_forward, naive_backward, False),
    "peft": (naive_forward, naive_backward, False),
    "peft_default": (peft_default_forward, peft_default_backward, True),
    "unsloth": (unsloth_forward, unsloth_backward, False),
}


def launches_of(machine: Machine, cell: Cell, variant: str) -> list[Launch]:
    """The launches of one call of a variant (benchmarks.variants); empty if it is not modelled."""
    if variant not in _SEQUENCES or cell.dtype not in ("bfloat16", "float16"):
        return []
    forward, backward, wide = _SEQUENCES[variant]
    shape = _shape(cell, wide)
    if cell.mode == FORWARD:
        return forward(machine, shape)
    if backward is None:
        return []
    first = [] if cell.mode == BACKWARD else forward(machine, shape)
    return [*first, *backward(machine, shape)]


def predicted_us(machine: Machine, cell: Cell, variant: str) -> float | None:
    """Microseconds of one call; None if the variant or dtype is not modelled."""
    launches = launches_of(machine, cell, variant)
    return sum(launch.us(machine) for launch in launches) if launches else None


def limiting(launches: Iterable[Launch], machine: Machine) -> str:
    """The launch that takes longest."""
    return max(launches, key=lambda launch: launch.us(machine)).name
