"""The results file of a run: written after each finding, read by targets, reports and figures.

Every file, of whatever benchmark, has

    schema, schema_version   this module's
    kind, complete           which benchmark wrote it, and whether it came to its end
    machine                  name, versions, date and more, by `machine.describe`

and the parts of its kind (KINDS), each in a line, and of a list each row: a new run changes so many
lines. Numbers have eight digits, more than any clock here is worth. What was measured is kept alike
in all of them. Where a row has
TIMES, each maps a variant to its median, quartiles and samples, as `timing.Timing.summary` gives
them; where it has MEMORIES, each maps a variant to its peak in bytes and perhaps more. `ratio` and
`peak_ratio` divide two of them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "lora_ext.benchmarks"
SCHEMA_VERSION = 1
_LEAST_PAIRS = 3

_LAYERS: dict[str, type] = {"cells": list, "skipped": list, "targets": list}
# kind -> its parts; the first has the rows.
KINDS: dict[str, dict[str, type]] = {
    "headline": _LAYERS,
    "full": _LAYERS,
    "few-rows": _LAYERS,
    "many-rows": _LAYERS,
    "gpu": _LAYERS,
    "models": {"cases": list},
    "adapters": {"cases": list},
}
TIMES = ("timing", "graph", "forward")
MEMORIES = ("memory", "forward_memory")
_NEEDED = {
    **{key: {"ms", "p25", "p75", "disturbed", "samples"} for key in TIMES},
    **{key: {"peak"} for key in MEMORIES},
}

Document = dict[str, Any]
Row = dict[str, Any]  # what was measured in one situation: a cell, a model


def new_document(kind: str, machine: dict[str, Any]) -> Document:
    """An empty document of one of KINDS."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "complete": False,
        "machine": machine,
        **{name: part() for name, part in KINDS[kind].items()},
    }


def write(document: Document, path: Path) -> None:
    """Replace the file in one step: a reader or an interrupt never sees half a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(_text(document))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _text(document: Document) -> str:
    parts = []
    for name, part in document.items():
        rows = ",\n".join(map(_line, part)) if isinstance(part, list) else ""
        parts.append(f"{_line(name)}:" + (f"[\n{rows}\n]" if rows else _line(part)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _line(part: Any) -> str:
    return json.dumps(_rounded(part), allow_nan=False, separators=(",", ":"))


def _rounded(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _rounded(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_rounded(value) for value in part]
    return float(f"{part:.8g}") if isinstance(part, float) else part


def keep(document: Document, path: Path) -> bool:
    """`write`, but a disk that is full is a word on stderr: what was kept before stays."""
    try:
        write(document, path)
    except OSError as error:
        print(f"{path} is not written: {error}", file=sys.stderr, flush=True)
        return False
    return True


def read(path: Path) -> Document:
    """Load a document; raises ValueError if it is none of this schema and version."""
    document = json.loads(path.read_text())
    for fault in _faults(document):
        raise ValueError(f"{path}: {fault}")
    return document


def rows_of(document: Document) -> list[Row]:
    """What has TIMES and MEMORIES."""
    return document[next(iter(KINDS[document["kind"]]))]


def has_findings(document: Document) -> bool:
    """Whether there is something to report."""
    parts = (part for name, part in document.items() if name != "machine")
    return any(part for part in parts if isinstance(part, list | dict))


def _faults(document: Any) -> Iterator[str]:
    """What a document lacks, the most general first."""
    if not isinstance(document, dict):
        yield f"expected an object with a schema, but got a {type(document).__name__}"
        return
    found = (document.get("schema"), document.get("schema_version"))
    if found != (SCHEMA, SCHEMA_VERSION):
        yield f"expected {SCHEMA} version {SCHEMA_VERSION}, but got {found}"
    kind = document.get("kind")
    if kind not in KINDS:
        yield f"expected a kind of {', '.join(KINDS)}, but got {kind}"
        return
    for name, part in {"machine": dict, **KINDS[kind]}.items():
        if not isinstance(document.get(name), part):
            yield f"expected {name}, a {part.__name__}, in a document of kind {kind}"
            return
    for row in rows_of(document):
        for key, needed in _NEEDED.items():
            for variant, found in row.get(key, {}).items():
                if not isinstance(found, dict) or not needed <= found.keys():
                    yield f"expected {', '.join(sorted(needed))} of {key}, {variant}: {found}"


def times_of(row: Row) -> str:
    """The key of a row's times: replays where there are some, which have no host in them."""
    return "graph" if row.get("graph") else "timing"


def is_disturbed(row: Row) -> bool:
    """True if a variant of the row has too few clean samples: its times are no measurement."""
    return any(timing["disturbed"] for timing in row.get("timing", {}).values())


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a quotient of two times, over rounds in which both were clean."""

    median: float
    p25: float
    p75: float
    n: int


def ratio(row: Row, over: str, under: str, key: str = "timing") -> Ratio | None:
    """Time of variant `over` by that of `under` in one row; None if either was not measured.

    key: which of TIMES; "graph" has replays of CUDA graphs
    """
    timing = row.get(key, {})
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


def median_ratio(row: Row, over: str, under: str, key: str = "timing") -> float | None:
    """The median of `ratio`."""
    found = ratio(row, over, under, key)
    return found and found.median


def least_ratio(row: Row, over: str, under: str, key: str = "timing") -> float | None:
    """The least time of variant `over` by that of `under`: others only ever slow a call down."""
    timing = row.get(key, {})
    least = [[s for s in timing.get(name, {}).get("samples", ()) if s] for name in (over, under)]
    return min(least[0]) / min(least[1]) if all(least) else None


def worst_ratio(row: Row, over: str, unders: Sequence[str]) -> Ratio | None:
    """Ratio to the fastest of several variants; those that were not measured are left out."""
    ratios = [r for name in unders if (r := ratio(row, over, name)) is not None]
    return max(ratios, key=lambda r: r.median, default=None)


def peak_ratio(row: Row, over: str, under: str, key: str = "memory") -> float | None:
    """Peak bytes of variant `over` by those of `under`; None if either was not measured.

    key: which of MEMORIES
    """
    memory = row.get(key, {})
    if over not in memory or not memory.get(under, {}).get("peak"):
        return None
    return memory[over]["peak"] / memory[under]["peak"]
