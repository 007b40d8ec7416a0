"""Reads the PTX of asm_provenance.cu: what each kernel's inline asm does with its parameters.

A kernel becomes a list of events: the instructions of its inline asm, its stores and its branches.
An operand is written by where its value comes from, so that register numbers, moves and casts
between address spaces do not matter:

    param2          the kernel's third parameter
    &param1         the address of a parameter in memory
    [param0+4]@0    a load of global memory before the first instruction of asm (@1: after it)
    asm0.1          the second result of the first instruction of asm
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Instructions inside inline asm, by what their first operand is. Any other is an error: an unknown
# instruction must not pass as one without results.
WRITES_FIRST = re.compile(
    r"(mapa|ldmatrix|ld|atom|mma|mul|elect|mbarrier\.try_wait|mbarrier\.test_wait)\b(?!\.async)"
)
READS_AND_WRITES_FIRST = re.compile(r"wgmma\.mma_async\b")
WRITES_NOTHING = re.compile(
    r"(bar|barrier|cp\.async|stmatrix|st|red|fence|prefetch|setmaxnreg|griddepcontrol"
    r"|mbarrier\.(init|inval|arrive|expect_tx)|wgmma\.(fence|commit_group|wait_group))\b"
)
PURE = re.compile(
    r"(mov|cvta|cvt|setp|selp)\b"
)  # moves and predicates: part of an operand's origin
SAME_VALUE = re.compile(r"(mov|cvta|cvt\.(u64\.u32|u32\.u64))\b")


class Event(NamedTuple):
    what: str
    operands: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} {', '.join(self.operands)}".rstrip()


@dataclass
class Kernel:
    """A kernel while it is read."""

    events: list[Event] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)  # of each register
    labels: set[str] = field(default_factory=set)
    asm_count: int = 0

    def value(self, token: str) -> str:
        if token.startswith("!"):
            return f"not({self.value(token[1:])})"
        return self.origin.get(token, token)

    def address(self, token: str) -> str:
        base, plus, offset = token.strip("[]").partition("+")
        return self.value(base) + plus + offset

    def operand(self, token: str) -> str:
        """`[%rd1,{%r1,%r2}]`, `{%r1,%r2}` or `%r1`, with every register replaced by its origin."""
        return re.sub(r"%?[\w$.:]+", lambda match: self.value(match[0]), token)


def split_operands(text: str) -> list[str]:
    """Splits at the commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def registers(token: str) -> list[str]:
    """`{%r1,%r2}` or `%r1|p`."""
    return [part.strip() for part in re.split(r"[,|]", token.strip("{}"))]


def predicate(op: str, a: str, b: str) -> str:
    """The predicate `a op b`; a 0-or-1 value compared with 0 is the predicate that made it."""
    choice = re.fullmatch(r"\((.*)\?1:0\)", a)
    if choice and b == "0" and op in ("ne", "eq"):
        return choice[1] if op == "ne" else f"not({choice[1]})"
    return f"{op}({a},{b})"


def read_pure(kernel: Kernel, opcode: str, operands: list[str]) -> None:
    target, sources = operands[0], [kernel.value(token) for token in operands[1:]]
    if target.startswith("{"):  # the parts of a register
        for i, register in enumerate(registers(target)):
            kernel.origin[register] = f"{opcode}({sources[0]}).{i}"
    elif opcode.startswith("mov") and sources[0] == operands[1] and sources[0].startswith("%"):
        kernel.origin[target] = f"{opcode}({sources[0]})"  # a special register
    elif SAME_VALUE.match(opcode):
        parameter = re.search(r"_param_(\d+)$", sources[0])
        kernel.origin[target] = f"&param{parameter[1]}" if parameter else sources[0]
    elif opcode.startswith("setp"):
        kernel.origin[target] = predicate(opcode.split(".")[1], *sources)
    elif opcode.startswith("selp"):
        kernel.origin[target] = f"({sources[2]}?{sources[0]}:{sources[1]})"
    else:
        kernel.origin[target] = f"{opcode}({','.join(sources)})"


def read_asm(kernel: Kernel, guard: str, opcode: str, operands: list[str]) -> None:
    """One instruction of inline asm."""
    if PURE.match(opcode):
        return read_pure(kernel, opcode, operands)
    results: list[str] = []
    if READS_AND_WRITES_FIRST.match(opcode):
        results = registers(operands[0])
        seen = operands
    elif WRITES_FIRST.match(opcode):
        results = registers(operands[0])
        seen = operands[1:]
    elif WRITES_NOTHING.match(opcode):
        seen = operands
    else:
        raise ValueError(f"asm_provenance.py does not know {opcode!r}: say whether it has results")
    name = f"@{kernel.value(guard)} {opcode}" if guard else opcode
    kernel.events.append(Event(name, tuple(kernel.operand(token) for token in seen)))
    for i, register in enumerate(results):
        kernel.origin[register] = f"asm{kernel.asm_count}.{i}"
    kernel.asm_count += 1


def read_compiled(kernel: Kernel, guard: str, opcode: str, operands: list[str]) -> None:
    """One instruction that the compiler made."""
    if opcode.startswith("ld.param"):
        place = re.search(r"_param_(\d+)((?:\+\d+)?)\]", operands[1])
        kernel.origin[operands[0]] = f"param{place[1]}{place[2]}"
    elif opcode.startswith("ld."):
        for i, register in enumerate(registers(operands[0])):
            lane = f".{i}" if "{" in operands[0] else ""
            address = kernel.address(operands[1])
            kernel.origin[register] = f"[{address}]{lane}@{kernel.asm_count}"
    elif opcode.startswith("st."):
        values = tuple(kernel.value(register) for register in registers(operands[1]))
        kernel.events.append(Event("store", (kernel.address(operands[0]), *values)))
    elif opcode.startswith("bra"):
        way = "back" if operands[0] in kernel.labels else "forward"
        kernel.events.append(Event(f"branch {way}", (kernel.value(guard),) if guard else ()))
    elif opcode.startswith(("bar", "barrier")):
        kernel.events.append(Event(f"compiled {opcode}", tuple(operands)))
    elif opcode != "ret":
        read_pure(kernel, opcode, operands)


def analyse(body: str) -> list[Event]:
    """The events of one kernel body."""
    kernel = Kernel()
    in_asm = False
    for part in re.split(r"(// (?:begin|end) inline asm)", body):
        if part.startswith("//"):
            in_asm = "begin" in part
            continue
        for statement in re.sub(r"//[^\n]*", "", part).split(";"):
            read_statement(kernel, statement, in_asm)
    return kernel.events


def read_statement(kernel: Kernel, statement: str, in_asm: bool) -> None:
    statement = statement.lstrip("{} \t\n").rstrip()  # a block of asm may be in braces
    while label := re.match(r"(\$?\w+):(?:\s+|$)", statement):
        kernel.labels.add(label[1])
        statement = statement[label.end() :]
    match = re.fullmatch(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if not match:  # a directive, or nothing
        return
    guard, opcode, rest = match[1] or "", match[2], re.sub(r"\s+", "", match[3])
    read = read_asm if in_asm else read_compiled
    read(kernel, guard, opcode, split_operands(rest))


def kernel_bodies(ptx: str) -> dict[str, str]:
    """Each kernel's text from its parameters' closing bracket to its `ret`."""
    entry = re.compile(r"\.entry (\w+)\(.*?\n?\)\n(.*?)\n\tret;", re.DOTALL)
    return {match[1]: match[2] for match in entry.finditer(ptx)}


def read_ptx(ptx: str) -> dict[str, list[Event]]:
    """The events of every kernel."""
    return {name: analyse(body) for name, body in kernel_bodies(ptx).items()}
