r"""Regular expressions of a subset that is matched in linear time, whatever the expression.

    literals, escapes, `.`, classes, groups, |, * + ? {m,n} and their lazy forms, ^ $ \A \Z \b

An expression becomes a nondeterministic automaton (Thompson 1968), and a text is read once while
the set of states that can be reached is followed: length of the text times number of states, where
a backtracking matcher such as `re` can need exponential time. The sets met so far are remembered,
so that later texts cost one look-up for each character. The texts accepted are those that
`re.fullmatch` accepts, except that `$` and `\Z` both are the very end of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from .regex_syntax import Assertion, Chars, Choice, Node, Repeat, Series

MAX_STATES = 4096
_MAX_REMEMBERED = 65536  # states in the sets that are kept, about 4 MiB
_FINAL = 0


class Budget:
    """Steps that may be spent on one task, over all of its matches.

    One step is a character read, or a state of an automaton visited.

    Attributes:
        task: what the steps are spent on, for the message.
        limit: most steps.
        spent: steps so far.
    """

    def __init__(self, task: str, limit: int) -> None:
        self.task = task
        self.limit = limit
        self.spent = 0

    def spend(self, steps: int) -> None:
        """Adds to what was spent.

        Raises:
            ValueError: more than the limit.
        """
        self.spent += steps
        if self.spent > self.limit:
            raise ValueError(
                f"lora_ext.patterns: expected {self.task} to take at most {self.limit} steps, but "
                "got patterns that take more; use fewer and simpler ones, or plain module names"
            )


@dataclass
class _State:
    """A state that reads a character of `chars`, or reads nothing where `assertion` holds."""

    chars: Chars | None
    assertion: str
    then: tuple[int, ...]


class Automaton:
    """What decides whether a whole text is of the language of an expression.

    Args:
        node: the parsed expression.

    Raises:
        ValueError: the expression needs more than 4096 states.
    """

    def __init__(self, node: Node) -> None:
        self._states = [_State(None, "", ())]
        self._looks_back = False
        self._start = frozenset({self._build(node, _FINAL)})
        self._sets: dict[frozenset[int], frozenset[int]] = {}
        self._remembered = 0
        self._steps: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._states)

    def accepts(self, text: str, budget: Budget) -> bool:
        """Whether the expression matches all of `text`; the steps go on the budget."""
        reached = self._start
        before = ""
        for char in text:
            reached = self._read(reached, before, char, budget)
            if not reached:
                return False
            before = char
        return _FINAL in self._closure(reached, before, "", budget)

    def _read(
        self, reached: frozenset[int], before: str, char: str, budget: Budget
    ) -> frozenset[int]:
        budget.spend(1)
        key = (reached, before if self._looks_back else "", char)
        known = self._steps.get(key)
        if known is not None:
            return known
        following = set()
        for index in self._closure(reached, before, char, budget):
            state = self._states[index]
            if state.chars is not None and state.chars.holds(char):
                following.update(state.then)
        result = frozenset(following)
        result = self._sets.setdefault(result, result)
        self._remembered += 1 + len(result)
        if self._remembered > _MAX_REMEMBERED:
            self._steps.clear()
            self._sets.clear()
            self._remembered = 1 + len(result)
        self._steps[key] = result
        return result

    def _closure(
        self, reached: frozenset[int], before: str, after: str, budget: Budget
    ) -> set[int]:
        """The states that are reached from `reached` without reading a character."""
        closed = set(reached)
        waiting = list(reached)
        while waiting:
            state = self._states[waiting.pop()]
            if state.chars is None and _holds(state.assertion, before, after):
                waiting.extend(index for index in state.then if index not in closed)
                closed.update(state.then)
        budget.spend(len(closed))
        return closed

    def _add(self, chars: Chars | None, assertion: str, then: tuple[int, ...]) -> int:
        if len(self._states) >= MAX_STATES:
            raise ValueError(f"more than {MAX_STATES} states: its repetitions are too large")
        self._states.append(_State(chars, assertion, then))
        return len(self._states) - 1

    def _build(self, node: Node, then: int) -> int:
        """Adds the states of `node`, which go on to the state `then`; returns the first."""
        if isinstance(node, Chars):
            return self._add(node, "", (then,))
        if isinstance(node, Assertion):
            self._looks_back = True
            return self._add(None, node.kind, (then,))
        if isinstance(node, Series):
            for item in reversed(node.items):
                then = self._build(item, then)
            return then
        if isinstance(node, Choice):
            return self._add(None, "", tuple(self._build(item, then) for item in node.items))
        return self._build_repeat(node, then)

    def _build_repeat(self, node: Repeat, then: int) -> int:
        copies = node.least
        if node.most is None:
            loop = self._add(None, "", ())
            first = self._build(node.item, loop)
            self._states[loop].then = (first, then)
            then = first if copies else loop
            copies = max(0, copies - 1)
        else:
            after = then
            for _ in range(node.most - node.least):
                then = self._add(None, "", (self._build(node.item, then), after))
        for _ in range(copies):
            then = self._build(node.item, then)
        return then


def _holds(assertion: str, before: str, after: str) -> bool:
    if assertion == "^":
        return not before
    if assertion == "$":
        return not after
    if assertion == "b":
        return _is_word(before) != _is_word(after)
    return True


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
