"""Writes copies of csrc/ with every mutant, first on the include path of whatever is compiled here.

Each line stays where it is, and #line says which file it is of: reports name the source itself.
"""

import os
from functools import cache
from pathlib import Path

from emulated.mutants import as_named, edits, rules
from emulated.mutants.faults import FAULTS
from emulated.mutants.harmless import HARMLESS
from emulated.mutants.programs import (
    COPIES,
    CSRC,
    PROGRAMS,
    ROOT,
    Mutant,
    is_of,
    mutants_of_faults,
    programs_of,
)
from emulated.mutants.source import Source
from emulated.mutants.wrap import Wrap, apply, number

HOST_FOLDERS = ("launch", "plan")


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
    """A header in a folder of kernels/, but for those of the host alone."""
    room, *folders = path.relative_to(CSRC).parts[:-1]
    is_inside = room == "kernels" and bool(folders) and folders[0] not in HOST_FOLDERS
    return path.suffix == ".h" and is_inside


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
        copy = COPIES / source.path.relative_to(CSRC)
        text = copy_text(source, apply(source.text, wraps))
        if not copy.exists() or copy.read_text() != text:
            as_named.check(source, FAULTS)
        written.add(write(copy, text))
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
        for name in (name for wrap in rule_wraps(source) for name in wrap.mutants):
            if is_of(program, name):
                why = HARMLESS.get(name) or HARMLESS.get(f"{program} {name}", "")
                found.append(Mutant(program, name, why, caught=not why))
    return [*found, *mutants_of_faults(program)]


def check_complete() -> None:
    """Every mutant has a program, and no two have one name or one number."""
    if len({number(name) for name in names()}) != len(names()):
        raise ValueError("two mutants have one number: rename one")
    for source in sources():
        for name in (name for wrap in rule_wraps(source) for name in wrap.mutants):
            if not any(is_of(program, name) for program in PROGRAMS):
                raise ValueError(f"{name}: expected a program of PROGRAMS to catch it")
    for fault in FAULTS:
        if not programs_of(fault):
            raise ValueError(
                f"{fault.name}: expected a program, as its file has kernels of several"
            )


def rule_wraps(source: Source) -> list[Wrap]:
    return rules.wraps_of(source) if is_kernel(source.path) else []
