"""Forwards of few rows, as decoding has them, beside a launch that reads x and W and writes y.

Ours is one launch that reads the weight once; PEFT's and the library route's are several, each with
its gap. The predictions that docs/decode.md has.
"""

from __future__ import annotations

from lora_ext import _C

from ..shapes import FORWARD, Cell
from . import MACHINES, predicted_us
from .launch import BYTES, Launch
from .rates import Machine

CARDS = ("A100", "L40S", "H100")
WIDTHS, ROWS, RANK = (4096, 8192), (1, 8, 64), 16
# Most of ours over that launch: of up to 8 rows by width, and of 64.
LIMITS, LIMIT_OF_64 = {4096: 1.15, 8192: 1.10}, 1.25


def cell_of(width: int, rows: int) -> Cell:
    """A forward without bias, in bfloat16."""
    return Cell(FORWARD, "bfloat16", rows, width, width, rank=RANK, bias=False)


def once_us(machine: Machine, width: int, rows: int, adapters: int = 0) -> float:
    """A matrix-vector product, or one of few rows, as fast as its bytes; with those of factors."""
    factors = 2 * adapters * RANK * width
    return Launch("W x", BYTES * (width * width + 2 * rows * width + factors)).us(machine)


def over_once(machine: Machine, width: int, rows: int, variant: str = "ours_kernel") -> float:
    """Predicted time over that."""
    found = predicted_us(machine, cell_of(width, rows), variant)
    assert found is not None
    return found / once_us(machine, width, rows)


def limit_of(width: int, rows: int) -> float:
    return LIMIT_OF_64 if rows > 8 else LIMITS[width]


def plan_of(machine: Machine, width: int, rows: int) -> _C.Plan:
    problem = _C.Problem(rows, width, width, RANK)
    return _C.plan_forward(machine.planned, problem, "auto")


# Rows and adapters, an equal number of rows each.
MANY = ((8, 2), (8, 8), (64, 8), (64, 64))


def many_over_once(machine: Machine, width: int, rows: int, adapters: int) -> dict[str, float]:
    """By route, over a launch that reads the adapters' factors, too; and what the planner takes."""
    problem = _C.Problem(rows, width, width, RANK)
    plan = _C.plan_grouped_forward(machine.planned, problem, adapters)
    least = once_us(machine, width, rows, adapters)
    return {name: us / least for name, us in plan.predicted_us.items()}


def table_of_many() -> str:
    """The same of many adapters: one launch, or one for each step and the library's product."""
    columns = ["card", "K = N", "rows", "adapters", "lora_decode", "hybrid"]
    lines = [columns, ["---"] * len(columns)]
    for name in CARDS:
        for width in WIDTHS:
            for rows, adapters in MANY:
                found = many_over_once(MACHINES[name], width, rows, adapters)
                cells = [f"{found[route]:.2f}" for route in ("kernel", "hybrid")]
                lines.append([name, f"{width}", f"{rows}", f"{adapters}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table() -> str:
    """Microseconds of that launch, and the others over it."""
    columns = ["card", "K = N", "rows", "W once, us", "lora_decode", "at most", "base alone, torch"]
    columns += ["library route", "PEFT bf16"]
    lines = [columns, ["---"] * len(columns)]
    for name in CARDS:
        machine = MACHINES[name]
        for width in WIDTHS:
            for rows in ROWS:
                base = once_us(machine, width, rows)
                ours, merged, library, peft = (
                    f"{over_once(machine, width, rows, variant):.2f}"
                    for variant in ("ours_kernel", "merged", "ours_library", "peft")
                )
                limit = f"{limit_of(width, rows):.2f}"
                sizes = [f"{width}", f"{rows}", f"{base:.1f}"]
                lines.append([name, *sizes, ours, limit, merged, library, peft])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
