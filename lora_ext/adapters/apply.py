"""Applies a placement to its model: all of it or, on any error, nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.apply import install
from ..models.model import (
    BIAS_SAVED_BY,
    SAVED_BY,
    adapter_names,
    mark_only_lora_as_trainable,
    mark_saved,
)
from .errors import AdapterError
from .placement import Placement, Stored, Target


def written(placement: Placement) -> Iterator[tuple[Stored, Tensor]]:
    for stored in placement.stored.values():
        if stored.value is not None:
            yield stored, stored.value


def apply(
    placement: Placement, adapter: str, trainable: bool, adapter_dtype: torch.dtype | None
) -> None:
    """Adds the adapter to all layers, or, on any error, to none."""
    model = placement.model
    is_first = not adapter_names(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = {id(target.layer): target.layer.active_adapters for target in placement.targets}
    new = {id(t.module): t.in_place for t in placement.targets if t.in_place is not t.module}
    undo: list[tuple[Tensor, Tensor]] = []
    untied: list[tuple[Stored, Tensor]] = []
    try:
        for target in placement.targets:
            _add(target, adapter, adapter_dtype)
        with torch.no_grad():
            for stored, value in written(placement):
                if stored.untied:
                    untied.append((stored, stored.tensor))
                    _untie(stored, value)
                    continue
                undo.append((stored.tensor, stored.tensor.detach().clone()))
                stored.tensor.copy_(value)
        install(model, dict(new))
    except BaseException:
        with torch.no_grad():
            for tensor, value in reversed(undo):
                tensor.copy_(value)
        for stored, tensor in untied:
            stored.holder._parameters[stored.name] = tensor  # type: ignore[assignment]
        install(model, {id(t.in_place): t.module for t in placement.targets if id(t.module) in new})
        for target in placement.targets:
            if target.in_place is target.module and adapter in target.layer.adapters:
                target.layer.delete_adapter(adapter)
                target.layer.active_adapters = active[id(target.layer)]
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise
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
    for stored, _ in written(placement):
        if isinstance(stored.tensor, nn.Parameter):
            stored.tensor.requires_grad_(trainable)


def _untie(stored: Stored, value: Tensor) -> None:
    """Gives the holder a separate parameter, so that the tied module does not change."""
    tensor = stored.tensor
    own = nn.Parameter(value.to(tensor.device), requires_grad=tensor.requires_grad)
    stored.holder._parameters[stored.name] = stored.tensor = own


def _add(target: Target, adapter: str, dtype: torch.dtype | None) -> None:
    layer = target.layer
    try:
        layer.add_adapter(adapter, target.spec, dtype)
    except ValueError as error:
        raise AdapterError(f"{target.name!r}: {error}") from None
    with torch.no_grad():
        for table, value in target.values.items():
            getattr(layer, table)[adapter].copy_(value)


def _mark(placement: Placement, adapter: str) -> None:
    """Records on the modules what belongs to the adapter besides its factors."""
    layers = {id(target.module): target.in_place for target in placement.targets}
    owned = [(root, SAVED_BY) for root in placement.saved.values()]
    if placement.config.bias != "none":
        inside = {id(module) for root in placement.saved.values() for module in root.modules()}
        owned += [
            (layers.get(id(stored.holder), stored.holder), BIAS_SAVED_BY)
            for stored, _ in written(placement)
            if id(stored.holder) not in inside
        ]
    for module, attribute in owned:
        mark_saved(module, attribute, adapter)
