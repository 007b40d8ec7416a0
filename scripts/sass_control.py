"""What ptxas tells the hardware beside each instruction, from the words that nvdisasm -hex prints.

Since Volta nothing but this orders a warp's instructions (Jia et al., arXiv:1804.06826, 2.1): bits
105 to 121 of the 128 say how many cycles the warp waits before its next instruction, which of six
scoreboards the instruction holds until its results are written and which until its operands are
read, and which of them must be free before it may issue.
"""

from dataclasses import dataclass

FIRST_BIT = 105 - 64  # in the upper word
NONE = 7


@dataclass(frozen=True)
class Control:
    stall: int = 1
    write: int | None = None
    read: int | None = None
    waits: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """ "4w0r1q25": four cycles, holds 0 and 1, waits for 2 and 5."""
        held = [f"{letter}{board}" for letter, board in (("w", self.write), ("r", self.read))]
        held = [each for each in held if not each.endswith("None")]
        waits = "q" + "".join(map(str, self.waits)) if self.waits else ""
        return f"{self.stall}{''.join(held)}{waits}"


PLAIN = Control()


def control_of(upper: int) -> Control:
    """Of an instruction's upper word."""
    bits = upper >> FIRST_BIT
    write, read = bits >> 5 & 7, bits >> 8 & 7
    return Control(
        bits & 15,
        None if write == NONE else write,
        None if read == NONE else read,
        tuple(board for board in range(6) if bits >> 11 >> board & 1),
    )


def upper_of(control: Control) -> int:
    """The word that says so, all else of it zero."""
    write = NONE if control.write is None else control.write
    read = NONE if control.read is None else control.read
    waits = sum(1 << board for board in control.waits)
    return (control.stall | write << 5 | read << 8 | waits << 11) << FIRST_BIT


def control_named(text: str) -> Control:
    """Of Control.text."""
    head, _, waits = text.partition("q")
    head, _, read = head.partition("r")
    stall, _, write = head.partition("w")
    return Control(
        int(stall),
        int(write) if write else None,
        int(read) if read else None,
        tuple(map(int, waits)),
    )
