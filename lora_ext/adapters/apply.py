"""Checks a file's tensors against a placement, by the header first, then as they are read, and
applies it to its model: all of it or, on any error, nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.apply import install, replace, undone_on_error
from ..models.model import (
    BIAS_SAVED_BY,
    SAVED_BY,
    adapter_names,
    mark_only_lora_as_trainable,
    mark_saved,
    named_modules,
    saved_modules,
)
from ..nn import LoRALayer
from .errors import AdapterError, shown, some, telling
from .layout import PREFIX, Stored, bias_of, check_real, tensors_of
from .placement import Placement, Target
from .tensors import Entry, TensorFile


def check_header(placement: Placement, header: Mapping[str, Entry]) -> None:
    """Raises AdapterError for a tensor that belongs to no slot, a slot without its tensor, a rank
    that differs from the config, a size from the model, and a dtype that cannot be used."""
    needed = {slot.key for target in placement.targets for slot in target.slots}
    needed |= {key for key, entry in placement.stored.items() if entry.written}
    missing = needed - set(header)
    unknown = {key for key in header if key not in needed and not placement.may_hold(key)}
    if (unknown and not missing) or any("lora_magnitude_vector" in key for key in unknown):
        raise AdapterError(
            f"expected LoRA tensors alone, but got {_why_unknown(placement, unknown)}"
        )
    if missing:
        also = f"; there are {some(unknown, 2)} instead" if unknown else ""
        raise AdapterError(
            f"expected all tensors of an adapter of these layers, but {some(missing)} is missing"
            f"{also}; without it results would differ"
        )
    for target in placement.targets:
        sides = "{1} in and {0} out features".format(*target.layer.matrix_shape)
        for slot in target.slots:
            why = f" (rank {target.spec.r} by the config, {sides})"
            header[slot.key].check(slot.shape, why=why)
    for key in placement.stored.keys() & header.keys():
        tensor = placement.stored[key].tensor
        header[key].check(
            tuple(tensor.shape),
            why=" as in the model",
            advice="; if it was resized for the adapter, resize the model's",
            is_floating=tensor.is_floating_point(),
        )


def _why_unknown(placement: Placement, unknown: set[str]) -> str:
    for key in sorted(unknown):
        if "lora_magnitude_vector" in key:
            return f"{shown(key, 200)}: DoRA, which is not supported"
        module = placement.modules.get(key.removeprefix(PREFIX).split(".lora_")[0])
        if ".lora_" in key and module is not None:
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"{shown(key, 200)}, of a {name}, which has no such tensor by the config"
    return some(unknown)


def read_values(placement: Placement, file: TensorFile, adapter_dtype: torch.dtype | None) -> None:
    """Reads all tensors into memory, in the dtypes in which they will be used."""
    for target in placement.targets:
        dtype = target.layer.factor_dtype(adapter_dtype)
        values = target.values
        for slot in target.slots:
            value = file.read(file.entries[slot.key], dtype)
            values[slot.table] = value.reshape(slot.shape[:2])
        pair = target.order.ours(values["lora_a"], values["lora_b"])
        values["lora_a"], values["lora_b"] = pair
    for key in placement.stored.keys() & file.entries.keys():
        stored, where = placement.stored[key], shown(key, 200)
        tensor = stored.tensor
        check_real(where, tensor)
        value = file.read(file.entries[key], tensor.dtype if tensor.is_floating_point() else None)
        if value.dtype != tensor.dtype:
            raise AdapterError(
                f"{where}: expected {tensor.dtype} as in the model, but got {value.dtype}"
            )
        if stored.written:
            stored.value = value
        elif not torch.equal(value, tensor.detach().cpu()):
            raise AdapterError(
                f"{where}: expected the model's own weight, but got another, for which the adapter "
                "was trained; load that into the model first"
            )


def check_owners(placement: Placement) -> None:
    """Checks that no write changes tensors that another adapter or a tied module relies on: a
    module that PEFT copies gets a separate parameter, anything else is an error."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    claims: dict[int, str] = {}  # the adapter that has stored values in a tensor
    for path, module in named_modules(placement.model):
        for name, tensor in tensors_of(module):
            full = f"{path}.{name}" if path else name
            holders.setdefault(id(tensor), []).append((full, module))
        for adapter in getattr(module, BIAS_SAVED_BY, ())[:1]:
            claims[id(bias_of(module))] = adapter
    for _, root in saved_modules(placement.model):
        held = (tensor for module in root.modules() for _, tensor in tensors_of(module))
        claims |= {id(tensor): getattr(root, SAVED_BY)[0] for tensor in held}
    groups: dict[int, list[tuple[Stored, Tensor]]] = {}
    for stored, value in placement.written():
        groups.setdefault(id(stored.tensor), []).append((stored, value))
    for address, group in groups.items():
        first, value = group[0]
        equal = all(torch.equal(value, other) for _, other in group)
        if equal and torch.equal(value, first.tensor.detach().cpu()):
            continue
        if address in claims:
            raise AdapterError(
                f"expected one adapter with {shown(first.key, 200)}, which the model has once, but "
                f"{claims[address]!r} has loaded other values there; delete_adapter that one first"
            )
        writers = {id(stored.holder) for stored, _ in group}
        tied = [name for name, module in holders[address] if id(module) not in writers]
        if equal and not tied:
            continue
        for stored, _ in group:
            stored.untied = stored.is_copied and isinstance(stored.tensor, nn.Parameter)
            if not stored.untied:
                others = tied or [other.key for other, _ in group if other is not stored]
                raise AdapterError(
                    f"expected {shown(stored.key, 200)} to be one module's alone, but it is tied "
                    f"to {others[0]!r}, which would change with it; untie them (clone it) first"
                )


def apply(
    placement: Placement, adapter: str, trainable: bool, adapter_dtype: torch.dtype | None
) -> None:
    """Adds the adapter to all layers, or, on any error, to none."""
    model = placement.model
    is_first = not adapter_names(model)
    active = {id(target.layer): target.layer.active_adapters for target in placement.targets}
    new = {id(t.module): t.in_place for t in placement.targets if t.in_place is not t.module}
    with torch.no_grad(), undone_on_error(model) as undo:
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
        undo.callback(replace, model, replaced)
        install(model, new)
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
