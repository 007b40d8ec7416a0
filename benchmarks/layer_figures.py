"""Pictures of a run over cells, one for each question; every title says which kind of device.

Cells in which other processes disturbed too many samples are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.colors import TwoSlopeNorm

from . import figures as shared
from .figures import COLOURS, Figure, plt
from .markdown import device_of
from .results import Document, Row, is_disturbed, peak_ratio, ratio, times_of, worst_ratio
from .shapes import BACKWARD, DROPOUT, FORWARD, SHORT, STEP, reading_order
from .variants import LABELS, floor_of

_MARKERS = {
    "ours": "o",
    "ours_packed": "D",
    "ours_fp32": "s",
    "ours_kernel": "X",
    "ours_library": "v",
    "ours_fp32_kernel": "P",
    "peft": "o",
    "peft_default": "s",
    "naive": "^",
    "loralib": "v",
    "unsloth": "P",
    "triton_pair": "d",
    "compiled": "X",
}
_STYLES = {
    name: shared.Dot(LABELS[name], COLOURS[name], marker, name.startswith("ours"))
    for name, marker in _MARKERS.items()
}
_WHAT = {
    FORWARD: "forward",
    BACKWARD: "backward",
    STEP: "training step (forward and backward)",
}
AXIS = "(log scale; less is better)"
_MOST_LINES = 60  # of a dot plot; a longer one is cut to the main rank


def title_of(document: Document, text: str) -> str:
    """With the kind of device and, of `make gpu`, the card, versions and date."""
    title = f"{device_of(document)}: {text}"
    if document["kind"] != "gpu":
        return title
    machine = document["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, a trial of the code"
    return f"{title}\n{where}, torch {machine['versions']['torch']}, {machine['date'][:10]}"


def _chosen(document: Document, mode: str) -> list[Row]:
    cells = [r for r in document["cells"] if r["cell"]["mode"] == mode and r["status"] == "ok"]
    cells = [r for r in cells if r["cell"]["group"] != "call" and not is_disturbed(r)]
    if len(cells) > _MOST_LINES:
        cells = [r for r in cells if r["cell"]["rank"] == 16]
    return sorted(cells, key=reading_order)


def _dots(
    cells: Sequence[Row], value: Callable[[Row, str], float | None], title: str, axis: str
) -> Figure | None:
    """One line for each cell, one dot for each variant, 1 is the floor."""
    if not cells:
        return None
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.27 * len(cells)))
    names = [r["cell"]["id"].replace(f" {r['cell']['mode']} ", " ", 1) for r in cells]
    shared.dots(axes, names, {n: [value(r, n) for r in cells] for n in _STYLES}, _STYLES)
    axes.set_xlabel(axis)
    shared.legend_beside(axes, 9)
    shared.finish(axes, title, "both", 11)
    return figure


def _latency(document: Document, mode: str) -> Figure | None:
    floor = floor_of(mode)

    def value(row: Row, name: str) -> float | None:
        found = ratio(row, name, floor, times_of(row))
        return found.median if found else None

    title = title_of(document, f"time of a {_WHAT[mode]}")
    return _dots(_chosen(document, mode), value, title, f"x {floor} {AXIS}")


def _memory(document: Document) -> Figure | None:
    cells = [r for r in _chosen(document, STEP) if "frozen" in r.get("memory", {})]
    title = title_of(document, "peak memory of a training step")
    return _dots(
        cells, lambda row, name: peak_ratio(row, name, "frozen"), title, f"x frozen {AXIS}"
    )


def _grid(document: Document) -> Figure | None:
    """Ours by the faster PEFT over rows and ranks, one panel for each dtype, width and mode."""
    cells = [r for r in document["cells"] if r["status"] == "ok" and not is_disturbed(r)]
    cells = [r for r in cells if r["cell"]["group"] == "grid" and not r["cell"]["layer"]]
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
    title = "time of ours by the faster PEFT (below 1: ours is faster; blank: disturbed)"
    shared.heading(figure, title_of(document, title))
    return figure


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    return {
        "forward.png": _latency(document, FORWARD),
        "backward.png": _latency(document, BACKWARD),
        "step.png": _latency(document, STEP),
        "memory.png": _memory(document),
        "grid.png": _grid(document),
    }
