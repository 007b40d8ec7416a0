"""Bars of steps of whole models."""

from __future__ import annotations

from ..figures import Figure, finish, grouped_bars, plt
from ..results import Document, median_ratio, peak_ratio
from .models_report import LABELS

# In the order of the picture.
_BARS = ("ours", "ours_fp32", "peft_accelerated", "peft_default_accelerated")
_BARS += ("peft", "peft_default")


def figures(document: Document) -> dict[str, Figure]:
    """Bars of time and memory over frozen."""
    cases = document["cases"]
    if not cases:  # other parts of the run alone
        return {}
    panels = {
        "time of a step": {
            name: [median_ratio(case, name, "frozen") for case in cases] for name in _BARS
        },
        "peak memory of a step": {
            name: [peak_ratio(case, name, "frozen") for case in cases] for name in _BARS
        },
    }
    size = (12, 1.2 + 1.3 * len(cases))
    figure, grid = plt.subplots(1, 2, figsize=size, sharey=True)
    for axes, (title, lengths) in zip(grid, panels.items(), strict=True):
        labels = [case["id"] for case in cases]
        grouped_bars(axes, labels, lengths, LABELS)
        axes.set_xlabel("x frozen model (less is better)")
        finish(axes, f"CPU: {title}", size=11)
    grid[0].invert_yaxis()
    figure.tight_layout()
    figure.legend(
        *grid[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
    )
    return {"models.png": figure}
