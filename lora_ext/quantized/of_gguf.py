"""The weights of transformers' and diffusers' packed GGUF layers: ggml's blocks of 32 or 256
elements of a row.

transformers dequantises them in the dtype of x, as in the layer's forward from nine rows on. Up to
eight rows it calls a kernel that reads the blocks; on a CPU, where there is no such kernel, W is
used for any number of rows. What diffusers dequantises is cast to the compute dtype, as in the
layer's own forward for any number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torch_state import compute_dtype
from ..versions import TOO_OLD
from .weight import QuantizedBase, WrittenWeight, stored_base

FEW_ROWS = "up to 8 rows go to ggml's kernel, which reads the blocks"
KERNELS = "diffusers' CUDA kernels read the blocks"
OTHER_DTYPE = "x is not in the compute dtype, which the layer's product needs"

# Elements at a time: the library's functions have several temporaries, which should fit in a cache.
_CPU_CHUNK = 1 << 19
_CHUNK = 1 << 24


class GgufWeight(WrittenWeight):
    """The weight of a `GgufLinear`: ``[out, bytes of a row]`` in uint8.

    Attributes:
        dtype: that in which its forward dequantises: x's dtype; autocast then rounds W again.
        permutation: the order ``[in]`` in which its forward reads the columns of x, or None. The
            columns of W are reordered to x's own order.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        from transformers.integrations.gguf.dequant import GGML_NAME

        self.blocks, self.type, self.dtype = layer.weight.detach(), layer.ggml_type, dtype
        self.permutation: Tensor | None = layer.input_permutation
        self.shape, self.device = (layer.out_features, layer.in_features), layer.weight.device
        self.format = GGML_NAME[self.type]

    def tensors(self) -> list[Tensor]:
        return [self.blocks]

    def _write(self, out: Tensor) -> None:
        rows, cols = self.shape
        count = max(1, (_CPU_CHUNK if self.device.type == "cpu" else _CHUNK) // cols)
        for start in range(0, rows, count):
            part, chunk = out[start : start + count], self._chunk(start, start + count)
            if self.permutation is None:
                part.copy_(chunk)
            else:
                part.index_copy_(1, self.permutation, chunk.to(out.dtype))

    def _chunk(self, start: int, stop: int) -> Tensor:
        """Some rows, ``[stop - start, in]`` in `dtype`."""
        blocks = self.blocks[start:stop]
        if self.device.type == "cpu":
            # The CPU part of `dequantize_blocks`, without the search for a kernel to download.
            from transformers.integrations.gguf.dequant import dequantize

            return dequantize(blocks, self.type, self.dtype).reshape(-1, self.shape[1])
        from transformers.integrations.gguf.kernels import dequantize_blocks

        return dequantize_blocks(blocks, self.type, blocks.shape[0], self.shape[1], self.dtype)


def gguf_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of a `GgufLinear`, or why it has to be called."""
    if x is None:  # many rows, in the dtype in which its kernels compute
        weight = GgufWeight(layer, torch.float32)
        return QuantizedBase(weight, layer.bias, torch.float32, torch.float32)
    if layer.weight.device.type != "cpu":
        from transformers.integrations.gguf.kernels import MAX_GEMV_ROWS

        if x.numel() <= MAX_GEMV_ROWS * layer.in_features:
            return FEW_ROWS
    # Also under autocast, y is cast back to x's dtype.
    return QuantizedBase(GgufWeight(layer, x.dtype), layer.bias, compute_dtype(x), x.dtype)


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
