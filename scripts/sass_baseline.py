"""What the main loops took when they were recorded, and which of them are worse now.

scripts/sass_baseline.json has a line for the loops of each kernel: on an A100 or H100, and of
sm_80's lora_gemm on an L40S. Of float16 only what differs from bfloat16 has one. Counts are of one
compiler: with another nvcc nothing is compared.
"""

import json
import re
from pathlib import Path

from sass_kernels import Kernel

FILE = Path(__file__).with_name("sass_baseline.json")
ON_CONSUMER_CARDS = "sm_80 on L40S"
TOLERANCE = 0.03  # of an efficiency: what a few instructions in another order make


def family_of(name: str) -> str:
    """A kernel's name without its dtype; other types than halves stay."""
    return re.sub(r" (bf16|fp16)\b", "", name)


def recorded(kernels: list[Kernel], consumer: bool = False) -> dict[str, list[list[float]]]:
    """Cycles of a step and efficiency of each loop, by family; by name of what differs from it."""
    found = {}
    for kernel in sorted(kernels, key=lambda each: ("fp16" in each.name, each.name)):
        loops = kernel.consumer_loops if consumer else kernel.main_loops
        figures = [[loop.cycles, loop.efficiency] for loop in loops]
        if figures and found.setdefault(family_of(kernel.name), figures) != figures:
            found[kernel.name] = figures
    return found


def record(nvcc: str, archs: dict[str, list[Kernel]]) -> None:
    sections = {arch: recorded(kernels) for arch, kernels in archs.items()}
    sections[ON_CONSUMER_CARDS] = recorded(archs["sm_80"], consumer=True)
    lines = [f'{{\n"nvcc": "{nvcc}"']
    for name, section in sections.items():
        rows = [f" {json.dumps(family)}: {loops}" for family, loops in section.items()]
        lines.append(f'"{name}": {{\n' + ",\n".join(rows) + "\n}")
    FILE.write_text(",\n".join(lines) + "\n}\n")


def read() -> dict:
    return json.loads(FILE.read_text())


def compared(kernels: list[Kernel], loops: dict[str, list[list[float]]]) -> list[str]:
    """What is worse than recorded, one line each."""
    wrong = []
    for kernel in kernels:
        before = loops.get(kernel.name, loops.get(family_of(kernel.name)))
        if not kernel.main_loops:
            continue
        if before is None or len(before) != len(kernel.main_loops):
            wrong.append(
                f"{kernel.name}: other main loops than recorded: python scripts/sass.py --record"
            )
            continue
        for loop, (cycles, efficiency) in zip(kernel.main_loops, before, strict=True):
            if loop.efficiency < efficiency * (1 - TOLERANCE):
                now = f"{loop.cycles:.0f} cycles a step, {loop.efficiency:.3f} of the tensor rate"
                was = f"{cycles:.0f} and {efficiency:.3f} recorded"
                wrong.append(f"{kernel.name}: the loop at {loop.place} takes {now}; {was}")
    return wrong
