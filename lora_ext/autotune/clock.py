"""Times calls on a device: the only module here that reads a clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3
_ROUNDS = 25

Call = Callable[[], object]
# Runs a call once, and returns a function that reads its microseconds later.
Timer = Callable[[Call], Callable[[], float]]


def interleaved_us(
    calls: Mapping[str, Call],
    device: torch.device,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Microseconds of each call, once in each round, in a new order in each round.

    Args:
        calls: by name, on this device.
        prepare: is called with the name before its call; not timed.
    """
    times_call, order, names = timer(device), random.Random(0), list(calls)
    readers: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for _ in range(_ROUNDS):
        order.shuffle(names)
        for name in names:
            prepare(name)
            readers[name].append(times_call(calls[name]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: [read() for read in reads] for name, reads in readers.items()}


def timer(device: torch.device) -> Timer:
    """A timer of calls on a device.

    On CUDA, the L2 cache is first cleared of all data, as between two calls of the same layer in a
    model. This also keeps the device busy while the host prepares the call. The times can be read
    after the device is synchronised.
    """
    if device.type != "cuda":
        return _on_host
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    evicting = torch.empty(size, dtype=torch.uint8, device=device)

    def on_device(call: Callable[[], object]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evicting.zero_()
        start.record()
        call()
        end.record()
        return lambda: 1e3 * start.elapsed_time(end)

    return on_device


def _on_host(call: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter_ns()
    call()
    elapsed = (time.perf_counter_ns() - start) / 1e3
    return lambda: elapsed
