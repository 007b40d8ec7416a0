"""`python -m benchmarks.adapters`: many adapters in one batch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import results
from ..suite import NO_PLOTS, ONLY, Suite, measure_each, wrong
from ..timing import Plan
from .cases import Case, all_cases
from .measure import measure

_PLAN = Plan(min_rounds=5, max_rounds=15, seconds=1.5, patience=2.0)
_SHORT_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=0.8, patience=1.5)
_SHORT = {"action": "store_true", "help": "only what the targets are read from"}


def _measure(options: argparse.Namespace, document: results.Document, path: Path) -> None:
    plan = _SHORT_PLAN if options.short else _PLAN
    cases = [c for c in all_cases() if c.group == "target" or not options.short]

    def measured(case: Case) -> results.Row:
        print(case.id, file=sys.stderr, flush=True)
        return measure(case, plan)

    chosen = [case for case in cases if options.only in case.id]
    measure_each(document, "cases", chosen, measured, path)


def _conclude(document: results.Document) -> list[str]:
    failed = [row for row in document["cases"] if row["status"] == "error"]
    faults = [f"FAILED: {row['case']['id']}: {row['error']}" for row in failed]
    return wrong(document, "case", "the loop") + faults


SUITE = Suite(
    "benchmarks.adapters",
    "A batch in which each row has its own adapter, ours and the others, here.",
    "adapters",
    _measure,
    {"--short": _SHORT, **ONLY, **NO_PLOTS},
    _conclude,
)

if __name__ == "__main__":
    sys.exit(SUITE.main())
