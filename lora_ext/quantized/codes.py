"""Codes as the operands of the kernels that dequantise, for a matrix and for a stack of matrices.

FourBits       W = table[code] * scale of its block, scales quantised again or not
ScaledCodes    W = (code - zero) * scale of its block, codes of 8 bits

`lora_ext.quantized.formats` makes those of the formats that models have on disk.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .devices import has_kernels
from .weight import WrittenWeight

_ops = torch.ops.lora_ext
# The last is not of bitsandbytes, and the first of two codes is in the lower half of their byte.
KINDS = ("nf4", "fp4", "e2m1")


class Codes(WrittenWeight):
    """The codes of a matrix or of a stack, and what they are multiplied by.

    Attributes:
        shape: ``(out, in)``, of a stack ``(E, rows, columns)``.
        own_rows: the kernels' words for a stack whose matrices without rows need not be written.
    """

    shape: Any
    own_rows: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def parts(self, first: int, count: int) -> Codes:
        """The matrices of a stack from a number on, as a stack; no other matrix is read."""

    def part(self, number: int) -> Codes:
        """One matrix of a stack; no other matrix is read."""
        made = self.parts(number, 1)
        made.shape = made.shape[1:]
        return made

    @abstractmethod
    def is_by_kernel(self) -> bool:
        """Whether they are dequantised by one launch of this package's kernel."""

    @abstractmethod
    def flat(self) -> tuple[list[Tensor], list[int]]:
        """The tensors and the numbers that `from_flat` makes the same codes of."""

    @classmethod
    @abstractmethod
    def from_flat(
        cls, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
    ) -> Codes:
        """The codes of what `flat` returned."""


class Nested(NamedTuple):
    """Scales that are codes themselves: ``table[code] * scale[i // block] + offset``.

    Attributes:
        table: ``[256]``.
        scale: one for each block of codes.
        offset: one element.
        block: codes that share a scale.
        dtype: that to which the product and the sum are rounded; the kernels read float32 alone.
    """

    table: Tensor
    scale: Tensor
    offset: Tensor
    block: int
    dtype: torch.dtype

    def values(self, codes: Tensor, first: int = 0) -> Tensor:
        """The scales of consecutive codes, of which `first` is the number of the first, rounded
        after the product and after the sum."""
        numbers = torch.arange(first, first + codes.numel(), device=codes.device)
        scale = self.scale.float()[numbers.div(self.block, rounding_mode="floor")]
        product = self.table[codes.flatten().int()] * scale
        return (product.to(self.dtype) + self.offset).float()


class FourBits(Codes):
    """Codes of 4 bits, whose blocks are counted through all rows and matrices.

    Args:
        codes: two a byte, in any dtype.
        scale: one for each block, floating, or with `nested` as uint8.
        kind: one of `KINDS`.
        table: ``[16]``.
        block: codes that share a scale.
        name: that of the form, for messages, if it is not the kind's.
        in_panels: whether the codes lie in panels of 32 rows, with scales in bfloat16.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        nested: Nested | None,
        kind: str,
        table: Tensor,
        block: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        in_panels: bool = False,
        name: str = "",
    ) -> None:
        self.codes, self.scale, self.nested = codes, scale, nested
        self.kind, self.table, self.block, self.in_panels = kind, table, block, in_panels
        self.shape, self.device, self.dtype = shape, codes.device, dtype
        self.format = name or kind

    def tensors(self) -> list[Tensor]:
        # Without the offset and the tables, which never change.
        return [self.codes, self.scale, *([] if self.nested is None else [self.nested.scale])]

    def words(self) -> dict[str, Any]:
        """The kernels' operands besides codes and scale."""
        words: dict[str, Any] = {"table": self.table, "block": self.block, **self.own_rows}
        words["low_first"] = self.kind == "e2m1"
        if self.nested is not None:
            words["scale_table"], words["scale_scale"], words["scale_offset"] = self.nested[:3]
            words["scale_block"] = self.nested.block
        return words

    def _bytes(self) -> Tensor:
        return self.codes.detach().view(torch.uint8).view(-1)

    def _without_nested(self) -> FourBits:
        if self.nested is None:
            return self
        made = copy.copy(self)
        made.scale, made.nested = self.nested.values(self.scale), None
        return made

    def _write(self, out: Tensor) -> None:
        if not has_kernels(self.device):
            self.write_by_library(out)
        elif self.in_panels:
            _ops.dequantize("4bit_panels", self._bytes(), self.scale, out, **self.words())
        elif self.nested is not None and self.nested.dtype == torch.float32:
            _ops.dequantize("4bit", self._bytes(), self.scale, out, **self.words())
        else:
            plain = self._without_nested()
            _ops.dequantize("4bit", self._bytes(), plain.scale.float(), out, **plain.words())

    def write_by_library(self, out: Tensor) -> None:
        """Writes W by bitsandbytes' own kernel, or of its kinds not by torch's operations."""
        scale = self._without_nested().scale
        if self.kind == "e2m1":
            pairs = self._bytes().int()
            values = self.table[torch.stack([pairs & 15, pairs >> 4], 1)].view(-1, self.block)
            torch.mul(values, scale.float().view(-1, 1), out=out.view(-1, self.block))
            return
        torch.ops.bitsandbytes.dequantize_4bit.out(
            self._bytes(), scale, self.block, self.kind, self.shape, out.dtype, out=out
        )

    def parts(self, first: int, count: int) -> FourBits:
        made, nested = copy.copy(self), self.nested
        made.shape = (count, *self.shape[1:])
        size = math.prod(self.shape[1:])
        begin, end = (number * size // self.block for number in (first, first + count))
        made.codes = self._bytes()[first * size // 2 : (first + count) * size // 2]
        made.scale = self.scale.view(-1)[begin:end]
        if nested is not None and nested.scale.numel() == 1:
            return made
        if nested is not None and begin % nested.block:
            made.scale, made.nested = nested.values(made.scale, begin), None
        elif nested is not None:
            blocks = slice(begin // nested.block, math.ceil(end / nested.block))
            made.nested = nested._replace(scale=nested.scale[blocks])
        return made

    def is_by_kernel(self) -> bool:
        return not self.in_panels and has_kernels(self.device)

    def flat(self) -> tuple[list[Tensor], list[int]]:
        nested = self.nested
        tensors, last = [self.codes, self.scale, self.table], 0
        if nested is not None:
            tensors, last = [*tensors, *nested[:3]], nested.block
        return tensors, [KINDS.index(self.kind), self.block, last, *self.shape]

    @classmethod
    def from_flat(
        cls, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
    ) -> FourBits:
        codes, scale, table, *second = tensors
        kind, block, last, *shape = numbers
        nested = Nested(second[0], second[1], second[2], last, torch.float32) if second else None
        return cls(codes, scale, nested, KINDS[kind], table, block, tuple(shape), dtype)


class ScaledCodes(Codes):
    """Codes of 8 bits with a scale for each block of a matrix.

    Args:
        codes: ``[..., rows, columns]``, int8 or float8.
        scale: ``[..., rows / m, columns / n]``, one for each block of m x n codes; for a stack
            whose matrices share them ``[1, ...]``.
        zero: as scale, or None.
        name: that of the codes' form.
        block: (m, n), where the last blocks of rows and of columns may have fewer; None if they
            are as many parts of W as there are scales.

    Attributes:
        multiplier: of every scale.
        by_kernel: whether codes without zero points are dequantised by this package's kernel: of
            int8 if their blocks are parts of a row, or all of W, and of float8_e4m3fn.
    """

    multiplier = 1.0

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        dtype: torch.dtype,
        name: str = "",
        block: tuple[int, int] | None = None,
    ) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        (rows, columns), (down, across) = codes.shape[-2:], scale.shape[-2:]
        self.block = block or (rows // max(1, down), columns // max(1, across))
        self.shape, self.device, self.dtype = tuple(codes.shape), codes.device, dtype
        self.by_kernel = self.device.type == "cpu"
        self.format = name or str(codes.dtype).removeprefix("torch.")
        if down > 1 and self.block[0] > 1:
            self.format += f" in blocks of {self.block[0]} x {self.block[1]}"
        elif across > 1:
            self.format += f" in groups of {self.block[1]}"

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale, *([] if self.zero is None else [self.zero])]

    def _write(self, out: Tensor) -> None:
        codes, scale, zero = self.codes, self.scale, self.zero
        *lead, rows, columns = codes.shape
        down, across = scale.shape[-2:]
        m, n = self.block
        if self.is_by_kernel():
            scale = scale.expand(*lead, down, across).float().contiguous()
            words = {"experts": math.prod(lead), "multiplier": self.multiplier, **self.own_rows}
            # Parts of a row are rows of their own, of any length.
            out = out.view(-1, n if m == 1 and n * across == columns else columns)
            words["block_rows"], words["block"] = self.block
            _ops.dequantize("8bit", codes.contiguous(), scale.flatten(), out, **words)
            return
        if (m * down, n * across) != (rows, columns):
            whole = scale.repeat_interleave(m, -2)[..., :rows, :].float()
            whole = whole.repeat_interleave(n, -1)[..., :columns]
            torch.mul(_values_of(codes, out.dtype), whole * self.multiplier, out=out)
            return
        values = _values_of(codes, out.dtype)
        blocks = values.reshape(*lead, down, rows // down, across, columns // across)
        if zero is not None:
            blocks = blocks - zero.to(blocks.dtype)[..., None, :, None]
        if self.multiplier != 1:
            scale = scale * self.multiplier
        torch.mul(blocks, scale[..., None, :, None], out=out.view(blocks.shape))

    def is_by_kernel(self) -> bool:
        (rows, columns), (down, across) = self.codes.shape[-2:], self.scale.shape[-2:]
        # The rest of a GPU's weights are as torch's operations have them.
        is_stack = self.codes.dim() == 3 and self.device.type == "cuda"
        if not (self.by_kernel or (is_stack and has_kernels(self.device))):
            return False
        if self.zero is not None:
            return False
        if self.codes.dtype == torch.float8_e4m3fn:
            # A GPU's kernel has blocks of powers of two, but for parts of a row.
            ends = zip(self.block, (rows, columns), strict=True)
            is_plain = all(size >= end or size.bit_count() == 1 for size, end in ends)
            return is_plain or self.device.type == "cpu" or down == rows
        return self.codes.dtype == torch.int8 and (down == rows or down == across == 1)

    def parts(self, first: int, count: int) -> ScaledCodes:
        made, where = copy.copy(self), slice(first, first + count)
        own = where if len(self.scale) > 1 else slice(None)
        made.codes, made.scale = self.codes[where], self.scale[own]
        made.zero = None if self.zero is None else self.zero[own]
        made.shape = (count, *self.shape[1:])
        return made

    def part(self, number: int) -> ScaledCodes:
        made = self.parts(number, 1)
        made.codes, made.scale, made.shape = made.codes[0], made.scale[0], made.shape[1:]
        made.zero = None if made.zero is None else made.zero[0]
        return made

    def flat(self) -> tuple[list[Tensor], list[int]]:
        return self.tensors(), [*self.block]

    @classmethod
    def from_flat(
        cls, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
    ) -> ScaledCodes:
        codes, scale, *zero = tensors
        down, across = numbers
        return cls(codes, scale, zero[0] if zero else None, dtype, block=(down, across))


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
