"""`python -m benchmarks`: measure, print the tables, write JSON, report and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from . import real_model, results, runner
from .shapes import (
    Cell,
    few_rows_cells,
    full_cells,
    headline_cells,
    many_rows_cells,
    target_cells,
)
from .suite import NO_PLOTS, ONLY, Suite, wrong
from .targets import evaluate
from .timing import Plan

# kind -> (plan of each cell, seconds after which no further cell begins)
_PLANS = {
    "headline": (Plan(min_rounds=4, max_rounds=11, seconds=1.2, patience=2.0), 110.0),
    "full": (Plan(min_rounds=5, max_rounds=11, seconds=2.0, patience=1.7), 1110.0),
    "few-rows": (Plan(min_rounds=7, max_rounds=21, seconds=2.0, patience=2.0), 600.0),
    "many-rows": (Plan(min_rounds=7, max_rounds=41, seconds=3.0, patience=2.0), 75.0),
}
_ALONE = {"few-rows": few_rows_cells, "many-rows": many_rows_cells}
_REAL_HEADLINES = ("query step bf16", "query forward fp32", "intermediate step fp32")


def _kind(name: str, about: str) -> dict[str, str]:
    return {"dest": "kind", "action": "store_const", "const": name, "help": about}


def with_progress(cells: Sequence[Cell]) -> Iterator[Cell]:
    """The cells, with a progress bar, or a line each where tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, cell in enumerate(cells, start=1):
            print(f"[{number}/{len(cells)}] {cell.id}", file=sys.stderr, flush=True)
            yield cell
        return
    with tqdm(total=len(cells), unit="cell", dynamic_ncols=True) as bar:
        for cell in cells:
            bar.set_postfix_str(cell.id)
            yield cell
            bar.update()


def chosen_cells(kind: str, only: str) -> list[Cell]:
    """The cells of a run of one of _PLANS, real layers after the single-cell targets.

    The short run times in a target's cell what the target takes, and the other peers elsewhere.
    """
    if kind in _ALONE:
        return [cell for cell in _ALONE[kind]() if only in cell.id]
    full = kind == "full"
    real = real_model.real_cells()
    if not full:
        real = [c for c in real if any(part in c.id for part in _REAL_HEADLINES)]
    first = target_cells()
    if not full:
        first = [replace(cell, all_peers=cell.group == "call") for cell in first]
    seen = {cell.id for cell in first}
    others = full_cells() if full else headline_cells()
    cells = [*first, *real, *(cell for cell in others if cell.id not in seen)]
    return [cell for cell in cells if only in cell.id]


def _measure(options: argparse.Namespace, document: results.Document, path: Path) -> None:
    cells = chosen_cells(document["kind"], options.only)
    plan, budget_s = _PLANS[document["kind"]]
    makers = {"real": real_model.make_real}
    runner.run(cells, document, path, plan, makers, budget_s, with_progress)
    document["numerics"] = real_model.numerics([c for c in cells if c.group == "real"])


def _conclude(document: results.Document) -> list[str]:
    document["targets"] = evaluate(document)
    return wrong(document, "cell", "naive")


SUITE = Suite(
    "benchmarks",
    "Latency and memory of one LoRA linear on this machine, ours and the others.",
    "",
    _measure,
    {
        "--full": _kind("full", "the whole grid, at most 20 minutes"),
        "--few-rows": _kind("few-rows", "forward of 1 to 16 rows alone"),
        "--many-rows": _kind("many-rows", "bfloat16 with 1024 and 2048 rows alone, 75 seconds"),
        **ONLY,
        **NO_PLOTS,
    },
    _conclude,
    "headline",
)

if __name__ == "__main__":
    sys.exit(SUITE.main())
