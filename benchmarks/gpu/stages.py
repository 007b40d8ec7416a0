"""What a stage of `make gpu` is, and how stages are run.

A stage is a command or a measurement whose result is written at once. A tool that is missing, or a
command that fails, is a result too: the next stage runs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .run import Run

ROOT = Path(__file__).resolve().parents[2]
_KEPT_LINES = 15

Result = dict[str, Any]  # "status": "done", "failed", "missing", or "partial": goes on next time


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: the key of its result.
        seconds: what it is expected to take on 16 cores and one card; there it does not begin with
            less.
        run: what it does.
        quick: whether QUICK=1 runs it.
    """

    name: str
    seconds: float
    run: Callable[[Run], Result]
    quick: bool = True


def run_command(
    command: Sequence[str], seconds: float, folder: str = ".", kept: int | None = _KEPT_LINES
) -> Result:
    """Runs a command; returns its status, seconds and its last lines, `kept` of them, or all."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT / folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, seconds),
        )
        code, lines = done.returncode, done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired:
        code, lines = -1, [f"stopped after {seconds:.0f} s"]
    except OSError as error:
        return missing(str(error))
    return {
        "status": "done" if code == 0 else "failed",
        "command": " ".join(command).replace(sys.executable, "python"),
        "seconds": round(time.monotonic() - start, 1),
        "summary": lines[-1] if lines else "",
        "tail": lines if kept is None else lines[-kept:],
    }


def result_of(status: str, summary: str, seconds: float = 0.0, **more: Any) -> Result:
    """A result that no command gave."""
    return {"status": status, "summary": summary, "seconds": seconds, "tail": [], **more}


def missing(reason: str) -> Result:
    """The result of a stage that cannot run here."""
    return result_of("missing", reason)


def run_stages(run: Run, chosen: Sequence[Stage]) -> None:
    """Runs the stages that have no result or a partial one, as long as the time left allows."""
    for stage in chosen:
        before = run.stages.get(stage.name, {"status": "partial"})
        if before["status"] != "partial" or (run.quick and not stage.quick):
            continue
        if run.device == "cuda" and run.left < stage.seconds:
            print(f"{stage.name}: {run.left:.0f} s left, it takes {stage.seconds:.0f}: next time")
            continue
        try:
            run.stages[stage.name] = stage.run(run)
        except Exception as error:  # what was measured before must not be lost
            run.stages[stage.name] = missing(f"{type(error).__name__}: {error}")
        run.write()
        print(f"{stage.name}: {run.stages[stage.name]['summary']}", flush=True)
