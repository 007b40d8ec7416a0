"""What a warp executes of a kernel where nothing is rare: shortest ways through its instructions.

Of a kernel that dequantises the way past its 16-byte stores, which is what a tile takes; of
lora_decode the way round its main loop, which is a step.
"""

import networkx as nx
import sass_loops
from sass_loops import Instruction, graph_of

STORES, MATRIX_LOAD, COPY = "STG", "LDSM", "LDGSTS"
# Bytes of W that a warp instruction must be worth: an H100 issues four a clock on each SM, and its
# DRAM brings 13 bytes meanwhile. At most half of the slots leaves room for waits.
LEAST_BYTES = 2 * 13 / 4


def is_wide_store(instruction: Instruction) -> bool:
    return instruction.opcode == STORES and ".128" in instruction.suffix


def shortest(graph: nx.DiGraph, start: int, ends: set[int]) -> list[int]:
    """Indices from the start to the nearest of the ends, both included; [] if none is reached."""
    ways = nx.single_source_shortest_path(graph, start)  # the nearest first
    return next((way for at, way in ways.items() if at in ends), [])


def tile_of(text: str) -> list[Instruction]:
    """The instructions of the way past the stores, in their order; [] without one."""
    instructions, graph = graph_of(text)
    graph = graph.copy()
    for at, each in enumerate(instructions):
        if each.opcode == "BRA" and ".DIV" in each.suffix:  # taken by a warp that is not whole
            graph.remove_edges_from([(at, to) for to in graph[at] if to != at + 1])
    stores = {at for at, each in enumerate(instructions) if is_wide_store(each)}
    exits = {at for at, each in enumerate(instructions) if each.opcode == "EXIT"}
    first = shortest(graph, 0, stores)
    rest = shortest(graph, first[-1], exits) if first else []
    return [instructions[at] for at in (*first, *rest[1:])] if rest else []


def step_of(text: str) -> list[Instruction]:
    """The way round the main loop, in its order; [] of a kernel without one that copies.

    From the first ldmatrix through the copies of the next steps back to it, without what happens
    where a tile begins or ends. Copies that a step has several of are those of its larger operand;
    what brings an operand one by one is not on this way.
    """
    instructions, graph = graph_of(text)
    place = {each.address: at for at, each in enumerate(instructions)}
    main = [
        loop
        for loop in sass_loops.main_loops(sass_loops.loops_of(text))
        if loop.count(MATRIX_LOAD) and loop.count(COPY)
    ]
    if len(main) != 1:
        return []
    body = {place[each.address] for each in main[0].body}
    graph = graph.subgraph(body).copy()
    first = min(at for at in body if instructions[at].opcode == MATRIX_LOAD)
    copies = {at for at in body if instructions[at].opcode == COPY}
    together = {at for at in copies if sum(at < other < at + 24 for other in copies) >= 2}
    out = shortest(graph, first, together)
    back = shortest(graph, out[-1], {first}) if out else []
    return [instructions[at] for at in (*out, *back[1:-1])] if back else []
