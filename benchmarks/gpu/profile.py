"""Where the time goes in the calls that are furthest from their predictions.

Their kernels by torch's profiler, beside the launches that the planner predicts.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import runner
from ..calls import call_of
from ..memory import silent_stderr
from ..problem import make_problem
from ..shapes import FORWARD, Cell
from ..variants import BUILDERS, OURS, Unavailable
from . import predicted
from .rows import Row, Rows

_WORST = 3


def furthest(entries: list[Row], gpu: str) -> list[tuple[Cell, str]]:
    """The calls of ours with the largest measured by predicted time; else the slowest of ours."""
    by_id = {entry["cell"]["id"]: runner.cell_of(entry) for entry in entries}
    mine = [
        (each["measured_us"] / each["predicted_us"], each["cell"], each["variant"])
        for each in predicted.predictions(entries, gpu)
        if each["variant"] in OURS
    ]
    mine = mine or [
        (entry["timing"]["ours"]["ms"], entry["cell"]["id"], "ours")
        for entry in entries
        if "ours" in entry.get("timing", {})
    ]
    mine = [(by_id[cell], variant) for _, cell, variant in sorted(mine, reverse=True)]
    return [(cell, variant) for cell, variant in mine if cell.group != "call"][:_WORST]


def items(options: Namespace) -> dict[str, Any]:
    """Of the cells that have been measured: a cell and a variant."""
    entries = []
    for stage in ("headline", "wide"):
        found = Rows(options.rows, stage, options.sources).found().values()
        entries += [row["entry"] for row in found if "entry" in row]
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    chosen = furthest(entries, gpu)
    if not chosen:
        raise Unavailable("no call of ours has been measured")
    return {f"{variant}, {cell.id}": (cell, variant) for cell, variant in chosen}


def measure(item: tuple[Cell, str], options: Namespace) -> Row:
    """Kernels of one call, and the launches predicted."""
    cell, variant = item
    card = predicted.card_named(torch.cuda.get_device_name()) if cell.device == "cuda" else None
    found: Row = {"cell": cell.id, "variant": variant, "kernels": kernels_of(cell, variant)}
    return found | {"predicted": predicted.launches_of(card, cell, variant)}


def kernels_of(cell: Cell, variant: str) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on the device, in order; on the CPU torch's operators."""
    problem, on_gpu = make_problem(cell), cell.device == "cuda"
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.set_grad_enabled(cell.mode != FORWARD):
        call = call_of(BUILDERS[variant](problem, cell.dropout_p), problem, cell.mode)
        for _ in range(3):
            call()
        if on_gpu:
            torch.cuda.synchronize()
        profiler = profile(activities=[kind])
        with silent_stderr(), profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize()
    device = torch.profiler.DeviceType.CUDA if on_gpu else torch.profiler.DeviceType.CPU
    events = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == device]
    events.sort(key=lambda e: e.start_ns())
    return [(e.name(), e.duration_ns() / 1e3) for e in events if e.duration_ns() > 0]
