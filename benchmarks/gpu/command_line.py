"""What the stages that are programs of their own share."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence

from ..cuda_timing import CudaMeter
from ..timing import CpuMeter, Function

_ROUNDS = 7
_SAID = 5  # faults that are named


def device_of(module: str, about: str | None, arguments: Sequence[str] | None) -> str:
    """The device that a command line asks for."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{module}", description=about)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(arguments).device


def medians_ms(functions: Mapping[str, Function], device: str, inner: int) -> dict[str, float]:
    """Of so many calls at a time, which take turns."""
    meter = CudaMeter() if device == "cuda" else CpuMeter()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(_ROUNDS):
        for name, function in functions.items():
            samples[name].append(meter(function, inner).ms)
    return {name: statistics.median(ms) for name, ms in samples.items()}


def conclude(faults: Sequence[str], last: str) -> int:
    """Prints the first faults, then the line that the report shows; returns the exit status."""
    print(*faults[:_SAID], last, sep="\n")
    return 1 if faults else 0
