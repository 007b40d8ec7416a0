"""torchao's tensors as weights of the op.

    TorchaoWeight   any, by torchao's own `dequantize`
    CodesWeight     W = code * scale of its group of a row, codes of 8 bits without zero points
    NF4Weight       W = table[code] * scale of its block, scales quantised again

On the CPU this package's kernels write the last two, bit for bit as torchao but without temporary
tensors; on other devices, and while a graph is traced, torchao computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .weight import QuantizedWeight

_ops = torch.ops.lora_ext


class TorchaoWeight(QuantizedWeight):
    """A tensor that the layer's forward dequantises in its original dtype and then casts."""

    def __init__(self, tensor: Any, format: str) -> None:
        self.tensor, self.format = tensor, format
        rows, cols = tensor.shape
        self.shape, self.device, self.dtype = (rows, cols), tensor.device, tensor.dtype

    def tensors(self) -> list[Tensor]:
        names = self.tensor.__tensor_flatten__()[0]
        return [getattr(self.tensor, name) for name in names]

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.tensor.dequantize().to(dtype)


class _WrittenWeight(TorchaoWeight):
    """A weight that a kernel writes in its original dtype; subclasses define how."""

    def __init__(self, tensor: Any, format: str) -> None:
        super().__init__(tensor, format)
        self.by_kernel = self.device.type == "cpu" and not torch.compiler.is_compiling()

    def writes(self, dtype: torch.dtype) -> bool:
        return self.by_kernel and dtype == self.dtype

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if not self.by_kernel:
            return self._by_library(dtype)
        if not self.writes(dtype):
            return self.dequantize(self.dtype).to(dtype)
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self._write(out)
        return out

    def _by_library(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.dequantize().to(dtype)

    def _write(self, out: Tensor) -> None:
        raise NotImplementedError


class CodesWeight(_WrittenWeight):
    """Int8Tensor or IntxUnpackedToInt8Tensor, with a scale for each row, for all, or for groups of
    a row."""

    def _write(self, out: Tensor) -> None:
        codes, scale = self.tensor.qdata.contiguous(), self.tensor.scale.float().flatten()
        # As a matrix of groups; a single scale is used for every row.
        runs = max(scale.numel(), self.shape[0])
        _ops.dequantize("8bit", codes, scale.expand(runs).contiguous(), out.view(runs, -1))


class ScaledCodesWeight(CodesWeight):
    """The weight for a forward that multiplies by codes and then scales: W is rounded once, to any
    dtype."""

    def writes(self, dtype: torch.dtype) -> bool:
        return self.by_kernel

    def _by_library(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.dequantize(dtype)


class NF4Weight(_WrittenWeight):
    """NF4Tensor. Its own method `dequantize` is a different function, of its table only."""

    def _by_library(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.get_original_weight().to(dtype)

    def _write(self, out: Tensor) -> None:
        tensor = self.tensor
        scale = tensor.dequantize_scalers(
            tensor.quantized_scalers, tensor.quantization_factor, tensor.scaler_block_size
        )
        codes, table = tensor.quantized_data.contiguous(), tensor.nf4.float()
        # The scales are no longer quantised.
        _ops.dequantize("4bit", codes, scale.float(), out, table=table, block=tensor.block_size)
