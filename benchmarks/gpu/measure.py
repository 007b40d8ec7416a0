"""Stages that measure, each in children: ceilings, cells, and the routes' table for the planner."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from .. import cost_model, runner
from ..shapes import BACKWARD, FORWARD, Cell
from ..timing import Plan
from . import cells, children
from .run import Run
from .stages import Result, missing, result_of

_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=1.2, batch_ms=4.0, max_inner=20, warmup_ms=20.0)
_QUICK_PLAN = replace(_PLAN, min_rounds=3, max_rounds=5, seconds=0.4)
_QUICK_CELLS = 14
# Three times what the slowest takes: problem, checks, graphs, memory; then torch.compile's minute.
_CELL_S, _COMPILED_S = 60.0, 150.0
_SHAPE_S, _CEILINGS_S = 30.0, 60.0


def ceilings(run: Run, seconds: float) -> Result:
    """What the card can do at most, see ceilings.py."""
    item = children.Item("ceilings", {}, min(seconds, _CEILINGS_S))
    for _, answer in children.each(run, "ceilings", [item], time.monotonic() + seconds):
        if answer.error:
            return result_of("failed", answer.error, tail=answer.tail)
        assert answer.result is not None
        tflops, gb_s = answer.result["tflops"], answer.result["dram_gb_s"]
        summary = f"{tflops:.1f} TFLOP/s, {gb_s:.0f} GB/s"
        return result_of("done", summary, tflops=tflops, dram_gb_s=gb_s)
    return result_of("partial", "it did not begin")


def _todo(run: Run, chosen: list[Cell]) -> list[Cell]:
    """What the document lacks; last what ended in an error, which may be a hang."""
    status = {result["cell"]["id"]: result["status"] for result in run.document["cells"]}
    new = [cell for cell in chosen if cell.id not in status]
    return new + [cell for cell in chosen if status.get(cell.id) == "error"]


def _keep(run: Run, entry: dict[str, Any]) -> None:
    """Puts a cell's entry in the place of an earlier one, and writes the document."""
    found = run.document["cells"]
    name = entry["cell"]["id"]
    found[:] = [result for result in found if result["cell"]["id"] != name]
    found.append(entry)
    run.write()


def _measure(run: Run, chosen: list[Cell], seconds: float) -> Result:
    """Measures the cells that the document does not have; partial until it has them all."""
    until = run.until(seconds)
    if run.device == "cpu":
        chosen = cells.on_cpu(chosen)
    if run.quick:
        chosen = chosen[:_QUICK_CELLS]
    document = run.document
    todo = _todo(run, chosen)
    by_name = {cell.id: cell for cell in todo}
    plan = _QUICK_PLAN if run.quick else _PLAN
    effort_left = sum(cell.effort for cell in todo)

    def ready(item: children.Item) -> children.Item:
        """With the cell's share of what is left."""
        nonlocal effort_left
        cell = by_name[item.name]
        limit_s = runner.share_s(cell.effort, effort_left, until - time.monotonic())
        effort_left -= cell.effort
        own = replace(plan.times(cell.effort), limit_s=limit_s)
        return replace(item, fields={**item.fields, "plan": asdict(own)})

    items = [
        children.Item(cell.id, {"cell": asdict(cell)}, _COMPILED_S if cell.compiled else _CELL_S)
        for cell in todo
    ]
    failed = []
    for item, answer in children.each(run, "cell", items, until, ready):
        cell = by_name[item.name]
        entry = (answer.result or {}).get("entry")
        if not isinstance(entry, dict) or entry.get("cell") != cell.as_dict():
            error = answer.error or "an answer without the cell"
            entry = {"cell": cell.as_dict(), "errors": {}, "notes": {}}
            entry |= {"status": "error", "error": error, "tail": answer.tail}
        elif answer.error:  # a fault of the device, after which nothing of the cell can be trusted
            entry |= {"status": "error", "error": answer.error, "tail": answer.tail}
        if entry["status"] == "error":
            failed.append(cell.id)
        _keep(run, entry)
    predict(run)
    measured = {result["cell"]["id"] for result in document["cells"]}
    missed = [cell.id for cell in chosen if cell.id not in measured]
    document["skipped"] = missed
    summary = f"{len(chosen) - len(missed)} of {len(chosen)} cells"
    errors = [cell for cell in _todo(run, chosen) if cell.id in measured]
    if errors:
        summary += f", {len(errors)} of them errors, such as {errors[0].id}"
    status = "failed" if failed else "partial" if missed or errors or run.quick else "done"
    return result_of(status, summary)


def headline(run: Run, seconds: float) -> Result:
    """The cells that matter most."""
    return _measure(run, cells.headline_cells(), seconds)


def wide(run: Run, seconds: float) -> Result:
    """The other projections, rows and ranks."""
    return _measure(run, cells.wide_cells(), seconds)


def predict(run: Run) -> None:
    """Puts predicted and measured times side by side into document["predictions"].

    Measured is a graph's replay, which has no host in it, as the prediction has none; without one,
    a call.
    """
    document = run.document
    machine = cost_model.machine_named(document["machine"]["gpu"] or "")
    document["predictions"] = []
    if machine is None:
        return
    found = run.stages.get("ceilings", {})
    if found.get("status") == "done":
        machine = cost_model.calibrated(machine, found["tflops"], found["dram_gb_s"])
    for result in document["cells"]:
        cell = runner.cell_of(result)
        for variant, timing in (result.get("timing", {}) | result.get("graph", {})).items():
            predicted = cost_model.predicted_us(machine, cell, variant)
            if predicted is None:
                continue
            launches = cost_model.launches_of(machine, cell, variant)
            document["predictions"].append(
                {
                    "cell": cell.id,
                    "variant": variant,
                    "predicted_us": predicted,
                    "measured_us": 1e3 * timing["ms"],
                    "longest": cost_model.limiting(launches, machine),
                }
            )


def tuning(run: Run, seconds: float) -> Result:
    """`lora_ext.warmup` for the headline's layers; the table is one that the package may ship."""
    if run.device != "cuda":
        return missing("routes are timed on a GPU")
    until = time.monotonic() + seconds
    shapes = {
        (cell.rows, cell.in_features, cell.out_features, cell.rank, wide, cell.dropout_p > 0)
        for cell in cells.headline_cells()
        for wide in (False, True)
        if cell.mode in (FORWARD, BACKWARD) and cell.group != "call"
    }
    names = ("rows", "in_features", "out_features", "rank", "float_adapters", "dropout")
    known = run.document.setdefault("tuned", {})
    folder = str((run.out / "tuning").resolve())
    items = [
        children.Item(
            " ".join(map(str, shape)),
            {"folder": folder, "shape": dict(zip(names, shape, strict=True))},
            _SHAPE_S,
        )
        for shape in sorted(shapes)
    ]
    todo = [i for i in items if i.name not in known] + [i for i in items if known.get(i.name)]
    last: dict[str, Any] = {}
    for item, answer in children.each(run, "tune", todo, until):
        known[item.name] = answer.error
        last = answer.result or last
        run.write()
    done = [item for item in items if known.get(item.name) == ""]
    errors = [item.name for item in items if known.get(item.name)]
    summary = f"{len(done)} of {len(items)} shapes"
    if last:
        summary += f"; {last['not_library']} of {last['entries']} entries are not the library's"
    if errors:
        summary += f"; {len(errors)} failed, such as {errors[0]}: {known[errors[0]]}"
    status = "failed" if errors else "done" if len(done) == len(items) else "partial"
    return result_of(status, summary)
