"""Sources of the kernels, parsed: tree-sitter's C++ grammar, behind CUDA's own words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tree_sitter
import tree_sitter_cpp
from tree_sitter import Node

from emulated.mutants.programs import CSRC

KERNELS = CSRC / "kernels"
PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_cpp.language()))
CUDA_WORDS = re.compile(
    rb"__(?:device|global|host|forceinline|grid_constant)__|__launch_bounds__\([^()]*\)"
    rb"|LORA_EXT_HOST_DEVICE"
)
ON_DEVICE = re.compile(r"__(?:device|global)__|LORA_EXT_HOST_DEVICE")
FUNCTION_NAME = {"identifier", "field_identifier", "operator_name"}


@dataclass(frozen=True)
class Source:
    """A file of csrc/. Offsets are those of its bytes, which are ASCII."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_bytes().decode("ascii")

    @cached_property
    def tree(self) -> Node:
        return self.parsed(self.text)

    def parsed(self, text: str) -> Node:
        """The tree of this text, or of another version of it."""
        # CUDA's words are no C++: blanks take their place, so that every offset stays.
        plain = CUDA_WORDS.sub(lambda word: b" " * len(word[0]), text.encode())
        root = PARSER.parse(plain).root_node
        if root.has_error:
            lines = sorted(
                {node.start_point.row + 1 for node in descendants(root) if node.is_error}
            )
            raise ValueError(f"{self.path}: expected C++, but cannot parse lines {lines}")
        return root

    def of(self, node: Node) -> str:
        return self.text[node.start_byte : node.end_byte]

    @property
    def stem(self) -> str:
        """The path within csrc/kernels/, or of another file its name, without the suffix."""
        path = self.path.with_suffix("")
        return str(path.relative_to(KERNELS)) if path.is_relative_to(KERNELS) else path.name

    def is_at(self, end: str) -> bool:
        return f"/{self.path.as_posix()}".endswith(f"/{end}")

    def device_functions(self) -> Iterator[Node]:
        for node in descendants(self.tree):
            if node.type == "function_definition" and self.is_on_device(node):
                yield node

    def is_on_device(self, function: Node) -> bool:
        before = function.prev_sibling
        start = before.end_byte if before is not None else function.parent.start_byte
        body = function.child_by_field_name("body")
        return ON_DEVICE.search(self.text, start, body.start_byte) is not None


def descendants(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from descendants(child)


def ancestors(node: Node) -> Iterator[Node]:
    while (node := node.parent) is not None:
        yield node


def name_of_function(function: Node) -> str:
    declarator = function.child_by_field_name("declarator")
    while declarator.type not in FUNCTION_NAME:
        inner = declarator.child_by_field_name("declarator")
        declarator = inner if inner is not None else declarator.named_children[-1]
    return declarator.text.decode()


def is_constant(node: Node) -> bool:
    """Whether the compiler evaluates it, so that nothing can change it at run time."""
    inside = node
    for outer in ancestors(node):
        if outer.type in {"static_assert_declaration", "template_argument_list", "enumerator"}:
            return True
        if outer.type in {"declaration", "field_declaration"} and b"constexpr" in (
            child.text for child in outer.children
        ):
            return True
        if outer.type == "if_statement" and inside == outer.child_by_field_name("condition"):
            return any(child.text == b"constexpr" for child in outer.children)
        if outer.type == "function_definition":
            return False
        inside = outer
    return False
