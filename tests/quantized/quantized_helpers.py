"""A quantised weight of these tests, which needs no library: bytes with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.quantized.weight import QuantizedWeight


class Rows(QuantizedWeight):
    """W = code * scale of its row, in float32, rounded once.

    Attributes:
        writes_out: whether it writes into what it is given, as formats with a kernel do.
        calls: how often it was dequantised.
    """

    format, dtype = "rows", torch.float32

    def __init__(self, codes: Tensor, scale: Tensor, writes_out: bool = True) -> None:
        self.codes, self.scale, self.writes_out = codes, scale, writes_out
        rows, cols = codes.shape
        self.shape, self.device = (rows, cols), codes.device
        self.calls = 0

    def tensors(self):
        return self.codes, self.scale

    def writes(self, dtype):
        return self.writes_out

    def dequantize(self, dtype, out=None):
        if not torch.compiler.is_compiling():
            self.calls += 1
        dense = (self.codes * self.scale[:, None]).to(dtype)
        return dense if out is None else out.copy_(dense)


def quantized_rows(weight: Tensor, writes_out: bool = True) -> Rows:
    """A weight ``[out, in]`` in 8 bits."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp_min(1e-6) / 127
    return Rows((weight / scale[:, None]).round().to(torch.int8), scale, writes_out)
