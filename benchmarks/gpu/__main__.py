"""`make gpu`: an hour on a GPU as evidence: golden vectors, checks, tests, times, a report.

    python -m benchmarks.gpu [--quick] [--device cpu] [--out FOLDER]

Each stage is a command in a child of its own, with a limit. It writes rows (rows.py), and what has
a row for the same sources is not done again: where one child is lost, the next goes on behind what
it was at, and where a call ends, the next call does. What failed is done again with --again alone.
log.txt has all that children print. With --device cpu each stage runs its part that needs no GPU,
to try the code.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..suite import finish
from . import process
from .child import BROKEN, LATE
from .document import document_of, summary
from .process import ROOT
from .rows import RED, Rows
from .stages import DEVICE, STAGES, Stage

_BUDGET_S = 540.0
_LEAST_S = 60.0  # left, for a stage to begin that takes longer: it goes on next time
_OVERRUN = 3.0  # a stage is stopped after so many times what it is expected to take
# What a stage may take at least where only the code is tried: until no item begins, and in all.
_TRIAL_S, _TRIAL_LIMIT_S = 20.0, 300.0
_START_S = 90.0  # until a child has imported torch and found the device
_MOST_LOST = 10  # a build that breaks on every item need not be run on all

_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh"}


@functools.cache
def hash_of(name: str) -> str:
    """Of the sources that a folder, or a file, has when the run begins."""
    path, digest = ROOT / name, hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.suffix in _SUFFIXES and file.is_file():
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass
class Run:
    """What every stage gets.

    Attributes:
        end: when to stop, as `time.monotonic()` counts.
        machine: what the results are of.
        absent: packages that stages use and that are not installed.
    """

    options: argparse.Namespace
    end: float
    machine: dict[str, Any]
    absent: Sequence[str] = ()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def log(self) -> Path:
        return self.options.out / "log.txt"

    def rows(self, stage: Stage) -> Rows:
        return Rows(self.options.out / "rows.jsonl", stage.name, self.sources(stage.folders))

    def sources(self, folders: Sequence[str]) -> str:
        """Of the sources under these folders, and of what they run on."""
        known = [self.options.device, self.machine.get("gpu"), self.machine.get("versions")]
        known += map(hash_of, folders)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def say(self, text: str) -> None:
        """Before and after what is run."""
        with self.log.open("a") as log:
            log.write(f"== {text}\n")
        print(text, flush=True)


def run_stage(run: Run, stage: Stage, most_s: float) -> None:
    """Runs it to its end, with as many children as are lost; the last row without a name says how
    it ended."""
    rows, start = run.rows(stage), time.monotonic()
    on_gpu = run.options.device == "cuda"
    status, said = "failed", f"{_MOST_LOST} children were lost"
    for row in rows.found().values():
        again = run.options.again and row["status"] in RED
        if row["name"] and (again or row["status"] == "begun"):  # a call that was killed left it
            rows.add(row["name"], "stopped")
    lost = 0
    while lost < _MOST_LOST:
        left = most_s - (time.monotonic() - start)
        words = ["--rows", str(rows.path.resolve()), "--stage", stage.name]
        words += ["--sources", run.sources(stage.folders), "--seconds", f"{left:.0f}"]
        command = stage.command(run.options, words)
        if isinstance(command, str):
            status, said = "missing", command
            break
        limit_s = left if on_gpu else left + _TRIAL_LIMIT_S
        end = process.run(command, limit_s, run.log)
        late = end.is_late or end.how == f"exit status {LATE}"
        begun = [n for n, row in rows.found().items() if n and row["status"] == "begun"]
        for name in begun:  # an item that is killed because the time is over is not to blame
            found = {} if late else {"error": end.text(), "tail": end.tail}
            rows.add(name, "stopped" if late else "failed", **found)
        if late:
            status, said = "partial", "the time was over"
            break
        if not begun and end.how != f"exit status {BROKEN}":
            is_missing = rows.found().get("", {}).get("status") == "missing"
            status = "failed" if end.how else "missing" if is_missing else "done"
            said = end.text() if end.how else end.said
            break
        lost += 1
    known = rows.found().get("", {})
    said = known.get("summary", said) if status == "missing" else said
    took = {"seconds": round(time.monotonic() - start, 1), "quick": run.options.quick}
    rows.add("", status, summary=said, total=known.get("total"), **took)


def run_stages(run: Run, stages: Sequence[Stage]) -> None:
    """Those that are not done, as far as the time left allows; what failed comes last."""

    def is_done(stage: Stage) -> bool:
        found = run.rows(stage).found()
        own = found.get("", {"status": ""})
        red = run.options.again and any(row["status"] in RED for row in found.values())
        return own["status"] == "done" and own["quick"] <= run.options.quick and not red

    def has_failed(stage: Stage) -> bool:
        return run.rows(stage).found().get("", {}).get("status") == "failed"

    todo = [stage for stage in stages if stage.quick or not run.options.quick]
    for stage in sorted((each for each in todo if not is_done(each)), key=has_failed):
        on_gpu = run.options.device == "cuda"
        if on_gpu and run.left < min(stage.seconds, _LEAST_S):
            run.say(f"{stage.name}: {run.left:.0f} s left, it takes {stage.seconds:.0f}: next time")
            continue
        most_s = min(_OVERRUN * stage.seconds, run.left)
        most_s = most_s if on_gpu else max(_TRIAL_S, most_s)
        run.say(f"{stage.name}, at most {most_s:.0f} s")
        run_stage(run, stage, most_s)
        run.say(f"{stage.name}: {summary(run.rows(stage).found())}")


def described(run: Run) -> str:
    """Asks a child what the results are of: a driver that hangs must not hang the run. Why nothing
    can be measured; empty if all is well."""
    rows = run.rows(DEVICE)
    rows.add("machine", "stopped")
    run_stage(run, DEVICE, _START_S)
    found = rows.found()["machine"]
    if "machine" not in found:
        return found.get("error") or f"no child could describe the device: {rows.found()['']}"
    run.machine, run.absent = found["machine"], found["absent"]
    built = run.machine["lora_ext"]
    if run.options.device == "cuda" and built.get("cuda") is not True:
        return (
            f"lora_ext is built without CUDA kernels ({built.get('cuda_reason', '')}), so there is"
            " nothing to measure: put a CUDA toolkit's nvcc on PATH, remove .venv/.built-cuda,"
            " then `make gpu` again"
        )
    return ""


def commit() -> str:
    """For the report; empty where git knows none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"))
    found.add_argument("--machine", default="", help="what to call this machine in the report")
    found.add_argument("--quick", action="store_true", help="what matters most, in 8 minutes")
    found.add_argument("--again", action="store_true", help="do again what failed or was wrong")
    found.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for all of it")
    found.add_argument(
        "--started", type=float, help="when the budget began, as `date +%%s` says; default: now"
    )
    names = [stage.name for stage in STAGES]
    found.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 without a device or kernels, 1 if a stage failed or ours is wrong, else 0.

    130 after an interrupt, of which SIGTERM, as of a limit outside, is one.
    """
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    spent = 0.0 if options.started is None else max(0.0, time.time() - options.started)
    run = Run(options, time.monotonic() + options.budget - spent, {})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a crash: all of a GPU's mapped memory
    is_interrupted = False
    try:
        if reason := described(run):
            print(f"python -m benchmarks.gpu: {reason}", file=sys.stderr)
            return 2
        if run.absent:
            run.say(f"not installed: {', '.join(run.absent)}; what needs them is left out")
        run_stages(run, [stage for stage in STAGES if stage.name in options.only])
    except KeyboardInterrupt:
        is_interrupted = True
        print("interrupted: the next call goes on from here", file=sys.stderr)
    if not run.machine:
        return 130
    machine = {**run.machine, "name": options.machine or run.machine["name"], "commit": commit()}
    document = document_of(machine, {stage.name: run.rows(stage).found() for stage in STAGES})
    faults = [
        f"FAILED: {name}: {stage['summary']}"
        for name, stage in document["stages"].items()
        if stage["status"] == "failed"
    ]
    # Pictures are drawn afterwards, by `python -m benchmarks.report`, where there is a library.
    status = finish(document, options.out / "results.json", faults, with_plots=False)
    print(f"what to send, or to keep by scripts/keep_gpu_results.py: {options.out}")
    return 130 if is_interrupted else status


if __name__ == "__main__":
    sys.exit(main())
