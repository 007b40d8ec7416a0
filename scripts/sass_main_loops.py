"""What a kernel's main loops need of an SM, and how long a step takes: the table of `make sass`.

Each loop that multiplies and has none within that does: its instructions by what they are for, the
cycles of its resources, the step as replayed (sass_replay.py), and how far copies and loads stand
among the products.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sass_loops
from sass_pipes import Card, category_of
from sass_replay import replay
from sass_residence import Residence
from sass_steady import steady_path
from sass_step import Op, op_of

LOADS, COPIES, PRODUCTS = {"ldsm", "lds"}, {"ldgsts", "ldg"}, {"hmma", "hgmma"}


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
