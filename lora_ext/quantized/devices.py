"""Which devices dequantise by kernels of this package."""

from __future__ import annotations

from functools import cache

import torch


@torch.compiler.assume_constant_result
@cache
def has_kernels(device: torch.device) -> bool:
    """Whether this build's kernels run there: by a launch for one value, once for each device.

    Without them, as in a build without CUDA or for another card, libraries' own kernels are to run.
    Nothing waits for the device.
    """
    codes = torch.zeros(1, dtype=torch.uint8, device=device)
    table, scale, out = (torch.zeros(count, device=device) for count in (16, 1, 1))
    try:
        torch.ops.lora_ext.dequantize_4bit(codes, table, scale, 64, None, None, None, 2, out)
    except RuntimeError:  # of which NotImplementedError is one
        return False
    return True
