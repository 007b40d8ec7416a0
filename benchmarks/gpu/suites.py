"""Tests in children: one that hangs, crashes or breaks the device costs itself, and no other."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import child
from .child import Child, Late
from .pytest_plugin import MARK
from .run import Run
from .stages import Result, missing, result_of

_KEPT_LINES = 40
_MOST_BROKEN = 10  # a build that breaks on every test need not be run on all
_NO_TESTS = 5  # pytest's exit status when it selects none
_BROKEN, _LATE = "a test ended its process", "late"


@dataclass
class Suite:
    """What is known of a suite's tests.

    Attributes:
        ended: id -> passed, failed or skipped.
        broken: id -> how it ended its process.
        current: the test that runs.
        lines: the last that were printed.
    """

    ended: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    current: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    def summary(self) -> str:
        """As pytest would say it."""
        counts = Counter(self.ended.values())
        found = [
            f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name]
        ]
        wrong = [name for name, outcome in self.ended.items() if outcome == "failed"]
        found += [f"{name} ended its process: {how}" for name, how in self.broken.items()]
        if wrong:
            found.append(f"failed: {', '.join(wrong[:3])}" + (" and others" if wrong[3:] else ""))
        return "; ".join(found) or "no test began"


def run_tests(
    run: Run,
    arguments: Sequence[str],
    seconds: float,
    test_s: float,
    under: Sequence[str] = (),
    before: dict[str, str] | None = None,
) -> Result:
    """Runs pytest, again without what ended its process, until all tests have run.

    Args:
        run: whose log.
        arguments: of pytest.
        seconds: for all of it; a suite that needs more goes on next time.
        test_s: for one test.
        under: a tool's command that pytest's own is appended to.
        before: what tests that ended in an earlier call came to.
    """
    until = time.monotonic() + max(1.0, seconds)
    suite = Suite(ended=dict(before or {}))
    how = _BROKEN
    while how == _BROKEN and len(suite.broken) < _MOST_BROKEN and time.monotonic() < until:
        try:
            how = _process(run, [*under, child.PYTHON], arguments, until, test_s, suite)
        except OSError as error:
            return missing(str(error))
    text, status = suite.summary(), "done"
    if how == _LATE:
        where = f" in {suite.current}" if suite.current else ""
        status, text = "partial", f"stopped after {seconds:.0f} s{where}; {text}"
    elif "passed" not in suite.ended.values():
        status, text = "failed", f"nothing passed: {text}"
    if how not in ("", _BROKEN, _LATE):
        status, text = "failed", f"{text}; {how}"
    if suite.broken or "failed" in suite.ended.values():
        status = "failed"
    right = {name: what for name, what in suite.ended.items() if what != "failed"}
    more = {"ended": right} if how == _LATE else {}
    return result_of(status, text, tail=list(suite.lines)[-15:], **more)


def _process(
    run: Run,
    python: Sequence[str],
    arguments: Sequence[str],
    until: float,
    test_s: float,
    suite: Suite,
) -> str:
    """One process: how it ended; "" in order, _BROKEN by a test, _LATE where the time was over."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as known:
        known.write("\n".join([*suite.ended, *suite.broken]))
        known.flush()
        suite.current = ""
        own = ["-m", "pytest", "-p", "benchmarks.gpu.pytest_plugin", "--without", known.name]
        limit = until
        with Child([*python, *own, *arguments], run.log) as process:
            try:
                while (line := process.line(limit)) is not None:
                    if not line.startswith(MARK):
                        if line.strip():
                            suite.lines.append(line)
                        continue
                    what, _, nodeid = line[len(MARK) :].partition(" ")
                    if what == "begin":
                        suite.current, limit = nodeid, min(until, time.monotonic() + test_s)
                    elif what == "fault":
                        suite.broken[suite.current] = nodeid.rpartition(" in ")[0]
                        return _BROKEN
                    else:
                        suite.ended[nodeid] = what
                        suite.current, limit = "", until
            except Late:
                suite.lines += process.last_words()
                if not suite.current or time.monotonic() >= until:
                    return _LATE
                suite.broken[suite.current] = f"stopped after {test_s:.0f} s"
                return _BROKEN
            how = process.end
    if suite.current:
        suite.broken[suite.current] = how or "exit status 0"
        return _BROKEN
    if how == "exit status 1" and "failed" in suite.ended.values():
        return ""
    if how == f"exit status {_NO_TESTS}" and (suite.ended or suite.broken):
        return ""
    return f"{how}: {suite.lines[-1]}" if how and suite.lines else how
