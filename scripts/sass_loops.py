"""The loops of a kernel, from nvdisasm's text: which of them multiply, and what else they hold.

A loop is what leads back to a branch's target, if every path into it passes that target (a natural
loop of the graph of jumps). Addresses alone would not do: ptxas moves rare paths, such as the
second try of a wait, behind the rest, and their jumps back are no loops.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import networkx as nx  # which torch needs

LINE = re.compile(
    r"^(?P<label>[.$\w]+):\s*$"
    r"|^\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z0-9]+)(?P<suffix>[.\w]*)(?P<operands>[^;\n]*)",
    re.MULTILINE,
)
# A call of a label, not of a function, comes back to nobody: so ptxas leaves loops on sm_80.
JUMPS = {"BRA", "BRX", "JMP", "JMX", "WARPSYNC", "CALL"}
ENDS = {"EXIT", "RET"}
MATRIX = {"HMMA", "HGMMA"}
LOCAL = {"LDL", "STL"}
BARRIERS = {"BAR", "SYNCS"}  # __syncthreads and its like, and mbarriers
PLAIN_LOADS = {"LD", "LDG"}  # which a warp waits for, unlike LDGSTS


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    suffix: str  # ".64x256x16.F32.BF16"
    operands: str
    conditional: bool  # under a predicate, or with one among the operands of a jump

    @property
    def targets(self) -> list[str]:
        return re.findall(r"\.L\w+", self.operands) if self.opcode in JUMPS else []

    @property
    def divides(self) -> bool:
        """Of any division there is one reciprocal, or one call where the operands have 64 bits.

        ptxas has no division: of 32-bit integers it makes I2F, MUFU.RCP, F2I and some IMAD, of
        floats MUFU.RCP and a Newton step, of 64-bit integers a call of __cuda_sm20_div_*64 or
        __cuda_sm20_rem_*64. Division by a constant is a multiplication, and not among them.
        """
        if self.opcode == "CALL":
            return re.search(r"_(div|rem)_", self.operands) is not None
        return self.opcode == "MUFU" and self.suffix.startswith(".RCP")


@dataclass(frozen=True)
class Loop:
    """Instructions of a loop, in the order of their addresses."""

    body: tuple[Instruction, ...]

    @property
    def multiplies(self) -> bool:
        return self.count(*MATRIX) > 0

    def count(self, *opcodes: str) -> int:
        return sum(instruction.opcode in opcodes for instruction in self.body)

    @property
    def divisions(self) -> int:
        return sum(instruction.divides for instruction in self.body)

    @cached_property
    def addresses(self) -> frozenset[int]:
        return frozenset(each.address for each in self.body)

    def within(self, other: "Loop") -> bool:
        return self.addresses < other.addresses

    @property
    def place(self) -> str:
        return f"{self.body[0].address:04x}-{self.body[-1].address:04x}"


def instructions_of(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel's text, and which of them each label stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in LINE.finditer(text):
        if line["label"]:
            labels[line["label"]] = len(instructions)
            continue
        operands = line["operands"]
        # "BRA UP0, `(.L_x_1)" and "BRA.DIV UR4, `(.L_x_2)", but not "BRA `(.L_x_3)"
        conditional = line["predicate"] is not None or (
            line["opcode"] in JUMPS and not operands.lstrip().startswith(("`", "R"))
        )
        address = int(line["address"], 16)
        instructions.append(
            Instruction(address, line["opcode"], line["suffix"], operands, conditional)
        )
    return instructions, labels


def successors_of(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Which instructions may follow each, by index."""
    found = []
    for index, instruction in enumerate(instructions):
        after = [labels[name] for name in instruction.targets if name in labels]
        leaves = instruction.opcode in ENDS or (after and instruction.opcode != "WARPSYNC")
        if not leaves or instruction.conditional:
            after.append(index + 1)
        found.append([each for each in dict.fromkeys(after) if each < len(instructions)])
    return found


# Several questions are asked of one kernel after the other, whose answers take seconds.
@lru_cache(maxsize=1)
def graph_of(text: str) -> tuple[list[Instruction], nx.DiGraph]:
    """The instructions of a kernel's text; by index of those that are reached, which may follow."""
    instructions, labels = instructions_of(text)
    after = successors_of(instructions, labels)
    reached: set[int] = set()
    waiting = [0] if instructions else []
    while waiting:
        if (at := waiting.pop()) not in reached:
            reached.add(at)
            waiting += after[at]
    return instructions, nx.DiGraph({at: after[at] for at in sorted(reached)})


@lru_cache(maxsize=1)
def loops_of(text: str) -> list[Loop]:
    """The loops of a kernel's text; those with one head are one loop."""
    instructions, graph = graph_of(text)
    if not instructions:
        return []
    above = nx.immediate_dominators(graph, 0)
    order = {at: number for number, at in enumerate(nx.dfs_postorder_nodes(graph, 0))}
    bodies: dict[int, set[int]] = {}
    for tail, head in graph.edges:
        at = tail
        if order[head] >= order[tail]:  # else it leads on
            while at not in (head, 0):
                at = above[at]
        if at == head:  # every path to the tail passes it
            body, waiting = bodies.setdefault(head, {head}), [tail]
            while waiting:
                if (at := waiting.pop()) not in body:
                    body.add(at)
                    waiting += graph.pred[at]
    return [Loop(tuple(instructions[at] for at in sorted(body))) for body in bodies.values()]


def main_loops(loops: list[Loop]) -> Iterator[Loop]:
    """Those that multiply and have no loop within that does."""
    multiplying = [loop for loop in loops if loop.multiplies]
    for loop in multiplying:
        if not any(other.within(loop) for other in multiplying):
            yield loop


def behind_barriers(text: str, loop: Loop) -> tuple[list[Instruction], nx.DiGraph]:
    """The kernel's instructions, and which of a loop's may follow each behind a barrier.

    By index, up to the next product. All warps of a block stand at the barrier, so no other warp
    multiplies while they arrive.
    """
    instructions, graph = graph_of(text)
    before = [
        at
        for at, each in enumerate(instructions)
        if each.address in loop.addresses and each.opcode not in MATRIX
    ]
    graph = graph.subgraph(before).copy()
    barriers = {at for at in graph if instructions[at].opcode in BARRIERS}
    seen = barriers.union(*(nx.descendants(graph, at) for at in barriers))
    return instructions, graph.subgraph(seen).copy()


def waited_loads(instructions: list[Instruction], graph: nx.DiGraph) -> list[Instruction]:
    """Plain loads of a loop behind a barrier and before the next product, on whatever way."""
    return [instructions[at] for at in sorted(graph) if instructions[at].opcode in PLAIN_LOADS]


def round_trips(instructions: list[Instruction], graph: nx.DiGraph) -> int:
    """How often a warp waits for plain loads on a way from a barrier to the next product, at most.

    What is stored to shared memory has been waited for, and loads behind the store are the next
    round trip. A loop on the way is gone through once.
    """
    way = without_jumps_back(graph)
    # On the ways to each instruction: round trips if none, or some, of the last has been stored.
    under_way, stored = dict.fromkeys(way, 0), dict.fromkeys(way, 0)
    most = 0
    for at in nx.topological_sort(way):
        under_way[at] = max((under_way[each] for each in way.pred[at]), default=0)
        stored[at] = max((stored[each] for each in way.pred[at]), default=0)
        if instructions[at].opcode in PLAIN_LOADS:
            under_way[at] = max(under_way[at], stored[at] + 1)
        elif instructions[at].opcode == "STS":
            stored[at] = max(under_way[at], stored[at])
        most = max(most, under_way[at])
    return most


def waits(text: str, loop: Loop) -> tuple[int, int]:
    """How many plain loads a loop waits for, and in how many round trips."""
    behind = behind_barriers(text, loop)
    return len(waited_loads(*behind)), round_trips(*behind)


def without_jumps_back(graph: nx.DiGraph) -> nx.DiGraph:
    """What is left of a graph without the edges by which it has cycles."""
    on_the_way: set[int] = set()
    back = []
    for tail, head, kind in nx.dfs_labeled_edges(graph):
        if kind == "forward":
            on_the_way.add(head)
        elif kind == "reverse":
            on_the_way.discard(head)
        elif head in on_the_way:
            back.append((tail, head))
    left = nx.DiGraph(graph)
    left.remove_edges_from(back)
    return left
