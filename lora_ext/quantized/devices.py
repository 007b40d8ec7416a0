"""Which devices dequantise with the kernels of this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_state import disabled_modes

_ops = torch.ops.lora_ext
_found: dict[torch.device, bool] = {}


def has_kernels(device: torch.device) -> bool:
    """Whether this build's kernels run on the device, with correct results for a small weight.

    This is tested once for each device, at the first weight on it. While a CUDA graph is captured,
    when synchronising is not allowed, the answer is no and is not stored. If it is no, as in a
    build without CUDA or on another card, the libraries' own kernels are to be used.
    """
    if device.type == "cpu":
        return True
    if device not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _found[device] = _are_right(device)
    return _found[device]


# As torch.compiler.assume_constant_result, which would import all of torch._dynamo: one second.
has_kernels._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_right(
    device: torch.device, wrong: Callable[[torch.device], str], what: str, instead: str
) -> bool:
    """Whether kernels run on a device, with correct results for a small case; a warning where these
    differ.

    Args:
        wrong: runs the case and names what differs, "" for nothing.
        what, instead: what the kernels do, and what runs in their place, in the warning.
    """
    try:
        with disabled_modes():  # of fake tensors, say, which have no values
            found = wrong(device)
    except torch.OutOfMemoryError:  # no information about the kernels
        raise
    except RuntimeError:  # includes NotImplementedError, raised if the op has no kernel
        return False
    if found:
        text = f"the kernels that {what} failed their check on {device}, in {found}: {instead}"
        warnings.warn(f"lora_ext: {text}", stacklevel=2)
    return not found


def _are_right(device: torch.device) -> bool:
    return is_right(device, _wrong, "dequantise", "the libraries' own are used there")


def _wrong(device: torch.device) -> str:
    # A lane has two scales of a tile's blocks of 16.
    cases = (torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 16)
    return next((str(dtype) for dtype, block in cases if _differs(device, dtype, block)), "")


def _differs(device: torch.device, dtype: torch.dtype, block: int) -> bool:
    """Whether results differ for every code next to every other, in full tiles and a partial
    one."""
    codes = torch.arange(2100, device=device) * 37 % 256
    table, scales = (torch.linspace(-1.3, 1.7, n, device=device) ** 3 for n in (16, 256))
    scale = torch.arange(-(-4200 // block), device=device) * 5
    factor = torch.linspace(0.1, 3, -(-len(scale) // 16), device=device)
    offset = torch.full((1,), 0.7, device=device)
    out = torch.empty(4200, dtype=dtype, device=device)
    packed, quantised = codes.to(torch.uint8), scale.to(torch.uint8)
    nested = {"scale_table": scales, "scale_scale": factor, "scale_offset": offset}
    words = {"table": table, "block": block, **nested, "scale_block": 16}
    _ops.dequantize("4bit", packed, quantised, out, **words)
    values = table[torch.stack([codes >> 4, codes & 15], 1).flatten()]
    whole = _scales_of(scales, scale % 256, factor, offset).repeat_interleave(block)[:4200]
    return not torch.equal(out, (values * whole).to(dtype))


def _scales_of(scales: Tensor, codes: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    made = scales[codes] * factor.repeat_interleave(16)[: len(codes)]
    return made + offset  # rounded after the product and after the sum
