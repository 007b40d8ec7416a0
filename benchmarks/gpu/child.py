"""Processes that may hang, crash or print anything: each with a limit, and dead with all it began.

A child leads a process group of its own. Whatever ends it, the limit included, the whole group is
killed: a grandchild that lived on would keep the GPU busy under every later measurement. What it
prints is read as it comes, so that a hang loses none of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
MARK = "@answer "  # before an answer, among all else that a child prints
_LOG_BYTES = 4 << 20
_LONGEST_LINE = 1 << 16
_POLL_S = 0.2
_LAST_WORDS_S = 2.0  # for the traceback that SIGABRT makes Python's faulthandler print
_REAP_S = 5.0  # a process in an uninterruptible call of the driver may never end
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


class Late(TimeoutError):
    """A child has met its limit."""


class Log:
    """A file of everything that children print, bounded; a full disk is no reason to stop."""

    def __init__(self, path: Path | None, most: int = _LOG_BYTES) -> None:
        self._file = None
        self._left = most
        if path is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8", errors="replace")

    def write(self, line: str) -> None:
        """Appends a line, at once."""
        if self._file is None or self._left <= 0:
            return
        self._left -= len(line) + 1
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError:
            self._file = None


def last_said(lines: Iterable[str]) -> str:
    """The last line before the traceback that Python's faulthandler ends a crash with."""
    said = ""
    for line in lines:
        if line.startswith("Fatal Python error"):
            break
        said = line.strip() or said
    return said


def _decoded(raw: bytes) -> str:
    """Without what a terminal or a table would obey."""
    text = raw.decode("utf-8", errors="replace").rstrip("\r")
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


def _alone() -> None:
    """In the child: it ends with its parent, and leaves no core file of a GPU's mapped memory."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Child:
    """A command in a process group of its own; leaving the `with` block kills the group.

    Raises:
        OSError: there is no such program.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Log | None = None,
        folder: Path = ROOT,
        asked: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """asked: whether `ask` will be used; else the child's input is empty."""
        self._log = log or Log(None)
        own = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **(environment or {})}
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **own},
            stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_alone,
        )
        self.pending = ""  # what has been printed of a line that has no end yet
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        with contextlib.suppress(OSError, ValueError):  # closed under the reader
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                *whole, rest = (rest + chunk).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    whole, rest = [*whole, rest], b""
                for raw in whole:
                    self._keep(raw)
                self.pending = _decoded(rest)
        if rest:
            self._keep(rest)
        self._lines.put(None)

    def _keep(self, raw: bytes) -> None:
        line = _decoded(raw)
        self._log.write(line)
        self._lines.put(line)

    def ask(self, line: str) -> None:
        """Sends a line; one that nobody reads any more is lost. It must fit a pipe, 64 KiB."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def no_more(self) -> None:
        """Ends the child's input."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def line(self, until: float) -> str | None:
        """The next line; None at the end of the child.

        Raises:
            Late: `time.monotonic()` reached `until`.
        """
        gone = False
        while True:
            left = until - time.monotonic()
            try:
                line = self._lines.get(timeout=max(0.0, min(_POLL_S, left)))
            except queue.Empty:
                if gone:  # it has ended, though something that it began holds its output open
                    return None
                gone = self._process.poll() is not None
                if left <= 0 and not gone:
                    raise Late from None
                continue
            if line is not None:
                return line
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, until - time.monotonic()))
                return None
            raise Late

    def last_words(self) -> list[str]:
        """Makes a child that is late say where it is: its Python's traceback, if it has one."""
        self._signal(signal.SIGABRT)
        lines: list[str] = []
        until = time.monotonic() + _LAST_WORDS_S
        with contextlib.suppress(Late):
            while (line := self.line(until)) is not None:
                lines.append(line)
        return lines

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kills the group; waits for the child, but not for ever."""
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)

    @property
    def end(self) -> str:
        """How the child ended: "", "exit status 3", "SIGSEGV"."""
        code = self._process.poll()
        if code is None:
            return "still running"
        if code >= 0:
            return f"exit status {code}" if code else ""
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
