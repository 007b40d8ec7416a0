"""Whether an edit that is planted in a copy is the edit that its fault names.

In the copy `planted(...) ? ... : ...` and `if (planted(...)) ...` are followed as with one fault
planted. What is left must be the source with the old text replaced by the new: the same tree, but
for comments, brackets that a tree does not need, blocks in blocks, and #pragma.
"""

import re

from tree_sitter import Node

from emulated.mutants import edits
from emulated.mutants.faults.fault import Fault
from emulated.mutants.source import Source
from emulated.mutants.wrap import apply, planted

DROPPED = {"comment", "preproc_call"}
PLANTED = planted("").partition("(")[0].encode()
WHOLLY_PLANTED = re.compile(rb"\(*" + PLANTED + rb"\(\w+\)+")


def check(source: Source, faults: list[Fault]) -> None:
    """Raises ValueError where one of the edits of this source plants something else."""
    copy = source.parsed(apply(source.text, edits.wraps_of(source, faults)))
    known: dict[tuple[str, bytes], str] = {}
    for fault in faults:
        changes = [(old, new) for file, old, new in fault.edits if source.is_at(file)]
        if not changes:
            continue
        found = Planted(fault.name, known).form(copy)
        wanted = Planted("", known).form(source.parsed(edited(source.text, changes)))
        if found != wanted:
            at = max(0, edits.common(found, wanted) - 80)
            raise ValueError(
                f"{fault.name}: expected {source.path.name} with this fault to have\n"
                f"{wanted[at : at + 240]}\nas the edit says, but its copy has\n"
                f"{found[at : at + 240]}"
            )


def edited(text: str, changes: list[tuple[str, str]]) -> str:
    places = sorted((text.index(old), old, new) for old, new in changes)
    for at, old, new in reversed(places):
        text = text[:at] + new + text[at + len(old) :]
    return text


class Planted:
    """Trees as text, as with one fault planted.

    Args:
        known: by type and text, those in which nothing is planted.
    """

    def __init__(self, fault: str, known: dict[tuple[str, bytes], str]) -> None:
        self.condition = planted(fault).encode()
        self.known = known

    def form(self, node: Node) -> str:
        if PLANTED in node.text:
            return self.new_form(node)
        key = node.type, node.text
        if key not in self.known:
            self.known[key] = self.new_form(node)
        return self.known[key]

    def new_form(self, node: Node) -> str:
        if not node.children:
            return node.text.decode()
        parts = [self.form(each) for child in node.children for each in self.left_of(child)]
        if node.type == "parenthesized_expression":
            return " ".join(parts[1:-1])
        return f"{node.type}({' '.join(parts)})"

    def left_of(self, node: Node) -> list[Node]:
        """What stands in the place of a node: itself, what is in one branch of it, or nothing."""
        if node.type in DROPPED:
            return []
        condition = node.child_by_field_name("condition")
        if condition is not None and WHOLLY_PLANTED.fullmatch(condition.text):
            chosen = self.condition in condition.text
            branch = node.child_by_field_name("consequence" if chosen else "alternative")
            if branch is not None and branch.type == "else_clause":
                branch = branch.named_children[0]
            return [branch] if node.type == "conditional_expression" else self.inside(branch)
        if node.type == node.parent.type == "compound_statement":
            return self.inside(node)
        return [node]

    def inside(self, block: Node | None) -> list[Node]:
        return [] if block is None else [n for c in block.named_children for n in self.left_of(c)]
