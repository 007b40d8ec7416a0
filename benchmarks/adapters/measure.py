"""Measure one case: check against the loop, time in turn, memory of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import runner
from ..agreement import disagreements
from ..results import Row
from ..shapes import FORWARD, STEP
from ..timing import Plan
from ..variants import Unavailable, Variant, floor_of
from .batch import Batch, make_batch
from .cases import Case
from .variants import BUILDERS, OURS, names_for

_NO_CHECK = ("merged", "frozen", "one")
_WITH_MEMORY = ("frozen", "one", "ours", "ours_pool", "loop", "grouped")  # of a step

Tensors = dict[str, Tensor]


def _outputs(batch: Batch, way: Variant) -> dict[str, Tensor]:
    """y, and of a step the gradients of x and of all factors of each kind, stacked."""
    x, grad = batch.inputs[0], batch.grads[0]
    if batch.case.mode == FORWARD:
        with way, torch.no_grad():
            return {"out": way.call(x)}
    with way:
        y = way.call(x)
        dx, *gradients = torch.autograd.grad(y, (x, *way.adapters), grad)
    half = len(gradients) // 2
    lora_a, lora_b = (
        part[0] if len(part) == 1 and part[0].dim() == 3 else torch.stack(part)
        for part in (gradients[:half], gradients[half:])
    )
    return {"out": y, "dx": dx, "dlora_a": lora_a, "dlora_b": lora_b}


def _memory(batch: Batch, way: Variant) -> dict[str, int]:
    peak = runner.peak_of_step(way, batch.inputs[0], batch.grads[0], batch.case.device)
    return {"peak": peak, "factors": sum(leaf.nbytes for leaf in way.adapters)}


def checked(
    names: Sequence[str],
    made: Callable[[str], tuple[Variant, Tensors, Tensors]],
    row: Row,
    announce: runner.Announce,
) -> dict[str, Variant]:
    """The variants that there are; what they lack, or where they disagree, goes into the row.

    made: a variant by its name, what it computes, and what it should, where that is compared
    """
    ways = {}
    for name in names:
        announce(f"{name}: check")
        try:
            way, found, expected = made(name)
            wrong = disagreements(found, expected)
        except Unavailable as reason:
            row["notes"][name] = str(reason)
            continue
        except (ImportError, NotImplementedError, RuntimeError) as error:
            row["errors"][name] = runner.text_of(error)
            continue
        ways[name] = way
        if wrong:
            row["disagreements"][name] = wrong
    return ways


def conclude(row: Row, ours: Sequence[str], floor: str) -> Row:
    """The row with its status: "wrong" if one of ours disagrees, "error" if one of them, or the
    floor, could not be measured."""
    if any(name in row["disagreements"] for name in ours):
        row["status"] = "wrong"
    elif failed := [name for name in (floor, *ours) if name in row["errors"]]:
        row["status"], row["error"] = "error", f"{failed[0]}: {row['errors'][failed[0]]}"
    return row


def measure(case: Case, plan: Plan, announce: runner.Announce = lambda what: None) -> Row:
    """Times in ms, memory in bytes.

    announce: told what is about to run, for whoever must find out what hung

    The row's status is "ok", or as of `conclude`; what is right is the loop.
    """
    row: Row = {"case": case.as_dict(), "status": "ok"}
    row |= {"errors": {}, "notes": {}, "disagreements": {}}
    torch.manual_seed(0)
    batch = make_batch(case)
    expected = _outputs(batch, BUILDERS["loop"](batch, 0.0))

    def made(name: str) -> tuple[Variant, Tensors, Tensors]:
        way = BUILDERS[name](batch, case.dropout_p)
        if name in _NO_CHECK:
            return way, {}, {}
        same = BUILDERS[name](batch, 0.0) if case.dropout_p else way
        return way, _outputs(batch, same), expected

    ways = checked(names_for(case), made, row, announce)
    runner.time_in_turn(case.mode, batch, ways, runner.means_for(case.device), plan, row, announce)
    if case.mode == STEP and case.group in ("target", "headline"):
        row["memory"] = {n: _memory(batch, ways[n]) for n in _WITH_MEMORY if n in row["timing"]}
    return conclude(row, OURS, floor_of(case.mode))
