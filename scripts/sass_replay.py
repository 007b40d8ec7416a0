"""Replays a main loop: its instructions in order, by all warps that share a quarter of an SM.

The four SMSPs of an SM run the same code, so one is replayed, and what they share, the memory pipe
and the way from L2, is taken for four at once. A warp issues when ptxas' stalls and scoreboards let
it (sass_control.py), when the slot of its SMSP is free, one instruction a clock, and when the pipe
is; among warps that may, one that is a step behind, and else the one that issued last. Loads hold
their scoreboards until shared memory or L2 has answered; bar.sync joins the warps of a block; wgmma
runs beside its warps, in the order of their issue, and warps wait for its groups, or for a stage of
a ring to be filled.

Not replayed: instruction fetch, register banks, bank conflicts of shared memory, misses of L2,
clusters that wait for each other.
"""

import functools
import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sass_pipes import (
    BARRIER_LATENCY,
    CONVERT_CYCLES,
    CONVERT_LATENCY,
    INTEGER_CYCLES,
    MBARRIER_LATENCY,
    MEMBAR_LATENCY,
    PRODUCT_LATENCY,
    QUEUE,
    SHUFFLE_LATENCY,
    SMSPS,
    TMA_LATENCY,
    UNIFORM_CYCLES,
    WGMMA_DRAIN,
    Card,
    copy_latency,
    load_latency,
    read_latency,
    shared_cycles,
)
from sass_step import (
    Op,
    Replayed,
    Ring,
    fill_cycles,
    needs_of,
    operand_cycles,
    tensor_cycles,
)

STEPS, WARM = 32, 8  # that are replayed, and that do not count: more than a ring has stages


MEMORY = {"ldsm", "stsm", "lds", "sts", "ldg", "stg", "ldgsts"}
PIPES = {"imad": "float"}
CYCLES = {
    "int": INTEGER_CYCLES,
    "imad": INTEGER_CYCLES,
    "convert": CONVERT_CYCLES,
    "uniform": UNIFORM_CYCLES,
}
LATENCIES = {"convert": CONVERT_LATENCY, "mbarrier": MBARRIER_LATENCY, "membar": MEMBAR_LATENCY}


@dataclass
class _Warp:
    block: int
    at: int = 0
    step: int = 0
    ready: float = 0.0  # inf while it waits for others
    boards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    copies: float = 0.0  # the last of its asynchronous copies has arrived
    groups: list[float] = field(default_factory=list)  # of wgmmas: when they end
    products: float = 0.0  # the end of the group that is still open
    ends: list[float] = field(default_factory=list)  # of its steps


class _Smsp:
    """Its slot and pipes, and its share of the SM's."""

    def __init__(
        self,
        ops: Sequence[Op],
        card: Card,
        warps: list[_Warp],
        blocks: int,
        ring: Ring | None,
    ):
        self.ops, self.card, self.warps, self.ring = ops, card, warps, ring
        self.slot, self.tensor, self.port, self.link = 0.0, 0.0, 0.0, 0.0
        self.pipe_of = [
            "memory" if op.name in MEMORY else PIPES.get(op.name, op.name) for op in ops
        ]
        self.copies = 0  # so far
        self.pipes: dict[str, float] = {}
        self.queue: deque[float] = deque(maxlen=QUEUE)  # when the last of them were taken up
        self.arrivals: list[tuple[float, float]] = []  # of copies that write shared memory
        self.waiting: dict[int, list[tuple[_Warp, float]]] = {}  # at a block's barrier
        self.released: dict[tuple[int, int], list[float]] = {}  # a block's stages, by step
        self.filled: dict[tuple[int, int], float] = {}
        self.parked: list[tuple[_Warp, float]] = []  # for a stage
        self.first_try = next((i for i, op in enumerate(ops) if op.kind == "mbarrier:try"), None)
        # A stage is released by the step's last arrival, as many steps later as groups of wgmma may
        # be under way; where the loop itself loads, for the step's own stage.
        arrivals = [at for at, op in enumerate(ops) if op.kind == "mbarrier:arrive"]
        loads = [at for at, op in enumerate(ops) if op.name == "tma"]
        waits = [int(op.kind.split(":")[1]) for op in ops if op.name == "products"]
        self.release = next(iter(loads or arrivals[-1:]), None)
        self.lag = 1 if loads else next(iter(waits), 0)
        # A producer's stage is written while wgmma reads others: each product's share of that.
        products = len(warps) // blocks * sum(op.name == "hgmma" for op in ops)
        beside = ring is not None and products and not loads
        self.fill_of_product = fill_cycles(ring) / products if beside else 0.0
        self.last: _Warp | None = None

    def earliest(self, warp: _Warp) -> float:
        """When a warp could issue its next instruction."""
        time, pipe = max(warp.ready, self.slot), self.pipe_of[warp.at]
        if pipe == "hmma":
            return max(time, self.tensor)
        if pipe == "memory":
            return max(time, self.queue[0]) if len(self.queue) == QUEUE else time
        return max(time, self.pipes.get(pipe, 0.0))

    def run(self) -> None:
        while any(warp.step < STEPS for warp in self.warps):
            times = [(self.earliest(warp), warp.step, warp is not self.last) for warp in self.warps]
            chosen = min(range(len(times)), key=lambda index: times[index])
            if times[chosen][0] == math.inf:
                raise RuntimeError("expected a warp that can go on, but all wait for each other")
            self.last = self.warps[chosen]
            self.issue(self.last, times[chosen][0])

    def issue(self, warp: _Warp, time: float) -> None:
        op, control = self.ops[warp.at], self.ops[warp.at].control
        self.slot = time + 1
        done = self.execute(warp, op, time)
        if control.write is not None:
            warp.boards[control.write].append(done)
        if control.read is not None:
            taken = self.queue[-1] if op.name in MEMORY and self.queue else time
            warp.boards[control.read].append(taken + read_latency(op.kind))
        warp.at += 1
        if warp.at == len(self.ops):
            warp.at, warp.step = 0, warp.step + 1
            warp.ends.append(time)
        after = max(time + max(1, control.stall), self.ready_after(warp))
        if op.kind == "bar":
            self.join(warp, time, after)
        elif op.kind == "mbarrier:try" and self.ring and warp.at - 1 == self.first_try:
            self.parked.append((warp, after))
            warp.ready = math.inf
            self.unpark()
        else:
            warp.ready = after

    def execute(self, warp: _Warp, op: Op, time: float) -> float:
        """Takes the pipe, and says when the results are there."""
        name = op.name
        if name in MEMORY:
            return self.access(warp, op, time)
        if name == "hmma":
            self.tensor = time + tensor_cycles(op, self.card)
            return time + PRODUCT_LATENCY
        if name == "hgmma":
            reads = operand_cycles(op) + self.fill_of_product
            self.tensor = max(time, self.tensor) + max(tensor_cycles(op, self.card), reads)
            warp.products = self.tensor + WGMMA_DRAIN
            if op.kind.endswith(":last"):
                warp.groups.append(warp.products)
            return warp.products
        if name == "commit":
            return warp.copies
        if self.ring and warp.at == self.release:
            self.released.setdefault((warp.block, warp.step - self.lag), []).append(time)
            self.unpark()
        pipe = PIPES.get(name, name)
        self.pipes[pipe] = time + CYCLES.get(name, 1)
        if name == "float":
            self.pipes[pipe] = time + 32 / self.card.float_lanes
        if op.kind == "membar:wide":
            return time + 2 * self.card.l2_latency
        return time + LATENCIES.get(name, SHUFFLE_LATENCY)

    def access(self, warp: _Warp, op: Op, time: float) -> float:
        """An instruction of the memory pipe: its time in the queue, then shared memory or L2."""
        cycles = SMSPS * shared_cycles(op.kind)
        copy = op.name in ("ldgsts", "ldg", "stg")
        while self.arrivals and self.arrivals[0][0] <= max(time, self.port):
            arrived, writing = heapq.heappop(self.arrivals)
            self.port = max(self.port, arrived) + writing
        taken = max(time, self.port)
        self.queue.append(taken)
        self.port = taken + (SMSPS * 2 if copy else cycles)
        if not copy:  # half of the other SMSPs' come first
            return taken + (SMSPS - 1) / (2 * SMSPS) * cycles + load_latency(op.kind)
        if op.name == "stg":
            return taken + read_latency(op.kind)
        moved = 32 * int(op.kind.split(":")[1])
        self.link = max(self.link, taken) + SMSPS * moved / self.card.l2_bytes
        self.copies += 1
        arrived = self.link + copy_latency(self.card, self.copies)
        if op.name == "ldgsts":
            heapq.heappush(self.arrivals, (arrived, cycles))
            warp.copies = max(warp.copies, arrived)
        return arrived

    def ready_after(self, warp: _Warp) -> float:
        """When the scoreboards and groups that the next instruction waits for are free."""
        op = self.ops[warp.at]
        time = 0.0
        for board in op.control.waits:
            time = max([time, *warp.boards[board]])
            warp.boards[board] = []
        if op.name == "depbar":
            _, board, left = op.kind.split(":")
            held = sorted(warp.boards[int(board)])
            held = held[: len(held) - int(left)] if int(left) else held
            time = max([time, *held])
        elif op.name == "products":
            left = int(op.kind.split(":")[1])
            if len(warp.groups) > left:
                time = max(time, warp.groups[len(warp.groups) - left - 1])
        return time

    def join(self, warp: _Warp, time: float, after: float) -> None:
        waiting = self.waiting.setdefault(warp.block, [])
        waiting.append((warp, after))
        warp.ready = math.inf
        if len(waiting) == sum(each.block == warp.block for each in self.warps):
            for each, own in waiting:
                each.ready = max(own, time + BARRIER_LATENCY)
            waiting.clear()

    def unpark(self) -> None:
        """Warps whose stage's filling has a time by now."""
        left = []
        for warp, after in self.parked:
            filled = self.fill(warp.block, warp.step)
            if filled is None:
                left.append((warp, after))
            else:
                warp.ready = max(after, filled + MBARRIER_LATENCY, self.ready_after(warp))
        self.parked = left

    def fill(self, block: int, step: int) -> float | None:
        """When the stage of a step is full; None while it is not released yet."""
        assert self.ring
        if (block, step) not in self.filled:
            released = self.released.get((block, step - self.ring.stages), [])
            if step < self.ring.stages:
                released = [0.0]
            elif len(released) < sum(warp.block == block for warp in self.warps):
                return None
            begin = max(max(released), self.link)
            self.link = begin + self.ring.l2_bytes / self.card.l2_bytes
            self.filled[block, step] = self.link + TMA_LATENCY
        return self.filled[block, step]


@functools.cache
def replay(
    ops: tuple[Op, ...], warps: int, card: Card, blocks: int = 1, ring: Ring | None = None
) -> Replayed:
    """`warps` of an SMSP, of as many blocks: the mean step once the loop is under way."""
    # Blocks begin one after the other, a share of a step apart.
    all_warps = [_Warp(index * blocks // warps) for index in range(warps)]
    smsp = _Smsp(ops, card, all_warps, blocks, ring)
    smsp.run()
    steps = STEPS - WARM
    mean = sum(warp.ends[STEPS - 1] - warp.ends[WARM - 1] for warp in all_warps) / warps / steps
    needs = needs_of(ops, warps, card, blocks, ring)
    return Replayed(max(mean, needs["tensor"]), needs)  # wgmmas may lag behind the first steps
