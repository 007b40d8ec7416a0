"""Formats in blocks, as models have them on disk: W = value of a code * scale of its block.

    mxfp4    e2m1, two a byte     32 of a row    2^(s - 127), s in uint8           gpt-oss
    nvfp4    e2m1, two a byte     16 of a row    e4m3 / a scale of the tensor      Blackwell's
    fp4      e2m1, two a byte     32 of a row    float32 or e8m0                   DeepSeek-V4's
    fp8      e4m3                 m x n of W     the same, or e8m0 in uint8        DeepSeek, Qwen

The first of two codes is in the lower half of its byte. e2m1, e4m3 and e8m0: OCP Microscaling
Formats 1.0 (2023). A format more is a row of `FORMATS`, and what reads the modules that hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Codes, FourBits, Nested, ScaledCodes

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float32, device="cpu")
_E2M1 = torch.cat([_E2M1, -_E2M1])
_HALF_E8M0 = torch.tensor([2.0 ** (code - 128) for code in range(256)], device="cpu").float()
_E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
_ONE_BLOCK = 1 << 30  # of all scales; a kernel's largest


class Format(NamedTuple):
    """How codes and scales are stored.

    Attributes:
        block: codes of a row that share a scale, or 0: blocks of rows and columns.
        codes: their dtypes; those of two a byte are bytes.
        scales: their dtypes.
        is_over_tensor: whether scales are divided by one of the whole tensor.
    """

    block: int
    codes: tuple[torch.dtype, ...]
    scales: tuple[torch.dtype, ...]
    is_over_tensor: bool = False


_BYTES = (torch.uint8, torch.int8)
FORMATS = {
    "mxfp4": Format(32, _BYTES, (torch.uint8,)),
    "nvfp4": Format(16, _BYTES, (torch.float8_e4m3fn,), is_over_tensor=True),
    "fp4": Format(32, _BYTES, (torch.float32, torch.float8_e8m0fnu)),
    "fp8": Format(0, (torch.float8_e4m3fn,), (torch.float32, torch.float8_e8m0fnu, torch.uint8)),
}


def codes_of(
    name: str,
    codes: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] | None = None,
    over: Tensor | None = None,
) -> Codes | str:
    """The codes of a matrix or of a stack of matrices, or what does not fit.

    Args:
        name: one of `FORMATS`.
        codes: ``[..., rows, columns]``; of two a byte ``[..., rows, columns / 2]``.
        scale: ``[..., rows, columns / block]``; with blocks of rows and columns
            ``[..., ceil(rows / m), ceil(columns / n)]``.
        dtype: that of the values by default.
        block: (m, n), for "fp8"; None: as many parts of W as there are scales.
        over: float32, one element, for "nvfp4".
    """
    form = FORMATS[name]
    for what, tensor, dtypes in (("codes", codes, form.codes), ("scales", scale, form.scales)):
        if tensor.dtype not in dtypes:
            return (
                f"{name} has {what} in {_names(dtypes)}, but these are in {_names([tensor.dtype])}"
            )
    if form.is_over_tensor != (over is not None) or (over is not None and over.numel() != 1):
        return f"{name} has {'a' if form.is_over_tensor else 'no'} scale of the whole tensor"
    per_byte = 2 if form.block else 1
    shape = (*codes.shape[:-1], per_byte * codes.shape[-1])
    wanted = _scales_of(form, shape, block, scale)
    if tuple(scale.shape) != wanted:
        of = f"{name} of {list(shape)}" + (
            f" in blocks of {block[0]} x {block[1]}" if block else ""
        )
        return f"{of} has scales of {list(wanted)}, but these are {list(scale.shape)}"
    if not form.block:
        scale = _floats(scale)
        return ScaledCodes(codes, scale, None, dtype, str(codes.dtype)[6:], block)
    device, nested = codes.device, None
    table = _E2M1.to(device)
    if name == "fp4":
        scale = _floats(scale)
    else:
        # mxfp4: codes twice as large, scales half as large. 2^128 is no float, and transformers has
        # .5 * 2^128 where s is 255.
        if over is None:
            table, values = 2.0 * table, _HALF_E8M0.to(device)
        else:
            values = _E4M3.to(device) / over.float().view(())
        one, zero = (torch.full((1,), value, device=device) for value in (1.0, 0.0))
        nested = Nested(values, one, zero, _ONE_BLOCK, torch.float32)
        scale = scale.view(torch.uint8)
    given = scale.reshape(-1), nested, "e2m1", table, form.block, shape, dtype
    return FourBits(codes, *given, name=name)


def _scales_of(
    form: Format, shape: tuple[int, ...], block: tuple[int, int] | None, scale: Tensor
) -> tuple[int, ...]:
    """The shape that scales have to have."""
    *lead, rows, columns = shape
    if form.block:
        return *lead, rows, math.ceil(columns / form.block)
    if block is None:  # any that divides
        down, across = scale.shape[-2:] if scale.dim() > 1 else (1, 1)
        block = math.ceil(rows / max(1, down)), math.ceil(columns / max(1, across))
        if rows % max(1, down) or columns % max(1, across):
            return *lead, -1, -1
    return *lead, math.ceil(rows / block[0]), math.ceil(columns / block[1])


def _floats(scale: Tensor) -> Tensor:
    """Scales as float32: of uint8 2^(s - 127), infinite where s is 255, where e8m0 has a NaN."""
    if scale.dtype == torch.uint8:
        return (scale.float() - 127).exp2()
    return scale.float()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
