"""The weights of transformers' block-wise FP8 layers.

Weights of 8 or 4 bits go to kernels that also quantise x. A weight with more than one byte for each
element, as from a checkpoint that was not quantised, is used directly in the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .weight import QuantizedBase, QuantizedWeight, stored_base

QUANTISES_X = "it quantises x, too"
OTHER_DTYPE = "x is not in the weight's dtype, which its product needs"
TRAINED = "the base weight is trained"


class StoredWeight(QuantizedWeight):
    """The weight of an `FP8Linear` if it has a floating dtype that the op supports."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        rows, cols = weight.shape
        self.shape, self.device, self.dtype = (rows, cols), weight.device, weight.dtype
        self.format = str(weight.dtype).removeprefix("torch.")

    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.weight.to(dtype)

    def workspace_bytes(self, dtype: torch.dtype) -> int:
        return 0 if dtype == self.weight.dtype else super().workspace_bytes(dtype)


def fp8_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of an `FP8Linear`, or why it has to be called."""
    weight = layer._parameters["weight"]
    if weight.element_size() == 1:
        return QUANTISES_X
    if weight.requires_grad:
        return TRAINED
    return stored_base(StoredWeight(weight), layer.bias, x, OTHER_DTYPE)
