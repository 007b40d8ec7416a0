"""One fault: edits of sources of csrc/."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    wrong_because: str  # for a control: why it is right
    edits: tuple[
        tuple[str, str, str], ...
    ]  # the end of a path, old text that occurs once, new text
    program: str = ""  # that sees it, with its arguments; else those that run the file's kernels
    arguments: tuple[str, ...] = ()
    expected: str = "caught"  # or "clean"


def faults_of(file: str) -> Callable[..., Fault]:
    """Makes faults whose edits, each (old, new), are all of one file."""

    def fault(name: str, what: str, why: str, *edits: tuple[str, str]) -> Fault:
        return Fault(name, what, why, tuple((file, old, new) for old, new in edits))

    return fault
