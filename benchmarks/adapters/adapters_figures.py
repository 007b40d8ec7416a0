"""adapters.png: time of a batch by the number of its adapters."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from ..figures import Dot, Figure, finish, plt
from ..results import Document, Row, is_disturbed, median_ratio
from ..shapes import FORWARD, STEP
from ..variants import LOOKS as COLOURS
from ..variants import floor_of
from .variants import LOOKS, OURS

STYLES = {
    name: Dot(label, COLOURS[colour].colour, marker, name in OURS)
    for name, (label, colour, marker) in LOOKS.items()
    if marker
}
# Of Okabe and Ito's colours, which the colour-blind tell apart; markers differ, too.
_LINES = {
    "peft": Dot("PEFT, adapter_names (not timed above 64)", "#009E73", "s", False),
    "loop": Dot("loop: one adapter after the other", "#0072B2", "v", False),
    "ours": Dot("lora_ext", "#E69F00", "o", True),
}
_FLOORS = {FORWARD: "merged: one adapter for all", STEP: "no adapter at all"}


def _panel(axes: Any, rows: list[Row], mode: str) -> None:
    """Milliseconds on log scales, and how many times as fast as the loop ours are.

    A point is the floor's median times the median of ratios to it, as in the report: ratios of
    interleaved calls hold where times of a shared machine do not.
    """
    floor = floor_of(mode)

    def ms(row: Row, name: str) -> float:
        return row["timing"][floor]["ms"] * (median_ratio(row, name, floor) or 1.0)

    styles = {**_LINES, floor: Dot(_FLOORS[mode], "#555555", "^", False)}
    for name, style in styles.items():
        timed = [row for row in rows if name in row["timing"]]
        if not timed:
            continue
        axes.plot(
            [row["case"]["adapters"] for row in timed],
            [ms(row, name) for row in timed],
            style.marker + ("--" if name == floor else "-"),
            color=style.colour,
            linewidth=3 if style.is_ours else 1.8,
            label=style.label,
        )
    for row in rows:
        faster, at = median_ratio(row, "loop", "ours"), row["case"]["adapters"]
        if faster is not None and at > 1:
            said = f"{faster:.{1 if faster < 10 else 0}f}x"
            point = at, ms(row, "ours")
            axes.annotate(said, point, (0, 8), textcoords="offset points", ha="center", size=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    finish(axes, f"{'Forward' if mode == FORWARD else 'Forward and backward'}, ms", "y", 11)


def _curves(document: Document) -> Figure | None:
    rows = [
        row
        for row in document["cases"]
        if row["case"]["group"] == "adapters" and row["status"] == "ok" and not is_disturbed(row)
    ]
    if not rows:
        return None
    figure, panels = plt.subplots(2, 1, figsize=(6.5, 8.5))
    for axes, mode in zip(panels, (FORWARD, STEP), strict=True):
        _panel(axes, [row for row in rows if row["case"]["mode"] == mode], mode)
    panels[1].set_xlabel("adapters in the batch", fontsize=10)
    figure.tight_layout()
    case = rows[0]["case"]
    said = (
        f"{document['machine']['name']}; a linear layer of {case['width']:,} x {case['width']:,}, "
        f"{case['dtype']},\n{case['rows']:,} tokens, adapters of rank {case['rank']}, dropout "
        f"{max(row['case']['dropout_p'] for row in rows)} with backward.\n"
        "Numbers: how many times as fast as the loop. Both scales are logarithmic."
    )
    figure.text(0.01, -0.01, said, fontsize=9, ha="left", va="top")
    return figure


def figures(document: Document) -> dict[str, Figure | None]:
    """File name -> figure."""
    return {"adapters.png": _curves(document)}
