"""Checks a file's tensors against a placement: by the header first, then as they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models.model import BIAS_SAVED_BY, SAVED_BY, named_modules, saved_modules
from .errors import AdapterError, shown, some
from .layout import PREFIX, Stored, features
from .owners import bias_of, check_real, tensors_of
from .placement import Placement
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
        sides = "{} in and {} out features".format(*features(target.layer))
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
