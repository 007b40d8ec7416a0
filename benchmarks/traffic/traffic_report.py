"""What is said and drawn of the traffic model: bytes of ours beside a floor and a naive layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import markdown
from ..results import Document

DIRECTIONS = ("forward", "backward")
VARIANTS = ("merged", "ours", "naive")
ROOM = 0.01  # of the merged product's requests

_INTRODUCTION = """\
Megabytes that kernels request of L2, and that reach DRAM under a model of an A100's L2 (40 MiB,
LRU, sectors of 32 bytes). bfloat16, bfloat16 adapters, no dropout. "merged" is our kernel without a
low-rank part; "naive" adds PEFT's passes to it, its skinny products ideal. Forward may ask for one
pass over X, backward for one over dY and one over X, and both for the adapters, beyond merged; the
column says by how much more, in percent of merged.\
"""


def _cases(document: Document) -> dict[tuple[tuple[int, ...], str], dict[str, Any]]:
    """(M, K, N, r) and direction -> variant -> row."""
    found: dict[tuple[tuple[int, ...], str], dict[str, Any]] = {}
    for row in document["rows"]:
        found.setdefault((tuple(row["shape"]), row["direction"]), {})[row["variant"]] = row
    return found


def table(document: Document) -> str:
    """Requests and DRAM bytes of each shape and direction."""
    rows = []
    for ((m, k, n, rank), direction), mine in _cases(document).items():
        over = mine["ours"]["over"]
        rows.append(
            [
                f"{m} x {k} x {n}, {rank}",
                direction,
                *(f"{mine[name]['requested'] / 1e6:.0f}" for name in VARIANTS),
                f"{100 * over:.2f} %" + ("" if over <= ROOM else " (above 1 %)"),
                *(f"{mine[name]['dram'] / 1e6:.0f}" for name in VARIANTS),
            ]
        )
    header = ["M x K x N, r", "direction", *VARIANTS, "ours beyond one pass and adapters"]
    return markdown.table([*header, "DRAM: merged", "ours", "naive"], rows, left=(0, 1))


def text(document: Document, images: Sequence[str]) -> str:
    """The report as Markdown."""
    return markdown.page(
        "Memory traffic, predicted",
        _INTRODUCTION,
        table(document),
        *markdown.pictures(images, "predicted"),
    )


def figures(document: Document) -> dict[str, Any]:
    """DRAM bytes over the merged product's."""
    from .. import figures as shared

    figure, panels = shared.plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        mine = {
            shape: rows for (shape, which), rows in _cases(document).items() if which == direction
        }
        labels = ["{} x {}\nx {}, r {}".format(*shape) for shape in mine]
        lengths = {
            name: [rows[name]["dram"] / rows["merged"]["dram"] for rows in mine.values()]
            for name in VARIANTS
        }
        shared.grouped_bars(axes, labels, lengths, dict(zip(VARIANTS, VARIANTS, strict=True)))
        shared.finish(axes, f"predicted (model of A100's L2): {direction}")
    panels[0].set_ylabel("DRAM bytes / the merged product's")
    panels[1].legend(frameon=False)
    return {"traffic.png": figure}
