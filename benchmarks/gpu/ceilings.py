"""What the card can do at most, of a library's product and of a copy."""

from __future__ import annotations

import torch

from .. import runner
from ..timing import Function

_CALLS = 20


def ceilings(device: str) -> dict[str, float]:
    """The library's half product at 4096 x 4096 x 4096, in TFLOP/s, and a copy, in GB/s."""
    size, elements = (4096, 2**28) if device == "cuda" else (256, 2**20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(elements, device=device, dtype=torch.bfloat16) for _ in range(2))
    meter = runner.means_for(device).meter

    def seconds(function: Function) -> float:
        meter(function, 5)
        return sorted(meter(function, 1).ms for _ in range(_CALLS))[_CALLS // 2] / 1e3

    return {
        "tflops": 2 * size**3 / seconds(lambda: torch.mm(a, b)) / 1e12,
        "dram_gb_s": 2 * 2 * elements / seconds(lambda: target.copy_(source)) / 1e9,
    }
