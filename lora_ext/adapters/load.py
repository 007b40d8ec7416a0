"""Loads an adapter from PEFT's folder: everything is checked first, then everything is applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.model import adapter_names, check_not_peft, reshard
from ..nn.adapter_spec import DEFAULT_ADAPTER
from .apply import apply, written
from .check import check_entries, check_keys
from .errors import WAY_OUT, AdapterError, shown
from .folder import CONFIG, open_adapter
from .owners import Owners, check_real, inner_model
from .peft_config import AdapterConfig, parse_config
from .placement import Placement, Stored
from .separate_experts import with_stacks
from .targets import warn_of_other_parameters, warn_of_others
from .tensors import TensorFile, open_tensors


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter: str = DEFAULT_ADAPTER,
    trainable: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Adds an adapter from a folder in PEFT's format to a model, in place.

    It reads ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT 0.21.2 writes them;
    never a pickle, and nothing that the config names is imported or opened. Layers are replaced as
    by `apply_lora`: those that the tensors name, with the rank of the tensors; for parameters
    (target_parameters) the modules that hold them. The first adapter of a model becomes active and
    the rest of the model is frozen; further adapters stay inactive until `set_adapter`.
    Stored biases and modules to save are written into the model's own parameters; a tied module to
    save gets a separate parameter where PEFT's copy would differ from the rest. With init "pissa"
    and "olora" the adapter belongs to another weight, W - scaling * B0 A0: A0 and B0 are computed
    again from W, as PEFT does, and W is kept.

    Args:
        model: the base that the adapter was trained on, with or without other adapters.
        folder: a local path.
        adapter: the name that it gets in the model.
        trainable: whether it is to be trained further, or frozen.
        adapter_dtype: of its factors; None is float32 on a half base, else the base's dtype,
            for any dtype in the file (PEFT's autocast_adapter_dtype).

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
        config, targets = placement.config, placement.targets
        warn_of_others(inner, config, [target.path for target in targets])
        names = [target.name for target in targets]
        warn_of_other_parameters(inner, config.target_parameters, names)
        apply(placement, adapter, trainable, adapter_dtype)
    except ValueError as error:
        raise AdapterError(f"lora_ext.load_adapter: {folder}: {error}") from None
    return model


def read_placement(
    model: nn.Module,
    folder: str,
    dtype: torch.dtype | None,
    check: Callable[[Placement], None],
) -> Placement:
    """Reads a folder with all its tensors and checks it for a model; changes nothing.

    Args:
        model: the adapter's base.
        folder: a local path.
        dtype: of the factors; None as in `load_adapter`.
        check: is called with the placement that was read; raises ValueError.

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
            tensors, config = with_stacks(file, config, model)
            placement = Placement(model, config, tensors.entries)
            check_keys(placement, tensors.entries)
            check_entries(placement, tensors.entries)
            _read(placement, tensors, dtype)
            check(placement)
    return placement


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Reads an adapter's config without a model: rank, targets, the name of the base and so on.

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
    """Adds to the message of a ValueError what can load the adapter."""
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
        if target.order is not None:
            values = target.values
            values["lora_a"], values["lora_b"] = target.order.ours(
                values["lora_a"], values["lora_b"]
            )
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


def _check_owners(placement: Placement) -> None:
    """Checks that no write changes tensors that another adapter or a tied module relies on: a
    module that PEFT copies gets a separate parameter, anything else is an error."""
    owners = Owners(placement.model)
    groups: dict[int, list[tuple[Stored, Tensor]]] = {}
    for stored, value in written(placement):
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
