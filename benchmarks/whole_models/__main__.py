"""`python -m benchmarks.whole_models`: measure, print, write JSON, Markdown and a plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import report, results
from ..machine import describe
from ..timing import Plan
from . import experts, generate, mixed_batch, overhead, packed, quantized
from .cases import all_cases, mixed_cases, quantized_cases
from .step import measure

_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=8.0)
_OVERHEAD_PLAN = Plan(min_rounds=9, max_rounds=25, seconds=2.0)
PARTS = ("models", "mixed", "quantized_layers", "packed", "generate", "experts", "overhead")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_models",
        description="Steps and forwards of whole models here: frozen, ours, PEFT's, accelerated.",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/models"))
    parser.add_argument("--machine", default="", help="what to call this machine in the report")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    what = "what is measured, all by default: %(choices)s"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help=what)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 130 after an interrupt, 1 if a file could not be written, else 0."""
    options = parse(arguments)
    document = results.new_document("models", describe("cpu", options.machine))
    path = options.out / "results.json"
    interrupted = False
    try:
        progress = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        for case in (*all_cases(), *quantized_cases()):
            if "models" in options.parts and options.only in case.id:
                document["cases"].append(measure(case, _PLAN, progress))
                results.keep(document, path)
        document["mixed"] = []
        for case in mixed_cases():
            if "mixed" in options.parts and options.only in case.id:
                document["mixed"].append(mixed_batch.measure(case, _PLAN, progress))
                results.keep(document, path)
        if "quantized_layers" in options.parts and quantized.is_available():
            document["quantized_layers"] = quantized.measure_layers(_OVERHEAD_PLAN, progress)
        elif "quantized_layers" in options.parts:
            progress("bitsandbytes is not installed: nothing is measured over quantised bases")
        for part, module in {"packed": packed, "generate": generate, "experts": experts}.items():
            if part in options.parts:
                document[part] = module.measure(_PLAN, progress)
                results.keep(document, path)
        if "overhead" in options.parts:
            document["overhead"] = overhead.measure(_OVERHEAD_PLAN)
        document["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    has_rows = any(document.get(part) for part in ("cases", *PARTS))
    kept = not has_rows or report.publish(document, path)
    return 130 if interrupted else 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
