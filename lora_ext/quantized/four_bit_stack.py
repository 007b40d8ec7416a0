"""Stacks in bitsandbytes' 4 bits, as its parametrization of a parameter ``[E, rows, columns]``
stores them: NF4 and FP4, with scales quantised again or not.

    W[e] = table[code] * scale of its block of 32 to 4096 elements, counted through all matrices

The codes and scales of one matrix are a part of those of the stack, if each matrix begins with a
block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import HALVES
from ..torch_state import is_plain
from ..versions import TOO_OLD
from .devices import has_kernels
from .stack import FlatStack, QuantizedStack
from .weight import QuantizedWeight

_ops = torch.ops.lora_ext
_KINDS = ("nf4", "fp4")


class Nested(NamedTuple):
    """Scales that are codes themselves: ``table[code] * scale[i // block] + offset``.

    Attributes:
        table: ``[256]``.
        scale: one for each block of codes.
        offset: one element.
        block: codes that share a scale.
    """

    table: Tensor
    scale: Tensor
    offset: Tensor
    block: int

    def values(self, codes: Tensor, first: int) -> Tensor:
        """The scales of consecutive codes, rounded after the product and after the sum.

        Args:
            first: the number of the first code.
        """
        numbers = torch.arange(first, first + len(codes), device=codes.device)
        scale = self.scale[numbers.div(self.block, rounding_mode="floor")]
        return self.table[codes.int()] * scale + self.offset


class Blocks(NamedTuple):
    """How codes become values.

    Attributes:
        kind: "nf4" or "fp4".
        table: ``[16]``.
        size: the codes of a block.
    """

    kind: str
    table: Tensor
    size: int


class FourBitMatrix(QuantizedWeight):
    """One matrix of a stack.

    Args:
        codes: ``[rows * columns / 2]`` uint8.
        scale: one for each block, in float32, or with `nested` as uint8.
        nested: whose scales begin with those of this matrix.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        nested: Nested | None,
        blocks: Blocks,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.codes, self.scale, self.nested, self.blocks = codes, scale, nested, blocks
        self.shape, self.dtype = shape, dtype
        self.device, self.format = codes.device, blocks.kind

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale]

    def writes(self, dtype: torch.dtype) -> bool:
        return True

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        kind, table, size = self.blocks
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if self.device.type == "meta":
            return out
        scale, nested = self.scale, self.nested
        if not has_kernels(self.device):
            scale = scale if nested is None else nested.values(scale, 0)
            torch.ops.bitsandbytes.dequantize_4bit.out(
                self.codes, scale, size, kind, self.shape, dtype, out=out
            )
        elif nested is None:
            _ops.dequantize("4bit", self.codes, scale, out, table=table, block=size)
        else:
            _ops.dequantize(
                "4bit",
                self.codes,
                scale,
                out,
                table=table,
                block=size,
                scale_table=nested.table,
                scale_scale=nested.scale,
                scale_offset=nested.offset,
                scale_block=nested.block,
            )
        return out


class FourBitStack(QuantizedStack):
    """A stack whose matrices begin with a block each.

    Args:
        codes: two a byte, all matrices one after the other.
        scale: one for each block, in float32, or with `nested` as uint8.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        nested: Nested | None,
        blocks: Blocks,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self.codes, self.scale, self.nested, self.blocks = codes, scale, nested, blocks
        self.sizes, self.dtype = sizes, dtype
        self.device, self.format = codes.device, blocks.kind

    def stored(self, number: int) -> FourBitMatrix:
        _, rows, columns = self.sizes
        nibbles, count = rows * columns // 2, rows * columns // self.blocks.size
        first, nested = number * count, self.nested
        codes = self.codes[number * nibbles : (number + 1) * nibbles]
        scale = self.scale[first : first + count]
        if nested is not None:
            if first % nested.block:
                scale, nested = nested.values(scale, first), None
            else:
                begin = first // nested.block
                end = begin + math.ceil(count / nested.block)
                nested = nested._replace(scale=nested.scale[begin:end])
        return FourBitMatrix(codes, scale, nested, self.blocks, (rows, columns), self.dtype)

    def flat(self) -> FlatStack:
        kind, table, size = self.blocks
        nested = self.nested
        tensors, last = [self.codes, self.scale, table], 0
        if nested is not None:
            tensors, last = [*tensors, *nested[:3]], nested.block
        numbers = [_KINDS.index(kind), size, *self.sizes, int(self.is_transposed), last]
        return FlatStack(tensors, numbers, self.dtype)

    @classmethod
    def from_flat(
        cls, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
    ) -> FourBitStack:
        codes, scale, table, *second = tensors
        kind, size, count, rows, columns, is_transposed, last = numbers
        nested = Nested(second[0], second[1], second[2], last) if second else None
        blocks = Blocks(_KINDS[kind], table, size)
        made = cls(codes, scale, nested, blocks, (count, rows, columns), dtype)
        made.is_transposed = bool(is_transposed)
        return made


def four_bit_stack(codes: Tensor, state: Any) -> FourBitStack | str:
    """The stack of packed codes and their `QuantState`, or why it is not supported."""
    if TOO_OLD["bitsandbytes"]:
        return TOO_OLD["bitsandbytes"]
    shape, size, nested = tuple(state.shape), state.blocksize, None
    if len(shape) != 3:
        return "a quantised parameter is not a stack of matrices"
    if not is_plain(codes) or 2 * codes.nbytes != math.prod(shape):
        return "the codes of a quantised parameter are sharded"
    if state.quant_type not in _KINDS or state.dtype not in (torch.float32, *HALVES):
        return "a quantised parameter has a form that is not known"
    tensors = [state.absmax, state.code]
    if state.nested:
        second = state.state2
        tensors += [second.absmax, second.code, state.offset]
        nested = Nested(second.code, second.absmax, state.offset, second.blocksize)
    if any(tensor.device != codes.device for tensor in tensors):
        return "the codes of a quantised parameter are on another device than their scales"
    if shape[1] * shape[2] % size:
        return f"experts of {shape[1]} x {shape[2]} do not begin with a block of {size} codes each"
    if codes.device.type == "cpu" and shape[2] % size:
        return "bitsandbytes' kernels on the CPU read blocks that straddle rows in their own way"
    floats = state.absmax if nested is None else nested.scale
    if floats.dtype != torch.float32 or (nested and state.absmax.dtype != torch.uint8):
        return "the scales of a quantised parameter are not in float32"
    packed = codes.detach().view(torch.uint8).view(-1)
    blocks = Blocks(state.quant_type, state.code, size)
    return FourBitStack(packed, state.absmax.view(-1), nested, blocks, shape, state.dtype)
