"""What a LoRA linear should cost on a card: rooflines and schedules, the one place for constants.

A call is a sequence of launches. A launch takes the longest of

    arithmetic   whole waves of tiles, one tile an SM at a time, at the card's sustained rate
    DRAM         its operands and results once, at the card's sustained bandwidth

and a gap before the next. One that begins early moves part of its bytes on SMs that the last wave
of the one before leaves idle. That is all: no L2, no clocks that fall, no host that is late (a
graph replay). `calibrated` puts two measured ceilings of a card in place of the table's. Half
precision; times in microseconds, sizes as in `lora_ext.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..shapes import BACKWARD, FORWARD, Cell
from . import others, ours
from .launch import Launch, shape_of
from .machine import MACHINES, Machine, calibrated, machine_named

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

_SEQUENCES = {
    "merged": (others.merged_forward, None, False),
    "frozen": (others.merged_forward, others.frozen_backward, False),
    "ours": (ours.auto_forward, ours.hybrid_backward, False),
    "ours_fp32": (ours.auto_forward, ours.hybrid_backward, True),
    "ours_fp32_kernel": (ours.ours_forward, ours.ours_backward, True),
    "ours_kernel": (ours.ours_forward, ours.ours_backward, False),
    "ours_library": (ours.library_forward, ours.library_backward, False),
    "ours_fp32_library": (ours.library_forward, ours.library_backward, True),
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
    shape = shape_of(cell, wide)
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
