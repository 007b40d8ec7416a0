r"""The syntax of the regular expressions that `lora_ext.patterns.automaton` runs.

What is not of the subset, such as a backreference, is an error that names the construct and where
it stands. Meanings are those of Python's `re` for text: `\d \w \s` are Unicode's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

MAX_REPEAT = 64
_MAX_DEPTH = 64
_DIGITS = "0123456789"
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_GROUPS = {
    "=": "lookahead",
    "!": "lookahead",
    "<=": "lookbehind",
    "<!": "lookbehind",
    "P<": "named group",
    "P=": "backreference",
    "#": "comment",
    ">": "atomic group",
    "(": "conditional group",
}


@dataclass(frozen=True)
class Chars:
    """One character: one of `singles`, `ranges` and `classes` (d w s D W S), or none of them."""

    singles: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    classes: frozenset[str] = frozenset()
    negated: bool = False

    def holds(self, char: str) -> bool:
        inside = (
            char in self.singles
            or any(low <= char <= high for low, high in self.ranges)
            or any(_in_class(char, name) for name in self.classes)
        )
        return inside != self.negated


@dataclass(frozen=True)
class Assertion:
    """No character, but "^" the start of the text, "$" its end, or "b" a word's boundary."""

    kind: str


@dataclass(frozen=True)
class Series:
    """One item after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """Any one of the items."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """The item `least` to `most` times; without limit if `most` is None."""

    item: Node
    least: int
    most: int | None


Node = Chars | Assertion | Series | Choice | Repeat

ANY = Chars(negated=True)
NOT_NEWLINE = Chars(frozenset("\n"), negated=True)


@lru_cache(maxsize=1024)
def literal(char: str) -> Chars:
    return Chars(frozenset(char))


def parse(expression: str) -> Node:
    """The tree of an expression.

    Raises:
        ValueError: a construct is not of the subset, or not valid; the message is the end of a
            sentence, such as "a backreference at 3".
    """
    parser = _Parser(expression)
    node = parser.choice()
    if not parser.at_end():
        raise parser.error("an unbalanced ')'")
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def at_end(self) -> bool:
        return self.at >= len(self.text)

    def peek(self, count: int = 1) -> str:
        return self.text[self.at : self.at + count]

    def take(self, wanted: str) -> bool:
        found = self.text.startswith(wanted, self.at)
        self.at += len(wanted) * found
        return found

    def next(self) -> str:
        char = self.peek()
        self.at += 1
        return char

    def error(self, what: str) -> ValueError:
        return ValueError(f"{what} at {self.at}")

    def choice(self) -> Node:
        items = [self.series()]
        while self.take("|"):
            items.append(self.series())
        return items[0] if len(items) == 1 else Choice(tuple(items))

    def series(self) -> Node:
        items = []
        while not self.at_end() and self.peek() not in "|)":
            items.append(self.quantified())
        return items[0] if len(items) == 1 else Series(tuple(items))

    def quantified(self) -> Node:
        start = self.at
        item = self.atom()
        bounds = self.quantifier()
        if bounds is None:
            return item
        if isinstance(item, Assertion) and self.text[start] != "(":
            self.at = start
            raise self.error("a repeated assertion")
        if self.take("+"):
            raise self.error("a possessive quantifier")
        self.take("?")
        if self.quantifier() is not None:
            raise self.error("a multiple repeat")
        return Repeat(item, *bounds)

    def quantifier(self) -> tuple[int, int | None] | None:
        char = self.peek()
        if char in ("*", "+", "?"):
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        if char != "{":
            return None
        inside, closed, _ = self.text[self.at + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        if not closed or not inside or inside.strip(_DIGITS + ",") or "," in high:
            raise self.error("a brace that is no repetition (write \\{)")
        least = int(low or 0)
        most = int(high) if high else None if comma else least
        if max(least, most or 0) > MAX_REPEAT:
            raise self.error(f"a repetition of more than {MAX_REPEAT}")
        if most is not None and most < least:
            raise self.error("a repetition whose bounds are exchanged")
        self.at += len(inside) + 2
        return least, most

    def atom(self) -> Node:
        char = self.next()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char == "\\":
            return self.escape()
        if char == ".":
            return NOT_NEWLINE
        if char in "^$":
            return Assertion(char)
        if char in "*+?{":
            self.at -= 1
            raise self.error(f"a {char!r} with nothing to repeat")
        return literal(char)

    def group(self) -> Node:
        if self.take("?") and not self.take(":"):
            kinds = [name for key, name in _GROUPS.items() if self.peek(len(key)) == key]
            raise self.error(f"a {kinds[0] if kinds else 'flag'}")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.error(f"more than {_MAX_DEPTH} groups inside each other")
        node = self.choice()
        self.depth -= 1
        if not self.take(")"):
            raise self.error("a group that is not closed")
        return node

    def escape(self) -> Node:
        if self.peek() in ("A", "Z", "b"):
            return Assertion({"A": "^", "Z": "$", "b": "b"}[self.next()])
        name = self.escaped()
        return (
            Chars(classes=frozenset(name))
            if len(name) == 1 and _is_class(name)
            else (literal(name[-1]))
        )

    def escaped(self) -> str:
        """After a backslash: a class's letter, or a backslash and the character that is meant."""
        if self.at_end():
            raise self.error("a backslash with nothing after it")
        char = self.next()
        if _is_class(char):
            return char
        if char in _CONTROLS:
            return "\\" + _CONTROLS[char]
        if char in _DIGITS:
            raise self.error("a backreference")
        if char.isascii() and char.isalpha():
            raise self.error(f"the escape \\{char}")
        return "\\" + char

    def char_class(self) -> Node:
        negated = self.take("^")
        singles: set[str] = set()
        ranges: list[tuple[str, str]] = []
        classes: set[str] = set()
        first = True
        while first or self.peek() != "]":
            first = False
            low = self.class_item()
            if self.peek() == "-" and self.peek(2) != "-]":
                self.at += 1
                high = self.class_item()
                if _is_class(low) or _is_class(high) or high[-1] < low[-1]:
                    raise self.error("a range that is not valid")
                ranges.append((low[-1], high[-1]))
            elif _is_class(low):
                classes.add(low)
            else:
                singles.add(low[-1])
        self.at += 1
        return Chars(frozenset(singles), tuple(ranges), frozenset(classes), negated)

    def class_item(self) -> str:
        """A class's letter, or a backslash and the character that is meant."""
        if self.at_end():
            raise self.error("a class that is not closed")
        return self.escaped() if self.take("\\") else "\\" + self.next()


def _is_class(name: str) -> bool:
    return name in ("d", "w", "s", "D", "W", "S")


def _in_class(char: str, name: str) -> bool:
    if name.isupper():
        return not _in_class(char, name.lower())
    if name == "d":
        return char.isdecimal()
    if name == "w":
        return char.isalnum() or char == "_"
    return char.isspace()
