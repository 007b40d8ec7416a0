"""Bytes that one call allocates at its peak, and bytes it keeps for backward."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], object]


@contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's C++ side writes a line to the terminal at each start and stop."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _cpu_peak_bytes(function: Function) -> int:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silent_stderr(), profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: equal times keep their order
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _cuda_peak_bytes(function: Function) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(function: Function, device: str = "cpu", prepare: Function = lambda: None) -> int:
    """Peak bytes from torch's allocator during one call, above what was live before.

    Runs the function once untimed, so that caches filled by a first call do not count. Scratch
    memory that a library takes from elsewhere than torch's allocator is not seen.

    prepare: run before each call, outside the measurement
    """
    measure = _cuda_peak_bytes if device == "cuda" else _cpu_peak_bytes
    prepare()
    function()
    prepare()
    was_enabled = gc.isenabled()
    gc.disable()  # it would free older tensors in the middle of the measurement
    try:
        return measure(function)
    finally:
        if was_enabled:
            gc.enable()


def process_peak() -> int:
    """Bytes that this process has had in memory at most. `ru_maxrss` would begin at the peak of
    the process that started it, and hide all below that."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def saved_bytes(function: Function, excluded: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves during `function`.

    excluded: weights and adapters, which are live anyway; x is no exclusion, because a frozen
    linear layer does not keep it
    """
    known = {t.untyped_storage().data_ptr() for t in excluded}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(saved.values())
