"""The weights of bitsandbytes: NF4 and FP4, with scales quantised again or not, and int8.

    Linear4bit      W = table[code] * absmax of its block of 32 to 4096 elements, in
                    either of two orders:
                    as quantised, or, after a forward in eval mode on a CPU with AVX512_BF16, in
                    panels of 32 rows with absmax in bfloat16
    a parametrization of ``[E, rows, columns]``
                    as a Linear4bit that is not in panels, its blocks counted through all matrices;
                    the codes and scales of one matrix are a part of those of the stack, if each
                    matrix begins with a block
    Linear8bitLt    W = code * (SCB / 127), a scale for each row

Kernels of this package dequantise them, bit for bit as bitsandbytes but without its temporary
tensors; on a device that these do not support, bitsandbytes' kernels do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dtypes import HALVES
from ..torch_state import compute_dtype, is_autocast, is_plain
from ..versions import TOO_OLD
from .codes import KINDS, FourBits, Nested, ScaledCodes
from .devices import has_kernels
from .few_rows import FEW_ROWS, own_product_wins
from .stack import QuantizedStack
from .weight import QuantizedBase, WrittenWeight

_FP4 = (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of 12
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
# What bitsandbytes' kernels read, whatever its state has: that is rounded under a default dtype of
# 16 bits, which `from_pretrained(dtype=)` sets.
_TABLES = {
    "nf4": torch.tensor(_NF4, dtype=torch.float32, device="cpu"),
    "fp4": torch.tensor([*_FP4, *(-v for v in _FP4)], dtype=torch.float32, device="cpu") / 12,
}


def codes_of(packed: Tensor, state: Any) -> FourBits:
    """Packed codes, of a matrix or of a stack, and their `QuantState`."""
    nested, in_panels = None, getattr(state, "packing_format_for_cpu", False)
    if state.nested:
        # When bitsandbytes converts a half weight back from panels it quantises the scales again,
        # and then reads them in the weight's dtype.
        second = state.state2
        nested = Nested(second.code, second.absmax, state.offset, second.blocksize, second.dtype)
    kind, table = state.quant_type, state.code
    if table.dtype != torch.float32 and kind in _TABLES:
        table = _TABLES[kind].to(packed.device)
    blocks = (kind, table, state.blocksize, tuple(state.shape), state.dtype)
    return FourBits(packed, state.absmax, nested, *blocks, in_panels)


class FourBitWeight(WrittenWeight):
    """The weight of a `bitsandbytes.nn.Linear4bit`: its packed codes and their `QuantState`. It
    keeps both, since a forward in eval mode changes them in place."""

    def __init__(self, packed: Tensor, state: Any) -> None:
        self.packed, self.state = packed, state
        rows, cols = state.shape
        self.shape, self.device, self.dtype = (rows, cols), packed.device, state.dtype
        in_panels = getattr(state, "packing_format_for_cpu", False)
        self.format = f"{state.quant_type} in panels" if in_panels else state.quant_type

    @property
    def codes(self) -> FourBits:
        return codes_of(self.packed, self.state)

    def tensors(self) -> list[Tensor]:
        return self.codes.tensors()

    def _write(self, out: Tensor) -> None:
        self.codes._write(out)


def four_bit_stack(codes: Tensor, state: Any) -> QuantizedStack | str:
    """The stack of packed codes and their `QuantState`, or why it is not supported."""
    if TOO_OLD["bitsandbytes"]:
        return TOO_OLD["bitsandbytes"]
    shape, size = tuple(state.shape), state.blocksize
    if len(shape) != 3:
        return "a quantised parameter is not a stack of matrices"
    if not is_plain(codes) or 2 * codes.nbytes != math.prod(shape):
        return "the codes of a quantised parameter are sharded"
    if state.quant_type not in KINDS or state.dtype not in (torch.float32, *HALVES):
        return "a quantised parameter has a form that lora_ext does not know"
    found = codes_of(codes.detach().view(torch.uint8).view(-1), state)
    if any(tensor.device != codes.device for tensor in found.flat()[0]):
        return "the codes of a quantised parameter are on another device than their scales"
    if shape[1] * shape[2] % size:
        return f"experts of {shape[1]} x {shape[2]} do not begin with a block of {size} codes each"
    if codes.device.type == "cpu" and shape[2] % size:
        return _STRADDLE
    dtypes, nested = {found.scale.dtype}, found.nested
    if nested is not None:
        dtypes = {nested.scale.dtype, nested.dtype, *(dtypes - {torch.uint8})}
    if dtypes != {torch.float32}:
        return "the scales of a quantised parameter are not in float32"
    return QuantizedStack(found)


def eight_bit_weight(codes: Tensor, scale: Tensor) -> ScaledCodes:
    """The weight of a `bitsandbytes.nn.Linear8bitLt`: its codes CB and their scales SCB."""
    made = ScaledCodes(codes, scale[:, None], None, torch.float32)
    made.multiplier, made.by_kernel = 1.0 / 127.0, has_kernels(codes.device)
    return made


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
        return _STRADDLE
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
    if has_kernel and dtype != torch.bfloat16:
        return _ROUNDS_X
    if most_rows and own_product_wins(found, x, dtype, most_rows):
        return FEW_ROWS
    if is_autocast(x):
        # y is rounded to the autocast dtype, as is PEFT's update, and then cast to x's dtype.
        if dtype != torch.get_autocast_dtype(x.device.type):
            return "its compute_dtype is not autocast's"
    elif dtype != x.dtype:
        return "its compute_dtype is not x's, which the update keeps"
    return QuantizedBase(found, layer.bias, dtype, x.dtype)


_STRADDLE = "a block of 4-bit codes spans two rows, which bitsandbytes on CPUs reads otherwise"
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
    return QuantizedBase(eight_bit_weight(codes, scale), layer.bias, dtype, dtype)
