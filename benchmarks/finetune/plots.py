"""One picture of a run: losses, their deviation, accuracy, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
from matplotlib import pyplot as plt

from ..results import ratio
from .checks import MOST_DEVIATION, Document
from .variants import LABELS

NAME = "finetune.png"
_COLORS = {
    "majority": "#bbbbbb",
    "frozen": "#777777",
    "ours": "#c1272d",
    "peft": "#1f6fb4",
    "ours_dropout": "#c1272d",
    "peft_dropout": "#1f6fb4",
}
_SMOOTHED = 9  # steps


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the steps before, so that the noise of single batches is out of the way."""
    windows = (values[max(0, i + 1 - _SMOOTHED) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _losses(axes: Any, document: Document, suffix: str, title: str) -> None:
    for name, width, dashes in ((f"peft{suffix}", 3.2, "-"), (f"ours{suffix}", 1.4, "--")):
        losses = document["losses"][name]
        pale = 0.45 if name.startswith("peft") else 1.0
        style = {"color": _COLORS[name], "linewidth": width, "linestyle": dashes, "alpha": pale}
        axes.plot(range(1, len(losses) + 1), _smooth(losses), label=LABELS[name], **style)
    frozen = _smooth(document["losses"]["frozen"])
    style = {"color": _COLORS["frozen"], "linewidth": 1.0}
    axes.plot(range(1, len(frozen) + 1), frozen, label=LABELS["frozen"], **style)
    axes.set_xlabel(f"step (running mean over {_SMOOTHED})")
    axes.set_ylabel("cross entropy")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")


def _deviation(axes: Any, document: Document) -> None:
    pairs = zip(document["losses"]["ours"], document["losses"]["peft"], strict=True)
    found = [max(abs(a - b) / abs(b), 1e-9) for a, b in pairs]
    axes.semilogy(range(1, len(found) + 1), found, color=_COLORS["ours"], linewidth=1.0)
    axes.axhline(MOST_DEVIATION, color="black", linewidth=1.0)
    axes.text(1, MOST_DEVIATION * 1.3, f"limit {MOST_DEVIATION:g}", fontsize=8)
    axes.set_ylim(1e-9, MOST_DEVIATION * 10)
    axes.set_xlabel("step (equal losses are drawn at the bottom)")
    axes.set_title("|loss - PEFT's| / PEFT's, no dropout", fontsize=10, loc="left")


def _bars(axes: Any, bars: Sequence[tuple[str, float, str]], title: str, unit: str) -> None:
    """bars: (name, value, text beside the bar)."""
    bars = list(reversed(bars))
    for i, (name, value, shown) in enumerate(bars):
        filled = name in ("majority", "frozen") or name.startswith("ours")
        color = _COLORS[name]
        axes.barh(i, value, color=color if filled else "white", edgecolor=color, linewidth=1.3)
        axes.text(value, i, f" {shown}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [LABELS.get(n, "majority class") for n, _, _ in bars])
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.45 * max(value for _, value, _ in bars))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_title(title, fontsize=10, loc="left")


def _times(document: Document) -> list[tuple[str, float, str]]:
    bars = []
    for name, timing in document["timing"].items():
        found = ratio(document, name, "frozen")
        times = f" ({found.median:.2f} x)" if found else ""
        bars.append((name, timing["ms"], f"{timing['ms']:.0f} ms{times}"))
    return bars


def _memories(document: Document) -> list[tuple[str, float, str]]:
    floor = document["memory"]["frozen"]
    return [
        (name, peak / 2**20, f"{peak / 2**20:.0f} MiB ({peak / floor:.2f} x)")
        for name, peak in document["memory"].items()
    ]


def draw(document: Document, folder: Path) -> str:
    """Write the picture into the folder; returns its file name."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 7.5))
    _losses(grid[0][0], document, "", "loss without dropout")
    _deviation(grid[0][1], document)
    _losses(grid[0][2], document, "_dropout", "loss with dropout")
    accuracies = {"majority": document["data"]["majority"], **document["accuracy"]}
    bars = [(name, 100 * value, f"{100 * value:.1f}%") for name, value in accuracies.items()]
    _bars(grid[1][0], bars, "accuracy on held-out texts", "%")
    _bars(grid[1][1], _times(document), "forward and backward of a step", "ms")
    _bars(grid[1][2], _memories(document), "peak memory of a step", "MiB")
    for axes in grid.flat:
        lines = "both" if axes in grid[0] else "x"
        axes.grid(color="#dddddd", linewidth=0.7, axis=lines)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    title = "CPU: MiniLM-L6 learns which area of the standard library a sentence describes"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(folder / NAME, dpi=130)
    plt.close(figure)
    return NAME
