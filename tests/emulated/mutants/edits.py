"""Faults that are edits of the text, planted at run time like those of the rules.

Of each edit the smallest expression, or run of statements, that holds all of the change stands
twice in the instrumented copy: as it is, and as edited. So one binary has all of them. Where the
text that an edit expects is gone, or no longer the only one of its kind, there is an error.
"""

import re
from dataclasses import dataclass

from tree_sitter import Node

from emulated.mutants.faults.fault import Fault
from emulated.mutants.source import Source, is_constant
from emulated.mutants.wrap import Wrap, planted

VALUES = re.compile(r"(?:.*_)?(?:expression|literal|identifier)$|true$|false$|nullptr$|null$")
NO_VALUES = {
    "lambda_expression",
    "type_identifier",
    "namespace_identifier",
    "field_identifier",
    "fold_expression",
    "literal_suffix",
}


@dataclass
class Change:
    """Edits of one fault as (start, end, new text), and the span that stands twice for them."""

    fault: str
    edits: list[tuple[int, int, str]]
    start: int
    end: int
    is_value: bool

    def overlaps(self, other: "Change") -> bool:
        return self.start < other.end and other.start < self.end

    def widen(self, other: "Change") -> None:
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)
        self.is_value = self.is_value and other.is_value

    def wrap(self, source: Source) -> Wrap:
        condition = planted(self.fault)
        text, last = "", self.start
        for start, end, new in sorted(self.edits):
            text += source.text[last:start] + new
            last = end
        edited = one_line(text + source.text[last : self.end])
        if self.is_value:
            before, after = f"({condition} ? ({edited}) : (", "))"
        elif self.start == self.end:  # nothing but an insertion
            before, after = f"if ({condition}) {{ {edited} }} ", ""
        else:
            before, after = f"if ({condition}) {{ {edited} }} else {{ ", " }"
        return Wrap(self.start, self.end, before, after, (self.fault,))


def wraps_of(source: Source, faults: list[Fault]) -> list[Wrap]:
    """Of the edits of one file."""
    changes: list[Change] = []
    for fault in faults:
        for file, old, new in fault.edits:
            if source.is_at(file):
                changes.append(change_of(source, fault.name, old, new))
    settled = False
    while not settled:
        settled = settle(changes)
    return [change.wrap(source) for change in changes]


def settle(changes: list[Change]) -> bool:
    """Makes one of two of a fault, and one span the larger where two overlap; whether none did."""
    for i, one in enumerate(changes):
        for other in changes[i + 1 :]:
            if not one.overlaps(other):
                continue
            if one.fault == other.fault:
                one.edits += other.edits
                one.widen(other)
                changes.remove(other)
                return False
            if one.start < other.start < one.end < other.end or (
                other.start < one.start < other.end < one.end
            ):
                one.widen(other)
                return False
    return True


def change_of(source: Source, fault: str, old: str, new: str) -> Change:
    count = source.text.count(old)
    if count != 1:
        raise ValueError(
            f"{fault}: expected to find this once in {source.path.name}, but found {count}:\n{old}"
        )
    at = source.text.index(old)
    before = common(old, new)
    after = common(old[before:][::-1], new[before:][::-1])
    start, end = at + before, at + len(old) - after
    edit = (start, end, new[before : len(new) - after])
    if not is_balanced(edit[2]) or not is_balanced(source.text[start:end]):
        # What both have in common belongs to different statements.
        start, end = at + len(old) - len(old.lstrip()), at + len(old.rstrip())
        edit = (start, end, new.strip())
    node = value_around(source, *edit) if ";" not in edit[2] else None
    if node is not None:
        return Change(fault, [edit], node.start_byte, node.end_byte, is_value=True)
    return Change(fault, [edit], *statements_around(source, *edit), is_value=False)


def is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def common(one: str, other: str) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def one_line(text: str) -> str:
    """The same code on one line, so that what follows keeps its line."""
    return " ".join(re.sub(r"//[^\n]*|^\s*#[^\n]*", "", text, flags=re.M).split())


def value_around(source: Source, start: int, end: int, new: str) -> Node | None:
    """The smallest expression that holds the span, can stand behind ?: with another, and is one
    with the new text, too: x in `a * x` is none of b * c, since a * b * c is (a * b) * c."""
    edited = source.parsed(source.text[:start] + new + source.text[end:])
    node = source.tree.descendant_for_byte_range(start, max(start, end - 1))
    if node.start_byte > start or node.end_byte < end:
        node = source.tree.descendant_for_byte_range(start, end)
    while node is not None:
        if node.type.endswith("statement") or node.type == "declaration":
            return None
        if (
            is_value(node)
            and node.start_byte <= start
            and end <= node.end_byte
            and not is_constant(node)
            and is_one(edited, node.start_byte, node.end_byte + len(new) - (end - start))
        ):
            return node
        node = node.parent
    return None


def is_one(tree: Node, start: int, end: int) -> bool:
    """Whether the text from start to end is a node, or a run of brackets around one."""
    node = tree.named_descendant_for_byte_range(start, end)
    return (node.start_byte, node.end_byte) == (start, end)


def is_value(node: Node) -> bool:
    if not VALUES.match(node.type) or node.type in NO_VALUES or node.parent is None:
        return False
    parent = node.parent
    field = next(
        (parent.field_name_for_child(i) for i, each in enumerate(parent.children) if each == node),
        None,
    )
    if parent.type == "expression_statement":
        return False  # it may have no value
    if parent.type == "call_expression" and field == "function":
        return False
    if parent.type == "assignment_expression" and field == "left":
        return False
    if parent.type in {"qualified_identifier", "template_function", "field_expression"}:
        return False
    return field not in {"declarator", "type", "name"}


def statements_around(source: Source, start: int, end: int, new: str) -> tuple[int, int]:
    """The statements of one block that the span touches, to the block's end if one declares."""
    block = source.tree.descendant_for_byte_range(start, end)
    while block.type != "compound_statement" or not (
        block.start_byte < start and end < block.end_byte
    ):
        block = block.parent
        if block is None:
            raise ValueError(f"{source.path.name}: no function holds the text at {start}:\n{new}")
    inside = [child for child in block.named_children if child.type != "comment"]
    touched = [each for each in inside if each.end_byte > start and each.start_byte < end]
    following = [each for each in inside if each.start_byte >= end]
    if not touched and following and not re.search(r"[;}]$", new.strip()):
        touched = following[:1]  # the insertion is the head of this statement
    if touched:
        first, last = touched[0].start_byte, touched[-1].end_byte
    else:
        first = last = following[0].start_byte if following else block.end_byte - 1
    if any(each.type == "declaration" for each in touched) or declares(new):
        last = block.end_byte - 1
    if source.text[first] == "#":  # a directive stands alone on its line
        before = [each.end_byte for each in inside if each.end_byte <= first]
        first = before[-1] if before else block.start_byte + 1
        last = max(first, last) if touched else first
    return first, last


def declares(text: str) -> bool:
    return (
        re.search(r"(?:^|[;{]\s*)(?:const |auto |u?int\d*_t |int |bool |float )", text) is not None
    )
