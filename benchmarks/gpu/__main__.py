"""`make gpu`: proof of what a GPU does, within minutes: golden vectors, tests, times, sanitizers.

    python -m benchmarks.gpu [--quick] [--device cpu] [--out FOLDER] [--resume FOLDER]

A second run with the same folder goes on where the first stopped: what is done for the same sources
is not done again, and what failed comes last. Every stage runs in children of its own, each with a
limit; log.txt has all that they print. With --device cpu every stage runs its part that needs no
GPU, to try the code.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import results
from ..suite import finish, wrong
from . import checks, children, gpu_targets, measure, profile
from .child import Log
from .run import CHECKING, MEASURED, Run, bring, commit, hash_of, resumed
from .stages import Stage, run_stages

_BUDGET_S = 540.0

# First whether the kernels are right, then how fast they are. Three calls of nine minutes do all of
# it. Seconds are what each is expected to take; it is stopped after three times that.
STAGES = (
    Stage("conformance", 45, checks.conformance),
    Stage("warmup", 45, checks.warmup),
    Stage("kernels", 90, checks.kernels),
    Stage("memcheck", 60, checks.sanitizer("memcheck")),
    *(Stage(tool, 60, checks.sanitizer(tool), quick=False) for tool in checks.SANITIZERS[1:]),
    Stage("ceilings", 10, measure.ceilings),
    Stage("headline", 100, measure.headline),
    Stage("profile", 45, profile.worst),
    Stage("stress", 60, checks.program("stress")),
    Stage("many", 60, checks.many, quick=False),
    Stage("experts", 40, checks.experts),
    Stage("pool", 20, checks.program("pool_stress")),
    Stage("adapters", 75, measure.adapters),
    Stage("decode", 40, checks.program("decode")),
    Stage("quantized", 30, checks.program("quantized")),
    Stage("mixtures", 90, measure.mixtures),
    Stage("tuning", 60, measure.tuning, quick=False),
    Stage("tests", 240, checks.tests, quick=False),
    Stage("wide", 60, measure.wide, quick=False),
)


def described(run: Run, name: str) -> dict[str, Any]:
    """The machine, as a child sees it: a driver that hangs must not hang the run.

    Raises:
        CannotStart: no child could say.
    """
    item = children.Item("device", {"machine": name}, children.START_S)
    for _, answer in children.each(run, "device", [item], time.monotonic() + children.START_S):
        if answer.result is None or answer.error:
            raise children.CannotStart(answer.error)
        return answer.result
    raise children.CannotStart("there was no time for it")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, as of a limit outside, ends the children and writes the report like an interrupt."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: the next call goes on from here", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"))
    parser.add_argument("--resume", type=Path, help="go on with the results in this folder")
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--quick", action="store_true", help="what matters most, in 8 minutes")
    parser.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for all of it")
    parser.add_argument(
        "--started", type=float, help="when the budget began, as `date +%%s` says; default: now"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 without a device or kernels, 1 if a stage failed or ours is wrong, else 0.

    130 after an interrupt.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    for name in options.only or []:
        if name not in names:
            parser.error(f"expected stages of {', '.join(names)}, but got {name}")
    spent = 0.0 if options.started is None else max(0.0, time.time() - options.started)
    end = time.monotonic() + options.budget - spent
    log = Log(options.out / "log.txt")
    empty = results.new_document("gpu", {})
    run = Run(options.device, options.out, empty, options.quick, end, hash_of(CHECKING), log)
    try:
        found = described(run, options.machine)
    except children.CannotStart as error:
        found = {"reason": f"no child could describe the device: {error}"}
    machine = found.get("machine", {})
    built = machine.get("lora_ext", {})
    if "reason" in found:
        print(f"python -m benchmarks.gpu: {found['reason']}", file=sys.stderr)
        return 2
    if options.device == "cuda" and built.get("cuda") is not True:
        print(
            "python -m benchmarks.gpu: lora_ext is built without CUDA kernels"
            f" ({built.get('cuda_reason', '')}), so there is nothing to measure: put a CUDA"
            " toolkit's nvcc on PATH, remove .venv/.built-cuda, then `make gpu` again",
            file=sys.stderr,
        )
        return 2
    absent = found.get("absent", [])
    if absent:
        run.say(f"not installed: {', '.join(absent)}; what needs them is left out")
    if "pytest" in absent:
        run.say("without pytest neither kernels nor sanitizers are tested: install it first")
    if options.resume:
        bring(options.resume, options.out)
    fresh = results.new_document(
        "gpu", {**machine, "sources": hash_of(MEASURED), "commit": commit()}
    )
    document = resumed(options.out / "results.json", fresh)
    run = Run(options.device, options.out, document, options.quick, end, run.checking, log)
    interrupted = True
    with _interruptible():
        run_stages(run, [s for s in STAGES if not options.only or s.name in options.only])
        interrupted = False
    document["complete"] = all(run.stages.get(name, {}).get("status") == "done" for name in names)
    measure.predict(run)
    document["targets"] = gpu_targets.evaluate(document)
    # At most 8 files: pictures are drawn from the results afterwards, by `python -m
    # benchmarks.report`, where there is a plot library.
    failed = [name for name, result in run.stages.items() if result["status"] == "failed"]
    faults = [f"FAILED: {name}: {run.stages[name]['summary']}" for name in failed]
    status = finish(document, run.path, [*wrong(document, "cell", "naive"), *faults], False)
    return 130 if interrupted else status


if __name__ == "__main__":
    sys.exit(main())
