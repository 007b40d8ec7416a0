"""Makes pytest write rows of its tests, and go on behind those that have one.

    pytest -p benchmarks.gpu.recorder --rows FILE --stage NAME --sources HASH --seconds S ...

A test that takes too long, crashes or breaks the device ends the process; __main__.py begins
another one then, which leaves out what has run, that test included.
"""

import faulthandler
import os
import time
from pathlib import Path

import pytest

from .child import BROKEN, LATE, STDERR, fault_of_device, limited
from .rows import Rows

_NO_FAULT = (0, 1, 5)  # exit status: all passed, some failed, none was left to run
_out = os.dup(1)  # before pytest captures what tests print


def pytest_addoption(parser):
    group = parser.getgroup("gpu", "a run of make gpu")
    for name, kind in {"rows": Path, "stage": str, "sources": str, "seconds": float}.items():
        group.addoption(f"--{name}", type=kind, required=True)
    group.addoption("--item-seconds", type=float, required=True, help="of one test")


def pytest_configure(config):
    faulthandler.enable(file=STDERR)
    config.pluginmanager.register(Recorder(config))


class Recorder:
    """Writes each test's row, of the worst of its setup, call and teardown."""

    def __init__(self, config):
        option = config.getoption
        self.rows = Rows(option("--rows"), option("--stage"), option("--sources"))
        self.until = time.monotonic() + option("--seconds")
        self.seconds = option("--item-seconds")
        self.status, self.error = "", ""

    def pytest_collectreport(self, report):
        if report.failed:
            self.rows.add(report.nodeid, "failed", error=str(report.longrepr)[-300:])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        self.rows.add("", "begun", total=len(items))
        by_name = {item.nodeid: item for item in items}
        todo = self.rows.to_do(by_name)
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in set(todo)])
        items[:] = [by_name[name] for name in todo]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.status, self.error = "ok", ""
        with limited(self.rows, item.nodeid, self.seconds):
            yield
            fault = fault_of_device() if self.status == "failed" else ""
            error = fault or self.error
            self.rows.add(item.nodeid, self.status, **({"error": error} if error else {}))
        if fault:
            os._exit(BROKEN)
        if nextitem is not None and time.monotonic() >= self.until:
            item.session.shouldstop = "out of time"

    def pytest_runtest_logreport(self, report):
        if report.failed:  # now: pytest's own is printed at the end, which may never come
            os.write(_out, f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}\n".encode())
            lines = report.longreprtext.strip().splitlines() or [""]
            said = [line for line in lines if line.startswith("E ")] or lines[-1:]
            self.status, self.error = "failed", said[0][:300].removeprefix("E ").strip()
        elif report.skipped and self.status == "ok":
            self.status = "skipped"

    def pytest_sessionfinish(self, session, exitstatus):
        if session.shouldstop:
            session.exitstatus = LATE
        elif exitstatus in _NO_FAULT:
            session.exitstatus = 0
