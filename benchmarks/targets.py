"""The acceptance figures of the CPU: what must hold, what was measured, pass or miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import results
from .results import Document, Ratio, Row, is_disturbed, worst_ratio
from .shapes import (
    DROPOUT,
    FEW_ROWS,
    FORWARD,
    GRID_RANKS,
    GRID_ROWS,
    GRID_WIDTHS,
    MANY_ROWS,
    SHORT,
    STEP,
)

PASS, MISS, UNKNOWN = "pass", "miss", "not measured"

# value, lower and upper quartile; None where the cell lacks a variant
Value = tuple[float, float, float]
Measure = Callable[[Row], Value | None]


@dataclass(frozen=True)
class Target:
    """value <= limit in one kind of cell."""

    name: str
    limit: float
    measure: Measure
    where: dict[str, Any]  # fields of the cell; a tuple stands for any of its values
    unit: str = "x"
    timed: bool = True  # False: bytes, which other processes do not change
    aggregate: bool = False  # one line for all cells together, showing the worst


def _value(found: Ratio | None) -> Value | None:
    return None if found is None else (found.median, found.p25, found.p75)


def time_ratio(over: str, *unders: str) -> Measure:
    """Time of one variant by that of the fastest of others."""
    return lambda result: _value(worst_ratio(result, over, unders))


def peak_ratio(over: str, under: str) -> Measure:
    """Peak bytes of one variant by those of another."""

    def measure(row: Row) -> Value | None:
        found = results.peak_ratio(row, over, under)
        return None if found is None else (found, found, found)

    return measure


_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


def workspace_mib(name: str, adapter_dtype: str | None = None) -> Measure:
    """Peak of a step above that of frozen, less the gradients of the adapters: MiB.

    frozen's peak holds the output, the gradient of x, and what torch's own GEMM takes as scratch.
    """

    def measure(result: Row) -> Value | None:
        found = result.get("memory", {})
        if name not in found or "frozen" not in found:
            return None
        cell = result["cell"]
        element = _ELEMENT[adapter_dtype or cell["dtype"]]
        gradients = cell["rank"] * (cell["out_features"] + cell["in_features"]) * element
        return ((found[name]["peak"] - found["frozen"]["peak"] - gradients) / 2**20,) * 3

    return measure


def _single(
    mode: str, dtype: str, width: int, rows: int, dropout_p: float = 0.0, out: int = 0
) -> dict[str, Any]:
    size = {"in_features": width, "out_features": out or width, "rows": rows, "rank": 16}
    return {"mode": mode, "dtype": dtype, "dropout_p": dropout_p, "group": "grid", **size}


def _targets() -> list[Target]:
    found = []
    for dtype in ("float32", "bfloat16"):
        for rows in (512, 2048):
            where = _single(FORWARD, dtype, 4096, rows)
            found.append(Target("ours / merged", 1.04, time_ratio("ours", "merged"), where))
    packed = time_ratio("ours_packed", "merged")
    for dtype, rows, limit in (
        ("float32", 16, 0.55),
        ("float32", 512, 0.75),
        ("float32", 2048, 0.85),
        ("bfloat16", 2048, 1.0),
    ):
        where = _single(FORWARD, dtype, 4096, rows)
        found.append(Target("ours packed / merged", limit, packed, where))
    for width, same, fp32 in ((4096, 1.06, 1.10), (1024, 1.12, 1.20)):
        where = _single(STEP, "bfloat16", width, 2048, DROPOUT)
        found.append(Target("ours / frozen", same, time_ratio("ours", "frozen"), where))
        name = "ours fp32 adapters / frozen"
        found.append(Target(name, fp32, time_ratio("ours_fp32", "frozen"), where))
    for mode in (FORWARD, STEP):
        where = _single(mode, "bfloat16", 1024, 2048, DROPOUT)
        measure = time_ratio("ours", "ours_no_dropout")
        found.append(Target("ours with dropout / without", 1.05, measure, where))
    for width in (4096, 1024):
        where = _single(STEP, "bfloat16", width, 2048, DROPOUT)
        for ours, adapter in (("ours", None), ("ours_fp32", "float32")):
            label = "ours" if adapter is None else "ours fp32 adapters"
            name = f"peak memory, {label} / frozen"
            found.append(Target(name, 1.05, peak_ratio(ours, "frozen"), where, timed=False))
            name = f"workspace, {label}"
            found.append(
                Target(name, 4.0, workspace_mib(ours, adapter), where, unit=" MiB", timed=False)
            )
    for mode in (FORWARD, STEP):
        where = {"group": "call", "mode": mode}
        found.append(Target("a call, ours / PEFT", 0.7, time_ratio("ours", "peft"), where))
    for mode in (FORWARD, STEP):
        for dtype in ("float32", "bfloat16"):
            where = {"mode": mode, "dtype": dtype, "group": "grid", "rows": GRID_ROWS}
            where |= {"in_features": GRID_WIDTHS, "rank": GRID_RANKS, "dropout_p": (0.0, DROPOUT)}
            pairs = [("ours / PEFT", time_ratio("ours", "peft"))]
            if dtype == "bfloat16":
                pairs = [
                    ("ours / faster PEFT", time_ratio("ours", "peft", "peft_default")),
                    ("ours / PEFT default", time_ratio("ours", "peft_default")),
                    ("ours fp32 adapters / PEFT default", time_ratio("ours_fp32", "peft_default")),
                ]
            for name, measure in pairs:
                found.append(Target(name, 1.0, measure, where, aggregate=True))
    return found


def _few_rows() -> list[Target]:
    """Of decoding; the last three were set on a processor where packing pays, an EPYC."""
    found = []
    of = {"mode": FORWARD, "group": "grid", "dropout_p": 0.0}
    merged, packed = time_ratio("ours", "merged"), time_ratio("ours_packed", "merged")
    peft = time_ratio("ours", "peft", "peft_default")
    for dtype in ("float32", "bfloat16"):
        where = of | {"dtype": dtype, "rows": FEW_ROWS, "rank": GRID_RANKS}
        anywhere, wide = where | {"in_features": GRID_WIDTHS}, where | {"in_features": 4096}
        found.append(Target("ours / faster PEFT", 1.03, peft, anywhere, aggregate=True))
        found.append(Target("ours / merged", 1.10, merged, wide, aggregate=True))
    for dtype, rows, limit in (
        ("float32", FEW_ROWS[:1], 0.5),
        ("float32", FEW_ROWS[1:], 0.35),
        ("bfloat16", FEW_ROWS, 0.65),
    ):
        where = of | {"dtype": dtype, "rows": rows, "in_features": 4096, "rank": (8, 16)}
        found.append(Target("ours packed / merged", limit, packed, where, aggregate=True))
    return found


def _many_rows(has_amx: bool) -> list[Target]:
    found = []
    for (rows, width, out), limits in MANY_ROWS.items():
        forward, step = limits[0 if has_amx else 1]
        where = _single(FORWARD, "bfloat16", width, rows, 0.0, out)
        found.append(Target("ours / merged", forward, time_ratio("ours", "merged"), where))
        where = _single(STEP, "bfloat16", width, rows, DROPOUT, out)
        found.append(Target("ours / frozen", step, time_ratio("ours", "frozen"), where))
    return found


TARGETS = _targets()


def _targets_of(document: Document) -> list[Target]:
    if document["kind"] == "few-rows":
        return _few_rows()
    if document["kind"] == "many-rows":
        return _many_rows(document["machine"]["lora_ext"].get("cpu_isa") == "amx")
    return TARGETS


def _matches(cell: dict[str, Any], where: dict[str, Any]) -> bool:
    for key, wanted in where.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if cell[key] not in allowed:
            return False
    return True


def _describe(where: dict[str, Any]) -> str:
    if where["group"] == "call":
        return f"{where['mode']}, 2x8, K=N=8, r=2"
    short = SHORT[where["dtype"]]
    if isinstance(rows := where["rows"], tuple) and set(rows) <= set(FEW_ROWS):
        width, ranks = where["in_features"], where["rank"]
        size = "" if isinstance(width, tuple) else f", K=N={width}"
        sizes = f"M={rows[0]}..{rows[-1]}, r={ranks[0]}..{ranks[-1]}"
        return f"{where['mode']}, {short}{size}, {sizes}"
    if isinstance(where["rows"], tuple):
        return f"{where['mode']}, {short}, the grid"
    dropout = f", dropout {where['dropout_p']:g}" if where["dropout_p"] else ""
    width, out = where["in_features"], where["out_features"]
    wide = f"K=N={width}" if width == out else f"K={width}, N={out}"
    size = f"{wide}, M={where['rows']}, r={where['rank']}"
    return f"{where['mode']}, {short}, {size}{dropout}"


def _row(target: Target, cells: Sequence[Row]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": target.name,
        "where": _describe(target.where),
        "limit": target.limit,
        "unit": target.unit,
        "measured": None,
        "verdict": UNKNOWN,
        "note": "",
    }
    notes = []
    quiet = [r for r in cells if not (target.timed and is_disturbed(r))]
    if len(quiet) < len(cells):
        notes.append(f"{len(cells) - len(quiet)} disturbed by other processes")
    found = [(r, figure) for r in quiet if (figure := target.measure(r)) is not None]
    if found:
        worst, (value, p25, p75) = max(found, key=lambda entry: entry[1][0])
        row |= {"measured": value, "p25": p25, "p75": p75}
        row["verdict"] = PASS if value <= target.limit else MISS
        if target.aggregate:
            missed = sum(figure[0] > target.limit for _, figure in found)
            notes.insert(0, f"{missed} of {len(found)} cells miss; worst: {worst['cell']['id']}")
    row["note"] = "; ".join(notes)
    return row


def evaluate(document: Document) -> list[dict[str, Any]]:
    """One row for each target: limit, measured value with quartiles, verdict.

    Cells that are wrong, failed or were disturbed count as not measured; a target whose cells the
    run does not have is "not measured", too.
    """
    return [
        _row(
            target,
            [
                result
                for result in document["cells"]
                if result["status"] == "ok" and _matches(result["cell"], target.where)
            ],
        )
        for target in _targets_of(document)
    ]
