"""How many blocks of a kernel share an SM, and whom a warp shares its quarter of it with.

As many as shared memory, registers and threads leave room for, but no more than the kernel's plan
launches: csrc/plan/decode_plan.cpp gives an SM one or two blocks of lora_decode, where an H100
would hold four.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sass_pipes import SMSPS
from sass_step import Op, Ring

# Shared memory of an SM and of a block at most, in bytes, for compiled code's smallest card.
SHARED = {"sm_80": (167936, 166912), "sm_90a": (233472, 232448)}
SHARED_OF_CONSUMER_CARDS = (102400, 101376)  # compute capability 8.6 and 8.9, which run sm_80 code
REGISTERS_PER_SM, THREADS_PER_SM = 65536, 2048
RESERVED_PER_BLOCK = 1024  # of shared memory, from compute capability 8.0 on
ROW_BYTES, LEFT_ROWS = 128, 128  # of a wgmma kernel's stage: 64 along k in halves, rows of P


class Launch(NamedTuple):
    """How an instance is launched, as csrc/kernel/ has it."""

    shared: int  # bytes of dynamic shared memory
    threads: int
    stages: int = 0  # of a wgmma kernel's ring
    resident: int = 0  # blocks that the plan gives to an SM at most; 0: as many as fit


def blocks_of(launch: Launch, registers: int, shared_per_sm: int, shared_per_block: int) -> int:
    """Blocks that an SM holds at a time; 0 if one does not fit."""
    if launch.shared > shared_per_block:
        return 0
    of_a_block = -(-registers * 32 // 256) * 256 * (launch.threads // 32)
    by_shared = shared_per_sm // (launch.shared + RESERVED_PER_BLOCK)
    return min(REGISTERS_PER_SM // of_a_block, by_shared, THREADS_PER_SM // launch.threads)


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


def residence_of(name: str, launch: Launch, fitting: int) -> Residence:
    """Of an instance of which so many blocks fit on an SM."""
    blocks = min(fitting, launch.resident or fitting)
    return Residence(launch.threads, blocks, launch.stages, "pingpong" in name)
