"""A launch: one kernel, or one call of the library."""

from __future__ import annotations

from dataclasses import dataclass

from lora_ext import _C

from ..shapes import Cell
from .rates import Machine

BYTES = 2  # of a half
FLOAT = 4
_MICRO = 1e6


@dataclass(frozen=True)
class Launch:
    """One kernel: DRAM bytes, and arithmetic at the rate of the library's large products."""

    name: str
    bytes: float
    flop: float = 0.0  # of all waves, idle SMs included
    times: int = 1  # launches, of an equal part each

    def us(self, machine: Machine) -> float:
        """The longer of arithmetic and DRAM, and the gaps."""
        arithmetic = self.flop / (machine.tflops * 1e12) * _MICRO
        memory = self.bytes / (machine.dram_gb_s * 1e9) * _MICRO
        return max(arithmetic, memory) + self.times * machine.gap_us


def product(
    machine: Machine, name: str, m: int, n: int, k: int, accumulate: bool = False
) -> Launch:
    """The library's Y [m, n] = P [m, k] Q, as the planner predicts it."""
    found = _C.library_product(machine.planned, m, n, k, accumulate)
    return Launch(name, found.bytes, found.flop)


def passes(name: str, elements: int, passes: int, size: int = BYTES) -> Launch:
    """So many over elements of `size` bytes."""
    return Launch(name, float(elements * passes * size))


def problem_of(cell: Cell, float_adapters: bool) -> _C.Problem:
    """A benchmark's cell as the planner takes it: X [m, k], W [n, k], rank r."""
    problem = _C.Problem(cell.rows, cell.out_features, cell.in_features, cell.rank)
    problem.float_adapters, problem.dropout = float_adapters, cell.dropout_p > 0
    return problem
