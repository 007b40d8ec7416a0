"""The way that a warp takes through a main loop once it is under way.

From the loop's head back to it, past as many products as there are, then past as many copies, and
then by as few instructions: neither the first step nor the last, no edge of a matrix, no mask that
is drawn once a tile, no second try of a wait. Loads to registers are copies only where a loop has
no others: elsewhere rare ways have them.

Stores to shared memory come behind asynchronous copies where these bring most bytes. A way for
operands at odd addresses stores each element, so by count it would be the fullest: lora_decode's
has 15 STS and none of W's four LDGSTS, but it is taken by such factors alone. That loop has 112
bytes of LDGSTS a lane and 32 of STS, the one of an element-wise lora_grouped_gemm 32 and 50.
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

COPIES = {"LDGSTS", "LDSM", "UTMALDG", "BAR"}
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of a lane; else 4

Worth = tuple[int, ...]


def worth_of(instructions: list[Instruction], wanted: list[set[str]]) -> Worth:
    found = [sum(each.opcode in opcodes for each in instructions) for opcodes in wanted]
    return (*found, -len(instructions))


def bytes_of(loop: Loop, opcode: str) -> int:
    """That a lane moves by these instructions."""
    suffixes = [each.suffix.split(".") for each in loop.body if each.opcode == opcode]
    return sum(next((WIDTHS[word] for word in words if word in WIDTHS), 4) for words in suffixes)


def wanted_of(loop: Loop) -> list[set[str]]:
    """Opcodes that a step has, the first of most weight: products, what brings operands, stores."""
    if loop.count("UTMALDG") or bytes_of(loop, "LDGSTS") > bytes_of(loop, "STS"):
        return [MATRIX, COPIES, {"STS"}]
    return [MATRIX, COPIES | {"STS"} if loop.count("LDGSTS") else COPIES | {"STS", "LDG"}, set()]


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
    wanted = wanted_of(loop)
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
            own = worth_of([instructions[at] for at in blocks[block]], wanted)
            best[block] = (tuple(map(sum, zip(worth, own, strict=True))), following)
    if head not in best:  # entered at two places
        return list(loop.body)
    path, at = [], head
    while at is not None:
        path += [instructions[index] for index in blocks[at]]
        at = best[at][1]
    return path
