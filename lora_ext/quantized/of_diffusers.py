"""The weights of diffusers' GGUF layers, an nn.Linear on ggml's blocks.

diffusers dequantises them; they are then cast to the compute dtype, as in the layer's own forward
for any number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..versions import TOO_OLD
from .base import QuantizedBase, stored_base
from .of_gguf import GgufWeight

KERNELS = "diffusers' CUDA kernels read the blocks"
OTHER_DTYPE = "x is not in the compute dtype, which the layer's product needs"


class DiffusersGgufWeight(GgufWeight):
    """The weight of a `GGUFLinear`: a `GGUFParameter` ``[out, bytes of a row]``.

    Attributes:
        dtype: the compute dtype, to which the dequantised values are cast.
    """

    def __init__(self, layer: Any) -> None:
        self.blocks: Any = layer.weight
        self.dtype, self.permutation = layer.compute_dtype, None
        self.shape, self.device = tuple(self.blocks.quant_shape), self.blocks.device
        self.format = self.blocks.quant_type.name

    def tensors(self) -> list[Tensor]:
        return [self.blocks.as_tensor()]

    def _chunk(self, start: int, stop: int) -> Tensor:
        from diffusers.quantizers.gguf import utils  # pyright: ignore[reportMissingImports]

        return utils.dequantize_gguf_tensor(self.blocks[start:stop]).to(self.dtype)


def diffusers_gguf_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of a `GGUFLinear`, or why it has to be called."""
    if TOO_OLD["diffusers"]:
        return TOO_OLD["diffusers"]
    from diffusers.quantizers.gguf import utils  # pyright: ignore[reportMissingImports]

    weight, bias = layer.weight, layer.bias
    if type(weight) is not utils.GGUFParameter or not isinstance(layer.compute_dtype, torch.dtype):
        return "the layer has no GGUF weight, or no compute dtype"
    kind: Any = layer.weight.quant_type
    if kind not in utils.dequantize_functions:
        return f"diffusers cannot dequantise {kind.name}"
    if type(bias) not in (type(None), Tensor, nn.Parameter):
        return "the bias is quantised, too"
    if utils.ops is not None and weight.is_cuda:
        return KERNELS
    return stored_base(DiffusersGgufWeight(layer), bias, x, OTHER_DTYPE)
