"""The mutants of the kernels: made from their plain sources, planted at run time, one at a time.

    programs.py    the programs that catch them
    source.py      sources, parsed
    rules.py       a mutant for every synchronisation, condition and bound
    edits.py       mutants that are edits of the text
    faults/        the list of those edits
    as_named.py    whether what is planted is what a fault says
    harmless.py    mutants that no test can see
    wrap.py        what they put around the text
    instrument.py  writes the instrumented copies that programs are compiled from

Only what writes copies needs tree-sitter: a machine without it can collect the tests.
"""

from emulated.mutants.programs import COPIES, PROGRAMS, Mutant, copy_of, mutants_of_faults

__all__ = [
    "COPIES",
    "PROGRAMS",
    "Mutant",
    "copy_of",
    "mutants_of_faults",
    "program_mutants",
    "write_copies",
]


def program_mutants(program: str) -> list[Mutant]:
    """All that a program must catch, or if it is harmless, must not."""
    from emulated.mutants import instrument

    return instrument.program_mutants(program)


def write_copies() -> None:
    from emulated.mutants import instrument

    instrument.write_copies()
