"""The weights of bitsandbytes' layers: NF4 and FP4, with scales quantised again or not, and int8.

    Linear4bit      W = table[code] * absmax of its block of 32 to 4096 elements, in
                    either of two orders:
                    as quantised, or, after a forward in eval mode on a CPU with AVX512_BF16, in
                    panels of 32 rows with absmax in bfloat16
    Linear8bitLt    W = code * (SCB / 127), a scale for each row

Kernels of this package dequantise them, bit for bit as bitsandbytes but without its temporary
tensors; on a device that these do not support, bitsandbytes' kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..torch_state import compute_dtype, is_autocast
from ..versions import TOO_OLD
from .base import QuantizedBase
from .devices import has_kernels
from .few_rows import FEW_ROWS, own_product_wins
from .weight import QuantizedWeight

_ops = torch.ops.lora_ext


class FourBitWeight(QuantizedWeight):
    """The weight of a `bitsandbytes.nn.Linear4bit`: its packed codes and their `QuantState`."""

    def __init__(self, packed: Tensor, state: Any) -> None:
        self.packed, self.state = packed, state
        rows, cols = state.shape
        self.shape, self.device, self.dtype = (rows, cols), packed.device, state.dtype
        self.format = f"{state.quant_type} in panels" if self.in_panels else state.quant_type

    @property
    def in_panels(self) -> bool:
        return getattr(self.state, "packing_format_for_cpu", False)

    def tensors(self) -> list[Tensor]:
        # Without `offset` and the tables, which never change.
        state = self.state
        return [self.packed, state.absmax, *([state.state2.absmax] if state.nested else [])]

    def writes(self, dtype: torch.dtype) -> bool:
        return True

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        state = self.state
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if self.device.type == "meta":
            return out  # on any device of the scales
        codes = self.packed.detach().view(torch.uint8).view(-1)
        blocks = {"table": state.code, "block": state.blocksize}
        if not has_kernels(self.device):
            self._dequantize_by_library(codes, out)
        elif self.in_panels:
            _ops.dequantize("4bit_panels", codes, state.absmax, out, **blocks)
        elif state.nested and state.state2.dtype == torch.float32:
            second = state.state2
            _ops.dequantize(
                "4bit",
                codes,
                state.absmax,
                out,
                **blocks,
                scale_table=second.code,
                scale_scale=second.absmax,
                scale_offset=state.offset,
                scale_block=second.blocksize,
            )
        else:
            absmax = _half_scales(state) if state.nested else state.absmax.float()
            _ops.dequantize("4bit", codes, absmax, out, **blocks)
        return out

    def _dequantize_by_library(self, codes: Tensor, out: Tensor) -> None:
        from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
            dequantize_blockwise,
        )

        state, absmax = self.state, self.state.absmax
        if state.nested:
            absmax = (dequantize_blockwise(absmax, state.state2) + state.offset).float()
        torch.ops.bitsandbytes.dequantize_4bit.out(
            codes, absmax, state.blocksize, state.quant_type, self.shape, out.dtype, out=out
        )


def _half_scales(state: Any) -> Tensor:
    """Nested scales that are computed in half: when bitsandbytes converts a half weight back from
    panels it quantises the scales again, and then reads them in the weight's dtype."""
    second, codes = state.state2, state.absmax.flatten()
    factor = second.absmax.float().repeat_interleave(second.blocksize)[: codes.numel()]
    return ((second.code[codes.long()] * factor).to(second.dtype) + state.offset).float()


class EightBitWeight(QuantizedWeight):
    """The weight of a `bitsandbytes.nn.Linear8bitLt`: its codes CB and their scales SCB."""

    format, dtype = "int8", torch.float32

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale
        rows, cols = codes.shape
        self.shape, self.device = (rows, cols), codes.device

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale]

    def writes(self, dtype: torch.dtype) -> bool:
        return True

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if self.device.type == "meta":
            return out
        if has_kernels(self.device):
            scale = self.scale.float().contiguous()
            _ops.dequantize("8bit", self.codes.contiguous(), scale, out, multiplier=1.0 / 127.0)
        else:
            factor = self.scale.unsqueeze(1).mul(1.0 / 127.0)
            torch.mul(self.codes.to(dtype), factor, out=out)
        return out


def four_bit_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of a `Linear4bit` for x, or why it has to be called."""
    if TOO_OLD["bitsandbytes"]:
        return TOO_OLD["bitsandbytes"]
    weight = layer._parameters["weight"]
    state = getattr(weight, "quant_state", None) or layer.quant_state
    if state is None:
        return "its weight is not quantised yet"
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return "its weight was quantised as [in, out]"
    if weight.device.type == "cpu" and layer.in_features % state.blocksize:
        return "bitsandbytes' kernels on the CPU read blocks that straddle rows in their own way"
    wanted = layer.compute_dtype
    has_kernel = _has_kernel(layer, x)
    if x is None:
        dtype = wanted or torch.float32
        if has_kernel and dtype != torch.bfloat16:
            return _ROUNDS_X
        return QuantizedBase(FourBitWeight(weight, state), layer.bias, dtype, dtype)
    if not layer.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        wanted = x.dtype
    dtype, found = wanted or x.dtype, FourBitWeight(weight, state)
    most_rows = _CPU_ROWS if has_kernel else _CUDA_ROWS if _has_cuda_kernel(layer, state, x) else 0
    if most_rows and own_product_wins(found, x, dtype, most_rows):
        return FEW_ROWS
    if has_kernel and dtype != torch.bfloat16:
        return _ROUNDS_X
    if is_autocast(x):
        # y is rounded to the autocast dtype, as is PEFT's update, and then cast to x's dtype.
        if dtype != torch.get_autocast_dtype(x.device.type):
            return "its compute_dtype is not autocast's"
    elif dtype != x.dtype:
        return "its compute_dtype is not x's, which the update keeps"
    return QuantizedBase(found, layer.bias, dtype, x.dtype)


_ROUNDS_X = "in eval bitsandbytes' kernel rounds x and y to bfloat16"

# In eval mode on a CPU with AVX512_BF16 bitsandbytes multiplies without dequantising. At 4096 x
# 4096 on two cores this product and the update took 1.06 of the time of the base alone with 64
# rows, the op 1.38; with 256 rows 1.28 and 1.08.
_CPU_ROWS = 127
# On CUDA it also has such a kernel, without gradients, which it uses for up to 4 rows on every
# card, and for more rows if its own timings of the card favour it.
_CUDA_ROWS = 4


def _has_kernel(layer: Any, x: Tensor | None) -> bool:
    """Whether its forward multiplies without dequantising; x None: an x without a gradient."""
    if layer.training or layer.weight.device.type != "cpu" or layer.out_features % 32:
        return False
    return layer.support_avx512bf16_for_cpu and not (x is not None and x.requires_grad)


def _has_cuda_kernel(layer: Any, state: Any, x: Tensor) -> bool:
    """Whether bitsandbytes (from 0.50 on) has a kernel that multiplies this x without
    dequantising."""
    if not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if layer.in_features % state.blocksize or not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return False
    return not state.nested or state.state2.blocksize == 256


def eight_bit_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of a `Linear8bitLt` for x, or why it has to be called."""
    if TOO_OLD["bitsandbytes"]:
        return TOO_OLD["bitsandbytes"]
    state, weight = layer.state, layer._parameters["weight"]
    # A weight that FSDP gathered has lost both; the layer's own forward then fails.
    codes, scale = getattr(weight, "CB", None), getattr(weight, "SCB", None)
    codes = state.CB if codes is None else codes
    scale = state.SCB if scale is None else scale
    if state.has_fp16_weights or codes is None or scale is None:
        return "its weight is not quantised yet"
    if codes.device.type != "cpu":
        return "it quantises x, too"
    if not layer.training:
        return "in eval it quantises x, too"
    dtype = torch.float32 if x is None else compute_dtype(x)
    return QuantizedBase(EightBitWeight(codes, scale), layer.bias, dtype, dtype)
