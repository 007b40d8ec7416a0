"""`python -m benchmarks`: measure, print the tables, write JSON, report and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from . import real_model, report, results, runner
from .machine import describe
from .shapes import Cell, few_rows_cells, full_cells, headline_cells, target_cells
from .targets import MISS, evaluate
from .timing import Plan

# kind -> (plan of each cell, seconds after which no further cell begins)
_PLANS = {
    "headline": (Plan(min_rounds=4, max_rounds=11, seconds=1.2, patience=2.0), 110.0),
    "full": (Plan(min_rounds=5, max_rounds=11, seconds=2.0, patience=1.7), 1110.0),
    "few-rows": (Plan(min_rounds=7, max_rounds=21, seconds=2.0, patience=2.0), 600.0),
}
_REAL_HEADLINES = ("query step bf16", "query forward fp32", "intermediate step fp32")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Latency and memory of one LoRA linear on this machine, ours and the others.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="the whole grid, at most 20 minutes")
    what.add_argument("--few-rows", action="store_true", help="forward of 1 to 16 rows alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="output folder")
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--only", default="", help="only cells whose name contains this text")
    parser.add_argument("--no-plots", action="store_true", help="no PNG files")
    return parser.parse_args(arguments)


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
    if kind == "few-rows":
        return [cell for cell in few_rows_cells() if only in cell.id]
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


def finish(document: results.Document, path: Path, with_plots: bool) -> int:
    """Report and plots, and on stderr what is wrong or missed. Returns the exit status."""
    kept = report.publish(document, path, with_plots)
    wrong = [r["cell"]["id"] for r in document["cells"] if r["status"] == "wrong"]
    for name in wrong:
        print(f"WRONG: {name}: ours disagrees with naive", file=sys.stderr)
    missed = sum(row["verdict"] == MISS for row in document["targets"])
    if missed:
        print(f"{missed} targets are missed", file=sys.stderr)
    return 0 if kept and not wrong else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if ours is wrong anywhere, 130 after an interrupt, else 0."""
    options = parse(arguments)
    kind = "full" if options.full else "few-rows" if options.few_rows else "headline"
    cells = chosen_cells(kind, options.only)
    plan, budget_s = _PLANS[kind]
    document = results.new_document(kind, describe("cpu", options.machine))
    path = options.out / "results.json"
    makers = {"real": real_model.make_real}
    interrupted = False
    try:
        runner.run(cells, document, path, plan, makers, budget_s, with_progress)
        document["numerics"] = real_model.numerics([c for c in cells if c.group == "real"])
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the report covers the cells measured so far", file=sys.stderr)
    document["targets"] = evaluate(document)
    status = finish(document, path, not options.no_plots)
    return 130 if interrupted else status


if __name__ == "__main__":
    sys.exit(main())
