"""Measurements in children: a hang or a fault costs one item, and no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import child
from .child import MARK, Child, Late, last_said
from .run import Run

START_S = 90.0  # until a child has imported torch and found the device
_TAIL, _KEPT = 15, 200  # lines of an answer; lines to find them in


@dataclass(frozen=True)
class Item:
    """What a child is asked for.

    Attributes:
        name: written before it begins.
        fields: of the task, as JSON.
        seconds: its limit.
    """

    name: str
    fields: dict[str, Any]
    seconds: float


@dataclass
class Answer:
    """What came of an item: the task's result, or an error and the last lines before it.

    Attributes:
        result: of the task; None after an error.
        error: what went wrong; a device's fault may come with a result.
        tail: the last lines that the child printed, after an error.
    """

    result: dict[str, Any] | None = None
    error: str = ""
    tail: list[str] = field(default_factory=list)


class CannotStart(RuntimeError):
    """Children end before they are ready."""


def answer_of(line: str) -> dict[str, Any] | None:
    """The answer in a line of a child's output, if it is one."""
    if not line.startswith(MARK):
        return None
    try:
        found = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@dataclass
class _Asked:
    """The state of one child's conversation."""

    item: Item | None = None
    tail: list[str] = field(default_factory=list)


def each(
    run: Run,
    task: str,
    items: Sequence[Item],
    until: float,
    ready: Callable[[Item], Item] = lambda item: item,
) -> Iterator[tuple[Item, Answer]]:
    """Asks children for the items in turn, one child for as many as it survives.

    Args:
        run: whose log and device. An item that is killed because the run ends has no answer.
        task: of child_tasks.py.
        items: what to ask for.
        until: no item begins later, as `time.monotonic()` counts.
        ready: called with an item that is about to begin; returns it with its last settings.

    Yields:
        Each item that began, with its answer.

    Raises:
        CannotStart: two children in a row ended before they could be asked for anything.
    """
    waiting, starts = list(items), 0
    until = min(until, run.hard_end)
    while waiting and time.monotonic() < until:
        command = [child.PYTHON, "-m", "benchmarks.gpu.child_tasks", task, run.device]
        asked = _Asked()
        try:
            with Child(command, run.log, asked=True) as process:
                for found in _conversation(run, process, waiting, until, ready, asked):
                    starts = 0
                    yield found
                how = process.end
        except OSError as error:
            raise CannotStart(str(error)) from error
        if asked.item is None and waiting and time.monotonic() < until:
            starts += 1
            if starts == 2 or how == "":
                last = asked.tail[-1] if asked.tail else "it printed nothing"
                raise CannotStart(f"a child for {task} ended before it was ready: {how}; {last}")


def _conversation(
    run: Run,
    process: Child,
    waiting: list[Item],
    until: float,
    ready: Callable[[Item], Item],
    asked: _Asked,
) -> Iterator[tuple[Item, Answer]]:
    """One child's part of the items, which it takes out of `waiting`."""
    limit = time.monotonic() + START_S
    while True:
        try:
            line = process.line(min(limit, run.hard_end))
        except Late:
            about = process.pending or last_said(asked.tail)
            asked.tail += process.last_words()
            if asked.item is None:
                asked.tail.append("it was not ready in time")
            elif time.monotonic() < run.hard_end:
                stopped = f"stopped after {asked.item.seconds:.0f} s"
                yield asked.item, _error(stopped, about, asked.tail)
            return
        if line is None:
            if asked.item is not None:
                how = process.end or "it ended without an answer"
                yield asked.item, _error(how, last_said(asked.tail), asked.tail)
            return
        answer = answer_of(line)
        if answer is None or bool(answer.get("ready")) != (asked.item is None):
            if line:
                asked.tail = [*asked.tail[-_KEPT:], line]
            continue
        if asked.item is not None:
            error = str(answer.get("fault") or answer.get("error") or "")
            result = answer.get("result")
            if not isinstance(result, dict):
                result, error = None, error or "an answer without a result"
            yield asked.item, Answer(result, error, asked.tail[-_TAIL:] if error else [])
            asked.tail = []
            if answer.get("fault"):
                return
            asked.item = None
        if not waiting or time.monotonic() >= until:
            waiting.clear()
            process.no_more()
            return
        item = asked.item = ready(waiting.pop(0))
        run.say(f"{item.name} ...")
        limit = time.monotonic() + item.seconds
        process.ask(json.dumps(item.fields))


def _error(what: str, about: str, tail: list[str]) -> Answer:
    """about: the last line before the end."""
    return Answer(None, f"{what}; it last said: {about.strip()}" if about else what, tail[-_TAIL:])
