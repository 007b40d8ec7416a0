"""The stages of `make gpu`, in the order of what would be missed most.

Each stage is a command or a measurement whose result is written at once. A tool that is missing, or
a command that fails, is a result too: the next stage runs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..results import Document

ROOT = Path(__file__).resolve().parents[2]
_KEPT_LINES = 15

# A few kernels of each kind under the sanitizers, which make them a hundred times slower.
_SANITIZED = "test_kernels_agree_with_the_library_route and 333x515x777x13"
_SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: the key of its result.
        seconds: what it is expected to take on 16 cores and one card; there it does not begin with
            less.
        run: (device, seconds left) -> its result, with "status": "done", "failed" or "missing".
        quick: whether QUICK=1 runs it.
    """

    name: str
    seconds: float
    run: Callable[[str, float], dict[str, Any]]
    quick: bool = True


def run_command(command: Sequence[str], seconds: float, folder: str = ".") -> dict[str, Any]:
    """Runs a command; returns its status, seconds and last lines."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT / folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        code, lines = done.returncode, done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired:
        code, lines = -1, [f"stopped after {seconds:.0f} s"]
    except OSError as error:
        return missing(str(error))
    return {
        "status": "done" if code == 0 else "failed",
        "command": " ".join(command).replace(sys.executable, "python"),
        "seconds": round(time.monotonic() - start, 1),
        "summary": lines[-1] if lines else "",
        "tail": lines[-_KEPT_LINES:],
    }


def missing(reason: str) -> dict[str, Any]:
    """The result of a stage that cannot run here."""
    return {"status": "missing", "summary": reason, "seconds": 0.0, "tail": []}


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rfE", *arguments]


def conformance(device: str, seconds: float) -> dict[str, Any]:
    """Every function of csrc/ptx/ on the card: golden vectors for the execution layer."""
    if device != "cuda":
        return missing("golden vectors come from a GPU")
    return run_command([sys.executable, "-m", "emulator.conformance.produce"], seconds, "tests")


def kernels(device: str, seconds: float) -> dict[str, Any]:
    """The kernel route against the library route, graphs and streams."""
    if device != "cuda":
        return run_command(_pytest("tests/test_plan.py"), seconds)
    return run_command(_pytest("-m", "gpu", "tests/test_cuda_kernels.py"), seconds)


def tests(device: str, seconds: float) -> dict[str, Any]:
    """All tests marked gpu."""
    if device != "cuda":
        return run_command(_pytest("tests/test_benchmark_model.py"), seconds)
    return run_command(_pytest("-m", "gpu", "tests"), seconds)


def warmup(device: str, seconds: float) -> dict[str, Any]:
    """Every kernel's small case on this card (`lora_ext.warmup`)."""
    if device != "cuda":
        return missing("kernels are checked on a GPU")
    code = "import lora_ext; failed = lora_ext.warmup(); print(*failed, len(failed), sep='\\n')"
    result = run_command([sys.executable, "-c", code], seconds)
    if result["status"] == "done":
        result["summary"] += " kernels failed their check"
    return result


def sanitizer(tool: str) -> Callable[[str, float], dict[str, Any]]:
    """compute-sanitizer on a few kernels."""

    def run(device: str, seconds: float) -> dict[str, Any]:
        found = shutil.which("compute-sanitizer")
        if found is None or device != "cuda":
            return missing("no compute-sanitizer on the PATH" if device == "cuda" else "no GPU")
        command = [found, "--tool", tool, "--error-exitcode", "9"]
        command += _pytest("-m", "gpu", "tests/test_cuda_kernels.py", "-k", _SANITIZED)
        return run_command(command, seconds)

    return run


def ceilings(device: str, seconds: float) -> dict[str, Any]:
    """The library's half product at 4096 x 4096 x 4096, in TFLOP/s, and a copy, in GB/s."""
    size, elements = (4096, 2**28) if device == "cuda" else (256, 2**20)
    half = {"device": device, "dtype": torch.bfloat16}
    a, b = torch.randn(size, size, **half), torch.randn(size, size, **half)
    source, target = (torch.empty(elements, **half) for _ in range(2))
    product_s = _best_seconds(lambda: torch.mm(a, b), device)
    copy_s = _best_seconds(lambda: target.copy_(source), device)
    return {
        "status": "done",
        "tflops": 2 * size**3 / product_s / 1e12,
        "dram_gb_s": 2 * 2 * elements / copy_s / 1e9,
        "seconds": 0.0,
        "summary": f"{2 * size**3 / product_s / 1e12:.1f} TFLOP/s,"
        f" {4 * elements / copy_s / 1e9:.0f} GB/s",
        "tail": [],
    }


def _best_seconds(function: Callable[[], object], device: str) -> float:
    """The median of 20 calls after 5."""
    times = []
    for _ in range(25):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return sorted(times[5:])[10]


STAGES = (
    Stage("conformance", 60, conformance),
    Stage("warmup", 30, warmup),
    Stage("kernels", 90, kernels),
    Stage("ceilings", 10, ceilings),
    Stage("tests", 240, tests, quick=False),
    *(Stage(tool, 120, sanitizer(tool), quick=False) for tool in _SANITIZERS),
)


def run_stages(
    document: Document,
    device: str,
    left: Callable[[], float],
    write: Callable[[], None],
    quick: bool,
    chosen: Sequence[Stage] = STAGES,
) -> None:
    """Runs the stages that the document has no result of, as long as the time left allows."""
    results = document.setdefault("stages", {})
    for stage in chosen:
        if stage.name in results or (quick and not stage.quick):
            continue
        if device == "cuda" and left() < stage.seconds:
            print(f"{stage.name}: {left():.0f} s are left, it takes {stage.seconds:.0f}: next time")
            continue
        try:
            results[stage.name] = stage.run(device, max(1.0, left()))
        except Exception as error:  # what was measured before must not be lost
            results[stage.name] = missing(f"{type(error).__name__}: {error}")
        write()
        print(f"{stage.name}: {results[stage.name]['summary']}", flush=True)
