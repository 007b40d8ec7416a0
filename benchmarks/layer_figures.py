"""Pictures of a run over cells, one for each question; every title says which kind of device.

Cells in which other processes disturbed too many samples are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import figures as shared
from .figures import Figure, plt
from .markdown import device_of
from .results import Document, Row, is_disturbed, median_ratio, peak_ratio, times_of
from .shapes import BACKWARD, FORWARD, STEP, reading_order
from .variants import LOOKS, floor_of

_STYLES = {
    name: shared.Dot(*look, name.startswith("ours")) for name, look in LOOKS.items() if look.marker
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
        return median_ratio(row, name, floor, times_of(row))

    title = title_of(document, f"time of a {_WHAT[mode]}")
    return _dots(_chosen(document, mode), value, title, f"x {floor} {AXIS}")


def _memory(document: Document) -> Figure | None:
    cells = [r for r in _chosen(document, STEP) if "frozen" in r.get("memory", {})]
    title = title_of(document, "peak memory of a training step")
    return _dots(
        cells, lambda row, name: peak_ratio(row, name, "frozen"), title, f"x frozen {AXIS}"
    )


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    return {
        "forward.png": _latency(document, FORWARD),
        "backward.png": _latency(document, BACKWARD),
        "step.png": _latency(document, STEP),
        "memory.png": _memory(document),
    }
