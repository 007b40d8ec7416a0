"""What cards sustain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import lora_ext
from lora_ext import _C


@dataclass(frozen=True)
class Machine:
    """Sustained figures of a card.

    Attributes:
        card: its name in ``lora_ext.kernels.CARDS``.
        tflops: of the library's dense half product at 4096 x 4096 x 4096.
        dram_gb_s: of a copy, read and written bytes together.
        gap_us: from the end of a kernel to the start of the next, in a graph.
        calibrated: whether tflops and dram_gb_s were measured on the card at hand.
    """

    card: str
    tflops: float
    dram_gb_s: float
    gap_us: float
    calibrated: bool = False

    @property
    def planned(self) -> _C.Card:
        """As the planner takes it."""
        return lora_ext.kernels.CARDS[self.card]


def _planned(name: str) -> Machine:
    rates = _C.sustained_by(lora_ext.kernels.CARDS[name])
    return Machine(name, rates.tflops, rates.dram_gb_s, rates.gap_us)


# By the planner's own rates.
MACHINES = {name: _planned(name) for name in lora_ext.kernels.CARDS}


def machine_named(name: str) -> Machine | None:
    """The entry that a device's name contains, "NVIDIA H100 80GB HBM3" for one; else None."""
    found = [key for key in MACHINES if key.replace(" ", "") in name.replace(" ", "")]
    return MACHINES[max(found, key=len)] if found else None


def calibrated(machine: Machine, tflops: float, dram_gb_s: float) -> Machine:
    """The machine with measured ceilings."""
    return replace(machine, tflops=tflops, dram_gb_s=dram_gb_s, calibrated=True)
