"""Curves of a mixed batch over rows for each adapter, and over adapters."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from ..figures import COLOURS, Dot, Figure, finish, heading, legend_beside, plt
from ..results import Document, Row, is_disturbed, ratio
from ..shapes import FORWARD, STEP
from ..variants import floor_of
from .variants import LABELS, OURS

# A colour of another variant's, and a marker.
_STYLES = {
    "ours": ("ours", "o"),
    "ours_offs": ("ours_fp32", "s"),
    "ours_pool": ("ours_packed", "D"),
    "ours_kernel": ("ours_library", "X"),
    "one": ("frozen", "^"),
    "peft": ("peft", "o"),
    "loop": ("peft_default", "s"),
    "loop_ours": ("loralib", "v"),
    "grouped": ("unsloth", "P"),
    "gather": ("compiled", "X"),
    "bmm": ("triton_pair", "d"),
}
STYLES = {
    name: Dot(LABELS[name], COLOURS[colour], marker, name in OURS)
    for name, (colour, marker) in _STYLES.items()
}
_TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100)
_GROUPS = {
    "rows": ("rows of each of 8 adapters, K = N = 2048", lambda case: case["rows"] / 8),
    "adapters": ("adapters of 1000 rows, K = N = 1024", lambda case: case["adapters"]),
}


def _panel(axes: Any, rows: list[Row], mode: str, where: Any, label: str) -> None:
    floor = floor_of(mode)
    for name, style in STYLES.items():
        points = [
            (where(row["case"]), found.median) for row in rows if (found := ratio(row, name, floor))
        ]
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                markersize=5 if style.is_ours else 3.5,
                linewidth=2.2 if style.is_ours else 1.2,
                linestyle="--" if name == "one" else "-",
                color=style.colour,
                label=style.label,
                zorder=4 if style.is_ours else 3,
            )
    axes.axhline(1.0, color="black", linewidth=1.0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in _TICKS if low <= t <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = sorted({where(row["case"]) for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel(f"x {floor} (log scale)", fontsize=9)
    finish(axes, f"{mode}, bf16" + (", dropout 0.05" if mode == STEP else ""), "y")


def _curves(document: Document) -> Figure | None:
    clean = [r for r in document["cases"] if r["status"] == "ok" and not is_disturbed(r)]
    if not any(row["case"]["group"] in _GROUPS for row in clean):
        return None
    figure, grid = plt.subplots(2, 2, figsize=(12, 8))
    for line, (group, (label, where)) in zip(grid, _GROUPS.items(), strict=True):
        for axes, mode in zip(line, (FORWARD, STEP), strict=True):
            rows = [r for r in clean if r["case"]["group"] == group and r["case"]["mode"] == mode]
            _panel(axes, rows, mode, where, label)
        # A forward has all of them; a step lacks those that cannot be trained.
        legend_beside(line[1], like=line[0])
    heading(figure, "CPU: time of a batch of many adapters, less is better")
    return figure


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    return {"adapters.png": _curves(document)}
