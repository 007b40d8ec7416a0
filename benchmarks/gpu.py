"""`python -m benchmarks.gpu`: golden vectors, the GPU tests, a first set of cells, on CUDA."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import results, runner
from .__main__ import finish, with_progress
from .machine import describe
from .shapes import gpu_cells
from .timing import Plan

_PLAN = Plan(min_rounds=7, max_rounds=15, seconds=1.5)
_BUDGET_S = 300.0
_STAGE_TIMEOUT_S = 600.0
_KEPT_LINES = 15


def run_stage(command: Sequence[str], folder: str = ".") -> dict[str, Any]:
    """Run a Python module; returns its exit status, seconds and last lines."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=Path(__file__).parent.parent / folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_STAGE_TIMEOUT_S,
        )
        status, lines = done.returncode, done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired:
        status, lines = -1, [f"stopped after {_STAGE_TIMEOUT_S:.0f} s"]
    return {
        "command": " ".join(command),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "summary": lines[-1] if lines else "",
        "tail": lines[-_KEPT_LINES:],
    }


def run_conformance() -> dict[str, Any]:
    """Execute every function of csrc/ptx/ on the GPU and keep what it returned."""
    return run_stage(["emulator.conformance.produce"], folder="tests")


def run_tests() -> dict[str, Any]:
    return run_stage(["pytest", "-m", "gpu", "-q", "-rfE"])


def missing_device(device: str) -> str:
    """Why the device cannot be used; empty if it can."""
    if device != "cuda" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return "torch finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 without a device, 1 if a test fails or ours is wrong anywhere, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"))
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    reason = missing_device(options.device)
    if reason:
        print(f"python -m benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    document = results.new_document("gpu", describe(options.device, options.machine))
    if options.device == "cuda" and document["machine"]["lora_ext"].get("cuda") is not True:
        why = document["machine"]["lora_ext"].get("cuda_reason", "")
        print(f"lora_ext is built without CUDA kernels: {why}", file=sys.stderr)
    path = options.out / "results.json"
    tests_failed = False
    if not options.no_tests:
        if options.device == "cuda":
            document["conformance"] = run_conformance()
            tests_failed = document["conformance"]["status"] != 0
            print(f"conformance: {document['conformance']['summary']}", flush=True)
        document["pytest"] = run_tests()
        tests_failed |= document["pytest"]["status"] not in (0, 5)  # 5: no test is marked so
        print(f"pytest -m gpu: {document['pytest']['summary']}", flush=True)
    cells = gpu_cells(options.device)
    runner.run(cells, document, path, _PLAN, budget_s=_BUDGET_S, progress=with_progress)
    status = finish(document, path, with_plots=True)
    return 1 if tests_failed else status


if __name__ == "__main__":
    sys.exit(main())
