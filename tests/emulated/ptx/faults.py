"""Faults of the text: edits of a kernel's PTX, each with the run of a program that sees it.

A fault is a pattern, what stands in its place, and which of its occurrences: the PTX of the kernel
is written with the edit, and decoded in place of nvcc's. Nothing is compiled.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from emulated.ptx.build import ENTRY, FOLDER, UNITS

FAULTY = FOLDER / "faults"


@dataclass(frozen=True)
class Kernel:
    """Entries, by a part of their name, and the run of a program that launches one of them."""

    unit: str
    arch: str
    name: str
    run: tuple[str, ...]  # the program and its arguments

    def file(self) -> Path:
        return UNITS / f"{self.unit}.compute_{self.arch}.ptx"

    def text(self) -> tuple[str, list[str]]:
        """The file up to its first entry, and the entries."""
        text = self.file().read_text()
        starts = [*ENTRY.finditer(text)]
        ends = [*(each.start() for each in starts[1:]), len(text)]
        found = [
            text[each.start() : end]
            for each, end in zip(starts, ends, strict=True)
            if self.name in each[1]
        ]
        if not found:
            raise ValueError(
                f"expected an entry with {self.name!r} in {self.file()}, but found none"
            )
        return text[: starts[0].start()], found


@dataclass(frozen=True)
class Fault:
    name: str
    kernel: Kernel
    old: str  # a regular expression
    new: str
    which: int | None = 0  # None: all

    def write(self) -> Path:
        """Writes the edited PTX; ValueError if the pattern is not in it."""
        head, entries = self.kernel.text()
        edited = [self.edit(entry) for entry in entries]
        if edited == entries:
            raise ValueError(f"{self.name}: {self.old!r} is not in {self.kernel.name}")
        path = FAULTY / f"{self.name}.compute_{self.kernel.arch}.ptx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "".join(edited))
        return path

    def edit(self, entry: str) -> str:
        found = [*re.finditer(self.old, entry)]
        chosen = found if self.which is None else found[self.which :][:1]
        for match in reversed(chosen):
            entry = entry[: match.start()] + match.expand(self.new) + entry[match.end() :]
        return entry
