"""What is said of `make gpu`: what any run over cells has, and stages, predictions, other layers,
kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import layer_report
from ..adapters import adapters_report
from ..markdown import milliseconds, quotient, table, table_of
from ..results import Document, Row
from ..shapes import FORWARD, STEP
from ..variants import LABELS
from . import quantized
from .cases import reading_order

_LISTED = 14  # kernels of a call, the longest of them
_ON_A_GPU = """\
The kernel route takes our own base product, where the planner may take the library's. With few rows
a pool has 64 slots, as many used as there are rows. PEFT has a name for each sample, which is the
rows of an adapter; "mixed" are tokens."""
_EXPERTS = """\
Layers without routers; each token's experts are drawn. frozen: transformers' own by grouped
products, without adapters; with weights in NF4 all experts are dequantised, once a direction. ours
and PEFT have factors in the dtype of x, "ours fp32" and "PEFT default" in float32. Outputs and
gradients of each are compared with float64 before; what disagrees is not timed."""
_NF4 = """\
A step of a layer on a weight in NF4, over one on the same weight dense; a "forward" is the weight
dequantised alone, over a copy of the dense one. bitsandbytes and PEFT: dequantised by bitsandbytes
in each direction. Every bit of ours is compared with bitsandbytes', or its formula's, before."""


def text(document: Document, images: Sequence[str]) -> str:
    """The whole report."""
    before = [
        ("Stages", stages(document.get("stages", {}))),
        ("Failed and wrong", failures(document.get("failed", []))),
        ("Predicted and measured", predictions(document.get("predictions", []))),
    ]
    after = [
        *many(document.get("adapters", [])),
        *quantized_weights(document.get("quantized", [])),
        *experts(document.get("mixtures", [])),
        ("Furthest from their predictions", profiles(document.get("profiles", []))),
        ("Clocks and power", clocks(document)),
    ]
    return layer_report.text(document, images, before, after)


def stages(results: dict[str, dict[str, Any]]) -> str:
    """What each stage of a GPU run said."""
    rows = [
        [name, result["status"], f"{result['seconds']:.0f} s", result["summary"].replace("|", "/")]
        for name, result in results.items()
    ]
    return table(["stage", "status", "took", "summary"], rows, left=(0, 1, 3))


def failures(rows: Sequence[Row]) -> str:
    """Each item that is red, and what its process said last."""
    return "\n".join(
        "\n".join(
            [
                f"- {row['stage']}, {row['name']}: {row['status']}: {row['error']}",
                *(f"      {line}" for line in row["tail"]),
            ]
        )
        for row in rows
    )


def many(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(heading, body) of batches of many adapters."""
    if not rows:
        return []
    bodies = []
    for mode in (FORWARD, STEP):
        mine = sorted(adapters_report.rows_of(rows, mode=mode), key=reading_order)
        heading = f"Many adapters, {mode}"
        bodies.append((f"{heading}, graph replays", adapters_report.times(mine, mode, "graph")))
        bodies.append((heading, adapters_report.times(mine, mode)))
    bodies.append(("Many adapters, peak memory", adapters_report.memory(rows)))
    bodies.append(("Many adapters, left out and wrong", adapters_report.left_out(rows)))
    return [*bodies, ("Many adapters, what is compared", f"{adapters_report.WAYS}\n\n{_ON_A_GPU}")]


def over_floor(
    rows: Sequence[Row], what: str, floor: str, labels: Mapping[str, str], right: str
) -> list[tuple[str, str]]:
    """(heading, body) of forwards and steps whose floor is the same way."""
    bodies = []
    for mode in (FORWARD, STEP):
        mine = adapters_report.rows_of(rows, mode=mode)
        for key, how in {"graph": ", graph replays", "timing": ""}.items():
            body = adapters_report.times(mine, mode, key, floor, labels)
            bodies.append((f"{what}, {mode}{how}", body))
    left = adapters_report.left_out(rows, labels, right)
    return [*bodies, (f"{what}, left out and wrong", left)]


def quantized_weights(rows: Sequence[Row]) -> list[tuple[str, str]]:
    if not rows:
        return []
    bodies = over_floor(rows, "NF4", quantized.FLOOR, quantized.LABELS, "the dense weight")
    return [*bodies, ("NF4, what is compared", _NF4)]


def experts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(heading, body) of layers of experts."""
    if not rows:
        return []
    bodies = over_floor(rows, "Experts", "frozen", LABELS, "float64")
    return [*bodies, ("Experts, what is compared", _EXPERTS)]


def predictions(entries: Sequence[dict[str, Any]]) -> str:
    """The planner's times beside the measured ones, the worst first."""

    def off(entry: dict[str, Any]) -> float:
        return entry["measured_us"] / entry["predicted_us"]

    columns = [
        ("cell", lambda entry: entry["cell"]),
        ("variant", lambda entry: LABELS.get(entry["variant"], entry["variant"])),
        ("predicted", lambda entry: milliseconds(entry["predicted_us"] / 1e3)),
        ("measured", lambda entry: milliseconds(entry["measured_us"] / 1e3)),
        ("measured / predicted", lambda entry: quotient(off(entry))),
        ("longest launch", lambda entry: entry["longest"]),
    ]
    return table_of(sorted(entries, key=off, reverse=True), columns, left=(0, 1, 5))


def profiles(found: Sequence[Row]) -> str:
    """The kernels of the calls that are furthest from their predictions."""
    rows = []
    for one in found:
        call = f"{LABELS[one['variant']]}, {one['cell']}"
        predicted = ", ".join(f"{name} {us:.1f}" for name, us in one["predicted"])
        least = sorted((us for _, us in one["kernels"]), reverse=True)[:_LISTED][-1:]
        longest = [(kernel, us) for kernel, us in one["kernels"] if us >= least[0]]
        for number, (kernel, us) in enumerate(longest):
            first = number == 0
            rows.append([call if first else "", kernel[:60], f"{us:.1f}", predicted * first])
    header = ["call", "kernel", "us", "launches predicted, us"]
    return table(header, rows, left=(0, 1, 3))


def clocks(document: Document) -> str:
    """What the card said before and after the first, the middle and the last cell."""
    every = [(r["cell"]["id"], r) for r in document["cells"]]
    parts = ("adapters", "quantized", "mixtures")
    every += [(r["case"]["id"], r) for part in parts for r in document.get(part, [])]
    read = [(name, r["card"]) for name, r in every if (r.get("card") or {}).get("after")]
    rows = []
    for place in dict.fromkeys((0, len(read) // 2, len(read) - 1)) if read else ():
        for when in ("before", "after"):
            name, card = read[place]
            rows.append([name, when, *map(str, (card[when] or {}).values())])
    names = list(read[0][1]["after"]) if read else []
    return table(["cell", "read", *names], rows, left=(0, 1))
