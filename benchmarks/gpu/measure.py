"""Stages that measure, each in children: ceilings, cells, many adapters, the autotune cache."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from .. import runner
from ..shapes import BACKWARD, FORWARD, Cell
from . import cases, cells, children, predicted
from . import mixtures as layers_of_experts
from .measuring import CASES, CELLS, MIXTURES, measured
from .run import Run
from .stages import Result, missing, result_of

_QUICK_CELLS, _QUICK_CASES, _QUICK_MIXTURES = 14, 6, 4
# Three times what the slowest takes: problem, checks, graphs, memory; then torch.compile's minute.
_CELL_S, _COMPILED_S, _CASE_S, _MIXTURE_S = 60.0, 150.0, 60.0, 90.0
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


def _chosen(
    run: Run, every: list[Any], on_cpu: Callable[[list[Any]], list[Any]], most_quick: int
) -> list[Any]:
    """Those of a run: small ones without a GPU, the first ones of a quick run."""
    chosen = on_cpu(every) if run.device == "cpu" else every
    return chosen[:most_quick] if run.quick else chosen


def _cells(run: Run, chosen: list[Cell], seconds: float) -> Result:
    """Times beside what the planner predicts."""
    chosen = _chosen(run, chosen, cells.on_cpu, _QUICK_CELLS)

    def limit_s(cell: Cell) -> float:
        return _COMPILED_S if cell.compiled else _CELL_S

    result = measured(run, CELLS, chosen, seconds, limit_s)
    predict(run)
    return result


def headline(run: Run, seconds: float) -> Result:
    """The cells that matter most."""
    return _cells(run, cells.headline_cells(), seconds)


def wide(run: Run, seconds: float) -> Result:
    """The other projections, rows and ranks."""
    return _cells(run, cells.wide_cells(), seconds)


def adapters(run: Run, seconds: float) -> Result:
    """Batches of many adapters, beside one adapter and the ways of others."""
    chosen = _chosen(run, cases.many_cases(), cases.on_cpu, _QUICK_CASES)
    return measured(run, CASES, chosen, seconds, lambda case: _CASE_S)


def mixtures(run: Run, seconds: float) -> Result:
    """Layers of experts, over the frozen ones and beside the ways of others."""
    if importlib.util.find_spec("transformers") is None:
        return missing("the frozen layers are transformers'")
    of_experts = layers_of_experts
    chosen = _chosen(run, of_experts.mixtures(), of_experts.on_cpu, _QUICK_MIXTURES)
    return measured(run, MIXTURES, chosen, seconds, lambda mixture: _MIXTURE_S)


def predict(run: Run) -> None:
    """Puts predicted and measured times side by side into document["predictions"].

    Measured is a graph's replay, which has no host in it, as the prediction has none; without one,
    a call.
    """
    document = run.document
    card = predicted.card_named(document["machine"]["gpu"] or "")
    document["predictions"] = []
    for result in document["cells"]:
        cell = runner.cell_of(result)
        for variant, timing in (result.get("timing", {}) | result.get("graph", {})).items():
            launches = predicted.launches_of(card, cell, variant)
            if launches:
                document["predictions"].append(
                    {
                        "cell": cell.id,
                        "variant": variant,
                        "predicted_us": sum(us for _, us in launches),
                        "measured_us": 1e3 * timing["ms"],
                        "longest": max(launches, key=lambda launch: launch[1])[0],
                    }
                )


def tuning(run: Run, seconds: float) -> Result:
    """`lora_ext.warmup` for the headline's layers; the file is one that the package may ship."""
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
