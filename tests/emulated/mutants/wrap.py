"""Text put around spans of a source, nested as the spans are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wrap:
    """What stands before and after the text from `start` to `end`; its mutants' names."""

    start: int
    end: int
    before: str
    after: str
    mutants: tuple[str, ...]


def number(mutant: str) -> str:
    """By which a program knows a mutant: FNV-1a of its name, as in fault.cpp."""
    value = 0x811C9DC5
    for byte in mutant.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{value:#x}u"


def planted(mutant: str) -> str:
    return f"emulator::planted({number(mutant)})"


def apply(text: str, wraps: list[Wrap]) -> str:
    """The text with all of them; of two around one span the later in the list is the outer."""
    ends: dict[int, list[str]] = {}
    inserted: dict[int, list[str]] = {}
    begins: dict[int, list[str]] = {}
    for _, wrap in sorted(
        enumerate(wraps), key=lambda item: (item[1].end - item[1].start, item[0])
    ):
        if wrap.start == wrap.end:
            inserted.setdefault(wrap.start, []).append(wrap.before + wrap.after)
        else:
            ends.setdefault(wrap.end, []).append(wrap.after)
            begins.setdefault(wrap.start, []).insert(0, wrap.before)
    parts, last = [], 0
    for position in sorted({*ends, *inserted, *begins}):
        parts.append(text[last:position])
        for kind in (ends, inserted, begins):
            parts += kind.get(position, [])
        last = position
    return "".join(parts) + text[last:]
