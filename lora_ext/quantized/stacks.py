"""How a module stores a parameter ``[E, ...]``, without reading a property that dequantises it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_state import is_plain
from .codes import Codes, FourBits, ScaledCodes
from .of_bitsandbytes import four_bit_stack
from .of_fp8 import fp8_stack, is_scale
from .of_mxfp4 import Mxfp4, mxfp4_stack
from .of_torchao import torchao_stack
from .stack import QuantizedStack, kept

PARAMETRIZED = "the module has parametrizations"
# By name, since bitsandbytes does not have to be installed.
_PARAMETRIZE = "bitsandbytes.nn.parametrize"
_FOUR_BITS = f"{_PARAMETRIZE}.Bnb4bitParametrization"
# An op has their places here as the first of a stack's numbers.
_KINDS: tuple[type[Codes], ...] = (FourBits, ScaledCodes)


def parametrized(module: nn.Module) -> dict[str, Any]:
    """The lists of parametrizations of a module's parameters, by their names."""
    found: Any = module._modules.get("parametrizations")
    return {} if found is None else found._modules


def parameter_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters, parametrized ones included and scales of codes not,
    in the order in which PEFT wraps them: the module's, or the alphabet's if it has
    parametrizations."""
    found = module._parameters
    own = [name for name, parameter in found.items() if parameter is not None]
    own = [name for name in own if not is_scale(found, name)]
    others = parametrized(module)
    return sorted({*own, *others}) if others else own


def stored_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter as it is stored: of a parametrized one the original, such as the codes."""
    kept = module._parameters.get(name)
    if kept is None:
        found = parametrized(module).get(name)
        return None if found is None else found._parameters.get("original")
    return kept


def stack_of(module: nn.Module, name: str) -> Tensor | QuantizedStack | str | None:
    """The parameter, or its stack if it is quantised; why neither can be had, as text; None if
    there is no such parameter."""
    found = parametrized(module).get(name)
    if found is None:
        own = module._parameters.get(name)
        if own is None:
            return None
        find = fp8_stack if is_plain(own) else torchao_stack
        stack = find(module, name, own)
        return own if stack is None else stack
    parts = list(found._modules.values())
    if len(parts) != 1 or not is_packing(parts[0]) or "original" not in found._parameters:
        return PARAMETRIZED
    codes: Any = found._parameters["original"]
    return (mxfp4_stack if type(parts[0]) is Mxfp4 else _four_bits)(parts[0], codes)


def whole_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter's values; of quantised matrices all, which their library dequantises."""
    found = getattr(module, name)
    return found if is_plain(found) else found.dequantize()


def _four_bits(part: Any, codes: Tensor) -> QuantizedStack | str:
    state = part.quant_state
    if torch.compiler.is_compiling() or not is_plain(codes):
        return four_bit_stack(codes, state)
    scale = state.absmax
    # The tensors of a kept stack keep their storages, so that no other has their addresses.
    key = (codes.data_ptr(), codes.nbytes, codes.device, state.code, state.quant_type, state.dtype)
    key += (scale.data_ptr(), scale.dtype, scale.device, state.shape, state.blocksize)
    if state.nested:
        second = state.state2
        key += (second.absmax.data_ptr(), second.code, second.blocksize, state.offset)
    return kept(part, "", key, lambda: four_bit_stack(codes, state))


def stacks_of(module: nn.Module) -> list[QuantizedStack]:
    """The quantised parameters of a module."""
    found = [stack_of(module, name) for name in parameter_names(module)]
    return [stack for stack in found if isinstance(stack, QuantizedStack)]


def is_packing(part: nn.Module) -> bool:
    """Whether a parametrization is bitsandbytes' own or that of MXFP4, and nothing else is computed
    in it."""
    kind = type(part)
    if kind is not Mxfp4 and f"{kind.__module__}.{kind.__qualname__}" != _FOUR_BITS:
        return False
    return "forward" not in part.__dict__ and not (part._forward_hooks or part._forward_pre_hooks)


def has_own_hooks_alone(module: nn.Module) -> bool:
    """Whether its forward's hooks are those of bitsandbytes' parametrization, which cache the
    dequantised parameters in a forward of the module: without one there is nothing to cache."""
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all(getattr(hook, "__module__", None) == _PARAMETRIZE for hook in hooks)


def flat_weight(weight: Tensor | QuantizedStack) -> tuple[list[Tensor], list[int], torch.dtype]:
    """A weight as the arguments of an op of torch.library: the tensors that it is read from, sizes
    and the like, none for a tensor, and the dtype of its matrices."""
    if isinstance(weight, Tensor):
        return [weight], [], weight.dtype
    tensors, numbers = weight.codes.flat()
    numbers = [_KINDS.index(type(weight.codes)), int(weight.is_transposed), *numbers]
    return tensors, numbers, weight.dtype


def weight_from_flat(
    tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
) -> Tensor | QuantizedStack:
    """The weight of what `flat_weight` returned."""
    if not numbers:
        return tensors[0]
    kind, is_transposed, *others = numbers
    codes = _KINDS[kind].from_flat(tensors, others, dtype)
    return QuantizedStack(codes, bool(is_transposed), shares=False)
