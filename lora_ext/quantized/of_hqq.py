"""The weights of HQQ's layers: 1 to 8 bits, with a scale and a zero point for each group.

    W = (code - zero) * scale       in the layer's compute_dtype, then cast

HQQ's own PyTorch backends multiply by W; its CUDA backends have kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .weight import QuantizedBase, QuantizedWeight, stored_base

NOT_YET = "its weight is not quantised yet"
OTHER_BACKEND = "HQQ's backend has kernels of its own"
OTHER_DTYPE = "x is not in HQQ's compute_dtype, which its product needs"

# Names of the forward that `HQQLinear.set_backend` sets on the class.
_PLAIN = (
    "forward_pytorch",
    "forward_pytorch_compile",
    "forward_pytorch_backprop",
    "forward_pytorch_backprop_compile",
)


class HQQWeight(QuantizedWeight):
    """The weight of an `HQQLinear`. It keeps the layer, since only the layer's own `dequantize` can
    prepare the scales, for example copy them from host memory."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        rows, cols = layer.meta["shape"]
        self.shape, self.device = (rows, cols), layer.W_q.device
        self.dtype = layer.compute_dtype
        self.format = f"HQQ's {layer.meta['nbits']} bits"

    def tensors(self) -> list[Tensor]:
        meta = self.layer.meta
        found = (self.layer.W_q, meta.get("scale"), meta.get("zero"))
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.layer.dequantize().detach().to(dtype)


def hqq_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of an `HQQLinear`, or why it has to be called."""
    if not layer.ready or layer.W_q is None:
        return NOT_YET
    if layer.backend.value not in _PLAIN:
        return OTHER_BACKEND
    # It is a clone, not a parameter: a gradient would go to the bias of the original layer.
    bias = None if layer.bias is None else layer.bias.detach()
    return stored_base(HQQWeight(layer), bias, x, OTHER_DTYPE)
