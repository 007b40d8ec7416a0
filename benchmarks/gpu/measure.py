"""Stages that measure: ceilings, cells, and the routes' table for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from lora_ext import tune

from .. import model, runner
from ..__main__ import with_progress
from ..shapes import BACKWARD, FORWARD, Cell
from ..timing import Plan
from . import cells
from .run import Run
from .stages import Result, missing, result_of

_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=1.2, batch_ms=4.0, max_inner=20, warmup_ms=20.0)
_QUICK_PLAN = replace(_PLAN, min_rounds=3, max_rounds=5, seconds=0.4)
_QUICK_CELLS = 14
_TUNED_SHARE = 0.5  # of the time left


def ceilings(run: Run) -> Result:
    """The library's half product at 4096 x 4096 x 4096, in TFLOP/s, and a copy, in GB/s."""
    size, elements = (4096, 2**28) if run.device == "cuda" else (256, 2**20)
    half = {"device": run.device, "dtype": torch.bfloat16}
    a, b = torch.randn(size, size, **half), torch.randn(size, size, **half)
    source, target = (torch.empty(elements, **half) for _ in range(2))
    product_s = _median_seconds(lambda: torch.mm(a, b), run.device)
    copy_s = _median_seconds(lambda: target.copy_(source), run.device)
    tflops, gb_s = 2 * size**3 / product_s / 1e12, 2 * 2 * elements / copy_s / 1e9
    summary = f"{tflops:.1f} TFLOP/s, {gb_s:.0f} GB/s"
    return result_of("done", summary, tflops=tflops, dram_gb_s=gb_s)


def _median_seconds(function: Callable[[], object], device: str) -> float:
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


def _measure(run: Run, chosen: list[Cell]) -> Result:
    """Measures the cells that the document does not have; partial until it has them all."""
    start = time.monotonic()
    if run.device == "cpu":
        chosen = cells.on_cpu(chosen)
    if run.quick:
        chosen = chosen[:_QUICK_CELLS]
    document = run.document
    done = {result["cell"]["id"] for result in document["cells"]}
    todo = [cell for cell in chosen if cell.id not in done]
    plan = _QUICK_PLAN if run.quick else _PLAN
    document["skipped"] = []
    runner.run(todo, document, run.path, plan, None, max(0.0, run.left), with_progress)
    predict(run)
    measured = {result["cell"]["id"] for result in document["cells"]}
    missed = [cell.id for cell in chosen if cell.id not in measured]
    document["skipped"] = missed
    status = "partial" if missed or run.quick else "done"
    summary = f"{len(chosen) - len(missed)} of {len(chosen)} cells"
    return result_of(status, summary, round(time.monotonic() - start, 1))


def headline(run: Run) -> Result:
    """The cells that matter most."""
    return _measure(run, cells.headline_cells())


def wide(run: Run) -> Result:
    """The other projections, rows and ranks."""
    return _measure(run, cells.wide_cells())


def predict(run: Run) -> None:
    """Puts predicted and measured times side by side into document["predictions"].

    Measured is a graph's replay, which has no host in it, as the prediction has none; without one,
    a call.
    """
    document = run.document
    machine = model.machine_named(document["machine"]["gpu"] or "")
    document["predictions"] = []
    if machine is None:
        return
    found = run.stages.get("ceilings", {})
    if found.get("status") == "done":
        machine = model.calibrated(machine, found["tflops"], found["dram_gb_s"])
    for result in document["cells"]:
        cell = runner.cell_of(result)
        for variant, timing in (result.get("timing", {}) | result.get("graph", {})).items():
            predicted = model.predicted_us(machine, cell, variant)
            if predicted is None:
                continue
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


def tuning(run: Run) -> Result:
    """`lora_ext.tune` for the headline's layers; the table is the one that the package ships."""
    if run.device != "cuda":
        return missing("routes are timed on a GPU")
    start = time.monotonic()
    shapes = {
        tune.Shape(
            cell.rows, cell.in_features, cell.out_features, cell.rank, wide, cell.dropout_p > 0
        )
        for cell in cells.headline_cells()
        for wide in (False, True)
        if cell.mode in (FORWARD, BACKWARD) and cell.group != "call"
    }
    path = tune.table_path(run.out / "tuning")
    until = start + _TUNED_SHARE * run.left
    table = tune.tune(sorted(shapes), path=path, until=until)
    timed = {entry.shape for entry in table.entries}
    won = [entry for entry in table.entries if entry.route != "library"]
    status = "done" if shapes <= timed else "partial"
    summary = f"{len(timed & shapes)} of {len(shapes)} shapes; {len(won)} of {len(table.entries)}"
    summary += " entries are not the library's"
    return result_of(status, summary, round(time.monotonic() - start, 1))
