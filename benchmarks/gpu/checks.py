"""Stages that check: golden vectors, tests, sanitizers, stress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence

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
_EXPERTS = "tests/experts/test_experts_grouped.py"

# A file that cannot be imported stops no other.
_HOW = ("-q", "-rfE", "--tb=short", "--continue-on-collection-errors")
_TEST_S, _SANITIZED_S, _CHECK_S = 60.0, 150.0, 30.0  # limits of one test, and of a kernel's check

Check = Callable[[Run, float], Result]


def suite(name: str, on_gpu: Sequence[str], on_cpu: Sequence[str]) -> Check:
    """Tests as a stage, which goes on where it was stopped for want of time."""

    def check(run: Run, seconds: float) -> Result:
        before = run.stages.get(name, {}).get("ended", {})
        chosen = on_cpu if run.device != "cuda" else ("-m", "gpu", *on_gpu)
        return run_tests(run, [*_HOW, *chosen], seconds, _TEST_S, before=before)

    return check


# The kernel route against the library route, graphs and streams.
kernels = suite("kernels", ["tests/kernels/test_cuda_kernels.py"], ["tests/kernels/test_plan.py"])
# The op with an adapter for each row, on every route.
many = suite("many", [_MANY], ["-k", "any_shape", _MANY])
# Experts of a mixture: by kernels; on torch's grouped product, with the update on every route.
experts = suite("experts", [_EXPERTS], [_EXPERTS])
# All other tests marked gpu.
_OTHERS = [f"--ignore={path}" for path in (_MANY, _EXPERTS)]
tests = suite("tests", ["tests", *_OTHERS], ["tests/kernels/test_decode_shares.py"])


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


def sanitizer(tool: str) -> Check:
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


def program(name: str) -> Check:
    """A module beside this one, whose docstring says what it checks."""

    def check(run: Run, seconds: float) -> Result:
        command = [child.PYTHON, "-m", f"benchmarks.gpu.{name}", "--device", run.device]
        return run_command(run, command, seconds)

    return check
