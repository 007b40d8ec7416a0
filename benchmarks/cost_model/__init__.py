"""What a LoRA linear should cost on a card, and what other packages' launches should cost there.

A call is a sequence of launches. A launch takes the longest of

    arithmetic   whole waves of tiles, one tile an SM at a time, at the card's sustained rate
    DRAM         its operands and results once, at the card's sustained bandwidth

and a gap before the next. That is all: no L2, no clocks that fall, no host that is late (a graph
replay). The rates, this package's launches and the library's products are the planner's own
(csrc/plan/plan_prediction.h); the launches of others are in `others`. `calibrated` puts two
measured ceilings of a card in place of the planner's. Half precision; times in microseconds,
sizes as in `lora_ext.kernels.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ..shapes import BACKWARD, FORWARD, Cell
from . import others, ours
from .launch import Launch, problem_of
from .rates import MACHINES, Machine, calibrated, machine_named

__all__ = [
    "MACHINES",
    "Launch",
    "Machine",
    "calibrated",
    "launches_of",
    "limiting",
    "machine_named",
    "predicted_us",
]


def _route(name: str, wide: bool):
    return partial(ours.forward, name), partial(ours.backward, name), wide


_SEQUENCES = {
    "merged": (others.merged_forward, None, False),
    "frozen": (others.merged_forward, others.frozen_backward, False),
    "ours": _route("auto", False),
    "ours_fp32": _route("auto", True),
    "ours_fp32_kernel": _route("kernel", True),
    "ours_kernel": _route("kernel", False),
    "ours_library": _route("library", False),
    "ours_fp32_library": _route("library", True),
    "naive": (others.naive_forward, others.naive_backward, False),
    "peft": (others.naive_forward, others.naive_backward, False),
    "peft_default": (others.peft_default_forward, others.peft_default_backward, True),
    "unsloth": (others.unsloth_forward, others.unsloth_backward, False),
}


def launches_of(machine: Machine, cell: Cell, variant: str) -> list[Launch]:
    """The launches of one call of a variant (benchmarks.variants); empty if it is not modelled."""
    if variant not in _SEQUENCES or cell.dtype not in ("bfloat16", "float16"):
        return []
    forward, backward, wide = _SEQUENCES[variant]
    problem = problem_of(cell, wide)
    if cell.mode == FORWARD:
        return forward(machine, problem)
    if backward is None:
        return []
    first = [] if cell.mode == BACKWARD else forward(machine, problem)
    return [*first, *backward(machine, problem)]


def predicted_us(machine: Machine, cell: Cell, variant: str) -> float | None:
    """Microseconds of one call; None if the variant or dtype is not modelled."""
    launches = launches_of(machine, cell, variant)
    return sum(launch.us(machine) for launch in launches) if launches else None


def limiting(launches: Iterable[Launch], machine: Machine) -> str:
    """The launch that takes longest."""
    return max(launches, key=lambda launch: launch.us(machine)).name
