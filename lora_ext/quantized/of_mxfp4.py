"""Stacks in MXFP4 as a parametrization holds them: the codes and scales of gpt-oss' folders.

    parametrizations.NAME.original    codes   [E, out, in / 32, 16], two a byte
    parametrizations.NAME.0.scales    scales  [E, out, in / 32], 2^(s - 127)

transformers has no module for them where it has no kernel of Triton's, and dequantises the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..torch_state import is_plain
from .codes import Codes
from .formats import codes_of
from .stack import QuantizedStack, kept


class Mxfp4(nn.Module):
    """The parametrization of a stack ``[E, in, out]``, or ``[E, out, in]`` if not `is_transposed`,
    with these scales and values in this dtype. Reading the parameter dequantises all matrices."""

    scales: Tensor

    def __init__(self, scales: Tensor, dtype: torch.dtype, is_transposed: bool) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.dtype, self.is_transposed = dtype, is_transposed

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        stack = mxfp4_stack(self, codes)
        if isinstance(stack, str):
            raise ValueError(f"lora_ext: expected a stack in MXFP4, but {stack}")
        values = stack.codes.dequantize(self.dtype)
        return values.transpose(1, 2) if self.is_transposed else values


def hold_mxfp4(
    module: nn.Module, name: str, codes: Tensor, scales: Tensor, dtype: torch.dtype
) -> None:
    """Puts codes and scales in the place of a parameter of a module of experts."""
    setattr(module, name, nn.Parameter(codes, requires_grad=False))
    part = Mxfp4(scales, dtype, bool(getattr(module, "is_transposed", False)))
    parametrize.register_parametrization(module, name, part, unsafe=True)


def mxfp4_stack(part: Mxfp4, codes: Tensor) -> QuantizedStack | str:
    """The stack of codes and their parametrization, or what does not fit."""
    scales = part.scales
    if not (is_plain(codes) and is_plain(scales)):
        return "the codes of a quantised parameter are sharded"

    def make() -> QuantizedStack | str:
        found = codes_of("mxfp4", codes.detach().flatten(2), scales, part.dtype)
        return QuantizedStack(found, part.is_transposed) if isinstance(found, Codes) else found

    if torch.compiler.is_compiling():
        return make()
    key: tuple[Any, ...] = (codes.data_ptr(), codes.device, codes.shape, scales.data_ptr())
    return kept(part, "", key, make)
