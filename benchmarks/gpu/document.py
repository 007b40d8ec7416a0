"""The results file of a run, made of its rows: what reports, targets and pictures are read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .. import results
from ..results import Document
from . import gpu_targets, predicted
from .rows import RED, TO_DO, Row

# The document's part -> the stages whose entries it has.
_PARTS = {
    "cells": ("headline", "wide"),
    "adapters": ("adapters",),
    "quantized": ("quantized",),
    "mixtures": ("mixtures",),
}
_LONGEST = 400  # characters of a summary

Found = Mapping[str, Mapping[str, Row]]  # stage -> name -> the last row


def document_of(machine: dict[str, Any], found: Found) -> Document:
    """Of all that stands for the sources at hand."""
    document = results.new_document("gpu", machine)
    document["stages"] = {name: stage_of(rows) for name, rows in found.items() if "" in rows}
    document["complete"] = all(
        name in document["stages"] and document["stages"][name]["status"] != "partial"
        for name in found
    )
    for part, stages in _PARTS.items():
        rows = [row for stage in stages for row in found.get(stage, {}).values()]
        document[part] = [row["entry"] for row in rows if "entry" in row]
    document["failed"] = [
        {key: row.get(key, "") for key in ("stage", "name", "status", "error", "tail")}
        for rows in found.values()
        for row in rows.values()
        if row["status"] in RED and row["name"]
    ]
    document["profiles"] = [row for row in found.get("profile", {}).values() if "kernels" in row]
    document["predictions"] = predicted.predictions(document["cells"], machine["gpu"] or "")
    document["targets"] = gpu_targets.evaluate(document)
    return document


def stage_of(found: Mapping[str, Row]) -> dict[str, Any]:
    """Failed, too, if an item is red, or if of all items none is right."""
    own, status = found[""], found[""]["status"]
    items = [row["status"] for name, row in found.items() if name]
    is_empty = status == "done" and own.get("total") is not None and "ok" not in items
    if is_empty or any(each in RED for each in items):
        status = "failed"
    return {"status": status, "summary": summary(found), "seconds": own.get("seconds", 0.0)}


def summary(found: Mapping[str, Row]) -> str:
    """How many items came to what, the first that is red, and what was said last."""
    own = found[""]
    items = {name: row for name, row in found.items() if name and row["status"] not in TO_DO}
    counts = Counter(row["status"] for row in items.values())
    said = [f"{count} {status}" for status, count in counts.items()]
    if own.get("total") is not None:
        said.append(f"of {own['total']}")
    red = [f"{n}: {row.get('error', '')}" for n, row in items.items() if row["status"] in RED]
    last = [row["said"] for row in items.values() if "said" in row][-1:]
    texts = [" ".join(said), *(red[:1] or last)]
    texts += [own["summary"]] if own["status"] != "done" or own.get("total") is None else []
    return "; ".join(text for text in texts if text)[:_LONGEST]
