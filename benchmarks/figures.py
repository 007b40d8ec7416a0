"""What every picture is made of: colours, titles, bars, how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

_GRID = {"color": "#dddddd", "linewidth": 0.7}


def save(figures: Mapping[str, Figure | None], folder: Path) -> list[str]:
    """Write the figures that there are; returns their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=130, bbox_inches="tight")
            plt.close(figure)
            with Image.open(folder / name) as drawn:  # a third of the bytes, the same picture
                drawn.convert("RGB").quantize(64, dither=0).save(folder / name, optimize=True)
            written.append(name)
    return written


def finish(axes: Any, title: str, grid: str = "", size: int = 10) -> None:
    """The title, and no frame but the axes.

    grid: for which of the axes grid lines are drawn: "x", "y" or "both"
    """
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold" if size > 10 else "normal")
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, **_GRID)
        axes.set_axisbelow(True)


def heading(figure: Figure, title: str) -> None:
    """A title above all panels."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.985))


def legend_beside(axes: Any, size: int = 8, like: Any = None) -> None:
    """To the right of the axes, with what is drawn there, or on others."""
    shown = (like or axes).get_legend_handles_labels()
    axes.legend(*shown, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=size)


@dataclass(frozen=True)
class Dot:
    """How a variant is drawn in a dot plot; ours are filled, peers are hollow."""

    label: str
    colour: str
    marker: str
    is_ours: bool


_RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 20, 40, 80)
_TICK = 0.065  # of an axis' length, what a number takes


def dots(
    axes: Any,
    names: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    styles: Mapping[str, Dot],
) -> None:
    """A line for each name from the top, a dot for each variant, on a log scale; 1 is the floor.

    values: variant -> one for each name
    """
    top = len(names) - 1
    found = [1.0, 1.2]
    for variant, style in styles.items():
        points = [(v, top - i) for i, v in enumerate(values[variant]) if v]
        if not points:
            continue
        found += [x for x, _ in points]
        axes.scatter(
            *zip(*points, strict=True),
            label=style.label,
            s=42 if style.is_ours else 34,
            facecolor=style.colour if style.is_ours else "white",
            edgecolor=style.colour,
            linewidth=1.3,
            marker=style.marker,
            zorder=4 if style.is_ours else 3,
        )
    low, high = min(found) / 1.08, max(found) * 1.08
    axes.axvline(1.0, color="black", linewidth=1.2, zorder=2)
    axes.set_xscale("log")
    axes.set_xticks(_apart([t for t in _RATIOS if low <= t <= high], (high / low) ** _TICK))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(names)), reversed(names), fontsize=8)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _apart(ticks: Sequence[float], factor: float) -> list[float]:
    """Those that are so far from the one before; 1 and what comes after it first."""
    kept = [1.0]
    for tick in ticks:
        if tick >= kept[-1] * factor:
            kept.append(tick)
    for tick in reversed(ticks):
        if tick * factor <= kept[0]:
            kept.insert(0, tick)
    return kept
