"""Loads an adapter from PEFT's folder: everything is checked first, then everything is applied."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from ..models.model import adapter_names, check_not_peft, reshard
from ..nn.adapter_spec import DEFAULT_ADAPTER
from .apply import apply, check_header, check_owners, read_values
from .errors import WAY_OUT, AdapterError, telling
from .folder import CONFIG, open_adapter
from .layout import inner_model
from .peft_config import AdapterConfig, parse_config
from .placement import Placement
from .separate_experts import with_stacks
from .targets import warn_of_others
from .tensors import open_tensors


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT_ADAPTER,
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
        adapter_name: the name that it gets in the model.
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
    with telling(f"lora_ext.load_adapter: {folder}: "):
        if adapter_name in adapter_names(inner):
            raise AdapterError(
                f"expected a new adapter name, but the model has {adapter_name!r}; delete_adapter "
                "it first or choose another name"
            )
        if adapter_dtype is not None and not adapter_dtype.is_floating_point:
            raise AdapterError(f"expected a floating adapter_dtype, but got {adapter_dtype}")
        placement = read_placement(inner, folder, adapter_dtype, check_owners)
        config, targets = placement.config, placement.targets
        paths = [target.path for target in targets]
        warn_of_others(inner, config, paths, [target.name for target in targets])
        apply(placement, adapter_name, trainable, adapter_dtype)
    return model


def read_placement(
    model: nn.Module,
    folder: str,
    dtype: torch.dtype | None,
    check: Callable[[Placement], None],
) -> Placement:
    """Reads a folder with all its tensors and checks it for a model, as `load_adapter`; changes
    nothing. `check` is called with the placement that was read and raises ValueError."""
    with open_adapter(folder) as files:
        with telling(f"{CONFIG}: ", WAY_OUT):
            config = parse_config(files.config)
        with (
            telling(f"{files.weights_name}: "),
            open_tensors(files.weights) as file,
            telling(end=WAY_OUT),
        ):
            tensors, config = with_stacks(file, config, model)
            placement = Placement(model, config, tensors.entries)
            check_header(placement, tensors.entries)
            read_values(placement, tensors, dtype)
            check(placement)
    return placement


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Reads an adapter's config without a model: rank, targets, the name of the base and so on.

    Raises:
        AdapterError: a file is missing, or the config is not that of a plain LoRA.
    """
    folder = os.fspath(folder)
    with (
        telling(f"lora_ext.adapters.read_adapter_config: {folder}: "),
        open_adapter(folder) as files,
        telling(f"{CONFIG}: "),
    ):
        return parse_config(files.config)
