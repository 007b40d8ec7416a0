"""Pictures of a run of `make gpu`: those of any run over cells, roofline, predictions, adapters."""

from __future__ import annotations

from typing import Any

from .. import figures as shared
from .. import layer_figures
from ..adapters.adapters_figures import STYLES
from ..figures import Figure, plt
from ..layer_figures import AXIS, title_of
from ..results import Document, is_disturbed, median_ratio, times_of
from ..shapes import FORWARD, STEP
from ..variants import LOOKS, floor_of
from .cases import reading_order
from .mixtures import mixture_of

_FLOORS = ("merged", "frozen")
_BYTES = 2


def _work(cell: dict[str, Any]) -> tuple[float, float]:
    """Floating-point operations and bytes of the base products alone: what a floor cannot avoid."""
    m, n, k = cell["rows"], cell["out_features"], cell["in_features"]
    products = 2 if cell["mode"] == STEP else 1
    return products * 2.0 * m * n * k, products * _BYTES * (m * n + m * k + n * k)


def _logarithmic(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8)


def _roofline(document: Document) -> Figure | None:
    cells = [r for r in document["cells"] if r["status"] == "ok" and r["cell"]["group"] != "call"]
    rows = [(_work(row["cell"]), row) for row in cells]
    rows += [
        (mixture_of(row).work(), row)
        for row in document.get("mixtures", [])
        if row["status"] == "ok"
    ]
    ceilings = document.get("stages", {}).get("ceilings", {})
    if not rows or "tflops" not in ceilings:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities = []
    for name in (*_FLOORS, "ours", "ours_kernel", "ours_fp32", "peft_default"):
        points = []
        for (flop, moved), row in rows:
            timing = row[times_of(row)]
            if name in timing:
                points.append((flop / moved, flop / timing[name]["ms"] / 1e9))
        if points:
            intensities += [x for x, _ in points]
            look = LOOKS[name]
            axes.scatter(*zip(*points, strict=True), s=22, c=look.colour, label=look.label)
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    steps = [low * (high / low) ** (i / 99) for i in range(100)]
    roof = [min(ceilings["tflops"], ceilings["dram_gb_s"] * x / 1e3) for x in steps]
    axes.plot(steps, roof, color="black", linewidth=1.2, label="measured ceilings")
    xlabel = "operations for each byte of the base product's operands and result"
    _logarithmic(axes, xlabel, "TFLOP/s of the base product")
    text = "roofline of the base products, LoRA's own work not counted"
    shared.finish(axes, title_of(document, text))
    return figure


def _predictions(document: Document) -> Figure | None:
    entries = document.get("predictions", [])
    if not entries:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 6))
    for name, look in LOOKS.items():
        mine = [e for e in entries if e["variant"] == name]
        if mine:
            x, y = ([e[key] for e in mine] for key in ("predicted_us", "measured_us"))
            axes.scatter(x, y, s=18, c=look.colour, label=look.label)
    values = [e[key] for e in entries for key in ("predicted_us", "measured_us")]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="black", linewidth=1.0)
    axes.fill_between(
        ends, [e / 1.25 for e in ends], [e * 1.25 for e in ends], color="#dddddd", zorder=0
    )
    _logarithmic(axes, "predicted by the planner, us", "measured, us")
    shared.finish(axes, title_of(document, "predicted and measured; grey: within 25 %"))
    return figure


def _adapters(document: Document) -> Figure | None:
    """A panel for forwards and one for steps, as high as they have cases."""
    clean = [r for r in document.get("adapters", []) if r["status"] == "ok" and not is_disturbed(r)]
    clean.sort(key=reading_order)
    panels = {m: [r for r in clean if r["case"]["mode"] == m] for m in (FORWARD, STEP)}
    panels = {mode: rows for mode, rows in panels.items() if rows}
    if not panels:
        return None
    heights = [0.4 + 0.27 * len(rows) for rows in panels.values()]
    figure, grid = plt.subplots(
        len(panels),
        squeeze=False,
        figsize=(10, max(3.6, 1.0 + sum(heights) + 0.8 * len(panels))),
        gridspec_kw={"height_ratios": heights},
    )
    for (mode, rows), axes in zip(panels.items(), grid[:, 0], strict=True):
        floor = floor_of(mode)
        values = {
            name: [median_ratio(row, name, floor, times_of(row)) for row in rows] for name in STYLES
        }
        names = [row["case"]["id"].removeprefix(f"{mode} ") for row in rows]
        shared.dots(axes, names, values, STYLES)
        axes.set_xlabel(f"x {floor} {AXIS}")
        shared.finish(axes, mode, "both")
    shared.legend_beside(grid[0, 0], 9)  # a forward has all of them
    shared.heading(figure, title_of(document, "many adapters in one batch"))
    return figure


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    return {
        **layer_figures.figures(document),
        "roofline.png": _roofline(document),
        "predictions.png": _predictions(document),
        "adapters.png": _adapters(document),
    }
