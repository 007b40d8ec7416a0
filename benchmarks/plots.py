"""PNG plots of a run, one for each question; every title says which kind of device.

Cells in which other processes disturbed too many samples are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter

from .results import Document, Result, in_order, is_disturbed, ratio, worst_ratio
from .shapes import DROPOUT, FORWARD, SHORT, STEP
from .variants import LABELS, floor_of

# Ours are filled and in one family of colours, peers are hollow.
_STYLE: dict[str, dict[str, Any]] = {
    "ours": {"color": "#c1272d", "marker": "o"},
    "ours_packed": {"color": "#f28e2b", "marker": "D"},
    "ours_fp32": {"color": "#8c1d40", "marker": "s"},
    "ours_kernel": {"color": "#e0651f", "marker": "X"},
    "ours_library": {"color": "#d99a9b", "marker": "v"},
    "ours_fp32_kernel": {"color": "#b5541c", "marker": "P"},
    "peft": {"color": "#1f6fb4", "marker": "o"},
    "peft_default": {"color": "#1f6fb4", "marker": "s"},
    "naive": {"color": "#555555", "marker": "^"},
    "loralib": {"color": "#2a9d5c", "marker": "v"},
    "unsloth": {"color": "#7b52ab", "marker": "P"},
    "compiled": {"color": "#00a3a3", "marker": "X"},
}
_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 20, 40, 80)
_MOST_LINES = 60  # of a dot plot; a longer one is cut to the main rank


def _title(axes: Any, text: str, mark: str) -> None:
    axes.set_title(f"{mark}: {text}", loc="left", fontsize=11, fontweight="bold", pad=10)


def _save(figure: Any, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return name


def _chosen(document: Document, mode: str) -> list[Result]:
    results = [r for r in document["cells"] if r["cell"]["mode"] == mode and r["status"] == "ok"]
    results = [r for r in results if r["cell"]["group"] != "call" and not is_disturbed(r)]
    if len(results) > _MOST_LINES:
        results = [r for r in results if r["cell"]["rank"] == 16]
    return in_order(results)


def _dots(
    results: Sequence[Result],
    value: Callable[[Result, str], float | None],
    title: str,
    axis: str,
    mark: str,
) -> Any:
    """One line for each cell, one dot for each variant, 1 is the floor."""
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.27 * len(results)))
    lines = len(results)
    largest, smallest = 1.2, 1.0
    for name, style in _STYLE.items():
        points = [(v, lines - 1 - i) for i, r in enumerate(results) if (v := value(r, name))]
        if not points:
            continue
        largest = max(largest, *(x for x, _ in points))
        smallest = min(smallest, *(x for x, _ in points))
        filled = style["color"] if name.startswith("ours") else "white"
        axes.scatter(
            *zip(*points, strict=True),
            label=LABELS[name],
            s=42 if name.startswith("ours") else 34,
            facecolor=filled,
            edgecolor=style["color"],
            linewidth=1.3,
            marker=style["marker"],
            zorder=4 if name.startswith("ours") else 3,
        )
    axes.axvline(1.0, color="black", linewidth=1.2, zorder=2)
    axes.set_xscale("log")
    axes.set_xticks([t for t in _TICKS if smallest / 1.08 <= t <= largest * 1.08])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.minorticks_off()
    axes.set_xlim(smallest / 1.08, largest * 1.08)
    names = [r["cell"]["id"].replace(f" {r['cell']['mode']} ", " ", 1) for r in results]
    axes.set_yticks(range(lines), reversed(names), fontsize=8)
    axes.set_ylim(-0.7, lines - 0.3)
    axes.grid(axis="both", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(axis)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    _title(axes, title, mark)
    return figure


def _latency(document: Document, mode: str, mark: str) -> Any | None:
    results = _chosen(document, mode)
    if not results:
        return None
    floor = floor_of(mode)

    def value(result: Result, name: str) -> float | None:
        found = ratio(result, name, floor)
        return found.median if found else None

    what = "a forward" if mode == FORWARD else "a training step (forward and backward)"
    return _dots(results, value, f"time of {what}", f"x {floor} (log scale; less is better)", mark)


def _memory(document: Document, mark: str) -> Any | None:
    results = [r for r in _chosen(document, STEP) if "frozen" in r.get("memory", {})]
    if not results:
        return None

    def value(result: Result, name: str) -> float | None:
        found = result["memory"]
        return found[name]["peak"] / found["frozen"]["peak"] if name in found else None

    axis = "x frozen (log scale; less is better)"
    return _dots(results, value, "peak memory of a training step", axis, mark)


def _grid(document: Document, mark: str) -> Any | None:
    """Ours by the faster PEFT over rows and ranks, one panel for each dtype, width and mode."""
    cells = [r for r in document["cells"] if r["cell"]["group"] == "grid" and r["status"] == "ok"]
    cells = [r for r in cells if not is_disturbed(r)]
    cells = [r for r in cells if r["cell"]["in_features"] == r["cell"]["out_features"]]
    ranks = sorted({r["cell"]["rank"] for r in cells})
    if len(ranks) < 2:
        return None
    rows = sorted({r["cell"]["rows"] for r in cells})
    measured = {(r["cell"]["mode"], r["cell"]["dropout_p"]) for r in cells}
    columns = [c for c in ((FORWARD, 0.0), (STEP, 0.0), (STEP, DROPOUT)) if c in measured]
    panels = sorted({(r["cell"]["dtype"], r["cell"]["in_features"]) for r in cells}, reverse=True)
    values = {}
    for result in cells:
        found = worst_ratio(result, "ours", ("peft", "peft_default"))
        cell = result["cell"]
        if found:
            key = (cell["dtype"], cell["in_features"], cell["mode"], cell["dropout_p"])
            values[(*key, cell["rank"], cell["rows"])] = found.median
    figure, grid = plt.subplots(
        len(panels),
        len(columns),
        figsize=(1 + 3.4 * len(columns), 2.1 * len(panels)),
        squeeze=False,
        sharex=True,
    )
    norm = TwoSlopeNorm(1.0, vmin=0.4, vmax=1.2)
    for line, (dtype, width) in zip(grid, panels, strict=True):
        for axes, (mode, p) in zip(line, columns, strict=True):
            image = [
                [values.get((dtype, width, mode, p, rank, m), float("nan")) for m in rows]
                for rank in ranks
            ]
            axes.imshow(image, cmap="RdYlGn_r", norm=norm, aspect="auto")
            for i, numbers in enumerate(image):
                for j, number in enumerate(numbers):
                    if number == number:
                        axes.text(j, i, f"{number:.2f}", ha="center", va="center", fontsize=9)
            axes.set_xticks(range(len(rows)), [f"M={m}" for m in rows])
            axes.set_yticks(range(len(ranks)), [f"r={rank}" for rank in ranks])
            dropout = f", dropout {p:g}" if p else ""
            axes.set_title(f"{SHORT[dtype]}, K=N={width}, {mode}{dropout}", fontsize=9)
            axes.tick_params(length=0)
    title = f"{mark}: time of ours by the faster PEFT (below 1: ours is faster; blank: disturbed)"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    return figure


def draw(document: Document, folder: Path, mark: str) -> list[str]:
    """Write the plots that the document has data for; returns their file names.

    mark: CPU or GPU, for the titles
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "forward.png": _latency(document, FORWARD, mark),
        "step.png": _latency(document, STEP, mark),
        "memory.png": _memory(document, mark),
        "grid.png": _grid(document, mark),
    }
    return [_save(figure, folder, name) for name, figure in figures.items() if figure is not None]
