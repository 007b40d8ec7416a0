"""The command of a suite, `python -m benchmarks[.SUITE]`: measures, and says what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import describe
from .report import publish
from .results import Document, Row, has_findings, keep, new_document
from .targets import MISS

Options = Mapping[str, dict[str, Any]]  # flag -> keywords of argparse's add_argument

ONLY: Options = {"--only": {"default": "", "help": "only what has this text in its name"}}
NO_PLOTS: Options = {"--no-plots": {"action": "store_true", "help": "no PNG files"}}


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
        module: as ``python -m`` has it.
        about: what is measured, a sentence.
        folder: of its results, in benchmarks/out.
        measure: (options, document, file): fills the document, and writes it after each finding.
        options: beside ``--out`` and ``--machine``.
        conclude: adds to a document, whole or interrupted, what follows; returns faults, in lines.
        kind: of its document, where none of the options with dest "kind" is given, of which one at
            most may be; the folder's name if it is empty.
    """

    module: str
    about: str
    folder: str
    measure: Callable[[argparse.Namespace, Document, Path], None]
    options: Options = field(default_factory=dict)
    conclude: Callable[[Document], list[str]] = lambda document: []
    kind: str = ""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Exit status 130 after an interrupt, 1 after faults or an unwritten file, else 0."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=self.about)
        out = Path("benchmarks/out") / self.folder
        parser.add_argument("--out", type=Path, default=out, help="output folder")
        parser.add_argument("--machine", default="", help="what to call this machine in the report")
        kinds = parser.add_mutually_exclusive_group() if self.kind else parser
        for flag, words in self.options.items():
            (kinds if words.get("dest") == "kind" else parser).add_argument(flag, **words)
        parser.set_defaults(kind=self.kind or self.folder)
        options = parser.parse_args(arguments)
        document = new_document(options.kind, describe("cpu", options.machine))
        path, interrupted = options.out / "results.json", False
        try:
            self.measure(options, document, path)
            document["complete"] = True
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: the report covers what was measured so far", file=sys.stderr)
        faults = self.conclude(document)
        status = finish(document, path, faults, not getattr(options, "no_plots", False))
        return 130 if interrupted else status


def measure_each(
    document: Document, name: str, cases: Iterable[Any], measure: Callable[[Any], Row], path: Path
) -> None:
    """Adds measure(case) of each case to document[name], and writes the file after each."""
    for case in cases:
        document.setdefault(name, []).append(measure(case))
        keep(document, path)


def wrong(document: Document, what: str, reference: str) -> list[str]:
    """A line for each of the rows ``document[what + "s"]`` in which ours is wrong."""
    rows = [row for row in document[f"{what}s"] if row["status"] == "wrong"]
    return [f"WRONG: {row[what]['id']}: ours disagrees with {reference}" for row in rows]


def finish(document: Document, path: Path, faults: Sequence[str], with_plots: bool = True) -> int:
    """Report and plots, and on stderr what is wrong or missed. Returns the exit status."""
    kept = not has_findings(document) or publish(document, path, with_plots)
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    missed = sum(row["verdict"] == MISS for row in document.get("targets", ()))
    if missed:
        print(f"{missed} targets are missed", file=sys.stderr)
    return 0 if kept and not faults else 1
