"""`python -m benchmarks.whole_models`: whole models, and what they are made of."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from .. import results
from ..suite import ONLY, Suite, measure_each
from ..timing import Plan
from . import experts, generate, mixed_batch, overhead, packed, quantized, step, whole_run
from .cases import all_cases, mixed_cases, quantized_cases

_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=8.0)
_OVERHEAD_PLAN = Plan(min_rounds=9, max_rounds=25, seconds=2.0)
PARTS = ("runs", "models", "mixed", "quantized_layers", "packed", "generate", "experts", "overhead")
_MODULES = {"packed": packed, "generate": generate, "experts": experts}
_HELP = "what is measured, all by default: %(choices)s"


def _measure(options: argparse.Namespace, document: results.Document, path: Path) -> None:
    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    document["mixed"] = []
    for part, name, cases, module in (
        ("runs", "runs", whole_run.RUNS, whole_run),
        ("models", "cases", (*all_cases(), *quantized_cases()), step),
        ("mixed", "mixed", mixed_cases(), mixed_batch),
    ):
        chosen = [c for c in cases if part in options.parts and options.only in c.id]
        measure = partial(module.measure, plan=_PLAN, progress=progress)
        measure_each(document, name, chosen, measure, path)
    if "quantized_layers" in options.parts and quantized.is_available():
        document["quantized_layers"] = quantized.measure_layers(_OVERHEAD_PLAN, progress)
    elif "quantized_layers" in options.parts:
        progress("bitsandbytes is not installed: nothing is measured over quantised bases")
    for part, module in _MODULES.items():
        if part in options.parts:
            document[part] = module.measure(_PLAN, progress)
            results.keep(document, path)
    if "overhead" in options.parts:
        document["overhead"] = overhead.measure(_OVERHEAD_PLAN)


SUITE = Suite(
    "benchmarks.whole_models",
    "Steps and forwards of whole models here: frozen, ours, PEFT's, accelerated.",
    "models",
    _measure,
    {**ONLY, "--parts": {"nargs": "+", "choices": PARTS, "default": PARTS, "help": _HELP}},
)

if __name__ == "__main__":
    sys.exit(SUITE.main())
