"""`python -m benchmarks.gpu.child`: measures the items of a stage, one after the other.

An item has a row (rows.py) before it begins, and another when it has ended. One that takes too long
ends the process, with a traceback of where it was; so does a fault of the device, after which each
later result would be an error. __main__.py begins another child then, which goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .rows import Row, Rows

LATE, BROKEN = 75, 70  # exit status: of the time, of the device
_ERROR_LENGTH = 300
STDERR = os.dup(2)  # before pytest captures it, see recorder.py


@contextmanager
def limited(rows: Rows, name: str, seconds: float) -> Iterator[None]:
    """Around an item: its process does not outlive the limit, whatever holds it up."""
    rows.add(name, "begun")
    os.write(STDERR, f"\n== {name}\n".encode())
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def fault_of_device() -> str:
    """What is wrong with the device since something failed on it; empty without, or if it works."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception as error:
        return str(error).strip().split("\n", 1)[0][:_ERROR_LENGTH] or type(error).__name__
    return ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--sources", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="no item begins later")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    from . import kinds

    rows = Rows(options.rows, options.stage, options.sources)
    kind = kinds.KINDS[options.stage]
    try:
        items = kind.items(options)
    except kinds.Unavailable as reason:
        rows.add("", "missing", summary=str(reason))
        return 0
    rows.add("", "begun", total=len(items))
    for name in rows.to_do(items):
        if time.monotonic() >= until:
            return LATE
        with limited(rows, name, kind.limit_s(items[name])):
            found: Row = {"status": "ok"}
            try:
                found |= kind.measure(items[name], options)
                json.dumps(found, allow_nan=False)
            except Exception as error:
                first = str(error).strip().split("\n", 1)[0]
                found = {"status": "failed", "error": f"{type(error).__name__}: {first}"}
            fault = fault_of_device()
            rows.add(name, **found | ({"status": "failed", "error": fault} if fault else {}))
        if fault:
            return BROKEN
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # never what a faulty device would make of an orderly end
