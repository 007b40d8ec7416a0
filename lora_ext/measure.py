"""The one clock, and the one rule of what is faster: of routes on a card, of panels and packs on a
CPU, of a library's product for quantised weights.

A trial times candidates with some numbers of rows. What it finds is kept as (rows, result) pairs,
of which a later call takes the one whose rows are nearest.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# On a device: calls before the first round, and rounds.
_WARM_UP, _ROUNDS = 3, 25
# On a CPU calls are repeated for this long in a round, so that it is not one of some microseconds.
# Rounds that take a second together are long, and fewer of them are enough.
_SECONDS_OF_ROUND, _ROUNDS_ON_HOST, _LONG_ROUNDS = 0.02, 8, 4
# What is read to evict the L2 cache, at least: the host prepares a call meanwhile.
_LEAST_BYTES = 64 << 20

Call = Callable[[], object]
# Runs a call, and returns a function that reads its microseconds later.
Timer = Callable[[Call], Callable[[], float]]
Times = Mapping[str, Sequence[float]]  # candidate -> microseconds in each round
Measured = tuple[tuple[int, float], ...]  # (rows, time of a candidate over that of another)


def near(rows: int, measured: Measured) -> float:
    """What was measured at the nearest number of rows, as a ratio, of two equally near at the
    fewer, as in csrc/common/nearest.h; infinite if nothing was."""
    if not measured or rows < 1:
        return math.inf
    return min(measured, key=lambda each: (max(each[0] / rows, rows / each[0]), each))[1]


def share(times: Times, name: str, base: str) -> float:
    """The part of the base's time that a candidate takes at most, in three rounds of four."""
    ratios = sorted(a / b for a, b in zip(times[name], times[base], strict=True))
    return ratios[(3 * len(ratios) - 1) // 4]


def fastest(times: Times, base: str, most: float) -> tuple[str, float]:
    """(the fastest candidate by its median, its share of the base's time); the base, if that is
    more than `most`."""
    best = min(times, key=lambda name: statistics.median(times[name]))
    ratio = share(times, best, base)
    return (best, ratio) if ratio <= most else (base, 1.0)


def interleaved_us(
    calls: Mapping[str, Call],
    device: torch.device,
    prepare: Callable[[str], object] = lambda name: None,
    capture: bool = False,
) -> dict[str, list[float]]:
    """Microseconds of each call, once in each round, in a new order in each round.

    Args:
        calls: by name, on this device.
        prepare: is called with the name before its call; not timed.
        capture: whether to time, on CUDA, the replays of a graph of each call, which leave out the
            host. If one cannot be captured, none is.
    """
    on_cuda = device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        for name, call in calls.items():
            prepare(name)
            for _ in range(_WARM_UP if on_cuda else 1):
                call()
        replays = _replays(calls, device, prepare) if on_cuda and capture else None
        times_call, order, names = timer(device), random.Random(0), list(calls)
        readers: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
        begin = time.perf_counter()
        for number in range(_ROUNDS if on_cuda else _ROUNDS_ON_HOST):
            if not on_cuda and number >= _LONG_ROUNDS and time.perf_counter() - begin > 1.0:
                break
            order.shuffle(names)
            for name in names:
                if replays is None:
                    prepare(name)
                readers[name].append(times_call((replays or calls)[name]))
        if on_cuda:
            torch.cuda.synchronize(device)
        return {name: [read() for read in reads] for name, reads in readers.items()}


def _replays(
    calls: Mapping[str, Call], device: torch.device, prepare: Callable[[str], object]
) -> dict[str, Call] | None:
    """The replay of a graph of each call; None if one cannot be captured. All have one pool of
    memory, since results are dropped and graphs run one after the other."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    replays: dict[str, Call] = {}
    for name, call in calls.items():
        prepare(name)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                call()
        except RuntimeError:
            return None
        replays[name] = graph.replay
    return replays


def timer(device: torch.device) -> Timer:
    """A timer of calls on a device, on CUDA the current one.

    There, the L2 cache is first cleared of all data, as between two calls of the same layer in a
    model. This also keeps the device busy while the host prepares the call. The times can be read
    after the device is synchronised.
    """
    if device.type != "cuda":
        return _on_host
    evict = evicting(device)

    def on_device(call: Call) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evict()
        start.record()
        call()
        end.record()
        return lambda: 1e3 * start.elapsed_time(end)

    return on_device


def evicting(device: torch.device) -> Callable[[], object]:
    """A function that clears the L2 cache by reading: what was written instead would be written
    back to DRAM while the next call reads from there."""
    size = max(_LEAST_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    read = torch.zeros(size // 4, dtype=torch.float32, device=device)
    total = torch.zeros((), dtype=torch.float32, device=device)
    return lambda: torch.sum(read, dim=0, out=total)


def _on_host(call: Call) -> Callable[[], float]:
    begin, count, passed = time.perf_counter(), 0, 0.0
    while not count or passed < _SECONDS_OF_ROUND:
        call()
        count, passed = count + 1, time.perf_counter() - begin
    return lambda: 1e6 * passed / count
