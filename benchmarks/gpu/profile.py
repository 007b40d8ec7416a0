"""Where the time goes in the call that is furthest from its prediction.

    python -m benchmarks.gpu.profile CELL VARIANT

makes one call of a variant (benchmarks.variants) between cudaProfilerStart and Stop, which is what
ncu looks at; CELL is JSON, as in results.json. The stage lists the kernels of the worst calls by
torch's profiler, beside the launches that the planner predicts, and asks ncu, where it works, how
busy the tensor pipes were and how many bytes DRAM moved.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import runner
from ..calls import call_of
from ..memory import silent_stderr
from ..problem import make_problem
from ..shapes import FORWARD, Cell
from ..variants import BUILDERS, OURS
from . import child, predicted
from .children import Item, each
from .run import Run
from .stages import Result, missing, result_of, run_command

_WORST = 3
_PROFILE_S = 45.0
_NCU_SECONDS = 120.0
_NCU_LINES = 10_000
_METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "DRAM bytes read",
    "dram__bytes_write.sum": "DRAM bytes written",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor pipes busy, %",
}


def furthest(run: Run) -> list[tuple[Cell, str]]:
    """The calls of ours with the largest measured by predicted time; else the slowest of ours."""
    by_id = {r["cell"]["id"]: runner.cell_of(r) for r in run.document["cells"]}
    mine = [e for e in run.document.get("predictions", []) if e["variant"] in OURS]
    mine = [e for e in mine if by_id[e["cell"]].group != "call"]
    if mine:
        mine.sort(key=lambda e: e["measured_us"] / e["predicted_us"], reverse=True)
        return [(by_id[e["cell"]], e["variant"]) for e in mine[:_WORST]]
    times = [
        (result["timing"]["ours"]["ms"], result["cell"]["id"])
        for result in run.document["cells"]
        if "ours" in result.get("timing", {})
    ]
    return [(by_id[name], "ours") for _, name in sorted(times, reverse=True)[:_WORST]]


def prepared(cell: Cell, variant: str) -> Callable[[], object]:
    """One call, warmed up."""
    problem = make_problem(cell)
    call = call_of(BUILDERS[variant](problem, cell.dropout_p), problem, cell.mode)
    for _ in range(3):
        call()
    if cell.device == "cuda":
        torch.cuda.synchronize()
    return call


def kernels_of(cell: Cell, variant: str) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on the device, in order; on the CPU torch's operators."""
    with torch.set_grad_enabled(cell.mode != FORWARD):
        call = prepared(cell, variant)
        on_gpu = cell.device == "cuda"
        kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        profiler = profile(activities=[kind])
        with silent_stderr(), profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize()
    device = torch.profiler.DeviceType.CUDA if on_gpu else torch.profiler.DeviceType.CPU
    events = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == device]
    events.sort(key=lambda e: e.start_ns())
    return [(e.name(), e.duration_ns() / 1e3) for e in events if e.duration_ns() > 0]


def counters(text: str) -> list[dict[str, Any]]:
    """One entry for each kernel in ncu's CSV: its name, and the metrics that ncu could read."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    entries: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        entry = entries.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        label = _METRICS.get(row["Metric Name"])
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        scale = {"ns": 1e-3, "nsecond": 1e-3, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
        if label:
            entry[label] = value * scale.get(row["Metric Unit"], 1.0)
    return list(entries.values())


def _with_ncu(
    run: Run, cell: Cell, variant: str, seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """What ncu counted, or nothing and the reason."""
    found = shutil.which("ncu")
    if found is None or run.device != "cuda":
        return [], "no ncu on the PATH"
    command = [found, "--csv", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--metrics", ",".join(_METRICS)]
    command += [child.PYTHON, "-m", "benchmarks.gpu.profile", json.dumps(cell.as_dict()), variant]
    done = run_command(run, command, seconds, kept=_NCU_LINES)
    entries = counters("\n".join(done["tail"]))
    return entries, "" if entries else f"ncu counted nothing: {done['summary']}"


def worst(run: Run, seconds: float) -> Result:
    """The calls of ours that are furthest from their predictions, kernel by kernel."""
    until = time.monotonic() + seconds
    chosen = furthest(run)
    if not chosen:
        return missing("no call of ours has been measured")
    items = [
        Item(
            f"{variant}, {cell.id}",
            {"cell": asdict(cell), "variant": variant},
            min(seconds, _PROFILE_S),
        )
        for cell, variant in chosen
    ]
    by_name = dict(zip((item.name for item in items), chosen, strict=True))
    card = predicted.card_named(run.document["machine"]["gpu"] or "")
    profiles, errors = [], []
    for item, answer in each(run, "profile", items, until):
        cell, variant = by_name[item.name]
        if answer.result is None or answer.error:
            errors.append(f"{item.name}: {answer.error}")
            continue
        profiles.append(
            {
                "cell": cell.id,
                "variant": variant,
                "kernels": answer.result["kernels"],
                "predicted": predicted.launches_of(card, cell, variant),
            }
        )
    left = until - time.monotonic()
    counted, reason = [], "no time for ncu"
    if left > 0:
        counted, reason = _with_ncu(run, *chosen[0], min(left, _NCU_SECONDS))
    summary = f"{len(profiles)} of {len(items)} calls; furthest: {items[0].name}"
    summary += f"; {reason or f'ncu read {len(counted)} kernels'}"
    if errors:
        summary += f"; failed: {errors[0]}"
    status = "failed" if errors else "done" if len(profiles) == len(items) else "partial"
    return result_of(status, summary, profiles=profiles, counters=counted)


def main(cell_text: str, variant: str) -> None:
    """One call under the profiler."""
    fields = json.loads(cell_text)
    fields.pop("id", None)
    cell = Cell(**fields)
    with torch.set_grad_enabled(cell.mode != FORWARD):
        call = prepared(cell, variant)
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main(*sys.argv[1:])
