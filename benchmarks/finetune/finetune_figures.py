"""One picture of a run: losses, their deviation, accuracy, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import figures as shared
from ..figures import COLOURS, Figure, plt
from ..results import Document, peak_ratio, ratio
from .claims import MOST_DEVIATION
from .trained_models import LABELS

_MAJORITY = "majority class"
_SMOOTHED = 9  # steps


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the steps before, so that the noise of single batches is out of the way."""
    windows = (values[max(0, i + 1 - _SMOOTHED) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _colour(name: str) -> str:
    return "#bbbbbb" if name == _MAJORITY else COLOURS[name.removesuffix("_dropout")]


def _losses(axes: Any, document: Document, suffix: str, title: str) -> None:
    for name, width, dashes in ((f"peft{suffix}", 3.2, "-"), (f"ours{suffix}", 1.4, "--")):
        losses = document["losses"][name]
        pale = 0.45 if name.startswith("peft") else 1.0
        style = {"color": _colour(name), "linewidth": width, "linestyle": dashes, "alpha": pale}
        axes.plot(range(1, len(losses) + 1), _smooth(losses), label=LABELS[name], **style)
    frozen = _smooth(document["losses"]["frozen"])
    style = {"color": COLOURS["frozen"], "linewidth": 1.0}
    axes.plot(range(1, len(frozen) + 1), frozen, label=LABELS["frozen"], **style)
    axes.set_xlabel(f"step (running mean over {_SMOOTHED})")
    axes.set_ylabel("cross entropy")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    shared.finish(axes, title, "both")


def _deviation(axes: Any, document: Document) -> None:
    pairs = zip(document["losses"]["ours"], document["losses"]["peft"], strict=True)
    found = [max(abs(a - b) / abs(b), 1e-9) for a, b in pairs]
    axes.semilogy(range(1, len(found) + 1), found, color=COLOURS["ours"], linewidth=1.0)
    axes.axhline(MOST_DEVIATION, color="black", linewidth=1.0)
    axes.text(1, MOST_DEVIATION * 1.3, f"limit {MOST_DEVIATION:g}", fontsize=8)
    axes.set_ylim(1e-9, MOST_DEVIATION * 10)
    axes.set_xlabel("step (equal losses are drawn at the bottom)")
    shared.finish(axes, "|loss - PEFT's| / PEFT's, no dropout", "both")


def _bars(axes: Any, bars: Sequence[tuple[str, float, str]], title: str, unit: str) -> None:
    """bars: (name, value, text beside the bar)."""
    bars = list(reversed(bars))
    for i, (name, value, shown) in enumerate(bars):
        color = _colour(name)
        filled = "white" if name.startswith("peft") else color
        axes.barh(i, value, color=filled, edgecolor=color, linewidth=1.3)
        axes.text(value, i, f" {shown}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [LABELS.get(n, n) for n, _, _ in bars])
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.45 * max(value for _, value, _ in bars))
    axes.tick_params(axis="y", length=0, labelsize=8)
    shared.finish(axes, title, "x")


def _times(document: Document) -> list[tuple[str, float, str]]:
    bars = []
    for name, timing in document["timing"].items():
        found = ratio(document, name, "frozen")
        times = f" ({found.median:.2f} x)" if found else ""
        bars.append((name, timing["ms"], f"{timing['ms']:.0f} ms{times}"))
    return bars


def _memories(document: Document) -> list[tuple[str, float, str]]:
    bars = []
    for name, found in document["memory"].items():
        mib = found["peak"] / 2**20
        times = peak_ratio(document, name, "frozen")
        bars.append((name, mib, f"{mib:.0f} MiB ({times:.2f} x)"))
    return bars


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 7.5))
    _losses(grid[0][0], document, "", "loss without dropout")
    _deviation(grid[0][1], document)
    _losses(grid[0][2], document, "_dropout", "loss with dropout")
    accuracies = {_MAJORITY: document["data"]["majority"], **document["accuracy"]}
    bars = [(name, 100 * value, f"{100 * value:.1f}%") for name, value in accuracies.items()]
    _bars(grid[1][0], bars, "accuracy on held-out texts", "%")
    _bars(grid[1][1], _times(document), "forward and backward of a step", "ms")
    _bars(grid[1][2], _memories(document), "peak memory of a step", "MiB")
    title = "CPU: MiniLM-L6 learns which area of the standard library a sentence describes"
    shared.heading(figure, title)
    return {"finetune.png": figure}
