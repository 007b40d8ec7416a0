"""Weights in 4 bits as bitsandbytes' parametrization keeps them, without bitsandbytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from helpers import F32
from torch import Tensor, nn
from torch.nn.utils import parametrize

BLOCK = 32
# The library's tables, rounded: any sixteen values would do.
TABLES = {
    "nf4": [-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.7, 1],
    "fp4": [0, 0.005, 0.67, 1, 0.33, 0.5, 0.17, 0.25],
}
TABLES["fp4"] += [-value for value in TABLES["fp4"]]
# Blocks of 48 second scales begin with an expert, those of 50 lie across experts, as some of 256 do
# in the library.
FORMS = {
    "nf4": ("nf4", None),
    "fp4": ("fp4", None),
    "nested": ("nf4", 48),
    "straddling": ("nf4", 50),
}


class Bnb4bitParametrization(nn.Module):
    """bitsandbytes' class of this name.

    Attributes:
        calls: how often all experts were dequantised.
    """

    def __init__(self, quant_state: Any) -> None:
        super().__init__()
        self.quant_state, self.calls = quant_state, 0

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        self.calls += 1
        return dequantised(packed, self.quant_state)


def _hook(*_: Any) -> None:
    """bitsandbytes' hooks, which cache what a forward reads twice."""


for each in (Bnb4bitParametrization, _hook):
    each.__module__ = "bitsandbytes.nn.parametrize"


def quantised(weight: Tensor, kind: str, nested: int | None, block: int = BLOCK) -> tuple:
    """(codes, state) of a weight; nested: codes of scales that share one of theirs."""
    values = weight.float().reshape(-1, block)
    table = torch.tensor(TABLES[kind], dtype=F32)
    scale = values.abs().amax(1)
    codes = ((values / scale[:, None])[..., None] - table).abs().argmin(-1).flatten()
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    state = SimpleNamespace(shape=weight.shape, dtype=weight.dtype, blocksize=block, code=table)
    state.quant_type, state.nested, state.absmax = kind, nested is not None, scale
    if nested is not None:
        state.offset = scale.mean()
        rest = scale - state.offset
        parts = torch.cat([rest, rest.new_zeros(-len(rest) % nested)]).view(-1, nested)
        most = parts.abs().amax(1)
        state.state2 = SimpleNamespace(absmax=most, blocksize=nested, dtype=F32)
        state.state2.code = torch.linspace(-1, 1, 256)
        found = ((parts / most[:, None] + 1) * 127.5).round().to(torch.uint8)
        state.absmax = found.flatten()[: len(scale)]
    return packed, state


def dequantised(packed: Tensor, state: Any) -> Tensor:
    codes = packed.flatten()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten().int()
    scale = state.absmax
    if state.nested:
        second = state.state2
        factor = second.absmax.repeat_interleave(second.blocksize)[: len(scale)]
        scale = second.code[scale.int()] * factor + state.offset
    values = state.code[codes].view(-1, state.blocksize) * scale[:, None]
    return values.view(state.shape).to(state.dtype)


def make_four_bits(module: nn.Module, name: str, form: str = "nf4", block: int = BLOCK) -> None:
    """As `bitsandbytes.nn.parametrize.replace_parameter_4bit`."""
    packed, state = quantised(module.get_parameter(name).data, *FORMS[form], block)
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    part = Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, name, part, unsafe=True)
    module.register_forward_pre_hook(_hook)
    module.register_forward_hook(_hook)


def parts_of(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if isinstance(each, Bnb4bitParametrization)]


def states_of(module: nn.Module) -> list[Any]:
    return [part.quant_state for part in parts_of(module)]
