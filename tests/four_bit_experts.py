"""Experts in 4 bits as bitsandbytes' parametrization keeps them, without bitsandbytes, beside the
same experts dense; and PEFT's models of both."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from expert_helpers import both, make_experts, mixture, run
from helpers import F32
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

HIDDEN, INNER, BLOCK = 64, 96, 32
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


def two_experts(
    kind: str = "plain", form: str = "nf4", dtype: torch.dtype = F32, experts: int = 6
) -> tuple[nn.Module, nn.Module]:
    """(experts in 4 bits, the same experts dense)."""
    dense = make_experts(kind, experts, (HIDDEN, INNER)).to(dtype)
    packed = copy.deepcopy(dense)
    for name in both(dense):
        make_four_bits(packed, name, form)
        found = packed.parametrizations[name]
        part = found[0]
        dense.get_parameter(name).data = dequantised(found.original, part.quant_state)
    return packed, dense


def two_mixtures(
    kind: str = "plain",
    form: str = "nf4",
    dtype: torch.dtype = F32,
    adapters: dict[str, dict[str, Any]] | None = None,
    **words: Any,
) -> tuple[nn.Module, nn.Module]:
    """PEFT's models of `two_experts`, with the same random adapters."""
    packed, dense = (
        mixture(adapters=adapters, dtype=dtype, base=base, **words)
        for base in two_experts(kind, form, dtype)
    )
    own = factors(packed)
    with torch.no_grad():
        for name, parameter in factors(dense).items():
            parameter.copy_(own[name])
    for part in parts_of(packed):
        part.calls = 0  # PEFT reads the parameter when it makes a wrapper
    return packed, dense


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's factors by names that do not depend on the order of PEFT's wrappers."""
    return {
        f"{module.parameter_name}.{table}.{name}": layer.weight
        for module in model.modules()
        if isinstance(module, ParamWrapper)
        for table in ("lora_A", "lora_B")
        for name, layer in getattr(module, table).items()
    }


def step(model: nn.Module, operands: tuple) -> dict[str, Tensor]:
    """`run`, with the factors' gradients under the names of `factors`."""
    found = run(model, *operands)
    found = {name: value for name, value in found.items() if "lora_" not in name}
    gradients = {name: factor.grad for name, factor in factors(model).items()}
    return found | {name: value for name, value in gradients.items() if value is not None}
