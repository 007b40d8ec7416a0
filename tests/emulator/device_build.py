"""Compiles the specimens with nvcc and says what ptxas would hold against them."""

import re
import subprocess
from pathlib import Path

from emulator import build, cuda_headers

SOURCES = {"sm_80": "device_build_sm80.cu", "sm_90a": "device_build_sm90a.cu"}
MAX_REGISTERS = {"sm_80": 128, "sm_90a": 168}


def compile_specimens(architecture: str, cubin: Path, *includes: Path) -> str:
    """Writes the cubin and returns ptxas' report. `includes` come before the repository's own."""
    folders = [*includes, build.ROOT / "csrc", build.ROOT / "tests"]
    source = build.EMULATOR / "specimens" / SOURCES[architecture]
    command = [cuda_headers.nvcc() or "nvcc", "-std=c++20", "-O3", "-cubin", "-Xptxas", "-v"]
    command += [f"-arch={architecture}", *(f"-I{folder}" for folder in folders), str(source)]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc exited with {done.returncode}:\n{done.stderr}")
    return done.stderr


def objections(architecture: str, report: str) -> list[str]:
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
    if registers > MAX_REGISTERS[architecture]:
        found.append(f"{registers} registers, more than {MAX_REGISTERS[architecture]}")
    return found
