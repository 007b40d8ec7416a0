"""Forwards of few rows, as decoding has them, beside the base product alone.

Ours is one launch that reads the weight once; PEFT's and the library route's are several, each with
its gap. The predictions that docs/decode.md has.
"""

from __future__ import annotations

import lora_ext
from lora_ext import _C

from ..shapes import FORWARD, Cell
from . import MACHINES, predicted_us
from .rates import Machine

CARDS = ("A100", "L40S", "H100")
WIDTHS, ROWS, RANK = (4096, 8192), (1, 8, 64), 16
# Most of ours over the base product alone: of up to 8 rows by width, and of 64.
LIMITS, LIMIT_OF_64 = {4096: 1.15, 8192: 1.10}, 1.25


def cell_of(width: int, rows: int) -> Cell:
    """A forward without bias, in bfloat16."""
    return Cell(FORWARD, "bfloat16", rows, width, width, rank=RANK, bias=False)


def over_base(machine: Machine, width: int, rows: int, variant: str = "ours_kernel") -> float:
    """Predicted time over that of the base product alone, the library's."""
    cell = cell_of(width, rows)
    found, base = (predicted_us(machine, cell, name) for name in (variant, "merged"))
    assert found is not None and base is not None
    return found / base


def limit_of(width: int, rows: int) -> float:
    return LIMIT_OF_64 if rows > 8 else LIMITS[width]


def plan_of(machine: Machine, width: int, rows: int) -> _C.Plan:
    problem = _C.Problem(rows, width, width, RANK)
    return lora_ext._C.plan_forward(machine.planned, problem, "auto")


def table() -> str:
    """Microseconds of the base product, and the others over it."""
    columns = ["card", "K = N", "rows", "base alone, us", "lora_decode", "at most", "library route"]
    lines = [[*columns, "PEFT bf16"], ["---"] * (len(columns) + 1)]
    for name in CARDS:
        machine = MACHINES[name]
        for width in WIDTHS:
            for rows in ROWS:
                base = predicted_us(machine, cell_of(width, rows), "merged")
                ours, library, peft = (
                    f"{over_base(machine, width, rows, variant):.2f}"
                    for variant in ("ours_kernel", "ours_library", "peft")
                )
                limit = f"{limit_of(width, rows):.2f}"
                sizes = [f"{width}", f"{rows}", f"{base:.1f}"]
                lines.append([name, *sizes, ours, limit, library, peft])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
