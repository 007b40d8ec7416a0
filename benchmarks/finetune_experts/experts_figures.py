"""Curves of losses: of the training of all areas, and of each of the two tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..figures import COLOURS, Figure, finish, plt
from ..results import Document
from .models import LABELS
from .two_tasks import LABELS as LABELS_OF_TWO

_MEAN_OF = 10  # steps


def _curve(axes: Any, losses: Sequence[float], name: str, label: str) -> None:
    """Means of the last steps. PEFT's line is dashed: one below it is seen."""
    means = []
    for end in range(1, len(losses) + 1):
        last = losses[max(0, end - _MEAN_OF) : end]
        means.append(sum(last) / len(last))
    style = "--" if name == "peft" else "-"
    axes.plot(range(1, len(means) + 1), means, style, color=COLOURS[name], label=label)


def figures(document: Document) -> dict[str, Figure]:
    """One picture with a panel for each training."""
    found = document["two_tasks"]
    figure, grid = plt.subplots(1, 1 + len(found["tasks"]), figsize=(13, 3.6))
    for name, label in LABELS.items():
        _curve(grid[0], document["losses"][name], name, label)
    finish(grid[0], "CPU: all areas, one adapter", "y")
    for place, (axes, task) in enumerate(zip(grid[1:], found["tasks"], strict=True)):
        for name, label in LABELS_OF_TWO.items():
            _curve(axes, [step[place] for step in found["losses"][name]], name, label)
        finish(axes, f"CPU, two tasks: {task['name']}", "y")
    for axes in grid:
        axes.set_xlabel(f"step (mean loss of the last {_MEAN_OF})")
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return {"losses.png": figure}
