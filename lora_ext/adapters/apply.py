"""Applies a placement to its model: all of it or, on any error, nothing."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..models.apply import install
from ..models.model import (
    BIAS_SAVED_BY,
    SAVED_BY,
    adapter_names,
    mark_only_lora_as_trainable,
    mark_saved,
)
from ..nn import LoRALayer
from .errors import telling
from .placement import Placement, Target


def apply(
    placement: Placement, adapter: str, trainable: bool, adapter_dtype: torch.dtype | None
) -> None:
    """Adds the adapter to all layers, or, on any error, to none."""
    model = placement.model
    is_first = not adapter_names(model)
    active = {id(target.layer): target.layer.active_adapters for target in placement.targets}
    new = {id(t.module): t.in_place for t in placement.targets if t.in_place is not t.module}
    with torch.no_grad(), ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        for target in placement.targets:
            if target.in_place is target.module:
                undo.callback(_remove, target.layer, adapter, active[id(target.layer)])
            _add(target, adapter, adapter_dtype)
        for stored, value in placement.written():
            tensor = stored.tensor
            if stored.untied:  # a separate parameter, so that the tied module does not change
                old: Any = {stored.name: tensor}
                undo.callback(stored.holder._parameters.update, old)
                own = nn.Parameter(value.to(tensor.device), requires_grad=tensor.requires_grad)
                stored.holder._parameters[stored.name] = stored.tensor = own
            else:
                undo.callback(tensor.copy_, tensor.detach().clone())
                tensor.copy_(value)
        replaced = {id(t.in_place): t.module for t in placement.targets if id(t.module) in new}
        undo.callback(install, model, replaced)
        install(model, new)
        undo.pop_all()
    _mark(placement, adapter)
    if is_first:
        mark_only_lora_as_trainable(model, placement.config.bias)
        if not trainable:
            model.requires_grad_(False)
        return
    for target in placement.targets:
        layer = target.layer
        layer.active_adapters = () if id(target.module) in new else active[id(layer)]
        bias = target.in_place._parameters.get("bias")
        if bias is not None and id(target.module) in new:
            bias.requires_grad_(False)
        for table in (layer.lora_a, layer.lora_b, layer.lora_bias):
            if adapter in table:
                table[adapter].requires_grad_(trainable)
    for stored, _ in placement.written():
        if isinstance(stored.tensor, nn.Parameter):
            stored.tensor.requires_grad_(trainable)


def _add(target: Target, adapter: str, dtype: torch.dtype | None) -> None:
    with telling(f"{target.name!r}: "):
        target.layer.add_adapter(adapter, target.spec, dtype)
    for table, value in target.values.items():
        getattr(target.layer, table)[adapter].copy_(value)


def _remove(layer: LoRALayer, adapter: str, active: tuple[str, ...]) -> None:
    if adapter in layer.adapters:
        layer.delete_adapter(adapter)
        layer.active_adapters = active


def _mark(placement: Placement, adapter: str) -> None:
    """Records on the modules what belongs to the adapter besides its factors."""
    layers = {id(target.module): target.in_place for target in placement.targets}
    owned = [(root, SAVED_BY) for root in placement.saved.values()]
    for stored, _ in placement.written():
        if not stored.is_copied:  # a bias
            owned.append((layers.get(id(stored.holder), stored.holder), BIAS_SAVED_BY))
    for module, attribute in owned:
        mark_saved(module, attribute, adapter)
