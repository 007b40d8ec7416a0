"""Makes pytest say which test begins, and end at a fault of the device.

    pytest -p benchmarks.gpu.pytest_plugin --without FILE

FILE has the ids of tests to leave out, a line each: what suites.py knows of an earlier process. A
test after which the device does not work any more ends the process, since every later one would
fail for its sake.
"""

import os
import sys
from pathlib import Path

MARK = "@test "
FAULT = 70  # exit status, of sysexits.h: an internal software error

_out = os.dup(1)  # before pytest captures what tests print


def _say(what: str, nodeid: str) -> None:
    os.write(_out, f"\n{MARK}{what} {nodeid}\n".encode())


def pytest_addoption(parser):
    group = parser.getgroup("gpu", "a run of make gpu")
    group.addoption("--without", type=Path, help="a file of ids of tests to leave out")


def pytest_collection_modifyitems(config, items):
    path = config.getoption("--without")
    known = set(path.read_text().splitlines()) if path else set()
    left_out = [item for item in items if item.nodeid in known]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid, location):
    _say("begin", nodeid)


class _Outcome:
    """Of the test that runs: the worst of its setup, call and teardown."""

    worst = "passed"


def pytest_runtest_setup(item):
    _Outcome.worst = "passed"


def pytest_runtest_logreport(report):
    if report.failed or (report.skipped and _Outcome.worst == "passed"):
        _Outcome.worst = report.outcome
    if report.failed:  # now: pytest's own is printed at the end, which may never come
        os.write(_out, f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}\n".encode())


def pytest_runtest_logfinish(nodeid, location):
    fault = _fault() if _Outcome.worst == "failed" else ""
    if fault:
        _say(f"fault {fault} in", nodeid)
        os._exit(FAULT)
    _say(_Outcome.worst, nodeid)


def _fault() -> str:
    """What is wrong with the device; empty without one, or if it works."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception as error:
        return str(error).strip().split("\n", 1)[0]
    return ""
