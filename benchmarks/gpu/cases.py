"""Batches of many adapters that are measured on a GPU, in order of importance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..adapters.cases import Case
from ..shapes import DROPOUT, FORWARD, STEP, TARGET_EFFORT

HEADLINE_ROWS, HEADLINE_ADAPTERS, HEADLINE_WIDTH = 8192, 64, 4096
_DECODED = {HEADLINE_WIDTH: (1, 16, 64, 4, 32, 2, 8), 8192: (64, 8, 1)}
_CAPACITY = 64  # of a pool that decoding reads


def _case(group: str, mode: str, rows: int, adapters: int, width: int, **fields) -> Case:
    """Each adapter's rows are a sample, unless it is tokens that are mixed; a step has dropout."""
    tokens = 0 if fields.get("layout") == "mixed" else rows // adapters
    fields = {"tokens": tokens, "dropout_p": DROPOUT if mode == STEP else 0.0, **fields}
    return Case(group, mode, rows, adapters, width, device="cuda", **fields)


def _headline(mode: str, **fields) -> Case:
    size = (HEADLINE_ROWS, HEADLINE_ADAPTERS, HEADLINE_WIDTH)
    return _case("headline", mode, *size, effort=TARGET_EFFORT, **fields)


def many_cases() -> list[Case]:
    """Training size; decoding, one adapter for each row of a pool with room for more; the sizes of
    the CPU's table."""
    decoded = [
        _case("decode", FORWARD, rows, rows, width, capacity=_CAPACITY)
        for width, counts in _DECODED.items()
        for rows in counts
    ]
    sizes = [
        _case("target", mode, rows, 32, 2048)
        for rows in (256, 2048, 32)
        for mode in (FORWARD, STEP)
    ]
    mixed = [_headline(mode, layout="mixed") for mode in (FORWARD, STEP)]
    return [
        _headline(FORWARD),
        _headline(STEP),
        *decoded[:3],
        sizes[0],
        *mixed,
        *decoded[3:],
        *sizes[1:],
    ]


def reading_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """A key that sorts rows: training size, the CPU's table, decoding; ranges first, then size."""
    case = row["case"]
    group = ("headline", "target", "decode").index(case["group"])
    return (group, case["layout"] == "mixed", case["rows"])


def on_cpu(cases: list[Case]) -> list[Case]:
    """The same set, small: to try the code without a GPU."""
    small: dict[str, Case] = {}
    for case in cases:
        rows = min(case.rows, 16)
        adapters = min(case.adapters, 16 if case.group == "decode" else 4)
        tokens = rows // adapters if case.tokens > 1 else case.tokens
        cut = replace(case, rows=rows, adapters=adapters, tokens=tokens, width=min(case.width, 256))
        small.setdefault(cut.id, replace(cut, device="cpu"))
    return list(small.values())
