"""What is to hold on a GPU: the forward of many adapters over a merged layer."""

from __future__ import annotations

from typing import Any

from ..results import Document, is_disturbed, ratio, times_of
from ..shapes import FORWARD
from ..targets import MISS, PASS, UNKNOWN
from .cases import HEADLINE_ADAPTERS, HEADLINE_ROWS, HEADLINE_WIDTH

LIMIT = 1.05
WHERE = (
    f"forward, bf16, {HEADLINE_ROWS} rows x {HEADLINE_ADAPTERS} adapters in ranges, "
    f"K=N={HEADLINE_WIDTH}, r=16"
)
_CASE = {
    "group": "headline",
    "mode": FORWARD,
    "layout": "ranges",
    "rows": HEADLINE_ROWS,
    "device": "cuda",
}


def evaluate(document: Document) -> list[dict[str, Any]]:
    """Rows as of `targets.evaluate`; a trial on a CPU has none."""
    if document["machine"]["device"] != "cuda":
        return []
    row = {"name": "many adapters, ours / merged", "where": WHERE, "limit": LIMIT, "unit": "x"}
    row |= {"measured": None, "verdict": UNKNOWN, "note": ""}
    for entry in document.get("adapters", []):
        if entry["status"] != "ok" or any(entry["case"][k] != v for k, v in _CASE.items()):
            continue
        key = times_of(entry)
        found = ratio(entry, "ours_offs", "merged", key)
        if is_disturbed(entry):
            row["note"] = "disturbed by other processes"
        elif found is not None:
            row |= {"measured": found.median, "p25": found.p25, "p75": found.p75}
            row["verdict"] = PASS if found.median <= LIMIT else MISS
            row["note"] = "replays of graphs" if key == "graph" else "calls"
    return [row]
