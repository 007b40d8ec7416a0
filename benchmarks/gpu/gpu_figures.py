"""Pictures of a GPU run: roofline, ratios, memory, predictions. Titles say card, date, versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import figures as shared
from ..figures import COLOURS, Figure, plt
from ..results import Document, Row, peak_ratio, ratio
from ..shapes import BACKWARD, FORWARD, STEP
from ..variants import LABELS, floor_of

_BARS = ("ours", "ours_kernel", "ours_fp32", "unsloth", "triton_pair", "peft", "peft_default")
_BYTES = 2


def _key(result: Row) -> str:
    """Replays where there are some: they have no host in them."""
    return "graph" if result.get("graph") else "timing"


def _ok(document: Document, *modes: str) -> list[Row]:
    found = [r for r in document["cells"] if r["status"] == "ok" and r["cell"]["mode"] in modes]
    return [r for r in found if r["cell"]["group"] != "call"]


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


def _title(axes: Any, document: Document, text: str) -> None:
    machine = document["machine"]
    mark = "GPU" if machine["device"] == "cuda" else "CPU, a trial of the code"
    versions = f"torch {machine['versions']['torch']}, {machine['date'][:10]}"
    where = machine["gpu"] or machine["cpu"]
    shared.finish(axes, f"{mark}: {text}\n{where}, {versions}")


def _roofline(document: Document) -> Figure | None:
    results = _ok(document, FORWARD, BACKWARD, STEP)
    ceilings = document.get("stages", {}).get("ceilings", {})
    if not results or "tflops" not in ceilings:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities = []
    for name in ("merged", "frozen", "ours", "ours_kernel", "ours_fp32", "peft_default"):
        points = []
        for result in results:
            timing = result[_key(result)]
            if name in timing:
                flop, moved = _work(result["cell"])
                points.append((flop / moved, flop / timing[name]["ms"] / 1e9))
        if points:
            intensities += [x for x, _ in points]
            axes.scatter(*zip(*points, strict=True), s=22, c=COLOURS[name], label=LABELS[name])
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    steps = [low * (high / low) ** (i / 99) for i in range(100)]
    roof = [min(ceilings["tflops"], ceilings["dram_gb_s"] * x / 1e3) for x in steps]
    axes.plot(steps, roof, color="black", linewidth=1.2, label="measured ceilings")
    xlabel = "operations for each byte of the base product's operands and result"
    _logarithmic(axes, xlabel, "TFLOP/s of the base product")
    _title(axes, document, "roofline of the base products, LoRA's own work not counted")
    return figure


def _bars(
    axes: Any, labels: Sequence[str], lengths: dict[str, list[float | None]], unit: str
) -> None:
    shared.grouped_bars(axes, labels, lengths, LABELS, numbers=False)
    axes.tick_params(axis="x", rotation=35)
    plt.setp(axes.get_xticklabels(), ha="right")
    axes.set_ylabel(unit)


def _times(cells: Sequence[Row]) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for name in _BARS:
        ratios = [ratio(r, name, floor_of(r["cell"]["mode"]), _key(r)) for r in cells]
        found[name] = [None if one is None else one.median for one in ratios]
    return found


def _ratios(document: Document) -> Figure | None:
    most = max((r["cell"]["rows"] for r in _ok(document, FORWARD, BACKWARD)), default=0)
    panels = []
    for mode in (FORWARD, BACKWARD):
        chosen = [r for r in _ok(document, mode) if r["cell"]["group"] == "model"]
        chosen = [r for r in chosen if (r["cell"]["rows"], r["cell"]["rank"]) == (most, 16)]
        if chosen:
            panels.append((mode, chosen))
    if not panels:
        return None
    figure, grid = plt.subplots(len(panels), 1, figsize=(11, 4.6 * len(panels)), squeeze=False)
    for axes, (mode, chosen) in zip(grid[:, 0], panels, strict=True):
        labels = [r["cell"]["layer"] for r in chosen]
        _bars(axes, labels, _times(chosen), f"time / {floor_of(mode)}")
        dropout = chosen[0]["cell"]["dropout_p"]
        what = f"{mode}, M = {most}, r = 16, dropout {dropout:g}"
        _title(axes, document, f"{what}: time over that of the {floor_of(mode)} layer")
    shared.legend_beside(grid[0, 0])
    figure.tight_layout()
    return figure


def _memory(document: Document) -> Figure | None:
    chosen = [r for r in _ok(document, STEP) if "frozen" in r.get("memory", {})]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(11, 4.6))
    cells = [r["cell"] for r in chosen]
    places = [c["layer"] or f"{c['in_features']}x{c['out_features']}" for c in cells]
    labels = [f"{one} M={c['rows']}" for one, c in zip(places, cells, strict=True)]
    peaks = {name: [peak_ratio(r, name, "frozen") for r in chosen] for name in _BARS}
    _bars(axes, labels, peaks, "peak bytes / frozen")
    shared.legend_beside(axes)
    _title(axes, document, "peak memory of a training step over the frozen layer's")
    return figure


def _predictions(document: Document) -> Figure | None:
    entries = document.get("predictions", [])
    if not entries:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 6))
    for name in ("merged", "frozen", *_BARS):
        mine = [e for e in entries if e["variant"] == name]
        if mine:
            x, y = ([e[key] for e in mine] for key in ("predicted_us", "measured_us"))
            axes.scatter(x, y, s=18, c=COLOURS[name], label=LABELS[name])
    values = [e[key] for e in entries for key in ("predicted_us", "measured_us")]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="black", linewidth=1.0)
    axes.fill_between(
        ends, [e / 1.25 for e in ends], [e * 1.25 for e in ends], color="#dddddd", zorder=0
    )
    _logarithmic(axes, "predicted, us (benchmarks/cost_model/)", "measured, us")
    _title(axes, document, "predicted and measured; grey: within 25 %")
    return figure


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    return {
        "roofline.png": _roofline(document),
        "ratios.png": _ratios(document),
        "memory.png": _memory(document),
        "predictions.png": _predictions(document),
    }
