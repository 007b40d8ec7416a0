"""Runs programs on nvcc's PTX, and says how each run ended and which kernels it launched.

PYTHONPATH=tests python -m emulated.ptx lora_linear_sequence --seeds 1:20
PYTHONPATH=tests python -m emulated.ptx --coverage            # of all programs' clean runs
PYTHONPATH=tests python -m emulated.ptx --fault sm80-no-commit
"""

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from emulated.ptx import build
from emulated.ptx.faults import Fault
from emulator import run

LAUNCHED = re.compile(r"(80|90a) (\S+): (\d+) instructions in (\S+) s(?:, lines (.*))?")
# What every run of the kernels must execute: operations whose absence a result need not show.
ESSENTIAL = re.compile(
    r"(?:@!?%p\d+ )?((?:bar|barrier|mbarrier|cp\.async|mma|wgmma|ldmatrix|stmatrix|fence|red|atom|"
    r"griddepcontrol|st\.(?:global|shared)\S*?)[.a-z0-9_:]*)[\s;]"
)


def lines_of(ranges: str) -> set[int]:
    found: set[int] = set()
    for each in ranges.split():
        first, _, last = each.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


@cache
def lines_in(file: Path) -> list[str]:
    return file.read_text().splitlines()


@dataclass
class Text:
    """A kernel of nvcc's: its file, and the lines that are operations."""

    file: Path
    lines: set[int]

    def essential(self, lines: set[int]) -> dict[int, str]:
        text = lines_in(self.file)
        found = {line: ESSENTIAL.match(text[line - 1].strip()) for line in sorted(lines)}
        return {line: match[1] for line, match in found.items() if match}


def texts(decode: Path) -> dict[tuple[str, str], Text]:
    """Of kernels that have code, by (architecture, name)."""
    found = {}
    for arch in build.ARCHS:
        files = [str(unit.ptx(arch)) for unit in build.units()]
        for said in run.execute([str(decode), *files], 600).stdout.splitlines():
            file, name, ranges = said.split(" ", 2)
            text = Text(Path(file), lines_of(ranges))
            if len(text.lines) > 1:
                found[arch, name] = text
    return found


@dataclass
class Coverage:
    """Of kernels by (architecture, name): which of their lines were executed."""

    executed: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    instructions: int = 0
    seconds: float = 0

    def add(self, found: run.Run) -> None:
        for fact in found.case.get("facts", []):
            if match := LAUNCHED.fullmatch(fact):
                lines = self.executed.setdefault((match[1], match[2]), set())
                lines |= lines_of(match[5] or "")
                self.instructions += int(match[3])
                self.seconds += float(match[4])

    def missing(self, of: dict[tuple[str, str], Text]) -> dict[tuple[str, str], dict[int, str]]:
        """The essential operations of each kernel that were not executed."""
        found = {
            key: text.essential(text.lines - self.executed.get(key, set()))
            for key, text in of.items()
        }
        return {key: lines for key, lines in found.items() if lines}

    def report(self, of: dict[tuple[str, str], Text]) -> str:
        missing = self.missing(of)
        lines = []
        for key in sorted(of, key=lambda key: self.share(key, of)):
            names = Counter(missing.get(key, {}).values())
            never = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
            lines.append(f"{self.share(key, of):6.1%} {key[0]:3} {key[1]}: {never or 'all'}")
        ran = sum(key in self.executed for key in of)
        total = sum(len(text.lines) for text in of.values())
        executed = sum(len(self.executed.get(key, set()) & of[key].lines) for key in of)
        lines.append(
            f"{ran} of {len(of)} kernels, {executed / total:.1%} of their operations, all but "
            f"{sum(map(len, missing.values()))} of those that copy, meet, multiply or store"
        )
        return "\n".join(lines)

    def share(self, key: tuple[str, str], of: dict[tuple[str, str], Text]) -> float:
        return len(self.executed.get(key, set()) & of[key].lines) / len(of[key].lines)


def runs(program: str, *arguments: str, timeout: float = 600) -> list[run.Run]:
    """Until the cases are through or one, the last, is not clean."""
    return run._run_program("ptx", [str(build.FOLDER / program), *arguments], timeout)


def run_fault(fault: Fault) -> run.Run:
    """The run that sees it, or the last of its kernel's, which is clean."""
    program, *arguments = fault.kernel.run
    return runs(program, *arguments, "--fault", str(fault.write()))[-1]


def report(found: list[run.Run], seconds: float) -> str:
    coverage = Coverage()
    for each in found:
        coverage.add(each)
    rate = coverage.instructions / max(coverage.seconds, 1e-9)
    lines = [f"{arch:3} {name}" for arch, name in sorted(coverage.executed)]
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
