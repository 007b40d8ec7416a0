"""The paths of PEFT's layers, for `lora_ext.explain`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..quantized.base import workspace_bytes
from .reasons import ADDED, BASE, FUSED, PEFT, adapters_state, dequantized_base, is_passed_over


def peft_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (path, layer) pairs of PEFT's LoRA layers; imports no further modules.

    For nested wrappers of parameters only the outermost, which represents all.
    """
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    if lora is None:
        return
    inner = set()
    for path, module in model.named_modules():
        if isinstance(module, lora.ParamWrapper):
            inner.add(id(module.base_layer))
        if isinstance(module, lora.LoraLayer) and id(module) not in inner:
            yield path, module


def peft_path(layer: Any, rows: int | None = None) -> tuple[str, str]:
    """(path, reason) of a PEFT layer's next forward, accelerated or not."""
    if hasattr(type(layer), "path"):
        path, reason = layer.path(rows)
        if path != BASE and is_passed_over(layer):
            return PEFT, "the layer's forward was replaced on the instance before accelerate"
        return path, reason
    from .swap import classes

    state = adapters_state(layer)
    if state is not None:
        return state
    if type(layer) in classes():
        return PEFT, "not accelerated; call lora_ext.accelerate(model)"
    return PEFT, f"no faster forward for peft's {type(layer).__name__}"


def peft_workspace_bytes(layer: Any, path: str) -> int:
    """Workspace of the base of a PEFT layer on a path, if it is dequantised there; else 0."""
    if path == FUSED and hasattr(type(layer), "workspace_bytes"):
        return layer.workspace_bytes()
    if path == FUSED:
        return workspace_bytes(dequantized_base(layer.get_base_layer(), None))
    if path != ADDED or type(layer.get_base_layer()) is nn.Embedding:
        return 0
    from .linear import linear_path

    return workspace_bytes(linear_path(layer, None).base)  # for DoRA
