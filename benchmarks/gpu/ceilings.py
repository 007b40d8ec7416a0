"""What the card can do at most, of a library's product and of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def ceilings(device: str) -> dict[str, float]:
    """The library's half product at 4096 x 4096 x 4096, in TFLOP/s, and a copy, in GB/s."""
    size, elements = (4096, 2**28) if device == "cuda" else (256, 2**20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(elements, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_s = _median_seconds(lambda: torch.mm(a, b), device)
    copy_s = _median_seconds(lambda: target.copy_(source), device)
    return {
        "tflops": 2 * size**3 / product_s / 1e12,
        "dram_gb_s": 2 * 2 * elements / copy_s / 1e9,
    }


def _median_seconds(function: Callable[[], object], device: str) -> float:
    """The median of 20 calls after 5."""
    times = []
    for _ in range(25):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return sorted(times[5:])[10]
