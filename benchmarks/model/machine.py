"""What cards sustain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import lora_ext


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
