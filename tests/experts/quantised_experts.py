"""Quantised experts beside the same experts dense, PEFT's models of both, and a step of them."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import four_bit_experts
import torch
import torchao_experts
from expert_helpers import both, make_experts, make_routes, mixture, run
from four_bit_experts import BLOCK, parts_of, states_of
from helpers import F32
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_ext.quantized.of_mxfp4 import hold_mxfp4

HIDDEN, INNER = 64, 96
FOUR_BITS = list(four_bit_experts.FORMS)


def forms(*names: str) -> list[Any]:
    """Parameters of a test: those in 4 bits, and of torchao these or all."""
    return [*FOUR_BITS, *torchao_experts.forms(*names)]


def quantise(module: nn.Module, name: str, form: str) -> Tensor:
    """Quantises a parameter of a module, and returns its values then."""
    if form.startswith("bitsandbytes"):  # the library's own
        own: Any = importlib.import_module("bitsandbytes.nn.parametrize")
        own.replace_parameter_4bit(module, name, form.endswith("nested"), "nf4", BLOCK)
        return getattr(module, name).clone()
    if form == "mxfp4":
        values = module.get_parameter(name)
        # Codes of rows of W; scales about those of W, some of them tiny.
        rows = values.mT if module.is_transposed else values
        shape = (*rows.shape[:-1], rows.shape[-1] // 32)
        generator = torch.Generator().manual_seed(3)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 125, shape, generator=generator, dtype=torch.uint8)
        hold_mxfp4(module, name, codes, scales, values.dtype)
        return getattr(module, name).clone()
    if form not in FOUR_BITS:
        torchao_experts.quantise(module, name, form)
        return module.get_parameter(name).dequantize()
    four_bit_experts.make_four_bits(module, name, form)
    found: Any = module.parametrizations
    part = found[name]
    return four_bit_experts.dequantised(part.original, part[0].quant_state)


def quantise_both(packed: nn.Module, dense: nn.Module, form: str) -> None:
    """Experts, and others of which the values are then the same."""
    for name in both(dense):
        dense.get_parameter(name).data = quantise(packed, name, form)


def two_experts(
    kind: str = "plain", form: str = "nf4", dtype: torch.dtype = F32, experts: int = 6
) -> tuple[nn.Module, nn.Module]:
    """(quantised experts, the same experts dense)."""
    dense = make_experts(kind, experts, (HIDDEN, INNER)).to(dtype)
    packed = copy.deepcopy(dense)
    quantise_both(packed, dense, form)
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


def routes(tokens: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    return make_routes(tokens, dtype=dtype, hidden=HIDDEN)


def of_one_expert(
    tokens: int, expert: int, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    x, index, weights = routes(tokens, dtype)
    return x, torch.full_like(index[:, :1], expert), weights[:, :1]


@torch.no_grad()
def poison_all_but(expert: int, model: Any) -> None:
    """Every scale that is not of the expert becomes NaN."""
    nan = float("nan")
    for state in states_of(model):
        count = len(state.absmax) // 6
        first, last, floats = expert * count, (expert + 1) * count, state.absmax
        if state.nested:
            floats, second = state.state2.absmax, state.state2.blocksize
            first, last = first // second, -(-last // second)
        floats[:first] = floats[last:] = nan
    if not states_of(model):
        base = model.base_model.model.experts.get_base_layer()
        for name in both(base):
            scale = base.get_parameter(name).scale
            scale[:expert] = scale[expert + 1 :] = nan


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
