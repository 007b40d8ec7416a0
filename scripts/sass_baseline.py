"""What the main loops took when they were recorded, and which of them are worse now.

scripts/sass_baseline.json has a line for the loops of each kernel: on an A100 or H100, and of
sm_80's lora_gemm and lora_decode on an L40S. Of float16 only what differs from bfloat16 has one.
Counts are of one compiler: with another nvcc nothing is compared. They are of one counter, too,
whose code the file has a hash of, and of as many kernels of each architecture as it says.
"""

import ast
import hashlib
import json
import re
from pathlib import Path

from sass_kernels import Kernel

FILE = Path(__file__).with_name("sass_baseline.json")
ON_CONSUMER_CARDS = "sm_80 on L40S"
# The counter: scripts/sass_*.py.
COUNTER = ["control", "loops", "main_loops", "pipes", "replay", "residence", "steady", "step"]
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


def plain(code: object) -> object:
    """Code as names and values: without comments, docstrings, and what Pythons differ in.

    ast.dump would not do: whether it names empty fields changed in 3.13, and 3.12 has more of them.
    """
    if isinstance(code, list):
        return [plain(each) for each in code]
    if not isinstance(code, ast.AST):
        return repr(code)
    fields = {name: value for name, value in ast.iter_fields(code) if value not in (None, [])}
    fields.pop("kind", None)  # of u"text"
    has_text = isinstance(code, ast.Module | ast.ClassDef | ast.FunctionDef)
    if has_text and ast.get_docstring(code, clean=False) is not None:
        fields["body"] = code.body[1:]
    return [type(code).__name__, *([name, plain(fields[name])] for name in sorted(fields))]


def counter_of(sources: list[str]) -> str:
    """What the code of a counter is known by."""
    code = json.dumps([plain(ast.parse(source)) for source in sources])
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def counter() -> str:
    """This one's: its constants, and all that makes cycles of a kernel's machine code."""
    return counter_of([Path(__file__).with_name(f"sass_{name}.py").read_text() for name in COUNTER])


def stale() -> list[str]:
    """What says so if another counter has recorded."""
    if read().get("counter") == counter():
        return []
    return ["recorded with another counter: python scripts/sass.py --record"]


def record(nvcc: str, archs: dict[str, list[Kernel]]) -> None:
    sections = {arch: recorded(kernels) for arch, kernels in archs.items()}
    sections[ON_CONSUMER_CARDS] = recorded(archs["sm_80"], consumer=True)
    lines = [f'{{\n"nvcc": "{nvcc}"', f'"counter": "{counter()}"']
    lines.append(f'"kernels": {json.dumps({arch: len(archs[arch]) for arch in archs})}')
    for name, section in sections.items():
        rows = [f" {json.dumps(family)}: {loops}" for family, loops in section.items()]
        lines.append(f'"{name}": {{\n' + ",\n".join(rows) + "\n}")
    FILE.write_text(",\n".join(lines) + "\n}\n")


def read() -> dict:
    return json.loads(FILE.read_text())


def compared(
    kernels: list[Kernel], loops: dict[str, list[list[float]]], consumer: bool = False
) -> list[str]:
    """What is worse than recorded, one line each."""
    wrong = []
    card = " on an L40S" if consumer else ""
    for kernel in kernels:
        found = kernel.consumer_loops if consumer else kernel.main_loops
        before = loops.get(kernel.name, loops.get(family_of(kernel.name), []))
        if len(before) != len(found):
            wrong.append(
                f"{kernel.name}{card}: other main loops than recorded:"
                " python scripts/sass.py --record"
            )
            continue
        for loop, (cycles, efficiency) in zip(found, before, strict=True):
            if loop.efficiency < efficiency * (1 - TOLERANCE):
                now = f"{loop.cycles:.0f} cycles a step, {loop.efficiency:.3f} of the tensor rate"
                was = f"{cycles:.0f} and {efficiency:.3f} recorded"
                wrong.append(f"{kernel.name}{card}: the loop at {loop.place} takes {now}; {was}")
    return wrong
