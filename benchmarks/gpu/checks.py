"""Stages that check: golden vectors, tests, sanitizers, stress."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from .run import Run
from .stages import Result, missing, run_command

# A few kernels of each kind under the sanitizers, which make them a hundred times slower.
_SANITIZED = "test_kernels_agree_with_the_library_route and 333x515x777x13"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


_ALL = "--continue-on-collection-errors"  # a file that cannot be imported stops no other


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rfE", _ALL, *arguments]


def conformance(run: Run) -> Result:
    """Every function of csrc/ptx/ on the card: golden vectors for the execution layer."""
    if run.device != "cuda":
        return missing("golden vectors come from a GPU")
    folder = run.out.resolve() / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "emulator.conformance.produce", str(folder)]
    return run_command(command, run.command_s, "tests")


def warmup(run: Run) -> Result:
    """Every kernel's small case on this card (`lora_ext.warmup`)."""
    if run.device != "cuda":
        return missing("kernels are checked on a GPU")
    code = "import lora_ext; failed = lora_ext.warmup(); print(*failed, len(failed), sep='\\n')"
    result = run_command([sys.executable, "-c", code], run.command_s)
    if result["status"] == "done":
        result["status"] = "done" if result["summary"] == "0" else "failed"
        result["summary"] += " kernels failed their check"
    return result


def kernels(run: Run) -> Result:
    """The kernel route against the library route, graphs and streams."""
    if run.device != "cuda":
        return run_command(_pytest("tests/test_plan.py"), run.command_s)
    return run_command(_pytest("-m", "gpu", "tests/test_cuda_kernels.py"), run.command_s)


def tests(run: Run) -> Result:
    """All tests marked gpu."""
    if run.device != "cuda":
        return run_command(_pytest("tests/test_benchmark_model.py"), run.command_s)
    return run_command(_pytest("-m", "gpu", "tests"), run.command_s)


def sanitizer(tool: str) -> Callable[[Run], Result]:
    """compute-sanitizer on a few kernels."""

    def check(run: Run) -> Result:
        found = shutil.which("compute-sanitizer")
        if found is None or run.device != "cuda":
            return missing("no compute-sanitizer on the PATH" if run.device == "cuda" else "no GPU")
        command = [found, "--tool", tool, "--error-exitcode", "9"]
        command += _pytest("-m", "gpu", "tests/test_cuda_kernels.py", "-k", _SANITIZED)
        return run_command(command, run.command_s)

    return check


def stress(run: Run) -> Result:
    """The same bits from a thousand replays, and from streams that run at the same time."""
    command = [sys.executable, "-m", "benchmarks.gpu.stress", "--device", run.device]
    return run_command(command, run.command_s)
