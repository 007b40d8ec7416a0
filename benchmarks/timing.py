"""Timing on a machine that others use, too.

The variants of a cell take turns in one process, in a new order each round, so that a slow minute
hits them all alike. Each sample records how long our own threads were runnable but had to wait for
a core; a sample with more than a few percent of that is dropped and taken again.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Function = Callable[[], object]

_NS_PER_MS = 1e6
_SWITCH_NS = 3_000_000  # what one involuntary context switch costs us, where only they are counted
_LEAST_CLEAN = 3  # with fewer clean samples a variant counts as disturbed


def _schedstat_wait_ns() -> int:
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except OSError:
            continue  # the thread has just ended
    return total


def _switches_wait_ns() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * _SWITCH_NS


def wait_reader() -> tuple[str, Callable[[], int]]:
    """(source, reader): the reader returns the ns our threads have waited for a core so far."""
    for source, reader in (
        ("run-queue wait of /proc/self/task/*/schedstat", _schedstat_wait_ns),
        ("involuntary context switches", _switches_wait_ns),
    ):
        try:
            reader()
        except (OSError, ImportError, IndexError, ValueError):
            continue
        return source, reader
    return "not available", lambda: 0


@dataclass(frozen=True)
class Sample:
    """One batch: ms per call, and the time spent waiting for a core as a fraction of the batch."""

    ms: float
    wait: float


Meter = Callable[[Function, int], Sample]


class CpuMeter:
    """Wall time on the host."""

    def __init__(self, read_wait_ns: Callable[[], int] | None = None) -> None:
        self._read_wait_ns = read_wait_ns or wait_reader()[1]

    def __call__(self, function: Function, inner: int) -> Sample:
        """Time `inner` calls."""
        waited = self._read_wait_ns()
        start = time.perf_counter_ns()
        for _ in range(inner):
            function()
        elapsed = time.perf_counter_ns() - start
        waited = self._read_wait_ns() - waited
        return Sample(elapsed / inner / _NS_PER_MS, waited / max(elapsed, 1))


@dataclass(frozen=True)
class Plan:
    """How long to measure a cell. Times in the unit of the name."""

    min_rounds: int = 5
    max_rounds: int = 15
    seconds: float = 3.0  # after min_rounds, stop here
    patience: float = 2.5  # give up retrying after this many times the undisturbed duration
    limit_s: float = float("inf")  # give up after this, but not before the first round
    batch_ms: float = 15.0  # calls shorter than this are timed several at a time
    max_inner: int = 2**31  # at most so many at a time
    max_wait: float = 0.03  # a sample that waited for a larger fraction is dropped
    lead_in_s: float = 0.12  # batches up to this long follow an untimed call of their own
    attempts: int = 3  # tries at a clean sample within a round
    warmup_ms: float = 50.0

    def times(self, effort: float) -> Plan:
        """The plan of a cell that deserves `effort` times the rounds."""
        return replace(
            self,
            min_rounds=round(self.min_rounds * effort),
            max_rounds=round(self.max_rounds * effort),
            seconds=self.seconds * effort,
        )


@dataclass
class Timing:
    """The samples of one variant; `samples[i]` is round i's, None where no try was clean."""

    inner: int
    batch_s: float  # how long a batch took in the warm-up
    samples: list[float | None] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)

    @property
    def clean(self) -> list[float]:
        """The undisturbed samples, ms per call."""
        return [s for s in self.samples if s is not None]

    def summary(self) -> dict[str, Any]:
        """Median and quartiles in ms, the number of samples and of those dropped.

        Disturbed means too few clean samples; the figures then come from the faster half of all.
        """
        disturbed = len(self.clean) < _LEAST_CLEAN
        values = sorted(self.clean)
        if disturbed:  # others only ever slow us down
            values = sorted(self.clean + self.dropped)
            values = values[: -(-len(values) // 2)]
        return {
            "ms": statistics.median(values),
            "p25": values[len(values) // 4],
            "p75": values[(3 * len(values)) // 4],
            "n": len(self.clean),
            "dropped": len(self.dropped),
            "disturbed": disturbed,
            "inner": self.inner,
            "samples": self.samples,
        }


def calibrate(function: Function, meter: Meter, plan: Plan) -> Timing:
    """Warm up, then choose how many calls make one batch."""
    meter(function, 1)
    ms = meter(function, 1).ms
    if ms < plan.warmup_ms:
        ms = meter(function, max(1, min(100, int(plan.warmup_ms / 5 / max(ms, 1e-4))))).ms
    inner = max(1, min(plan.max_inner, int(plan.batch_ms / max(ms, 1e-4))))
    return Timing(inner, inner * ms / 1e3)


def interleaved(
    functions: Mapping[str, Function],
    timings: Mapping[str, Timing],
    meter: Meter,
    plan: Plan,
    seed: int = 0,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Take turns until each variant has enough clean samples or the time is over.

    functions: name -> one call of the variant
    timings: name -> result of `calibrate`; receives the samples
    """
    order = random.Random(seed)
    start = now()
    undisturbed_s = plan.min_rounds * sum(t.batch_s for t in timings.values())
    limit_s = min(plan.limit_s, plan.patience * max(plan.seconds, undisturbed_s))
    while (elapsed := now() - start) <= limit_s or not any(t.samples for t in timings.values()):
        fewest = min(len(t.clean) for t in timings.values())
        if fewest >= plan.max_rounds or (fewest >= plan.min_rounds and elapsed >= plan.seconds):
            break
        names = list(functions)
        order.shuffle(names)
        for name in names:
            timing = timings[name]
            clean = None
            for _ in range(plan.attempts):
                if timing.batch_s <= plan.lead_in_s:
                    functions[name]()  # caches and allocator in the state that it leaves itself
                sample = meter(functions[name], timing.inner)
                if sample.wait <= plan.max_wait:
                    clean = sample.ms
                    break
                timing.dropped.append(sample.ms)
            timing.samples.append(clean)


def compared(functions: Mapping[str, Function], plan: Plan) -> dict[str, dict[str, Any]]:
    """Name -> summary of the times of functions that take turns on the CPU."""
    meter = CpuMeter()
    timings = {name: calibrate(function, meter, plan) for name, function in functions.items()}
    interleaved(functions, timings, meter, plan)
    return {name: timing.summary() for name, timing in timings.items()}
