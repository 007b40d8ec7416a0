"""Processes that may hang, crash or print anything: each with a limit, and dead with all it began.

A process leads a group of its own. Whatever ends it, the limit included, the whole group is killed:
one that lived on would keep the GPU busy under every later measurement.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_LAST_WORDS_S = 2.0  # for the traceback that SIGABRT makes Python's faulthandler print
_REAP_S = 5.0  # a process in an uninterruptible call of the driver may never end
_KEPT_LINES = 10
_TRACEBACKS = ("Fatal Python error", "Timeout (")  # what faulthandler begins with


class End(NamedTuple):
    """How a process ended: "" in order, "exit status 3", "SIGSEGV", "stopped after 5 s"; what it
    last said before a traceback; its last lines; whether its own limit ended it."""

    how: str
    said: str
    tail: list[str]
    is_late: bool

    def text(self) -> str:
        said = f"; it last said: {self.said}" if self.said else ""
        return (self.how or "it ended early") + said


def run(command: Sequence[str], seconds: float, log: Path) -> End:
    """Runs a command, and appends all that it prints to a file."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    is_late = False
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            how = _name_of(process.wait(max(1.0, seconds)))
        except subprocess.TimeoutExpired:
            how, is_late = f"stopped after {seconds:.0f} s", True
            _kill(process, signal.SIGABRT, _LAST_WORDS_S)
        finally:
            _kill(process, signal.SIGKILL, _REAP_S)
    with log.open("rb") as printed:
        printed.seek(start)
        lines = [_plain(line) for line in printed.read().splitlines()]
    lines = [line for line in lines if line.strip()]
    ends = [at for at, line in enumerate(lines) if line.startswith(_TRACEBACKS)]
    if ends and lines[ends[0]].startswith("Timeout ("):  # child.py's, of an item
        how = f"stopped after its limit, {lines[ends[0]][len('Timeout (') :].rstrip('!)')}"
    said = lines[: ends[0]] if ends else lines
    tail = [*said[-_KEPT_LINES:], *lines[len(said) : len(said) + _KEPT_LINES]]
    return End(how, said[-1].strip() if said else "", tail, is_late)


def _name_of(status: int) -> str:
    if status >= 0:
        return f"exit status {status}" if status else ""
    with suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"


def _kill(process: subprocess.Popen, number: int, seconds: float) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _plain(line: bytes) -> str:
    """Without what a terminal or a table would obey."""
    text = line.decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)
