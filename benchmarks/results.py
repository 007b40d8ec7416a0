"""The JSON document of a run: written after each cell, read by targets, report and plots."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "lora_ext.benchmarks"
SCHEMA_VERSION = 1
_LEAST_PAIRS = 3

Document = dict[str, Any]
Result = dict[str, Any]  # one cell's entry


def new_document(kind: str, machine: dict[str, Any]) -> Document:
    """An empty document. kind: headline | full | gpu."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "complete": False,
        "machine": machine,
        "cells": [],
        "skipped": [],
        "targets": [],
    }


def write(document: Document, path: Path) -> None:
    """Replace the file in one step: a reader or an interrupt never sees half a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def keep(document: Document, path: Path) -> bool:
    """`write`, but a disk that is full is a word on stderr: what was kept before stays."""
    try:
        write(document, path)
    except OSError as error:
        print(f"{path} is not written: {error}", file=sys.stderr, flush=True)
        return False
    return True


def read(path: Path) -> Document:
    """Load a document; raises ValueError for another schema or version."""
    document = json.loads(path.read_text())
    found = (document.get("schema"), document.get("schema_version"))
    if found != (SCHEMA, SCHEMA_VERSION):
        raise ValueError(f"{path}: expected {SCHEMA} version {SCHEMA_VERSION}, found {found}")
    return document


def is_disturbed(result: Result) -> bool:
    """True if a variant of the cell has too few clean samples: its times are no measurement."""
    return any(timing["disturbed"] for timing in result.get("timing", {}).values())


def in_order(results: Iterable[Result]) -> list[Result]:
    """Sorted for reading: real layers, named models, the grid; then by dtype, dropout and size."""
    groups = ("call", "real", "model", "grid")
    fields = ("dtype", "dropout_p", "in_features", "out_features", "rows", "rank")

    def key(result: Result) -> tuple[Any, ...]:
        cell = result["cell"]
        return (groups.index(cell["group"]), *(cell[field] for field in fields))

    return sorted(results, key=key)


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a quotient of two times, over rounds in which both were clean."""

    median: float
    p25: float
    p75: float
    n: int


def ratio(result: Result, over: str, under: str, key: str = "timing") -> Ratio | None:
    """Time of variant `over` by that of `under` in one cell; None if either was not measured.

    key: "timing" for calls, "graph" for replays of CUDA graphs
    """
    timing = result.get(key, {})
    if over not in timing or under not in timing:
        return None
    a, b = timing[over], timing[under]
    pairs = zip(a["samples"], b["samples"], strict=False)
    values = sorted(x / y for x, y in pairs if x is not None and y is not None)
    if len(values) < _LEAST_PAIRS:
        single = a["ms"] / b["ms"]
        return Ratio(single, a["p25"] / b["p75"], a["p75"] / b["p25"], 0)
    return Ratio(
        statistics.median(values),
        values[len(values) // 4],
        values[(3 * len(values)) // 4],
        len(values),
    )


def worst_ratio(result: Result, over: str, unders: Sequence[str]) -> Ratio | None:
    """Ratio to the fastest of several variants; those that were not measured are left out."""
    ratios = [r for name in unders if (r := ratio(result, over, name)) is not None]
    return max(ratios, key=lambda r: r.median, default=None)
