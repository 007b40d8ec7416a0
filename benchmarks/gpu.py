"""`python -m benchmarks.gpu`: the GPU tests, then a first set of cells on a CUDA device."""

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
_TESTS_TIMEOUT_S = 600.0
_KEPT_LINES = 15


def run_tests() -> dict[str, Any]:
    """Run `pytest -m gpu`; returns its exit status, seconds and last lines."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TESTS_TIMEOUT_S,
        )
        status, lines = done.returncode, done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired:
        status, lines = -1, [f"stopped after {_TESTS_TIMEOUT_S:.0f} s"]
    return {
        "command": "pytest -m gpu",
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "summary": lines[-1] if lines else "",
        "tail": lines[-_KEPT_LINES:],
    }


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
        document["pytest"] = run_tests()
        tests_failed = document["pytest"]["status"] not in (0, 5)  # 5: no test is marked so
        print(f"pytest -m gpu: {document['pytest']['summary']}", flush=True)
    cells = gpu_cells(options.device)
    runner.run(cells, document, path, _PLAN, budget_s=_BUDGET_S, progress=with_progress)
    status = finish(document, path, with_plots=True)
    return 1 if tests_failed else status


if __name__ == "__main__":
    sys.exit(main())
