"""report.md and pictures of any results file; `python -m benchmarks.report FILE` renders one again.

What is said and drawn is the affair of each kind. Of its two modules the second needs a plot
library:

    *_report    text(document, images), the report as Markdown; images: names of files beside it
    *_figures   figures(document): name of a PNG -> figure, or None where there is nothing for it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from . import results
from .results import Document

# kind -> its modules, without what they end with, where both are of one name
_MODULES = {
    **dict.fromkeys(("headline", "full", "few-rows", "many-rows"), "layer"),
    "models": "whole_models.models",
    "adapters": "adapters.adapters",
}
_APART = {("gpu", "report"): "gpu.gpu", ("gpu", "figures"): "layer"}


def _of_kind(document: Document, what: str) -> Any:
    """The module that knows what to say of a document, or how to draw it."""
    kind = document["kind"]
    name = _APART.get((kind, what)) or _MODULES[kind]
    return import_module(f"{__package__}.{name}_{what}")


def text(document: Document, images: Sequence[str] = ()) -> str:
    """The whole report as Markdown. images: file names of figures, relative to the report."""
    return _of_kind(document, "report").text(document, images)


def write(document: Document, json_path: Path, with_plots: bool = True) -> Path:
    """Write report.md and the figures beside the results file; returns the report's path."""
    images: list[str] = []
    if with_plots:
        try:
            from . import figures

            drawn = _of_kind(document, "figures").figures(document)
            images = figures.save(drawn, json_path.parent)
        except Exception as error:  # the results themselves must not be lost to a picture
            print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)
    path = json_path.with_name("report.md")
    path.write_text(text(document, images))
    return path


def publish(document: Document, json_path: Path, with_plots: bool = True) -> bool:
    """Print the report, write results, report and figures; False if a file was not written."""
    print(text(document))
    kept = results.keep(document, json_path)
    try:
        print(f"written: {json_path}, {write(document, json_path, with_plots)}")
    except OSError as error:
        print(f"no report: {error}", file=sys.stderr)
        return False
    return kept


def main(arguments: list[str]) -> int:
    """Render FILE again, targets included."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.report FILE", file=sys.stderr)
        return 2
    json_path = Path(arguments[0])
    try:
        document = results.read(json_path)
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(write(document, json_path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
