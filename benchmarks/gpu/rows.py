"""What a run finds, a line of JSON each: what is killed loses nothing, and the next call goes on.

A row has

    stage, name   what it is of; the last row of both counts. Without a name: the stage itself
    sources       a hash of the sources, the packages and the card that it stands for
    status        of what was done: ok, wrong, failed, skipped; begun, and stopped, which is to do
                  of a stage: done, partial, failed, missing

and what was found. Rows of other sources stay in the file, and are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RED = ("wrong", "failed")
TO_DO = ("begun", "stopped")

Row = dict[str, Any]


class Rows:
    """Those of one stage, in a file of all; what others write there is seen.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, stage: str, sources: str) -> None:
        self.path = path
        self._own = {"stage": stage, "sources": sources}

    def add(self, name: str, status: str, **found: Any) -> None:
        """Writes a row; a line that a killed process left open ends before it."""
        line = json.dumps({"name": name, "status": status, **self._own, **found}, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"\n{line}\n")

    def found(self) -> dict[str, Row]:
        """The last row of each name."""
        rows = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # an empty line, or one that its writer could not end
                continue
            if self._own.items() <= row.items():
                rows[row["name"]] = row
        return rows

    def to_do(self, names: Iterable[str]) -> list[str]:
        """Those without a result; last what was stopped, which may be a hang."""
        found = self.found()
        new = [name for name in names if name not in found]
        return new + [name for name in names if found.get(name, {}).get("status") in TO_DO]
