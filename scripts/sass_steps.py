"""The shortest way round the main loop of a kernel that copies, multiplies and never stops: a step.

From the first ldmatrix through the copies of the next steps back to it, without what happens where
a tile begins or ends. Copies that a step has several of are those of its larger operand; what
brings an operand one by one is not on this way.
"""

import sass_loops
from sass_loops import Instruction
from sass_paths import shortest

MATRIX_LOAD, COPY = "LDSM", "LDGSTS"
# Bytes of W that a warp instruction must be worth: an H100 issues four a clock on each SM, and its
# DRAM brings 13 bytes meanwhile. At most half of the slots leaves room for waits.
LEAST_BYTES = 2 * 13 / 4


def step_of(text: str) -> list[Instruction]:
    """Its instructions, in their order; [] of a kernel without such a loop."""
    instructions, labels = sass_loops.instructions_of(text)
    place = {each.address: at for at, each in enumerate(instructions)}
    main = [
        loop
        for loop in sass_loops.main_loops(sass_loops.loops_of(text))
        if loop.count(MATRIX_LOAD) and loop.count(COPY)
    ]
    if len(main) != 1:
        return []
    body = {place[each.address] for each in main[0].body}
    successors = [
        [each for each in after if each in body] if at in body else []
        for at, after in enumerate(sass_loops.successors_of(instructions, labels))
    ]
    first = min(at for at in body if instructions[at].opcode == MATRIX_LOAD)
    copies = {at for at in body if instructions[at].opcode == COPY}
    together = {at for at in copies if sum(at < other < at + 24 for other in copies) >= 2}
    out = shortest(successors, first, together)
    back = shortest(successors, out[-1], {first}) if out else []
    return [instructions[at] for at in (*out, *back[1:-1])] if back else []
