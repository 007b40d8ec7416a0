"""Requests that a child process answers one after the other, each within a time limit."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO

# Time to import torch and to initialise a device, and for the host's work before each launch.
_START_S = 300.0
_HOST_S = 60.0


class CannotStart(RuntimeError):
    """The child ended or timed out before it began its first answer."""


class ChildLost(RuntimeError):
    """The child ended or timed out within an answer."""


def answers(
    code: str,
    request: object,
    timeout_s: float | None,
    begins: Callable[[str], object] = lambda name: None,
) -> Iterator[tuple[str, str]]:
    """Runs Python code that reads JSON and prints lines ``["begin"|"end", name, result]``.

    Yields each name and its result, and calls `begins` with the name before. The child imports the
    same modules as this process would, and reads the request from standard input. It is killed,
    with all processes that it has started, when the iteration ends. It need not answer everything:
    if it ends between answers, the iteration ends.

    Args:
        timeout_s: limit for an answer, besides a minute for the host; None: no limit.

    Raises:
        CannotStart: no answer was begun, so nothing is known about any name.
        ChildLost: what happened to the child, during the answer for the name that had begun.
    """
    limit = None if timeout_s is None else timeout_s + _HOST_S
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,
        )
        try:
            yield from _conversation(child, request, limit, begins, said)
        finally:
            _kill(child)


def _conversation(
    child: subprocess.Popen[str],
    request: object,
    limit: float | None,
    begins: Callable[[str], object],
    said: IO[str],
) -> Iterator[tuple[str, str]]:
    assert child.stdin is not None and child.stdout is not None
    stdout = child.stdout
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with stdout:
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    with suppress(BrokenPipeError), child.stdin:  # it may have ended; its output shows this
        json.dump(request, child.stdin)
    current, begun = "", False

    def failure(what: str) -> RuntimeError:
        if current:
            return ChildLost(f"the process that checked it {what}")
        return CannotStart(f"a process {what}")

    while True:
        wait = limit if begun else _START_S
        try:
            line = lines.get(timeout=wait)
        except queue.Empty:
            raise failure(f"said nothing for {wait:g} s") from None
        if line is None:
            break
        answer = _parsed(line)
        if answer is None:
            continue
        what, name, result = answer
        if what == "begin":
            begun, current = True, name
            begins(name)
        else:
            current = ""
            yield name, result
    code = child.wait()
    said.seek(0)
    last = said.read().strip().rpartition("\n")[2]
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    if current or not begun:
        raise failure(f"ended with {how}: {last}".removesuffix(": "))


def _parsed(line: str) -> list[str] | None:
    """The parsed line; None for a line that other code printed."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(answer, list) and len(answer) == 3 and answer[0] in ("begin", "end")
    return answer if fits else None


def _kill(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    # A process within a call of the driver ends only when the call does.
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=30)
