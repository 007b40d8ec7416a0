"""`make gpu`: golden vectors, tests, sanitizers and cells on a GPU, within minutes, resumable.

    python -m benchmarks.gpu [--quick] [--device cpu] [--out FOLDER] [--budget SECONDS]

A second run with the same folder goes on where the first stopped: what has a result is not done
again. With --device cpu every stage runs its part that needs no GPU, to try the code.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import model, results, runner
from ..__main__ import finish, with_progress
from ..machine import describe
from ..shapes import gpu_cells
from ..timing import Plan
from .stages import run_stages

_PLAN = Plan(min_rounds=7, max_rounds=15, seconds=1.5)
_BUDGET_S = 540.0
_QUICK_CELLS = 12
_SAME = ("name", "device", "versions")  # of the machine, for results to belong together


def missing_device(device: str) -> str:
    """Why the device cannot be used; empty if it can."""
    if device != "cuda" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return "torch finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def resumed(path: Path, fresh: results.Document) -> results.Document:
    """The document at `path` if it is this machine's, else a fresh one; another is kept aside."""
    if not path.exists():
        return fresh
    try:
        found = results.read(path)
    except (OSError, ValueError) as error:
        print(f"{path} is not read ({error}); it is kept as {path.name}.old", file=sys.stderr)
        path.replace(path.with_name(path.name + ".old"))
        return fresh
    if any(found["machine"].get(key) != fresh["machine"][key] for key in _SAME):
        print(f"{path} is another machine's; it is kept as {path.name}.old", file=sys.stderr)
        path.replace(path.with_name(path.name + ".old"))
        return fresh
    done = len(found["cells"]) + len(found.get("stages", {}))
    print(f"resuming: {done} results are there", flush=True)
    found["skipped"] = []
    return found


def predict(document: results.Document) -> None:
    """Puts predicted and measured times side by side into document["predictions"]."""
    machine = model.machine_named(document["machine"]["gpu"] or "")
    document["predictions"] = []
    if machine is None:
        return
    ceilings = document.get("stages", {}).get("ceilings", {})
    if ceilings.get("status") == "done":
        machine = model.calibrated(machine, ceilings["tflops"], ceilings["dram_gb_s"])
    for result in document["cells"]:
        cell = runner.cell_of(result)
        for variant, timing in result.get("timing", {}).items():
            predicted = model.predicted_us(machine, cell, variant)
            if predicted is not None:
                launches = model.launches_of(machine, cell, variant)
                document["predictions"].append(
                    {
                        "cell": cell.id,
                        "variant": variant,
                        "predicted_us": predicted,
                        "measured_us": 1e3 * timing["ms"],
                        "longest": model.limiting(launches, machine),
                    }
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 without a device, 1 if a stage failed or ours is wrong anywhere, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"))
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--quick", action="store_true", help="what matters most, in 8 minutes")
    parser.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for all of it")
    parser.add_argument("--no-stages", action="store_true", help="measure cells only")
    options = parser.parse_args(arguments)
    reason = missing_device(options.device)
    if reason:
        print(f"python -m benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    end = time.monotonic() + options.budget

    def left() -> float:
        return end - time.monotonic()

    path = options.out / "results.json"
    document = resumed(path, results.new_document("gpu", describe(options.device, options.machine)))
    if options.device == "cuda" and document["machine"]["lora_ext"].get("cuda") is not True:
        why = document["machine"]["lora_ext"].get("cuda_reason", "")
        print(f"lora_ext is built without CUDA kernels: {why}", file=sys.stderr)

    def write() -> None:
        results.write(document, path)

    if not options.no_stages:
        run_stages(document, options.device, left, write, options.quick)
    done = {result["cell"]["id"] for result in document["cells"]}
    cells = [cell for cell in gpu_cells(options.device) if cell.id not in done]
    plan = _PLAN
    if options.quick:
        cells = cells[: max(0, _QUICK_CELLS - len(done))]
        plan = replace(_PLAN, min_rounds=3, max_rounds=7, seconds=0.5)
    runner.run(cells, document, path, plan, budget_s=max(0.0, left()), progress=with_progress)
    predict(document)
    status = finish(document, path, with_plots=True)
    failed = [n for n, r in document.get("stages", {}).items() if r["status"] == "failed"]
    for name in failed:
        print(f"FAILED: {name}: {document['stages'][name]['summary']}", file=sys.stderr)
    return 1 if failed else status


if __name__ == "__main__":
    sys.exit(main())
