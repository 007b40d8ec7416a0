"""Layers of a model, of this package or of PEFT, found without an import of PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def peft_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (path, layer) pairs of PEFT's LoRA layers; imports no further modules.

    For nested wrappers of parameters only the outermost, which represents all.
    """
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    if lora is None:
        return
    inner = wrapped_modules(model)
    for path, module in model.named_modules():
        if isinstance(module, lora.LoraLayer) and id(module) not in inner:
            yield path, module


def wrapped_modules(model: nn.Module) -> set[int]:
    """The ids of what PEFT's wrappers of parameters hold: each a wrapper, or the module whose
    parameters these are."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    kind = getattr(lora, "ParamWrapper", ())
    wrappers: Any = (module for module in model.modules() if isinstance(module, kind))
    return {id(wrapper.base_layer) for wrapper in wrappers}


def per_row_modules(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """(the layers whose rows can have different adapters, other modules of PEFT with a part for
    each adapter); imports no further modules and does not inspect the contents of layers."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    other: Any = sys.modules.get("peft.utils.other")
    theirs = () if lora is None else (lora.LoraLayer, other.AuxiliaryTrainingWrapper)
    wrapper = getattr(lora, "ParamWrapper", ())
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
            base: Any = children.get("base_layer")
            while isinstance(base, wrapper):  # computed by the outermost
                base = base._modules.get("base_layer")
            if base is not None:
                stack.append(base)
            continue
        if theirs and isinstance(module, theirs):
            others.append(module)
        stack += [child for child in children.values() if child is not None]
    return layers, others
