"""The paths of PEFT's layers, for `lora_ext.explain`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from .reasons import PEFT, adapters_state


def peft_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (path, layer) pairs of PEFT's LoRA layers; imports nothing that is not imported."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    if lora is not None:
        for path, module in model.named_modules():
            if isinstance(module, lora.LoraLayer):
                yield path, module


def peft_path(layer: Any, rows: int | None = None) -> tuple[str, str]:
    """(path, reason) of a PEFT layer's next forward, accelerated or not."""
    if hasattr(type(layer), "path"):
        return layer.path(rows)
    from .swap import classes

    state = adapters_state(layer)
    if state is not None:
        return state
    if type(layer) in classes():
        return PEFT, "not accelerated; call lora_ext.accelerate(model)"
    return PEFT, f"no faster forward for peft's {type(layer).__name__}"


def parts_by_row(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """(the layers whose rows can have different adapters, what else of PEFT has parts for each
    adapter); imports nothing that is not imported, and looks into no layer."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    other: Any = sys.modules.get("peft.utils.other")
    theirs = () if lora is None else (lora.LoraLayer, other.AuxiliaryTrainingWrapper)
    layers: list[Any] = []
    others: list[Any] = []
    stack, seen = [model], set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        if hasattr(type(module), "row_adapters"):
            layers.append(module)
            base = children.get("base_layer")
            if base is not None:
                stack.append(base)
            continue
        if theirs and isinstance(module, theirs):
            others.append(module)
        stack += [child for child in children.values() if child is not None]
    return layers, others
