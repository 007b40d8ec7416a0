"""`make gpu`: proof of what a GPU does, within minutes: golden vectors, tests, times, sanitizers.

    python -m benchmarks.gpu [--quick] [--device cpu] [--out FOLDER] [--resume FOLDER]

A second run with the same folder goes on where the first stopped: what has a result is not done
again. With --device cpu every stage runs its part that needs no GPU, to try the code.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import results
from ..__main__ import finish
from ..machine import describe
from . import checks, measure, profile
from .run import Run, bring, resumed
from .stages import Stage, run_stages

_BUDGET_S = 540.0

# In the order of what would be missed most; three calls of nine minutes do all of it.
STAGES = (
    Stage("conformance", 60, checks.conformance),
    Stage("warmup", 30, checks.warmup),
    Stage("kernels", 90, checks.kernels),
    Stage("ceilings", 10, measure.ceilings),
    Stage("tests", 240, checks.tests, quick=False),
    Stage("headline", 60, measure.headline),
    Stage("profile", 60, profile.worst),
    Stage("tuning", 60, measure.tuning, quick=False),
    *(Stage(tool, 120, checks.sanitizer(tool), quick=False) for tool in checks.SANITIZERS),
    Stage("stress", 60, checks.stress),
    Stage("wide", 60, measure.wide, quick=False),
)


def missing_device(device: str) -> str:
    """Why the device cannot be used; empty if it can."""
    if device != "cuda" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return "torch finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"


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
    """Exit status 2 without a device or kernels, 1 if a stage failed or ours is wrong, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    for name in options.only or []:
        if name not in names:
            parser.error(f"expected stages of {', '.join(names)}, but got {name}")
    reason = missing_device(options.device)
    if reason:
        print(f"python -m benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    spent = 0.0 if options.started is None else max(0.0, time.time() - options.started)
    end = time.monotonic() + options.budget - spent
    if options.resume:
        bring(options.resume, options.out)
    fresh = results.new_document("gpu", describe(options.device, options.machine))
    document = resumed(options.out / "results.json", fresh)
    if options.device == "cuda" and document["machine"]["lora_ext"].get("cuda") is not True:
        why = document["machine"]["lora_ext"].get("cuda_reason", "")
        print(
            f"python -m benchmarks.gpu: lora_ext is built without CUDA kernels ({why}), so there is"
            " nothing to measure: put a CUDA toolkit's nvcc on PATH, remove .venv/.built, then"
            " `make gpu` again",
            file=sys.stderr,
        )
        return 2
    run = Run(options.device, options.out, document, options.quick, end)
    run_stages(run, [s for s in STAGES if not options.only or s.name in options.only])
    document["complete"] = all(run.stages.get(name, {}).get("status") == "done" for name in names)
    measure.predict(run)
    status = finish(document, run.path, with_plots=True)
    failed = [name for name, result in run.stages.items() if result["status"] == "failed"]
    for name in failed:
        print(f"FAILED: {name}: {run.stages[name]['summary']}", file=sys.stderr)
    return 1 if failed else status


if __name__ == "__main__":
    sys.exit(main())
