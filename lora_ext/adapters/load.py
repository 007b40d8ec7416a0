"""Loading an adapter from PEFT's folder: all of it is checked first, then all of it applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.apply import install
from ..models.model import (
    BIAS_SAVED_BY,
    SAVED_BY,
    adapter_names,
    check_not_peft,
    mark_only_lora_as_trainable,
    own,
    reshard,
)
from ..nn.linear import DEFAULT_ADAPTER
from .check import check_entries, check_keys
from .errors import WAY_OUT, AdapterError, shown
from .folder import CONFIG, open_adapter
from .owners import Owners, check_real, inner_model
from .peft_config import AdapterConfig, parse_config
from .placement import Placement, Stored, Target
from .targets import warn_of_others
from .tensors import TensorFile, open_tensors


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter: str = DEFAULT_ADAPTER,
    trainable: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Adds an adapter from a folder in PEFT's format to a model, in place.

    Read are ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT 0.21.2 writes them;
    never a pickle, and nothing that the config names is imported or opened. Layers are replaced as
    by `apply_lora`: those that the tensors name, with the rank that they have. The first adapter of
    a model becomes active and the rest of it is frozen; a further one waits for `set_adapter`.
    Stored biases and modules to save are written into the model's own parameters; a tied module to
    save gets a parameter of its own where PEFT's copy would differ from the rest. init "pissa" and
    "olora" stand for another weight, W - scaling * B0 A0: A0 and B0 are computed again from W, as
    PEFT does, and the weight is kept.

    Args:
        model: the base that the adapter was trained on, with or without other adapters.
        folder: a local path.
        adapter: the name that it gets here.
        trainable: whether it is to be trained further, or frozen.
        adapter_dtype: of its factors; None is float32 on a half base, else the base's dtype,
            whatever the file holds (PEFT's autocast_adapter_dtype).

    Returns:
        The model.

    Raises:
        AdapterError: a ValueError. A file is missing, broken or not plain LoRA; its tensors do not
            fit the model in name, shape, rank and kind; a value is not finite; the name is taken;
            or what it stores belongs to another adapter. The model is then unchanged, as it is
            after any other error.
    """
    folder = os.fspath(folder)
    inner = inner_model(model)
    check_not_peft(inner, "load_adapter")
    reshard(inner)
    try:
        if adapter in adapter_names(inner):
            raise AdapterError(
                f"expected a new adapter name, but the model has {adapter!r}; delete_adapter it "
                "first or choose another name"
            )
        if adapter_dtype is not None and not adapter_dtype.is_floating_point:
            raise AdapterError(f"expected a floating adapter_dtype, but got {adapter_dtype}")
        placement = read_placement(inner, folder, adapter_dtype, _check_owners)
        warn_of_others(inner, placement.config, [target.path for target in placement.targets])
        _apply(placement, adapter, trainable, adapter_dtype)
    except ValueError as error:
        raise AdapterError(f"lora_ext.load_adapter: {folder}: {error}") from None
    return model


def read_placement(
    model: nn.Module,
    folder: str,
    dtype: torch.dtype | None,
    check: Callable[[Placement], None],
) -> Placement:
    """What a folder asks of a model, checked, with all tensors read; changes nothing.

    Args:
        model: the adapter's base.
        folder: a local path.
        dtype: of the factors; None as in `load_adapter`.
        check: of what was read; raises ValueError.

    Raises:
        AdapterError: as `load_adapter`.
    """
    with open_adapter(folder) as files:
        with _naming(CONFIG), _with_way_out():
            config = parse_config(files.config)
        with (
            _naming(files.weights_name),
            open_tensors(files.weights) as file,
            _with_way_out(),
        ):
            placement = Placement(model, config, file.entries)
            check_keys(placement, file.entries)
            check_entries(placement, file.entries)
            _read(placement, file, dtype)
            check(placement)
    return placement


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """What an adapter's config says, without a model: rank, targets, the base's name and so on.

    Raises:
        AdapterError: a file is missing, or the config is not that of a plain LoRA.
    """
    folder = os.fspath(folder)
    try:
        with open_adapter(folder) as files, _naming(CONFIG):
            return parse_config(files.config)
    except ValueError as error:
        raise AdapterError(f"lora_ext.adapters.read_adapter_config: {folder}: {error}") from None


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Puts the file's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from None


@contextmanager
def _with_way_out() -> Iterator[None]:
    """Says after the message of a ValueError what may take the adapter."""
    try:
        yield
    except ValueError as error:
        way_out = "" if "PeftModel" in str(error) else WAY_OUT
        raise AdapterError(f"{error}{way_out}") from None


def _read(placement: Placement, file: TensorFile, adapter_dtype: torch.dtype | None) -> None:
    """Reads all tensors into memory, in the dtypes in which they will be used."""
    for target in placement.targets:
        dtype = target.layer.factor_dtype(adapter_dtype)
        for slot in target.slots:
            value = file.read(file.entries[slot.key], dtype)
            target.values[slot.table] = value.reshape(slot.shape[:2])
    for key in placement.stored.keys() & file.entries.keys():
        stored = placement.stored[key]
        tensor = stored.tensor
        check_real(shown(key, 200), tensor)
        value = file.read(file.entries[key], tensor.dtype if tensor.is_floating_point() else None)
        if value.dtype != tensor.dtype:
            raise AdapterError(
                f"{shown(key, 200)}: expected {tensor.dtype} as in the model, but got {value.dtype}"
            )
        if stored.written:
            stored.value = value
        elif not torch.equal(value, tensor.detach().cpu()):
            raise AdapterError(
                f"{shown(key, 200)}: expected the model's own weight, but got another, for which "
                "the adapter was trained; load that into the model first"
            )


def _written(placement: Placement) -> Iterator[tuple[Stored, Tensor]]:
    for stored in placement.stored.values():
        if stored.value is not None:
            yield stored, stored.value


def _check_owners(placement: Placement) -> None:
    """What is written may not change what another adapter or a tied module relies on: a module that
    PEFT copies gets a parameter of its own, and anything else is refused."""
    owners = Owners(placement.model)
    groups: dict[int, list[tuple[Stored, Tensor]]] = {}
    for stored, value in _written(placement):
        groups.setdefault(id(stored.tensor), []).append((stored, value))
    for group in groups.values():
        first, value = group[0]
        equal = all(torch.equal(value, other) for _, other in group)
        if equal and torch.equal(value, first.tensor.detach().cpu()):
            continue
        owners.check_free(first.key, first.tensor)
        tied = owners.tied(first.tensor, {id(stored.holder) for stored, _ in group})
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


def _apply(
    placement: Placement, adapter: str, trainable: bool, adapter_dtype: torch.dtype | None
) -> None:
    """Adds the adapter to all layers, or, on any error, to none."""
    model = placement.model
    is_first = not adapter_names(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = {id(target.layer): target.layer.active_adapters for target in placement.targets}
    new = {id(t.module): t.layer for t in placement.targets if t.layer is not t.module}
    undo: list[tuple[Tensor, Tensor]] = []
    untied: list[tuple[Stored, Tensor]] = []
    try:
        for target in placement.targets:
            _add(target, adapter, adapter_dtype)
        with torch.no_grad():
            for stored, value in _written(placement):
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
        install(model, {id(t.layer): t.module for t in placement.targets if id(t.module) in new})
        for target in placement.targets:
            if target.layer is target.module and adapter in target.layer.adapters:
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
        bias = layer._parameters.get("bias")
        if bias is not None and id(target.module) in new:
            bias.requires_grad_(False)
        for table in (layer.lora_a, layer.lora_b, layer.lora_bias):
            if adapter in table:
                table[adapter].requires_grad_(trainable)
    for stored, _ in _written(placement):
        if isinstance(stored.tensor, nn.Parameter):
            stored.tensor.requires_grad_(trainable)


def _untie(stored: Stored, value: Tensor) -> None:
    """Gives the holder a parameter of its own, which the model's tied module does not see."""
    tensor = stored.tensor
    own = nn.Parameter(value.to(tensor.device), requires_grad=tensor.requires_grad)
    stored.holder._parameters[stored.name] = stored.tensor = own


def _add(target: Target, adapter: str, dtype: torch.dtype | None) -> None:
    layer = target.layer
    try:
        layer.add_adapter(adapter, target.spec, dtype)
    except ValueError as error:
        raise AdapterError(f"{target.path!r}: {error}") from None
    with torch.no_grad():
        for table, value in target.values.items():
            getattr(layer, table)[adapter].copy_(value)


def _mark(placement: Placement, adapter: str) -> None:
    """Notes on the modules what belongs to the adapter besides its factors."""
    layers = {id(target.module): target.layer for target in placement.targets}
    owned = [(root, SAVED_BY) for root in placement.saved.values()]
    if placement.config.bias != "none":
        inside = {id(module) for root in placement.saved.values() for module in root.modules()}
        owned += [
            (layers.get(id(stored.holder), stored.holder), BIAS_SAVED_BY)
            for stored, _ in _written(placement)
            if id(stored.holder) not in inside
        ]
    for module, attribute in owned:
        own(module, attribute, adapter)
