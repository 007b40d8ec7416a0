"""Stacks of torchao: a parameter ``[E, rows, columns]`` whose type is one of its tensor subclasses.

    Int8Tensor      W[e] = (code - zero) * scale
    Float8Tensor    W[e] = code * scale

A scale is that of a row or column, of a block of a matrix, of a matrix, or of all. Each matrix has
the bits of torchao's `dequantize` of the stack. Codes of int8 without zero points are dequantised
by this package's kernel on the CPU, others by torch's functions in torchao's order.

torchao's other types are refused: those that also quantise x are another function, and none of the
rest can hold a stack on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..dtypes import HALVES
from ..torch_state import is_plain
from ..versions import TOO_OLD
from .of_torchao import (
    QUANTISES_X,
    SCALES_X,
    TRAINED,
    ZERO_POINTS,
    has_zero_points,
    reason_of_type,
)
from .stack import FlatStack, QuantizedStack, is_same
from .weight import QuantizedWeight

_ops = torch.ops.lora_ext
_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class TorchaoMatrix(QuantizedWeight):
    """One matrix of a stack.

    Args:
        codes: ``[rows, columns]``.
        scale: ``[rows / m, columns / n]``, one for each block of m x n codes.
        zero: as scale, or None.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, dtype: torch.dtype
    ) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.shape = (codes.shape[0], codes.shape[1])
        self.device, self.format, self.dtype = codes.device, format, dtype

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale] + ([] if self.zero is None else [self.zero])

    def writes(self, dtype: torch.dtype) -> bool:
        return True

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        (rows, columns), (down, across) = self.shape, self.scale.shape
        if self.device.type == "meta" or out.numel() == 0:
            return out
        is_of_rows = down == rows or (down, across) == (1, 1)
        if self.zero is None and self.codes.dtype == torch.int8 and out.is_cpu and is_of_rows:
            runs = max(rows, down * across)
            scale = self.scale.float().flatten().expand(runs).contiguous()
            _ops.dequantize("8bit", self.codes.contiguous(), scale, out.view(runs, -1))
            return out
        values = _values_of(self.codes, dtype)
        blocks = values.reshape(down, rows // down, across, columns // across)
        if self.zero is not None:
            blocks = blocks - self.zero.to(blocks.dtype)[:, None, :, None]
        torch.mul(blocks, self.scale[:, None, :, None], out=out.view(blocks.shape))
        return out


def _values_of(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes as torchao multiplies them by scales: int8 in W's dtype, float8 in float32."""
    if codes.dtype == torch.int8:
        return codes.to(dtype)
    if codes.device.type != "cpu":
        return codes.float()
    # On a CPU with AVX-512 a look-up takes 0.4 of the time of torch's conversion of float8.
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(codes.dtype).float()
    places = codes.contiguous().view(torch.uint8).flatten().int()
    return table.index_select(0, places).view(codes.shape)


class TorchaoStack(QuantizedStack):
    """A stack of codes with scales for blocks of each matrix, or of all.

    Args:
        codes: ``[E, rows, columns]``, int8 or float8.
        scale: ``[E, rows / m, columns / n]``, or with 1 instead of E.
        zero: as scale, or None; ignored if all are 0, which a traced program cannot see.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.codes, self.scale, self.dtype = codes, scale, dtype
        is_used = torch.compiler.is_compiling() or has_zero_points(zero)
        self.zero = zero if is_used else None
        self.sizes = (codes.shape[0], codes.shape[1], codes.shape[2])
        self.device = codes.device
        self.format = str(codes.dtype).removeprefix("torch.")
        if scale.shape[2] > 1:
            self.format += f" in groups of {codes.shape[2] // scale.shape[2]}"

    def stored(self, number: int) -> TorchaoMatrix:
        place = number if len(self.scale) > 1 else 0
        zero = None if self.zero is None else self.zero[place]
        return TorchaoMatrix(self.codes[number], self.scale[place], zero, self.format, self.dtype)

    def flat(self) -> FlatStack:
        tensors = [self.codes, self.scale] + ([] if self.zero is None else [self.zero])
        return FlatStack(tensors, [int(self.is_transposed)], self.dtype)

    @classmethod
    def from_flat(
        cls, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
    ) -> TorchaoStack:
        codes, scale, *zero = tensors
        made = cls(codes, scale, zero[0] if zero else None, dtype)
        made.is_transposed = bool(numbers[0])
        return made


# For each parameter its properties, the version of its zero points, and the stack of them: a
# forward asks a dozen times, and checking them takes 15 us.
_made: Any = WeakIdKeyDictionary()


def torchao_stack(tensor: Any) -> TorchaoStack | str | None:
    """The stack of a parameter, or why it is not supported; None for one that is not a stack of
    torchao's."""
    if not type(tensor).__module__.startswith("torchao."):
        return None
    if torch.compiler.is_compiling():
        return _stack_of(tensor)
    points = tensor.__dict__.get("zero_point")
    version = 0 if points is None or points.is_inference() else points._version
    key = (*tensor.__dict__.values(), tensor.requires_grad, version)
    found = _made.get(tensor)
    if found is None or not is_same(found[0], key):
        _made[tensor] = found = (key, _stack_of(tensor))
    return found[1]


def _stack_of(tensor: Any) -> TorchaoStack | str | None:
    if tensor.dim() != 3:
        return None
    reason = TOO_OLD["torchao"] or _reason(type(tensor).__name__, tensor)
    if reason:
        return reason
    codes, scale, zero = tensor.qdata, tensor.scale, getattr(tensor, "zero_point", None)
    if scale.numel() == 1:
        scale, zero = scale.view(1, 1, 1), None if zero is None else zero.view(1, 1, 1)
    if not _fit(codes, scale, zero, tensor.dtype):
        return "a quantised parameter has a form that is not known"
    return TorchaoStack(codes, scale, zero, tensor.dtype)


def _reason(name: str, tensor: Any) -> str:
    """Why torchao's own forward is another function than the product with W, or cannot be had."""
    if tensor.requires_grad:
        return TRAINED
    if name not in ("Int8Tensor", "Float8Tensor"):
        return reason_of_type(name)
    if tensor.act_quant_kwargs is not None:
        return QUANTISES_X
    if name == "Float8Tensor":
        return ""
    if tensor.act_pre_scale is not None:
        return SCALES_X
    is_of_rows = tensor.block_size[-1] == tensor.qdata.shape[-1]
    return ZERO_POINTS if is_of_rows and has_zero_points(tensor.zero_point) else ""


def _fit(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the parts are plain tensors, together, with a scale for each block of each matrix."""
    parts = [codes, scale] if zero is None else [codes, scale, zero]
    if not all(is_plain(part) and part.device == codes.device for part in parts):
        return False
    if codes.dtype not in _CODES or dtype not in (torch.float32, *HALVES):
        return False
    if scale.dim() != 3 or (zero is not None and zero.shape != scale.shape):
        return False
    count, down, across = scale.shape
    if 0 in scale.shape or count not in (1, codes.shape[0]):
        return False
    return codes.shape[1] % down == 0 and codes.shape[2] % across == 0
