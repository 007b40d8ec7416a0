"""The shortest way through a kernel that passes its 16-byte stores: what a tile of it takes.

Of a kernel without a main loop, that is what a warp executes where nothing is left over.
"""

from collections import deque

from sass_loops import Instruction, instructions_of, successors_of

LOADS, STORES = "LDG", "STG"


def is_wide_store(instruction: Instruction) -> bool:
    return instruction.opcode == STORES and ".128" in instruction.suffix


def shortest(successors: list[list[int]], start: int, ends: set[int]) -> list[int]:
    """Indices from the start to the nearest of the ends, both included; [] if none is reached."""
    before = {start: start}
    waiting = deque([start])
    while waiting:
        at = waiting.popleft()
        if at in ends:
            path = [at]
            while path[-1] != start:
                path.append(before[path[-1]])
            return path[::-1]
        for each in successors[at]:
            if each not in before:
                before[each] = at
                waiting.append(each)
    return []


def tile_of(text: str) -> list[Instruction]:
    """The instructions of that way, in their order; [] without one."""
    instructions, labels = instructions_of(text)
    successors = successors_of(instructions, labels)
    for at, each in enumerate(instructions):
        if each.opcode == "BRA" and ".DIV" in each.suffix:  # taken by a warp that is not whole
            successors[at] = [at + 1]
    stores = {at for at, each in enumerate(instructions) if is_wide_store(each)}
    exits = {at for at, each in enumerate(instructions) if each.opcode == "EXIT"}
    first = shortest(successors, 0, stores)
    rest = shortest(successors, first[-1], exits) if first else []
    return [instructions[at] for at in (*first, *rest[1:])] if rest else []
