"""Checks a file's tensors against a placement by its header: nothing is read or allocated."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import AdapterError, shown, some
from .layout import PREFIX, features
from .placement import Placement
from .tensors import Entry


def check_keys(placement: Placement, header: Mapping[str, Entry]) -> None:
    """Checks that every tensor of the file belongs to a slot, and that every slot has its tensor.

    Raises:
        AdapterError: a tensor is missing, or there is one too many.
    """
    needed = {slot.key for target in placement.targets for slot in target.slots}
    needed |= {key for key, entry in placement.stored.items() if entry.written}
    missing = needed - set(header)
    unknown = {key for key in header if key not in needed and not placement.may_hold(key)}
    if (unknown and not missing) or any("lora_magnitude_vector" in key for key in unknown):
        raise AdapterError(f"expected no other tensors, but got {_why_unknown(placement, unknown)}")
    if missing:
        also = f"; there are {some(unknown, 2)} instead" if unknown else ""
        raise AdapterError(
            f"expected all tensors of an adapter of these layers, but {some(missing)} is missing"
            f"{also}; without it another result would be served"
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


def check_entries(placement: Placement, header: Mapping[str, Entry]) -> None:
    """Checks shapes and dtypes.

    Raises:
        AdapterError: a rank differs from the config, a size from the model, or a dtype cannot be
            used.
    """
    for target in placement.targets:
        for slot in target.slots:
            entry = header[slot.key]
            _check_floating(entry)
            if entry.shape != slot.shape:
                in_features, out_features = features(target.layer)
                raise AdapterError(
                    f"{shown(slot.key, 200)}: expected shape {list(slot.shape)} (rank "
                    f"{target.spec.r} by the config, {in_features} in and {out_features} out "
                    f"features), but got {list(entry.shape)}"
                )
    for key in placement.stored.keys() & header.keys():
        entry, tensor = header[key], placement.stored[key].tensor
        if entry.shape != tuple(tensor.shape):
            raise AdapterError(
                f"{shown(key, 200)}: expected shape {list(tensor.shape)} as in the model, but got "
                f"{list(entry.shape)}; if it was resized for the adapter, resize the model's"
            )
        if tensor.is_floating_point():
            _check_floating(entry)


def _check_floating(entry: Entry) -> None:
    if not entry.is_floating:
        raise AdapterError(
            f"{shown(entry.name, 200)}: expected a floating dtype, but got {entry.dtype}"
        )
