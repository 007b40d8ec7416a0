"""report.md and pictures of any results file; `python -m benchmarks.report FILE` renders one again.

What is said and drawn is the affair of each kind: a module with

    text(document, images)   the report as Markdown; images: names of files beside it
    figures(document)        name of a PNG -> figure, or None where the document has nothing for it;
                             a kind without it has no pictures
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import results
from .results import Document


def _of_kind(document: Document) -> Any:
    """The module that knows what to say of a document."""
    from . import layer_report
    from .adapters import adapters_report
    from .finetune import finetune_report
    from .finetune_experts import experts_report
    from .finetune_many import many_report
    from .gpu import gpu_report
    from .whole_models import models_report

    kinds = {
        "headline": layer_report,
        "full": layer_report,
        "few-rows": layer_report,
        "gpu": gpu_report,
        "models": models_report,
        "adapters": adapters_report,
        "finetune": finetune_report,
        "finetune_many": many_report,
        "finetune_experts": experts_report,
    }
    return kinds[document["kind"]]


def text(document: Document, images: Sequence[str] = ()) -> str:
    """The whole report as Markdown. images: file names of figures, relative to the report."""
    return _of_kind(document).text(document, images)


def write(document: Document, json_path: Path, with_plots: bool = True) -> Path:
    """Write report.md and the figures beside the results file; returns the report's path."""
    images: list[str] = []
    if with_plots:
        try:
            from . import figures

            draw = getattr(_of_kind(document), "figures", lambda document: {})
            images = figures.save(draw(document), json_path.parent)
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
