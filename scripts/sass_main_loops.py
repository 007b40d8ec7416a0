"""What a kernel's main loops need of an SM, and how long a step takes: the table of `make sass`.

Each loop that multiplies and has none within that does: its instructions by what they are for, the
cycles of its resources, the step as replayed (sass_replay.py), and how far copies and loads stand
among the products.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sass_loops
from sass_pipes import SMSPS, Card, category_of
from sass_replay import replay
from sass_steady import steady_path
from sass_step import Op, Ring, op_of

LOADS, COPIES, PRODUCTS = {"ldsm", "lds"}, {"ldgsts", "ldg"}, {"hmma", "hgmma"}
ROW_BYTES, LEFT_ROWS = 128, 128  # of a wgmma kernel's stage: 64 along k in halves, rows of P


@dataclass(frozen=True)
class MainLoop:
    """A loop, replayed on a card."""

    place: str  # addresses of its first and last instruction
    instructions: dict[str, int]  # of a warp's step, by category
    warps: int  # that share an SMSP
    needs: dict[str, float]  # cycles of a step, by resource
    cycles: float
    efficiency: float
    bound: str
    products_ahead: float  # between a load from shared memory and the wait for it, on average
    copies_among: float  # the share of copies that follow a product of their step

    @property
    def tensor(self) -> float:
        return self.needs["tensor"]


def products_ahead(ops: Sequence[Op]) -> float:
    """How many products a warp issues between a load and the first instruction that waits for it.

    0: all wait for the load before they multiply.
    """
    found = []
    for at, op in enumerate(ops):
        if op.name not in LOADS or op.control.write is None:
            continue
        later = [*ops[at + 1 :], *ops[: at + 1]]
        until = next(
            (i for i, each in enumerate(later) if op.control.write in each.control.waits), 0
        )
        found.append(sum(each.name in PRODUCTS for each in later[:until]))
    return sum(found) / len(found) if found else 0.0


def copies_among(ops: Sequence[Op]) -> float:
    """The share of the copies before which a product stands, counted from the step's barrier on."""
    barrier = next((at for at, op in enumerate(ops) if op.kind == "bar"), 0)
    step = [*ops[barrier:], *ops[:barrier]]
    copies = [at for at, op in enumerate(step) if op.name in COPIES]
    first = next((at for at, op in enumerate(step) if op.name in PRODUCTS), len(step))
    return sum(at > first for at in copies) / len(copies) if copies else 0.0


@dataclass(frozen=True)
class Residence:
    """Whom a loop shares the SM with."""

    threads: int  # of a block
    blocks: int  # of an SM
    stages: int = 0  # of a wgmma kernel's ring
    pingpong: bool = False

    @property
    def warps(self) -> int:
        """Of an SMSP, that run the loop at a time."""
        if self.stages:  # a producer, and two consumers, of which pingpong has one multiply
            return 1 if self.pingpong else 2
        return max(1, self.blocks) * self.threads // 32 // SMSPS

    def ring(self, ops: Sequence[Op]) -> Ring | None:
        """P's rows, and half of Q's; the cluster's other block loads the other half for both."""
        columns = [int(op.kind.split(":")[1]) for op in ops if op.name == "hgmma"]
        if not self.stages or not columns:
            return None
        half = ROW_BYTES * columns[0] // 2
        return Ring(self.stages, ROW_BYTES * LEFT_ROWS + half, half)


def residence_of(name: str, threads: int, blocks: int, stages: int = 0) -> Residence:
    return Residence(threads, blocks, stages, "pingpong" in name)


def main_loops_of(text: str, card: Card, residence: Residence) -> list[MainLoop]:
    """Of a kernel's disassembly, in the order of their addresses."""
    found = []
    for loop in sass_loops.main_loops(sass_loops.loops_of(text)):
        path = steady_path(text, loop)
        ops = tuple(op_of(each) for each in path)
        blocks = 1 if residence.stages else max(1, residence.blocks)
        done = replay(ops, residence.warps, card, blocks, residence.ring(ops))
        found.append(
            MainLoop(
                loop.place,
                dict(Counter(map(category_of, path))),
                residence.warps,
                {name: round(cycles, 1) for name, cycles in done.needs.items()},
                round(done.cycles, 1),
                round(done.efficiency, 4),
                done.bound,
                round(products_ahead(ops), 1),
                round(copies_among(ops), 2),
            )
        )
    return sorted(found, key=lambda each: int(each.place.split("-")[0], 16))
