"""Compiles specimens with nvcc and says what ptxas would hold against them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from emulator import cuda_headers
from emulator.build import EMULATOR, ROOT


@dataclass(frozen=True)
class DeviceBuild:
    source: str  # relative to tests/emulator/
    architecture: str
    max_registers: int


SPECIMENS_SM80 = DeviceBuild("specimens/device_build_sm80.cu", "sm_80", 128)
SPECIMENS_SM90A = DeviceBuild("specimens/device_build_sm90a.cu", "sm_90a", 168)
BUILDS = {
    "specimens_sm80": SPECIMENS_SM80,
    "specimens_sm90a": SPECIMENS_SM90A,
}


def compile_kernels(build: DeviceBuild, cubin: Path, *includes: Path) -> str:
    """Writes the cubin and returns ptxas' report. `includes` come before the repository's own."""
    folders = [*includes, ROOT / "csrc", ROOT / "tests"]
    command = [cuda_headers.nvcc() or "nvcc", "-std=c++20", "-O3", "-cubin", "-Xptxas", "-v"]
    command += [f"-arch={build.architecture}", *(f"-I{folder}" for folder in folders)]
    command += [str(EMULATOR / build.source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc exited with {done.returncode}:\n{done.stderr}")
    return done.stderr


def objections(build: DeviceBuild, report: str) -> list[str]:
    """What is wrong with the kernels of a report."""
    kernels = report.count("Compiling entry function")
    found = [] if kernels >= 5 else [f"expected at least 5 kernels, but found {kernels}"]
    # A stack frame holds an array indexed at run time or the copy of a parameter whose address was
    # taken. A tensor map there is nothing that TMA can read.
    in_registers = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    frames = [line.strip() for line in report.splitlines() if "stack frame" in line]
    found += [line for line in frames if line != in_registers]
    # C7504 to C7519: setmaxnreg ignored, or wgmma serialised: notes to ptxas, but a kernel three
    # times slower.
    found += [line for line in report.splitlines() if re.search(r"C75\d\d", line)]
    registers = max(map(int, re.findall(r"Used (\d+) registers", report)), default=0)
    if registers > build.max_registers:
        found.append(f"{registers} registers, more than {build.max_registers}")
    return found
