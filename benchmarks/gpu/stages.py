"""What a stage of `make gpu` is, and how stages are run.

A stage is a command or a measurement whose result is written at once. A tool that is missing, or a
command that fails, is a result too: the next stage runs.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import child
from .child import ROOT, Child, Late, last_said
from .run import Run

_KEPT_LINES, _SEEN_LINES = 15, 200
_LONGEST = 400  # characters of a summary

# "status" is one of
#     done     not done again for these sources
#     partial  goes on next time
#     failed, missing, begun (the run was killed in it)
#              done again next time, after everything that has not failed
Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: the key of its result.
        seconds: what it is expected to take on 16 cores and one card; there it does not begin with
            less.
        run: what it does, given how many seconds it may take.
        quick: whether QUICK=1 runs it.
    """

    name: str
    seconds: float
    run: Callable[[Run, float], Result]
    quick: bool = True


def run_command(
    run: Run,
    command: Sequence[str],
    seconds: float,
    kept: int = _KEPT_LINES,
) -> Result:
    """Runs a command; returns its status and its last lines, `kept` of them."""
    lines: deque[str] = deque(maxlen=max(kept, _SEEN_LINES))
    late = False
    try:
        with Child(command, run.log, ROOT) as process:
            try:
                until = time.monotonic() + max(1.0, seconds)
                while (line := process.line(until)) is not None:
                    if line.strip():
                        lines.append(line)
            except Late:
                late = True
                before = process.pending or last_said(lines) or "nothing"
                lines += process.last_words()
                lines.append(f"stopped after {seconds:.0f} s; it last said: {before}")
            how = process.end
    except OSError as error:
        return missing(str(error))
    if how and not late:
        lines.append(f"{last_said(lines)} ({how})" if lines else how)
    return result_of(
        "failed" if late or how else "done",
        lines[-1] if lines else "",
        command=" ".join(command).replace(child.PYTHON, "python"),
        tail=list(lines)[-kept:],
    )


def result_of(status: str, summary: str, **more: Any) -> Result:
    """A result; run_stages adds how long the stage took, and for which sources it stands."""
    return {"status": status, "summary": summary[:_LONGEST], "seconds": 0.0, "tail": [], **more}


def missing(reason: str) -> Result:
    """The result of a stage that cannot run here."""
    return result_of("missing", reason)


def is_done(run: Run, stage: Stage) -> bool:
    """Whether it has a result that stands for the sources at hand."""
    result = run.stages.get(stage.name, {})
    return result.get("status") == "done" and result.get("checking", "") == run.checking


def in_order(run: Run, chosen: Sequence[Stage]) -> list[Stage]:
    """What is to be done: first what has not failed yet, so that no hang is met first each time."""
    todo = [s for s in chosen if not is_done(run, s) and (s.quick or not run.quick)]
    return sorted(todo, key=lambda stage: _has_failed(run, stage))


def _has_failed(run: Run, stage: Stage) -> bool:
    return run.stages.get(stage.name, {}).get("status") in ("failed", "missing", "begun")


def run_stages(run: Run, chosen: Sequence[Stage]) -> None:
    """Runs the stages that are not done, as long as the time left allows."""
    for stage in in_order(run, chosen):
        if run.device == "cuda" and run.left < stage.seconds:
            print(f"{stage.name}: {run.left:.0f} s left, it takes {stage.seconds:.0f}: next time")
            continue
        before = run.stages.get(stage.name)
        limit_s = run.limit_s(stage.seconds)
        run.stages[stage.name] = result_of("begun", "the run was killed in it")
        if before is not None and before.get("checking") == run.checking and "ended" in before:
            run.stages[stage.name] |= {"ended": before["ended"], "checking": run.checking}
        run.write()
        run.say(f"{stage.name}, at most {limit_s:.0f} s")
        start = time.monotonic()
        try:
            result = stage.run(run, limit_s)
            json.dumps(result, allow_nan=False)  # what cannot be written must not stop all writing
        except Exception as error:  # what was measured before must not be lost
            result = result_of("failed", f"{type(error).__name__}: {error}")
        except BaseException:  # an interrupt says nothing of the stage
            run.stages.pop(stage.name)
            if before is not None:
                run.stages[stage.name] = before
            run.write()
            raise
        took = round(time.monotonic() - start, 1)
        run.stages[stage.name] = {**result, "seconds": took, "checking": run.checking}
        run.write()
        run.say(f"{stage.name}: {result['status']}: {result['summary']}")
