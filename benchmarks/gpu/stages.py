"""The stages of `make gpu`: the command of each, and how long it takes."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple

_TEST_S, _SANITIZED_S = 60.0, 150.0  # of one test

# What is fixed in benchmarks/ makes no time void: --again does again what is red.
_MEASURED = ("csrc", "lora_ext", "setup.py")
_CHECKED = (*_MEASURED, "emulator", "tests")

# A file that cannot be imported stops no other. pytest's own faulthandler would take the limit away
# from a test that has failed.
_PYTEST = ("-m", "pytest", "-p", "benchmarks.gpu.recorder", "-p", "no:faulthandler", "-q")
_PYTEST += ("--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_KERNELS = [f"tests/kernels/test_{name}.py" for name in ("cuda_kernels", "replays")]
_KERNELS += ["tests/experts/test_experts_grouped.py"]

# The command, given the words that name its rows and its seconds; a text: why there is none.
Command = Callable[[Namespace, list[str]], list[str] | str]


class Stage(NamedTuple):
    """One step of a run.

    Attributes:
        seconds: what it is expected to take on 16 cores and one card; there it does not begin with
            less, or with less than a minute.
        folders: of sources, whose change makes its rows void.
        quick: whether QUICK=1 runs it.
    """

    name: str
    seconds: float
    command: Command
    folders: Sequence[str] = _MEASURED
    quick: bool = True


def measured(options: Namespace, words: list[str]) -> list[str]:
    """Of child.py."""
    quick = ["--quick"] if options.quick else []
    own = ["-m", "benchmarks.gpu.child", "--device", options.device, *quick]
    return [sys.executable, *own, *words]


def golden(options: Namespace, words: list[str]) -> list[str] | str:
    """Every function of csrc/ptx/ on the card: golden vectors for the execution layer."""
    if options.device != "cuda":
        return "golden vectors come from a GPU"
    folder = options.out.resolve() / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    return [sys.executable, "-m", "emulator.conformance.produce", str(folder)]


def tests(on_gpu: Sequence[str], on_cpu: Sequence[str]) -> Command:
    """pytest, which goes on where it was stopped."""

    def command(options: Namespace, words: list[str]) -> list[str]:
        chosen = ["-m", "gpu", *on_gpu] if options.device == "cuda" else on_cpu
        return [sys.executable, *_PYTEST, *words, "--item-seconds", str(_TEST_S), *chosen]

    return command


def sanitized(options: Namespace, words: list[str]) -> list[str] | str:
    """A few tiles of each kind under compute-sanitizer, which makes them a hundred times slower."""
    tool = words[words.index("--stage") + 1]
    found = shutil.which("compute-sanitizer")
    if found is None or options.device != "cuda":
        return "no compute-sanitizer on the PATH, or no GPU"
    # torch asks CUDA for what a device may lack, and takes the error for an answer.
    under = [found, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    own = ["--item-seconds", str(_SANITIZED_S), "--no-check-timeout", "-m", "gpu"]
    own += ["-k", "sanitized and kernel-", "tests/kernels/test_cuda_kernels.py"]
    return [*under, sys.executable, *_PYTEST, *words, *own]


# First whether the kernels are right, then how fast they are. Three calls of nine minutes do all.
STAGES = (
    Stage("golden", 45, golden, _CHECKED),
    Stage("checks", 45, measured),
    Stage("kernels", 210, tests(_KERNELS, ["tests/kernels/test_replays.py"]), _CHECKED),
    Stage("memcheck", 60, sanitized, _CHECKED),
    *(
        Stage(tool, 60, sanitized, _CHECKED, quick=False)
        for tool in ("racecheck", "synccheck", "initcheck")
    ),
    Stage("ceilings", 10, measured),
    Stage("headline", 100, measured),
    Stage("profile", 45, measured),
    Stage("adapters", 75, measured),
    Stage("quantized", 30, measured),
    Stage("mixtures", 90, measured),
    Stage("tuning", 60, measured, quick=False),
    Stage(
        "tests",
        300,
        tests(
            ["tests/op/test_many_adapters.py", "tests", *(f"--ignore={path}" for path in _KERNELS)],
            ["tests/kernels/test_decode_shares.py"],
        ),
        _CHECKED,
        quick=False,
    ),
    Stage("wide", 60, measured, quick=False),
)
DEVICE = Stage("device", 0, measured, ())
