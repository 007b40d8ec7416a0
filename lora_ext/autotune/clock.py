"""Times calls on a device: the only module here that reads a clock."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3
_ROUNDS = 25
# What is read to evict the L2 cache, at least: the host prepares a call meanwhile.
_LEAST_BYTES = 64 << 20

Call = Callable[[], object]
# Runs a call once, and returns a function that reads its microseconds later.
Timer = Callable[[Call], Callable[[], float]]


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
            host. They must have been called before. If one cannot be captured, none is.
    """
    on_cuda = device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        replays = _replays(calls, device, prepare) if on_cuda and capture else None
        times_call, order, names = timer(device), random.Random(0), list(calls)
        readers: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
        for _ in range(_ROUNDS):
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

    def on_device(call: Callable[[], object]) -> Callable[[], float]:
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


def _on_host(call: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter_ns()
    call()
    elapsed = (time.perf_counter_ns() - start) / 1e3
    return lambda: elapsed
