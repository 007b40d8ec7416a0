"""The way that a warp takes through a main loop once it is under way.

From the loop's head back to it, past as many products as there are, then past as many asynchronous
copies, then past as much else of what a step does, and then by as few instructions: neither the
first step nor the last, no edge of a matrix, no mask that is drawn once a tile, no second try of a
wait. Loads to registers are copies only where a loop has no others: elsewhere rare ways have them.

Asynchronous copies come before all else: a way that copies element by element stores more often,
but is not what a step in the middle takes. lora_decode's for a factor at odd addresses has 15 STS
and none of W's four LDGSTS.
"""

from sass_loops import (
    MATRIX,
    Instruction,
    Loop,
    blocks_of,
    in_order,
    instructions_of,
    successors_of,
)

ASYNCHRONOUS = {"LDGSTS", "UTMALDG"}
OTHERS = {"LDSM", "STS", "BAR"}

Worth = tuple[int, ...]


def worth_of(instructions: list[Instruction], others: set[str]) -> Worth:
    counted = (MATRIX, ASYNCHRONOUS, others)
    found = [sum(each.opcode in opcodes for each in instructions) for opcodes in counted]
    return (*found, -len(instructions))


def steady_path(text: str, loop: Loop) -> list[Instruction]:
    """The instructions of that way, in their order."""
    instructions, labels = instructions_of(text)
    blocks, successors = blocks_of(successors_of(instructions, labels))
    addresses = {each.address for each in loop.body}
    inside = [instructions[block[0]].address in addresses for block in blocks]
    # The head is where the loop is entered: what follows a block outside.
    heads = {
        each
        for block, after in enumerate(successors)
        for each in after
        if inside[each] and not inside[block]
    }
    heads = heads or {next(index for index, each in enumerate(inside) if each)}
    [head] = heads if len(heads) == 1 else [min(heads)]
    order = in_order(head, lambda block: [n for n in successors[block] if inside[n]])
    others = OTHERS if loop.count(*ASYNCHRONOUS) else OTHERS | {"LDG"}
    best: dict[int, tuple[Worth, int | None]] = {}
    for block in reversed(order):
        ways: list[tuple[Worth, int | None]] = []
        for each in successors[block]:
            if not inside[each]:
                continue
            if each == head:
                ways.append(((0, 0, 0, 0), None))
            elif each in best:  # else a jump back
                ways.append((best[each][0], each))
        if ways:
            worth, following = max(ways, key=lambda way: way[0])
            own = worth_of([instructions[at] for at in blocks[block]], others)
            best[block] = (tuple(map(sum, zip(worth, own, strict=True))), following)
    if head not in best:  # entered at two places
        return list(loop.body)
    path, at = [], head
    while at is not None:
        path += [instructions[index] for index in blocks[at]]
        at = best[at][1]
    return path
