"""A launch, and the waves of tiles that it is made of."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from ..shapes import Cell
from .machine import Machine

BYTES = 2  # of a half
FLOAT = 4
_MICRO = 1e6


def blocks_of(count: int, size: int) -> int:
    """Of `size`, the last perhaps smaller."""
    return -(-count // size)


@dataclass(frozen=True)
class Launch:
    """One kernel: arithmetic in waves of equal tiles, and DRAM bytes."""

    name: str
    bytes: float
    flop: float = 0.0  # of all waves, idle SMs included
    share: float = 1.0  # of the machine's rate
    # What SMs that its last wave leaves idle can move, and at the machine's rate multiply, for a
    # launch that begins early.
    spare_bytes: float = 0.0
    spare_flop: float = 0.0

    def after(self, other: Launch) -> Launch:
        """What is left of it after `other`, beside the last wave of which it begins."""
        needs = (
            (self.bytes, other.spare_bytes),
            (self.flop / self.share, other.spare_flop),
        )
        done = min((spare / need for need, spare in needs if need > 0), default=1.0)
        left = max(0.0, 1.0 - done)
        return replace(self, bytes=left * self.bytes, flop=left * self.flop)

    def us(self, machine: Machine) -> float:
        """The longer of arithmetic and DRAM, and the gap."""
        arithmetic = self.flop / (machine.tflops * 1e12 * self.share) * _MICRO
        memory = self.bytes / (machine.dram_gb_s * 1e9) * _MICRO
        return max(arithmetic, memory) + machine.gap_us


def wave_flop(machine: Machine, m: int, n: int, k: int, tile: tuple[int, int]) -> float:
    """Of whole waves of tiles, one an SM."""
    waves = blocks_of(blocks_of(m, tile[0]) * blocks_of(n, tile[1]), machine.sms)
    return 2.0 * waves * machine.sms * tile[0] * tile[1] * k


# What the library chooses among, the smaller tiles at a lower rate.
_LIBRARY_TILES = (((128, 256), 1.0), ((128, 128), 0.9), ((128, 64), 0.75), ((64, 64), 0.55))


def product(
    machine: Machine, name: str, m: int, n: int, k: int, accumulate: bool = False
) -> Launch:
    """The library's Y [m, n] = P [m, k] Q; it splits k where there are few tiles."""
    times = []
    for tile, rate in _LIBRARY_TILES:
        flop = wave_flop(machine, m, n, k, tile)
        tiles = blocks_of(m, tile[0]) * blocks_of(n, tile[1])
        splits = max(1, min(machine.sms // max(1, tiles), blocks_of(k, 512)))
        times.append(flop / splits / rate)
    moved = BYTES * (m * k + n * k + (2 if accumulate else 1) * m * n)
    return Launch(name, moved, min(times))


def passes(name: str, elements: int, passes: int, size: int = BYTES) -> Launch:
    """So many over elements of `size` bytes."""
    return Launch(name, float(elements * passes * size))


@dataclass(frozen=True)
class Shape:
    """X [m, k], W [n, k], rank r."""

    m: int
    n: int
    k: int
    r: int
    dropout: bool
    wide: bool  # float32 adapters


def shape_of(cell: Cell, wide: bool) -> Shape:
    """Of a benchmark's cell."""
    return Shape(
        cell.rows, cell.out_features, cell.in_features, cell.rank, cell.dropout_p > 0, wide
    )


def ends_of(jobs: Iterable[float], workers: int) -> list[float]:
    """When each worker ends, every job in its turn taken by the one that is free first."""
    free = [0.0] * workers
    for job in jobs:
        heapq.heapreplace(free, free[0] + job)
    return sorted(free)


# The share of a card's bandwidth that a share of its SMs can draw, over that share (predicted).
SHARE_OF_DRAM = 2.5


def spare_of(ends: list[float], begin: float, over: float = 1.0) -> float:
    """Time of all workers that those which have ended are worth until the last one ends.

    Args:
        ends: when each ends, ascending.
        begin: from when on.
        over: what a worker is worth of its share; all together at most the whole.
    """
    spare = 0.0
    for count, (end, after) in enumerate(pairwise(ends), 1):
        spare += min(1.0, over * count / len(ends)) * (max(after, begin) - max(end, begin))
    return spare
