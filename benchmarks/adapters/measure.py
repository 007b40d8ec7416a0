"""Measure one case: check against the loop, time in turn, memory of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..agreement import TOLERANCE, error_of
from ..results import Row
from ..shapes import FORWARD, STEP
from ..timing import Plan, compared
from ..variants import Unavailable
from .cases import Case
from .variants import BUILDERS, Batch, Way, floor_of, make_batch

_NO_CHECK = ("merged", "frozen", "one")


def _outputs(batch: Batch, way: Way) -> dict[str, Tensor]:
    """y, and of a step the gradients of x and of all factors of each kind, stacked."""
    x, grad = batch.inputs[0], batch.grads[0]
    if batch.case.mode == FORWARD:
        with torch.no_grad():
            return {"out": way.call(x)}
    y = way.call(x)
    dx, *gradients = torch.autograd.grad(y, (x, *way.leaves), grad)
    half = len(gradients) // 2
    lora_a, lora_b = (
        part[0] if len(part) == 1 and part[0].dim() == 3 else torch.stack(part)
        for part in (gradients[:half], gradients[half:])
    )
    return {"out": y, "dx": dx, "dlora_a": lora_a, "dlora_b": lora_b}


def _wrong(batch: Batch, way: Way, expected: dict[str, Tensor]) -> list[str]:
    found = []
    for name, actual in _outputs(batch, way).items():
        if actual.shape != expected[name].shape:
            found.append(f"{name} has shape {list(actual.shape)}")
            continue
        error, allowed = error_of(actual, expected[name]), TOLERANCE[batch.weight.dtype]
        if not error.within(allowed):
            found.append(f"{name}: max error {error.max:.1e}, rms error {error.rms:.1e}")
    return found


def _call_of(batch: Batch, way: Way) -> Callable[[], object]:
    pairs = batch.rotation()
    if batch.case.mode == FORWARD:
        return lambda: way.call(next(pairs)[0])

    def step() -> None:
        x, grad = next(pairs)
        for leaf in (x, *way.leaves):
            leaf.grad = None
        way.call(x).backward(grad)

    return step


def _memory(batch: Batch, way: Way) -> dict[str, int]:
    x, grad = batch.inputs[0], batch.grads[0]

    def clear() -> None:
        for leaf in (x, *way.leaves):
            leaf.grad = None

    try:
        peak = memory.peak_bytes(lambda: way.call(x).backward(grad), "cpu", clear)
    finally:
        clear()
    return {"peak": peak, "factors": sum(leaf.nbytes for leaf in way.leaves)}


def measure(case: Case, plan: Plan) -> Row:
    """Times in ms, memory in bytes. status: "ok", or "wrong" where ours disagrees with the loop."""
    row: dict[str, Any] = {"case": case.as_dict(), "status": "ok", "notes": {}, "disagreements": {}}
    torch.manual_seed(0)
    batch = make_batch(case)
    expected = _outputs(batch, BUILDERS["loop"](batch, 0.0))
    ways: dict[str, Way] = {}
    for name, build in BUILDERS.items():
        if name in ("merged", "frozen") and name != floor_of(case.mode):
            continue
        try:
            ways[name] = build(batch, case.dropout_p)
            found = [] if name in _NO_CHECK else _wrong(batch, build(batch, 0.0), expected)
        except Unavailable as reason:
            row["notes"][name] = str(reason)
            continue
        except (ImportError, NotImplementedError, RuntimeError) as error:
            ways.pop(name, None)
            row["notes"][name] = f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
            continue
        if found:
            row["disagreements"][name] = found
            if name.startswith("ours"):
                row["status"] = "wrong"
    with torch.no_grad() if case.mode == FORWARD else nullcontext():
        row["timing"] = compared({n: _call_of(batch, way) for n, way in ways.items()}, plan)
    if case.mode == STEP and case.group == "target":
        timed = ("frozen", "one", "ours", "ours_pool", "loop", "grouped")
        row["memory"] = {n: _memory(batch, ways[n]) for n in timed if n in ways}
    return row
