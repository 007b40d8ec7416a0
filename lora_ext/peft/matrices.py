"""Modules with adapters on some of their matrices, such as a mixture's router with `all-linear`.

    W' = W + scaling * B A        computed as in PEFT, with the same bits: a router compares logits

Such a W is small. In PEFT most of the time is spent on registering and removing a parametrization;
here the module is called with W' instead of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..dtypes import FLOATS
from ..quantized.stacks import stack_of
from ..torch_state import is_plain, is_transformed
from .chain import Chain

SUM = "the module is called with W + B A, as PEFT makes it"


def are_all(chain: Chain) -> bool:
    """Whether each parameter of the chain is a matrix."""
    stored = [stack_of(chain.base, name) for _, name, _ in chain.targets]
    return all(isinstance(each, Tensor) and each.dim() == 2 for each in stored)


def reason(chain: Chain, by_row: bool = False) -> str:
    """Why PEFT's own forward is needed, or ""."""
    if any(chain.base._parameters[name].dtype not in FLOATS for _, name, _ in chain.targets):
        return "a parameter is not of a floating dtype"
    is_exported = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    return "the model is exported or traced" if is_exported else ""


def operands(chain: Chain, args: tuple, kwargs: Mapping[str, Any]) -> tuple | None:
    """The arguments of the module, or None if they need PEFT's own forward."""
    return None if is_transformed() or kwargs.get("adapter_names") else (args, kwargs)


def has_rows(operands: tuple) -> bool:
    """Whether the arguments are one plain x, whose rows can be called apart."""
    (x, *others), named = operands
    return not (others or named) and is_plain(x) and x.dim() >= 2


def forward(chain: Chain, operands: tuple) -> Any:
    """The module's output with W + B A instead of each W."""
    sums = {
        name: _with_updates(chain.base._parameters[name], wrapper, adapters)
        for wrapper, name, adapters in chain.targets
        if adapters
    }
    return functional_call(chain.base, sums, *operands, tie_weights=False)


def _with_updates(parameter: Tensor, wrapper: Any, adapters: list[str]) -> Tensor:
    # In PEFT's order of operations, to get its bits.
    delta = wrapper.get_delta_weight(adapters[0])
    for name in adapters[1:]:
        delta = delta + wrapper.get_delta_weight(name)
    return parameter + delta
