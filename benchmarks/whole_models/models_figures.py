"""Two bars a model, PEFT with its defaults and accelerated, with the gain written on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..figures import Figure, finish, plt
from ..results import Document, Row, median_ratio
from ..shapes import DROPOUT
from . import passes
from .cases import BATCH, LENGTH

_PEFT, _ACCELERATED = "peft_default", "peft_default_accelerated"
_LABELS = {_PEFT: "PEFT, default settings", _ACCELERATED: "PEFT with lora_ext.accelerate"}
# Blue and orange of Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = {_PEFT: "#0072B2", _ACCELERATED: "#E69F00"}
_TOKENS = {BATCH[model] * LENGTH[model] for model in BATCH}
_MIB = 2**20


def figures(document: Document) -> dict[str, Figure | None]:
    """models.png: time and memory of a step, passes.png: why; experts.png: time of one token."""
    steps = _steps(document)
    return {
        "models.png": steps,
        "passes.png": steps and passes.figure(),
        "experts.png": _tokens(document),
    }


def _pairs(
    axes: Any,
    rows: Sequence[Row],
    value: Callable[[Row, str], float],
    gain: Callable[[Row], str],
) -> None:
    """For each row the two bars, their values, and the gain on the second."""
    for place, name in enumerate(_LABELS):
        ends = [value(row, name) for row in rows]
        at = [number + 0.38 * place for number in range(len(rows))]
        bars = axes.barh(at, ends, 0.36, color=_COLOURS[name], label=_LABELS[name])
        said = [
            f"{end:,.0f}" + (f"   {gain(row)}" if place else "")
            for end, row in zip(ends, rows, strict=True)
        ]
        axes.bar_label(bars, said, fontsize=10, padding=3, fontweight="bold" if place else "normal")
    axes.set_yticks([i + 0.19 for i in range(len(rows))], [row["id"] for row in rows], fontsize=10)
    axes.invert_yaxis()


def _faster(row: Row) -> str:
    found = median_ratio(row, _PEFT, _ACCELERATED) or 0.0
    return f"{found:.{1 if found < 10 else 0}f}x as fast"


def _less(row: Row) -> str:
    peaks = [row["memory"][name]["peak"] for name in _LABELS]
    return f"{100 * (1 - peaks[1] / peaks[0]):.0f}% less"


def _has_both(row: Row) -> bool:
    return all(name in row.get("timing", {}) for name in _LABELS)


def _finish(figure: Figure, top: Any, document: Document, what: str) -> Figure:
    where = f"{document['machine']['name']}; {what}"
    top.legend(loc="lower left", bbox_to_anchor=(0, 1.16), frameon=False, fontsize=10)
    figure.tight_layout()
    figure.text(0.01, -0.01, where, fontsize=9, ha="left", va="top", wrap=True)
    return figure


def _steps(document: Document) -> Figure | None:
    """Of the models whose linear layers all have adapters."""
    rows = [row for row in document["cases"] if _has_both(row) and "all linear" in row["id"]]
    if not rows:  # other parts of the run alone
        return None
    rows = [row | {"id": row["id"].replace(" all linear ", "\n")} for row in rows]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.5, 2.4 + 1.5 * len(rows)))
    _pairs(upper, rows, lambda row, name: row["timing"][name]["ms"], _faster)
    _pairs(lower, rows, lambda row, name: row["memory"][name]["peak"] / _MIB, _less)
    for axes, title in ((upper, "One training step, ms"), (lower, "Its peak memory, MiB")):
        axes.margins(x=0.3)
        finish(axes, title, size=11)
    [tokens] = _TOKENS
    what = (
        f"{tokens} tokens, adapters of rank 16 on all linear layers,\n"
        f"dropout {DROPOUT}; forward and backward, no head"
    )
    return _finish(figure, upper, document, f"{what}, weights not counted in memory")


def _tokens(document: Document) -> Figure | None:
    """Of mixtures of experts: one token, on a log scale."""
    rows = [r for r in document.get("experts", ()) if _has_both(r) and r["id"].endswith("1 token")]
    if not rows:
        return None
    rows = [row | {"id": row["id"].replace(", ", "\n")} for row in rows]
    figure, axes = plt.subplots(figsize=(6.5, 1.6 + 0.9 * len(rows)))
    _pairs(axes, rows, lambda row, name: row["timing"][name]["ms"], _faster)
    axes.set_xscale("log")
    axes.set_xlim(1, 1e5)
    finish(axes, "One token through experts with adapters, ms (log scale)", size=11)
    adapters = "float32 adapters of rank 16 on attention, experts and router"
    return _finish(figure, axes, document, adapters)
