"""bitsandbytes' codes of 4 bits, with its bits, a part of a weight at a time.

bitsandbytes (0.50) makes several float32 copies of a whole weight on a CPU, and looks its values up
among the 15 bounds between codes in threads that take 200 values each. Here each bound is compared
with a part that fits the cache. 600 million values, two cores of an EPYC (Zen 4):
TIMES
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_library: Any = import_module("bitsandbytes.functional")
BLOCK = 64  # bitsandbytes' own
_AT_A_TIME = 2**18


def quantised(values: Tensor, config: Any, storage: torch.dtype) -> tuple[Tensor, Any]:
    """The codes of values whose rows are whole blocks, or which are a matrix, in a dtype, and their
    `QuantState`."""
    kind, nested = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
    words = {"blocksize": BLOCK, "quant_type": kind}
    flat = values.reshape(-1)
    if values.device.type != "cpu" or len(flat) % BLOCK or not (kind == "nf4" and _is_as_here()):
        words |= {"compress_statistics": nested, "quant_storage": storage}
        return _library.quantize_4bit(values.contiguous(), **words)
    codes, scale = _parts(flat)
    words |= {"quant_type": kind, "dtype": values.dtype, "shape": values.shape}
    words["code"] = _library.get_4bit_type(kind, device="cpu")
    if nested:
        words["offset"] = scale.mean()
        found = _library.quantize_blockwise(scale - words["offset"], blocksize=256)
        scale, words["state2"] = found
    return codes.view(storage)[:, None], _library.QuantState(scale, **words)


def _parts(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of NF4, two a byte, and a scale for each block."""
    codes = torch.empty(len(flat) // 2, dtype=torch.uint8, device="cpu")
    scale = torch.empty(len(flat) // BLOCK, dtype=torch.float32, device="cpu")
    table = _library.get_4bit_type("nf4", device="cpu")
    bounds = ((table[1:] + table[:-1]) / 2).tolist()
    for first in range(0, len(flat), _AT_A_TIME):
        values = flat[first : first + _AT_A_TIME].float().view(-1, BLOCK)
        largest = torch.amax(values.abs(), 1, out=scale[first // BLOCK :][: len(values)])
        values = values * (1 / largest.clamp(min=1e-38))[:, None]
        values = values.clamp_(-1, 1).flatten()
        # The number of bounds below a value; NaN is in none of the comparisons.
        found = torch.full(values.shape, 15, dtype=torch.uint8, device="cpu")
        is_below = torch.empty(values.shape, dtype=torch.bool, device="cpu")
        for bound in bounds:
            torch.le(values, bound, out=is_below)
            found.sub_(is_below.view(torch.uint8))
        out = codes[first // 2 :][: len(found) // 2]
        torch.bitwise_or(found[::2] << 4, found[1::2], out=out)
    return codes, scale


@cache
def _is_as_here() -> bool:
    """Whether the installed bitsandbytes computes as this does: else its own op does."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2**14, generator=generator, device="cpu", dtype=torch.float32)
    codes, state = _library.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
    return all(map(torch.equal, _parts(values), (codes.view(-1), state.absmax)))
