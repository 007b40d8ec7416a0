"""A step of a main loop as the replay takes it: its instructions in short, and what they need."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sass_control import Control, control_named
from sass_loops import Instruction
from sass_pipes import INTEGER_CYCLES, SHARED_BYTES, SMSPS, Card, kind_of, shared_cycles


@dataclass(frozen=True)
class Op:
    """An instruction as far as the replay knows it; "hmma:2048/2q0" is one in short."""

    kind: str
    control: Control

    @property
    def text(self) -> str:
        return f"{self.kind}/{self.control.text}"

    @functools.cached_property
    def name(self) -> str:
        return self.kind.partition(":")[0]


def op_of(instruction: Instruction) -> Op:
    control, more = instruction.control, re.search(r"\{([\d,]+)\}", instruction.operands)
    if instruction.opcode == "DEPBAR" and more:
        control = replace(control, waits=(*control.waits, *map(int, more[1].split(","))))
    return Op(kind_of(instruction), control)


def op_named(text: str) -> Op:
    kind, _, control = text.partition("/")
    return Op(kind, control_named(control))


@dataclass(frozen=True)
class Ring:
    """Stages that a producer fills; a wgmma kernel's consumers wait for them and release them."""

    stages: int
    l2_bytes: int  # of a stage, which L2 sends for one SM
    multicast_bytes: int = 0  # of it, which L2 sends for another block of the cluster


@dataclass(frozen=True)
class Replayed:
    """A step of the loop, in cycles of an SMSP: as replayed, and what each resource needs of it."""

    cycles: float
    needs: dict[str, float]

    @property
    def tensor(self) -> float:
        return self.needs["tensor"]

    @property
    def efficiency(self) -> float:
        return self.tensor / self.cycles

    @property
    def bound(self) -> str:
        """What needs nine tenths of the step or more; else latencies that nothing hides."""
        most = max(self.needs, key=lambda name: self.needs[name])
        return most if self.needs[most] >= 0.9 * self.cycles else "latency"


def tensor_cycles(op: Op, card: Card) -> float:
    size = int(op.kind.split(":")[1])
    if op.name == "hmma":
        return size / card.products
    return 64 * 16 * size / SMSPS / card.wgmma_products


def operand_cycles(op: Op) -> float:
    """Of the memory pipe, while wgmma reads 64 x 16 and n x 16 halves for all four SMSPs."""
    if op.name != "hgmma":
        return 0.0
    return 2 * 16 * (64 + int(op.kind.split(":")[1])) / SHARED_BYTES


def fill_cycles(ring: Ring) -> float:
    return (ring.l2_bytes + ring.multicast_bytes) / SHARED_BYTES


def needs_of(
    ops: Sequence[Op], warps: int, card: Card, blocks: int, ring: Ring | None
) -> dict[str, float]:
    """Cycles of an SMSP that each resource is busy for in a step of all its warps."""
    found = dict.fromkeys(("tensor", "issue", "shared", "L2", "integer"), 0.0)
    for op in ops:
        found["issue"] += warps
        if op.name in ("hmma", "hgmma"):
            found["tensor"] += warps * tensor_cycles(op, card)
            found["shared"] += warps * operand_cycles(op)
        elif op.name in ("ldsm", "stsm", "lds", "sts"):
            found["shared"] += warps * SMSPS * shared_cycles(op.kind)
        elif op.name in ("ldgsts", "ldg"):
            found["L2"] += warps * SMSPS * 32 * int(op.kind.split(":")[1]) / card.l2_bytes
            if op.name == "ldgsts":
                found["shared"] += warps * SMSPS * shared_cycles(op.kind)
        elif op.name == "int":
            found["integer"] += warps * INTEGER_CYCLES
    if ring:
        found["L2"] += blocks * ring.l2_bytes / card.l2_bytes
        found["shared"] += blocks * fill_cycles(ring)
    return found
