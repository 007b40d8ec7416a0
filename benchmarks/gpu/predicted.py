"""What the planner predicts of a cell on the device, to stand beside its measured time.

Without the host, as a graph's replay. The frozen and the merged layer are one product of the
library; of other packages it says nothing.
"""

from __future__ import annotations

from typing import Any

import lora_ext
from lora_ext import _C

from .. import runner
from ..results import Row
from ..shapes import BACKWARD, FORWARD, Cell

# variant (benchmarks.variants) -> the route that the planner is asked for, and float32 adapters
_ROUTES = {
    "ours": ("auto", False),
    "ours_fp32": ("auto", True),
    "ours_kernel": ("kernel", False),
    "ours_fp32_kernel": ("kernel", True),
    "ours_library": ("library", False),
    "ours_fp32_library": ("library", True),
}


def card_named(name: str) -> _C.Card | None:
    """The planner's card that a device's name contains, "NVIDIA H100 80GB HBM3" for one."""
    cards = lora_ext.kernels.CARDS
    found = [key for key in cards if key.replace(" ", "") in name.replace(" ", "")]
    return cards[max(found, key=len)] if found else None


def launches_of(card: _C.Card | None, cell: Cell, variant: str) -> list[tuple[str, float]]:
    """(name, microseconds) of each launch of a call; [] where the planner predicts nothing."""
    if card is None or cell.dtype not in ("bfloat16", "float16"):
        return []
    backward = {FORWARD: (False,), BACKWARD: (True,)}.get(cell.mode, (False, True))
    launches: list[_C.Launch] = []
    if (variant, cell.mode) == ("merged", FORWARD):
        launches = [_product(card, cell, False)]
    elif variant == "frozen":
        launches = [_product(card, cell, direction) for direction in backward]
    elif variant in _ROUTES:
        route, wide = _ROUTES[variant]
        problem = _C.Problem(cell.rows, cell.out_features, cell.in_features, cell.rank)
        problem.float_adapters, problem.dropout = wide, cell.dropout_p > 0
        for direction in backward:
            planned = _C.plan_backward if direction else _C.plan_forward
            plan = planned(card, problem, route)
            launches += _C.predicted_launches(plan)
    times = [(launch.name, launch.us(card)) for launch in launches]
    return [(name, us) for name, us in times if us > 0]  # allocations are the host's


def _product(card: _C.Card, cell: Cell, backward: bool) -> _C.Launch:
    n, k = cell.out_features, cell.in_features
    return _C.library_product(card, cell.rows, *((k, n) if backward else (n, k)))


def predictions(entries: list[Row], gpu: str) -> list[dict[str, Any]]:
    """Predicted and measured times of cells side by side.

    Measured is a graph's replay, which has no host in it, as the prediction has none; without one,
    a call.
    """
    card, found = card_named(gpu), []
    for entry in entries:
        cell = runner.cell_of(entry)
        for variant, timing in (entry.get("timing", {}) | entry.get("graph", {})).items():
            if launches := launches_of(card, cell, variant):
                found.append(
                    {
                        "cell": cell.id,
                        "variant": variant,
                        "predicted_us": sum(us for _, us in launches),
                        "measured_us": 1e3 * timing["ms"],
                        "longest": max(launches, key=lambda launch: launch[1])[0],
                    }
                )
    return found
