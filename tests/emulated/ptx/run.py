"""Runs programs on nvcc's PTX, and says how each run ended and which kernels it launched.

PYTHONPATH=tests python -m emulated.ptx lora_linear_sequence --seeds 1:20
PYTHONPATH=tests python -m emulated.ptx --fault sm80-no-commit
PYTHONPATH=tests python -m emulated.ptx --faults
"""

import re
import time
from dataclasses import dataclass

from emulated.ptx.build import FOLDER
from emulated.ptx.faults import Fault
from emulator import run

LAUNCHED = re.compile(r"(80|90a) (\S+): (\d+) of (\d+), (\d+) instructions in (\S+) s")


@dataclass
class Coverage:
    """Of kernels by (architecture, name): how many of its operations were executed, of all."""

    executed: dict[tuple[str, str], tuple[int, int]]
    instructions: int = 0
    seconds: float = 0

    def add(self, found: run.Run) -> None:
        for fact in found.case.get("facts", []):
            if match := LAUNCHED.fullmatch(fact):
                key, count = (match[1], match[2]), int(match[3])
                before = self.executed.get(key, (0, 0))[0]
                self.executed[key] = max(before, count), int(match[4])
                self.instructions += int(match[5])
                self.seconds += float(match[6])


def runs(program: str, *arguments: str, timeout: float = 600) -> list[run.Run]:
    """Until the cases are through or one, the last, is not clean."""
    return run._run_program("ptx", [str(FOLDER / program), *arguments], timeout)


def run_fault(fault: Fault) -> run.Run:
    """The run that sees it, or the last of its kernel's, which is clean."""
    program, *arguments = fault.kernel.run
    return runs(program, *arguments, "--fault", str(fault.write()))[-1]


def report(found: list[run.Run], seconds: float) -> str:
    coverage = Coverage({})
    for each in found:
        coverage.add(each)
    rate = coverage.instructions / max(coverage.seconds, 1e-9)
    lines = [
        f"{count:6} of {of:6}  {arch:3} {name}"
        for (arch, name), (count, of) in sorted(coverage.executed.items())
    ]
    lines.append(
        f"{len(found)} runs in {seconds:.1f} s, {len(coverage.executed)} kernels, "
        f"{coverage.instructions:,} instructions of warps, {rate:,.0f} a second"
    )
    return "\n".join(lines)


def timed(program: str, *arguments: str) -> str:
    start = time.perf_counter()
    found = runs(program, *arguments)
    text = report(found, time.perf_counter() - start)
    last = found[-1]
    return text if last.outcome == "clean" else f"{text}\n{last.outcome}: {last.message}"
