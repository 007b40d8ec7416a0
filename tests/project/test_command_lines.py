"""Command lines parse alike under every Python that we support."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("benchmarks", "emulator", "lora_ext", "scripts", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "add_argument(" in path.read_text()
]


def lists_with_choices(source: str) -> list[int]:
    """The lines of positional arguments that may be absent, and have choices.

    Before Python 3.12, argparse looks for the empty list that stands for their absence among the
    choices, and ends the program.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            options = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
            name = getattr(node.args[0], "value", "") if node.args else ""
            if options.get("nargs") == "*" and "choices" in options and name[:1] != "-":
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_list_of_choices_may_be_absent(path):
    assert lists_with_choices(path.read_text()) == []


def test_one_is_seen():
    add = "parser.add_argument({}, nargs={}, choices=[1])"
    assert lists_with_choices(add.format("'arch'", "'*'")) == [1]
    assert lists_with_choices(add.format("'--arch'", "'*'")) == []
    assert lists_with_choices(add.format("'arch'", "'+'")) == []
