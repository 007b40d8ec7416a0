"""`python -m benchmarks.adapters`: measure, print, write JSON, Markdown and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import report, results
from ..machine import describe
from ..timing import Plan
from .cases import all_cases
from .measure import measure

_PLAN = Plan(min_rounds=5, max_rounds=15, seconds=1.5, patience=2.0)
_SHORT_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=0.8, patience=1.5)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters",
        description="A batch in which each row has its own adapter, ours and the others, here.",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/adapters"))
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--short", action="store_true", help="only what the targets are read from")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--no-plots", action="store_true", help="no PNG files")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if ours is wrong or fails, or a file is not written, 130 after an interrupt."""
    options = parse(arguments)
    document = results.new_document("adapters", describe("cpu", options.machine))
    path = options.out / "results.json"
    plan = _SHORT_PLAN if options.short else _PLAN
    interrupted = False
    try:
        for case in all_cases():
            if options.only in case.id and (case.group == "target" or not options.short):
                print(case.id, file=sys.stderr, flush=True)
                document["cases"].append(measure(case, plan))
                results.keep(document, path)
        document["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    kept = not document["cases"] or report.publish(document, path, not options.no_plots)
    wrong = [row["case"]["id"] for row in document["cases"] if row["status"] == "wrong"]
    for name in wrong:
        print(f"WRONG: {name}: ours disagrees with the loop", file=sys.stderr)
    failed = [row for row in document["cases"] if row["status"] == "error"]
    for row in failed:
        print(f"FAILED: {row['case']['id']}: {row['error']}", file=sys.stderr)
    return 130 if interrupted else 0 if kept and not wrong and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
