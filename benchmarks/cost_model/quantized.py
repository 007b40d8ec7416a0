"""The launches of a layer on an NF4 base, whose weight each direction dequantises whole.

Blocks of 64 values, whose scales are codes of 8 bits in blocks of 256, as QLoRA has them. Beside
that, launches are those of the layer on a dense base: what a cache keeps of the weight between its
writing and its reading is left out for all alike.
"""

from __future__ import annotations

from ..shapes import BACKWARD, FORWARD, Cell
from . import MACHINES, launches_of, predicted_us
from .launch import BYTES, FLOAT, Launch
from .rates import Machine

BLOCK, SCALE_BLOCK = 64, 256

# variant -> what its layer on a dense base is, and how it dequantises
VARIANTS = {
    "ours": ("ours", "ours"),
    "ours_fp32": ("ours_fp32", "ours"),
    "peft": ("peft", "bitsandbytes"),
    "peft_default": ("peft_default", "bitsandbytes"),
    "unsloth": ("unsloth", "bitsandbytes"),
}


def dequantized_by(how: str, values: int) -> list[Launch]:
    """The launches that write a weight of so many values in halves."""
    codes, blocks = values / 2, values / BLOCK
    written = values * BYTES
    if how == "ours":
        scales = blocks + blocks / SCALE_BLOCK * FLOAT
        return [Launch("dequantize_4bit", codes + scales + written)]
    return [  # Unsloth calls the same kernels
        Launch("dequantize_blockwise", blocks + blocks / SCALE_BLOCK * FLOAT + blocks * FLOAT),
        Launch("plus offset", 2 * blocks * FLOAT),
        Launch("kDequantizeBlockwise", codes + blocks * FLOAT + written),
    ]


def quantized_launches_of(machine: Machine, cell: Cell, variant: str) -> list[Launch]:
    """Of a forward, a backward or both; empty if it is not modelled."""
    dense, how = VARIANTS[variant]
    launches = launches_of(machine, cell, dense)
    if not launches:
        return []
    directions = 1 if cell.mode in (FORWARD, BACKWARD) else 2
    return directions * dequantized_by(how, cell.in_features * cell.out_features) + launches


def quantized_us(machine: Machine, cell: Cell, variant: str) -> float | None:
    """Microseconds of one call; None if the variant or dtype is not modelled."""
    launches = quantized_launches_of(machine, cell, variant)
    return sum(launch.us(machine) for launch in launches) if launches else None


def table() -> str:
    """The predictions that docs/quantized.md has."""
    columns = ["card", "K = N", "rows", "dequantise: ours", "bitsandbytes"]
    for direction in (FORWARD, BACKWARD):
        columns += [f"{direction}: ours, dense", "ours", "PEFT", "Unsloth"]
    lines = [columns, ["---"] * len(columns)]
    for name in ("A100", "L40S", "H100"):
        machine = MACHINES[name]
        for width in (4096, 8192):
            writes = [
                sum(launch.us(machine) for launch in dequantized_by(how, width * width))
                for how in ("ours", "bitsandbytes")
            ]
            for rows in (2048, 8192):
                found = [*writes]
                for mode in (FORWARD, BACKWARD):
                    cell = Cell(mode, "bfloat16", rows, width, width, rank=16, bias=False)
                    found.append(predicted_us(machine, cell, "ours"))
                    for variant in ("ours", "peft", "unsloth"):
                        found.append(quantized_us(machine, cell, variant))
                lines.append([name, f"{width}", f"{rows}", *(f"{us:.0f}" for us in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
