"""One run of `make gpu`: its document, where it is kept, and how much time is left."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .. import results
from ..results import Document

_SAME = ("name", "device", "versions")  # of the machine, for results to belong together


@dataclass
class Run:
    """What every stage gets.

    Attributes:
        device: "cuda", or "cpu" to try the code.
        out: the folder for everything that the run writes.
        document: what has been found so far, written to out/results.json after each finding.
        quick: only what matters most.
        end: when to stop, as `time.monotonic()` counts.
    """

    device: str
    out: Path
    document: Document
    quick: bool = False
    end: float = float("inf")
    stages: dict = field(init=False)

    def __post_init__(self) -> None:
        self.stages = self.document.setdefault("stages", {})

    @property
    def path(self) -> Path:
        """The results' file."""
        return self.out / "results.json"

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    @property
    def command_s(self) -> float:
        """How long a command may take. Where only the code is tried, the end does not count."""
        return self.left if self.device == "cuda" else max(60.0, self.left)

    def write(self) -> None:
        """Keeps the document; a full disk is a word on stderr, not the end."""
        results.keep(self.document, self.path)


def bring(source: Path, out: Path) -> None:
    """Copies the files of an earlier run to a folder that has no results yet."""
    if not (out / "results.json").exists() and (source / "results.json").exists():
        shutil.copytree(source, out, dirs_exist_ok=True)


def resumed(path: Path, fresh: Document) -> Document:
    """The document at `path` if it is this machine's, else a fresh one; another is kept aside."""
    if not path.exists():
        return fresh
    try:
        found = results.read(path)
    except (OSError, ValueError) as error:
        print(f"{path} is not read ({error}); it is kept as {path.name}.old", file=sys.stderr)
        path.replace(path.with_name(path.name + ".old"))
        return fresh
    if any(found["machine"].get(key) != fresh["machine"][key] for key in _SAME):
        print(f"{path} is another machine's; it is kept as {path.name}.old", file=sys.stderr)
        path.replace(path.with_name(path.name + ".old"))
        return fresh
    done = len(found["cells"]) + len(found.get("stages", {}))
    print(f"resuming: {done} results are there", flush=True)
    found["skipped"] = []
    return found
