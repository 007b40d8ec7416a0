r"""Patterns that choose modules by their dotted paths; none can hang, whatever it says.

    "q_proj", "attn.q_proj"   a name: the path, or its end at a dot, as in PEFT's lists
    "*_proj", "layers.?.q"    a glob (any of * ? [): `fnmatch.fnmatchcase` on the path or on its end
                              at a dot; * crosses dots
    "re:layers\.\d+\.mlp"     a regular expression for the whole path (`regex_syntax`)

PEFT's configs hold bare regular expressions; `full_match` and `peft_pattern` have their meanings.
A pattern and a path have at most 1024 characters, an automaton at most 4096 states, and the work is
the product of the two at most (`automaton`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Generic, TypeVar

from .automaton import Automaton, Budget
from .regex_syntax import ANY, NOT_NEWLINE, Assertion, Chars, Node, Repeat, Series, literal, parse

MAX_LENGTH = 1024
_STEPS_OF_ONE_MATCH = 8_000_000  # 4096 states for 1024 characters, each read and visited
_STEPS_OF_ONE_STATE = 64  # to make it, in time and in memory
_DOT = literal(".")


Value = TypeVar("Value")


def matches(pattern: str, path: str, budget: Budget | None = None) -> bool:
    """Whether the pattern chooses the module at `path`.

    Args:
        pattern: a name, a glob or ``"re:..."``.
        path: dotted path of a module.
        budget: for the steps of many matches together.

    Raises:
        ValueError: the pattern is not valid or too large, the path is too long, or the budget is
            spent.
    """
    _check_length("a pattern", pattern)
    if pattern.startswith("re:"):
        return _accepts(_expression(pattern[3:]), path, budget)
    if any(mark in pattern for mark in "*?["):
        return _accepts(_glob(pattern), path, budget)
    return is_name_of(pattern, path)


def is_name_of(name: str, path: str) -> bool:
    """Whether `name` is the path or its end at a dot."""
    return path == name or path.endswith(f".{name}")


def full_match(expression: str, path: str, budget: Budget | None = None) -> bool:
    """``re.fullmatch(expression, path)``: target_modules as a string in PEFT's config.

    Raises:
        ValueError: as `matches`.
    """
    return _accepts(_expression(expression), path, budget)


def peft_pattern(key: str, path: str, budget: Budget | None = None) -> bool:
    r"""``re.match(rf"(.*\.)?({key})$", path)``: PEFT's rank_pattern and alpha_pattern.

    Raises:
        ValueError: as `matches`.
    """
    return _ends(_peft_key(key), path, budget)


class PeftTable(Generic[Value]):
    """rank_pattern or alpha_pattern: the value of the first key that matches a path.

    Args:
        table: key -> value; as many as a config of bounded size holds.
        budget: for compiling the keys and for all look-ups.

    Raises:
        ValueError: a key is not valid or too large, or the budget is spent.
    """

    def __init__(self, table: Mapping[str, Value], budget: Budget) -> None:
        self._budget = budget
        self._size = len(table)
        self._exact: dict[str, tuple[int, Value]] = {}
        self._others: list[tuple[int, _Fixed | Automaton, Value]] = []
        for place, (key, value) in enumerate(table.items()):
            shape = _peft_shape(key)
            if isinstance(shape, Automaton):
                budget.spend(_STEPS_OF_ONE_STATE * len(shape))
            elif shape.only:
                self._exact.setdefault(shape.only, (place, value))
                continue
            self._others.append((place, shape, value))

    def get(self, path: str, default: Value) -> Value:
        """The value for the module at `path`."""
        end, found = self._exact.get(path, (self._size, default))
        for place, shape, value in self._others:
            if place > end:
                break
            if _ends(shape, path, self._budget):
                return value
        return found


class _Fixed:
    """An expression of one length, such as ``^model\\.layers\\.0\\.q_proj``, compared directly:
    configs with a rank for every layer hold hundreds of them.

    Attributes:
        only: the one path that it matches, "" if there are others.
    """

    def __init__(self, chars: tuple[Chars, ...], whole: bool) -> None:
        self.chars = chars
        self.whole = whole
        singles = ["".join(c.singles) for c in chars if c == Chars(c.singles)]
        self.only = "".join(singles) if whole and len(singles) == len(chars) else ""
        if len(self.only) != len(chars):  # [ab] is one of two
            self.only = ""

    def ends(self, path: str) -> bool:
        start = len(path) - len(self.chars)
        if start < 0 or (start > 0 and (self.whole or path[start - 1] != ".")):
            return False
        return all(chars.holds(char) for chars, char in zip(self.chars, path[start:], strict=True))


def _ends(shape: _Fixed | Automaton, path: str, budget: Budget | None) -> bool:
    if isinstance(shape, Automaton):
        return _accepts(shape, path, budget)
    if budget is not None:
        budget.spend(1)
    return shape.ends(path)


def _accepts(automaton: Automaton, path: str, budget: Budget | None) -> bool:
    _check_length("a module path", path)
    return automaton.accepts(path, budget or Budget("one match", _STEPS_OF_ONE_MATCH))


def _check_length(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"lora_ext.patterns: expected {what} to be a string, but got {text!r}")
    if len(text) > MAX_LENGTH:
        raise ValueError(
            f"lora_ext.patterns: expected {what} of at most {MAX_LENGTH} characters, but got "
            f"{len(text)}: {text[:40]!r}..."
        )


@lru_cache(maxsize=256)
def _expression(expression: str) -> Automaton:
    return _automaton(expression, _parsed(expression))


@lru_cache(maxsize=256)
def _peft_key(key: str) -> Automaton | _Fixed:
    return _peft_shape(key)


def _peft_shape(key: str) -> Automaton | _Fixed:
    node = _parsed(key)
    items = node.items if isinstance(node, Series) else (node,)
    whole = items[:1] == (Assertion("^"),)
    chars = items[1:] if whole else items
    chars = chars[:-1] if chars[-1:] == (Assertion("$"),) else chars
    if chars and all(isinstance(item, Chars) for item in chars):
        return _Fixed(tuple(item for item in chars if isinstance(item, Chars)), whole)
    return _automaton(key, _at_dot(node, NOT_NEWLINE))


@lru_cache(maxsize=256)
def _glob(glob: str) -> Automaton:
    items: list[Node] = []
    at = 0
    while at < len(glob):
        char = glob[at]
        at += 1
        close = glob.find("]", at + (2 if glob[at : at + 1] == "!" else 1))
        if char == "*":
            items.append(Repeat(ANY, 0, None))
        elif char == "?":
            items.append(ANY)
        elif char == "[" and close > 0:
            items.append(_glob_class(glob[at:close]))
            at = close + 1
        else:
            items.append(literal(char))
    return _automaton(glob, _at_dot(Series(tuple(items)), ANY))


def _glob_class(inside: str) -> Chars:
    negated = inside.startswith("!")
    inside = inside[negated:]
    singles, ranges = set(), []
    at = 0
    while at < len(inside):
        if inside[at + 1 : at + 2] == "-" and at + 2 < len(inside):
            ranges.append((inside[at], inside[at + 2]))
            at += 3
        else:
            singles.add(inside[at])
            at += 1
    return Chars(frozenset(singles), tuple(ranges), negated=negated)


def _at_dot(node: Node, before: Chars) -> Node:
    """The node for the whole path, or for its end at a dot."""
    return Series((Repeat(Series((Repeat(before, 0, None), _DOT)), 0, 1), node))


def _parsed(expression: str) -> Node:
    _check_length("a pattern", expression)
    try:
        return parse(expression)
    except ValueError as error:
        raise _invalid(expression, error) from None


def _automaton(pattern: str, node: Node) -> Automaton:
    try:
        return Automaton(node)
    except ValueError as error:
        raise _invalid(pattern, error) from None


def _invalid(pattern: str, error: ValueError) -> ValueError:
    return ValueError(
        "lora_ext.patterns: expected a pattern of literals, classes, groups, |, * + ? {m,n}, but "
        f"{pattern!r} has {error}; write module names or a simpler pattern"
    )
