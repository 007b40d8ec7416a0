"""Measure cells one by one: check, time, memory. A failing variant does not stop its cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import memory, results
from .agreement import disagreements, outputs
from .calls import Operands, call_of
from .problem import Problem, make_problem
from .shapes import FORWARD, STEP, Cell
from .timing import CpuMeter, Function, Meter, Plan, Timing, calibrate, interleaved
from .variants import BUILDERS, OURS, Builder, Unavailable, Variant, floor_of, names_for

_ERROR_LENGTH = 300  # characters of an error's text that are kept
_SHARES = 1.3

_REPLAYED = " replayed"

ProblemMaker = Callable[[Cell], Problem]
Announce = Callable[[str], object]


@dataclass(frozen=True)
class Means:
    """How calls are timed on a device.

    Attributes:
        meter: times a number of calls.
        capture: makes a graph of a call and returns its replay; None where there are no graphs.
        watch: reads clocks, power and temperature; None where there is nothing to read.
    """

    meter: Meter
    capture: Callable[[Callable[[], Function]], Function] | None = None
    watch: Callable[[], dict[str, Any] | None] | None = None


def means_for(device: str) -> Means:
    """The means of a device type."""
    if device != "cuda":
        return Means(CpuMeter())
    from . import card, cuda_timing

    return Means(cuda_timing.CudaMeter(), cuda_timing.captured, card.readings)


def text_of(error: BaseException) -> str:
    """Its first line, with its type unless a variant is but unavailable."""
    first = str(error).strip().split("\n", 1)[0]
    kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return f"{kind}{first}"[:_ERROR_LENGTH]


def _check(
    cell: Cell,
    problem: Problem,
    variants: Mapping[str, Variant],
    builders: Mapping[str, Builder],
    errors: dict[str, str],
    announce: Announce,
) -> dict[str, list[str]]:
    """Compare with naive, without dropout: name -> what disagrees."""
    expected = outputs(builders["naive"](problem, 0.0), problem, cell.mode)
    wrong = {}
    for name, variant in variants.items():
        if not variant.adapters or name in ("naive", "ours_no_dropout"):
            continue
        if cell.dropout_p and name == "compiled":
            continue  # without dropout it would be another program
        if name not in OURS and not cell.all_peers:
            continue
        announce(f"{name}: check")
        try:
            same = builders[name](problem, 0.0) if cell.dropout_p else variant
            found = disagreements(outputs(same, problem, cell.mode), expected)
        except Exception as error:
            errors[name] = text_of(error)
            continue
        if found:
            wrong[name] = found
    return wrong


def time_in_turn(
    mode: str,
    operands: Operands,
    variants: Mapping[str, Variant],
    means: Means,
    plan: Plan,
    result: results.Row,
    announce: Announce,
) -> None:
    """Puts the times of calls into result["timing"], and of graphs' replays into ["graph"].

    Both take turns in the same rounds. A call that cannot be captured has a note, and no replay;
    one that fails is among result["errors"]. What the means watch goes into result["card"].
    """
    before = means.watch() if means.watch else None
    functions: dict[str, Function] = {}
    timings: dict[str, Timing] = {}
    grad_mode = torch.no_grad if mode == FORWARD else nullcontext

    def prepare(key: str, function: Function) -> None:
        timings[key] = calibrate(function, means.meter, plan)
        functions[key] = function

    with grad_mode():
        for name, variant in variants.items():
            announce(f"{name}: time")
            make = partial(call_of, variant, operands, mode)
            try:
                prepare(name, make())
            except Exception as error:
                result["errors"][name] = text_of(error)
                continue
            if means.capture is None:
                continue
            if variant.no_graph:
                result["notes"][name] = f"no graph: {variant.no_graph}"
                continue
            try:
                prepare(name + _REPLAYED, means.capture(make))
            except Exception as error:
                result["notes"][name] = f"no graph: {text_of(error)}"
        announce("all in turn")
        if functions:
            interleaved(functions, timings, means.meter, plan)
    measured = {key: timing.summary() for key, timing in timings.items() if timing.samples}
    result["timing"] = {k: t for k, t in measured.items() if not k.endswith(_REPLAYED)}
    if means.capture is not None:
        replays = {k: t for k, t in measured.items() if k.endswith(_REPLAYED)}
        result["graph"] = {k.removesuffix(_REPLAYED): t for k, t in replays.items()}
    if means.watch:
        result["card"] = {"before": before, "after": means.watch()}


def peak_of_step(variant: Variant, x: Tensor, grad: Tensor, device: str) -> int:
    """Peak bytes of a forward and a backward; no gradient is left."""

    def clear() -> None:
        for leaf in (x, *variant.adapters):
            leaf.grad = None

    def step() -> None:
        with variant:
            variant.call(x).backward(grad)

    try:
        return memory.peak_bytes(step, device, clear)
    finally:
        clear()


def _memory(cell: Cell, problem: Problem, variant: Variant) -> dict[str, int]:
    """Peak bytes of a call and, where there is a backward, the bytes that are saved for it."""
    x = problem.inputs[0]

    def forward() -> Tensor:
        with variant:
            return variant.call(x)

    if cell.mode != STEP:
        with torch.no_grad():
            return {"peak": memory.peak_bytes(forward, cell.device)}
    peak = peak_of_step(variant, x, problem.grads[0], cell.device)
    known = [problem.weight, *variant.adapters]
    known += [problem.bias] if problem.bias is not None else []
    return {"peak": peak, "saved": memory.saved_bytes(forward, known)}


def cell_of(result: results.Row) -> Cell:
    """The cell of an entry."""
    return Cell(**{name: value for name, value in result["cell"].items() if name != "id"})


def share_s(effort: float, effort_left: float, left_s: float) -> float:
    """How long a cell may be timed: by its part of the effort left, and somewhat longer."""
    return _SHARES * left_s * effort / effort_left


def run_cell(
    cell: Cell,
    plan: Plan,
    make: ProblemMaker = make_problem,
    builders: Mapping[str, Builder] = BUILDERS,
    means: Means | None = None,
    announce: Announce = lambda what: None,
) -> results.Row:
    """Measure one cell. Times in ms, memory in bytes.

    announce: told what is about to run, for whoever must find out what hung

    The entry's status is "ok", "wrong" (one of ours disagrees with naive) or "error" (nothing could
    be measured).
    """
    result: results.Row = {"cell": cell.as_dict(), "status": "ok", "errors": {}, "notes": {}}
    errors = result["errors"]
    torch.manual_seed(0)
    try:
        problem = make(cell)
        variants: dict[str, Variant] = {}
        for name in names_for(cell):
            try:
                variants[name] = builders[name](problem, cell.dropout_p)
            except Exception as error:
                errors[name] = text_of(error)
        wrong = _check(cell, problem, variants, builders, errors, announce)
        variants = {name: v for name, v in variants.items() if name not in errors}
        result["disagreements"] = wrong
        result["notes"] = {name: v.note for name, v in variants.items() if v.note}
        means = means or means_for(cell.device)
        time_in_turn(cell.mode, problem, variants, means, plan, result, announce)
        result["memory"] = {}
        for name, variant in variants.items() if cell.memory else ():
            announce(f"{name}: memory")
            try:
                result["memory"][name] = _memory(cell, problem, variant)
            except Exception as error:
                errors[name] = text_of(error)
    except Exception as error:
        result["status"], result["error"] = "error", text_of(error)
        return result
    if any(name in wrong for name in OURS):
        result["status"] = "wrong"
    elif floor_of(cell.mode) not in result["timing"]:
        result["status"], result["error"] = "error", "the floor could not be measured"
    return result


def run(
    cells: Sequence[Cell],
    document: results.Document,
    path: Path,
    plan: Plan,
    makers: Mapping[str, ProblemMaker] | None = None,
    budget_s: float = float("inf"),
    progress: Callable[[Sequence[Cell]], Iterable[Cell]] = iter,
) -> None:
    """Measure the cells into the document and write it after each one.

    makers: a cell group -> how to make its tensors, where not at random
    budget_s: no cell is timed for longer than _SHARES times its part of what is left of it, by
        effort, and cells that have not begun by then are listed in document["skipped"]
    progress: passes the cells on and shows where the run is
    """
    makers = makers or {}
    start = time.monotonic()
    effort_left = sum(cell.effort for cell in cells)
    results.keep(document, path)
    for cell in progress(cells):
        left_s = budget_s - (time.monotonic() - start)
        if left_s < 0:
            document["skipped"].append(cell.id)
            continue
        limit_s = share_s(cell.effort, effort_left, left_s)
        effort_left -= cell.effort
        own = replace(plan.times(cell.effort), limit_s=limit_s)
        document["cells"].append(run_cell(cell, own, makers.get(cell.group, make_problem)))
        results.keep(document, path)
    document["seconds"] = round(time.monotonic() - start, 1)
    document["complete"] = True
    results.keep(document, path)
