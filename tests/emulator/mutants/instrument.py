"""Writes copies of csrc/ with every mutant, first on the include path of whatever is compiled here.

Each line stays where it is, and #line says which file it is of: reports name the source itself.
"""

import os
from functools import cache
from pathlib import Path

from emulator.mutants import edits, rules
from emulator.mutants.faults import FAULTS
from emulator.mutants.harmless import HARMLESS
from emulator.mutants.programs import COPIES, CSRC, PROGRAMS, ROOT, Mutant, mutants_of_faults
from emulator.mutants.source import Source
from emulator.mutants.wrap import Wrap, apply, number


@cache
def sources() -> list[Source]:
    """Of csrc/: kernels, and whatever an edit names."""
    edited = {file for fault in FAULTS for file, _, _ in fault.edits}
    paths = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})
    found = {end: [path for path in paths if Source(path).is_at(end)] for end in edited}
    if lost := {end: paths for end, paths in found.items() if len(paths) != 1}:
        raise ValueError(f"faults/: expected each of these once in csrc/, but found {lost}")
    named = {path for each in found.values() for path in each}
    return [Source(path) for path in paths if is_kernel(path) or path in named]


def is_kernel(path: Path) -> bool:
    return path.suffix == ".h" and "kernel" in path.relative_to(CSRC).parts[:-1]


@cache
def wraps_of(source: Source) -> list[Wrap]:
    """Edits are listed last: they stand around the rules' wraps of the same span."""
    return [*rule_wraps(source), *edits.wraps_of(source, FAULTS)]


def copy_text(source: Source, text: str) -> str:
    named = os.path.relpath(source.path, ROOT)
    return f'#include "emulator/fault.h"\n#line 1 "{named}"\n{text}'


@cache
def write_copies() -> None:
    """Writes all copies, those anew whose text has changed, and removes others."""
    written = set()
    for source in sources():
        wraps = wraps_of(source)
        if not wraps:
            continue
        text = copy_text(source, apply(source.text, wraps))
        written.add(write(COPIES / source.path.relative_to(CSRC), text))
    known = "".join(f"{number(name)},  // {name}\n" for name in names())
    written.add(write(COPIES / "known_mutants.inc", known))
    for copy in COPIES.rglob("*"):
        if copy.is_file() and copy not in written:
            copy.unlink()


def write(path: Path, text: str) -> Path:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def names() -> list[str]:
    """Of all mutants."""
    found = [name for source in sources() for wrap in rule_wraps(source) for name in wrap.mutants]
    return found + [fault.name for fault in FAULTS]


@cache
def program_mutants(program: str) -> list[Mutant]:
    """By the rules, then the edits of its sources, then what else is to be seen by it."""
    found = []
    for source in sources():
        if source.stem in PROGRAMS.get(program, ()):
            for name in (name for wrap in rule_wraps(source) for name in wrap.mutants):
                why = HARMLESS.get(name) or HARMLESS.get(f"{program} {name}", "")
                found.append(Mutant(program, name, why, caught=not why))
    return [*found, *mutants_of_faults(program)]


def check_complete() -> None:
    """Every mutant has a program, and no two have one name or one number."""
    if len({number(name) for name in names()}) != len(names()):
        raise ValueError("two mutants have one number: rename one")
    covered = {stem for stems in PROGRAMS.values() for stem in stems}
    for source in sources():
        if rule_wraps(source) and source.stem not in covered:
            raise ValueError(f"{source.path}: expected a program of PROGRAMS to catch its mutants")


def rule_wraps(source: Source) -> list[Wrap]:
    return rules.wraps_of(source) if is_kernel(source.path) else []
