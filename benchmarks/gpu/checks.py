"""Stages that check: golden vectors, tests, sanitizers, stress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from . import child
from .children import Item, each
from .run import Run
from .stages import Result, missing, result_of, run_command
from .suites import run_tests

# A few tiles of each kind under the sanitizers, which make them a hundred times slower.
_SANITIZED = "sanitized and kernel-"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")

# Kernels for many adapters by their names, and the tests of the op with them.
_GROUPED, _MANY = "many adapters", "tests/op/test_many_adapters.py"

# A file that cannot be imported stops no other.
_HOW = ("-q", "-rfE", "--tb=short", "--continue-on-collection-errors")
_TEST_S, _SANITIZED_S, _CHECK_S = 60.0, 150.0, 30.0  # limits of one test, and of a kernel's check


def _suite(run: Run, name: str, seconds: float, *arguments: str) -> Result:
    """Tests as a stage, which goes on where it was stopped for want of time."""
    before = run.stages.get(name, {}).get("ended", {})
    return run_tests(run, [*_HOW, *arguments], seconds, _TEST_S, before=before)


def conformance(run: Run, seconds: float) -> Result:
    """Every function of csrc/ptx/ on the card: golden vectors for the execution layer."""
    if run.device != "cuda":
        return missing("golden vectors come from a GPU")
    folder = run.out.resolve() / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    command = [child.PYTHON, "-m", "emulator.conformance.produce", str(folder)]
    return run_command(run, command, seconds)


def warmup(run: Run, seconds: float) -> Result:
    """Every kernel's small case on this card, as a first use checks it."""
    if run.device != "cuda":
        return missing("kernels are checked on a GPU")
    until = time.monotonic() + seconds
    names: list[str] = []
    for _, answer in each(run, "kernels", [Item("names of kernels", {}, seconds)], until):
        if answer.result is None or answer.error:
            return result_of("failed", answer.error, tail=answer.tail)
        names = answer.result["names"]
    ended = dict(run.stages.get("warmup", {}).get("ended", {}))
    items = [Item(name, {"name": name}, _CHECK_S) for name in names if name not in ended]
    for item, answer in each(run, "check", items, until):
        ended[item.name] = answer.error or (answer.result or {})["failed"]
    wrong = [f"{name}: {why}" for name, why in ended.items() if why]
    grouped = sum(_GROUPED in name for name in ended)
    summary = f"{len(ended)} of {len(names)} kernels checked, {len(wrong)} failed"
    summary += f"; {grouped} of them for many adapters"
    whole = bool(names) and len(ended) == len(names)
    status = "failed" if wrong else "done" if whole else "partial"
    right = {} if whole else {"ended": {name: "" for name, why in ended.items() if not why}}
    return result_of(status, summary, tail=wrong, **right)


def kernels(run: Run, seconds: float) -> Result:
    """The kernel route against the library route, graphs and streams."""
    if run.device != "cuda":
        return _suite(run, "kernels", seconds, "tests/kernels/test_plan.py")
    return _suite(run, "kernels", seconds, "-m", "gpu", "tests/kernels/test_cuda_kernels.py")


def many(run: Run, seconds: float) -> Result:
    """The op with an adapter for each row, on every route."""
    if run.device != "cuda":
        return _suite(run, "many", seconds, "-k", "any_shape", _MANY)
    return _suite(run, "many", seconds, "-m", "gpu", _MANY)


def tests(run: Run, seconds: float) -> Result:
    """All other tests marked gpu."""
    if run.device != "cuda":
        return _suite(run, "tests", seconds, "tests/kernels/test_decode_shares.py")
    return _suite(run, "tests", seconds, "-m", "gpu", "tests", f"--ignore={_MANY}")


def sanitizer(tool: str) -> Callable[[Run, float], Result]:
    """compute-sanitizer on a few kernels."""

    def check(run: Run, seconds: float) -> Result:
        found = shutil.which("compute-sanitizer")
        if found is None or run.device != "cuda":
            return missing("no compute-sanitizer on the PATH" if run.device == "cuda" else "no GPU")
        # torch asks CUDA for what a device may lack, and takes the error for an answer.
        command = [found, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        arguments = [*_HOW, "--no-check-timeout", "-m", "gpu", "-k", _SANITIZED]
        arguments += ["tests/kernels/test_cuda_kernels.py"]
        return run_tests(run, arguments, seconds, _SANITIZED_S, under=command)

    return check


def _module(run: Run, name: str, seconds: float) -> Result:
    command = [child.PYTHON, "-m", f"benchmarks.gpu.{name}", "--device", run.device]
    return run_command(run, command, seconds)


def stress(run: Run, seconds: float) -> Result:
    """The same bits from a thousand replays, and from streams that run at the same time."""
    return _module(run, "stress", seconds)


def pool(run: Run, seconds: float) -> Result:
    """Replays of a pool's graph while adapters come and go, against a loop over them."""
    return _module(run, "pool_stress", seconds)


def decode(run: Run, seconds: float) -> Result:
    """Few rows in one launch, right and how fast, beside the base product alone."""
    return _module(run, "decode", seconds)


def quantized(run: Run, seconds: float) -> Result:
    """Weights in 4 bits beside bitsandbytes' kernels, and times of layers on them."""
    return _module(run, "quantized", seconds)
