"""One picture of a run: each task's losses among the others and alone, times, memory."""

from __future__ import annotations

from typing import Any

from .. import figures as shared
from ..figures import COLOURS, Figure, plt
from ..results import Document
from .many_report import LABELS

_COLOURS = {"together": COLOURS["ours"], "in_turn": COLOURS["frozen"], "peft": COLOURS["peft"]}
_SMOOTHED = 8  # steps


def _curves(axes: Any, document: Document) -> None:
    for name, width, dashes in (("in_turn", 3.0, "-"), ("together", 1.2, "--")):
        for place in range(len(document["tasks"])):
            losses = [step[place] for step in document["losses"][name]]
            windows = [losses[max(0, i + 1 - _SMOOTHED) : i + 1] for i in range(len(losses))]
            means = [sum(window) / len(window) for window in windows]
            label = LABELS[name] if place == 0 else None
            style = {"color": _COLOURS[name], "linewidth": width, "linestyle": dashes}
            axes.plot(range(1, len(means) + 1), means, label=label, **style)
    axes.set_xlabel(f"step (running mean over {_SMOOTHED})")
    axes.set_ylabel("cross entropy of a task")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    shared.finish(axes, "losses of the eight tasks", "both")


def _bars(axes: Any, values: dict[str, float], title: str, unit: str) -> None:
    for i, (name, value) in enumerate(reversed(values.items())):
        axes.barh(i, value, color=_COLOURS[name])
        axes.text(value, i, f" {value:.0f} {unit}", va="center", fontsize=8)
    axes.set_yticks(range(len(values)), [LABELS[name] for name in reversed(values)])
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.4 * max(values.values()))
    axes.tick_params(axis="y", length=0, labelsize=8)
    shared.finish(axes, title, "x")


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    figure, grid = plt.subplots(1, 3, figsize=(15, 4))
    _curves(grid[0], document)
    times = {name: found["ms"] for name, found in document["timing"].items()}
    _bars(grid[1], times, "forward and backward of all tasks", "ms")
    peaks = {name: found["peak"] / 2**20 for name, found in document["memory"].items()}
    _bars(grid[2], peaks, "peak memory", "MiB")
    shared.heading(figure, "CPU: eight adapters of one MiniLM-L6")
    return {"finetune_many.png": figure}
