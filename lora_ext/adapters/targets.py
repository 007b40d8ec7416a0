"""Which modules the names in a config select: PEFT's rules, on the paths that the model had before
it got adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from ..models.find import replacement_for
from ..models.model import adapter_modules, named_modules
from ..models.patterns import is_name_of
from ..nn import LoRALayer
from ..nn.experts import is_experts
from ..quantized.stacks import parameter_names
from .errors import some
from .peft_config import AdapterConfig


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Path -> module, without the model itself and without parts of layers with adapters."""
    own = adapter_modules(model)
    named = named_modules(model, remove_duplicate)
    return {path: module for path, module in named if path and id(module) not in own}


def selected_paths(
    model: nn.Module,
    targets: str | tuple[str, ...],
    excluded: tuple[str, ...],
    saved: tuple[str, ...],
) -> list[str]:
    """The modules that PEFT gives an adapter, in order.

    Args:
        model: with or without adapters.
        targets: names in target_modules, or an expression that this library wrote.
        excluded: names in exclude_modules.
        saved: names in modules_to_save.
    """
    paths = list(base_modules(model))
    if isinstance(targets, str):
        chosen = [path for path in paths if re.fullmatch(targets, path)]
    else:
        chosen = _named(paths, targets)
    out = set(_named(chosen, excluded))
    return [path for path in chosen if path not in out and not _is_in_saved(path, saved)]


def saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The modules that modules_to_save names: as in PEFT, those whose path ends with a name, with a
    dot before it or not. A name may match none: PEFT adds names of heads that a model may not
    have."""
    return [path for path in base_modules(model, False) if path.endswith(names)] if names else []


def warn_of_others(model: nn.Module, config: AdapterConfig, adapted: Iterable[str]) -> None:
    """Warns of layers that target_modules names but for which the file has no tensors.

    Args:
        model: before the adapter is added.
        config: the adapter's; if it selects by an expression or an index, there is no warning.
        adapted: the layers that get the adapter.
    """
    targets, excluded = config.target_modules, config.exclude_modules
    if isinstance(targets, str) or isinstance(excluded, str) or config.layers_to_transform:
        return
    modules = base_modules(model)
    selected = selected_paths(model, targets, excluded, config.modules_to_save)
    others = set(selected).difference(adapted)
    others = {p for p in others if isinstance(modules[p], LoRALayer) or replacement_for(modules[p])}
    others -= {p for p in others if is_experts(modules[p])}  # not a target of PEFT's
    if others:
        warnings.warn(
            f"lora_ext.load_adapter: target_modules names {some(others)} too, for which the file "
            "has no tensors; they stay as they are",
            stacklevel=3,
        )


def warn_of_other_parameters(
    model: nn.Module, names: tuple[str, ...], adapted: Iterable[str]
) -> None:
    """Warns of parameters that target_parameters names but for which the file has no tensors.

    Args:
        model: before the adapter is added.
        names: target_parameters.
        adapted: the parameters that get the adapter, and the layers.
    """
    if not names:
        return
    every = {
        f"{p}.{n}" for p, module in base_modules(model).items() for n in parameter_names(module)
    }
    adapted = {*adapted, *(f"{path}.weight" for path in adapted)}
    others = set(_named(every, names)) - adapted
    others |= set(names).difference(ending for each in every for ending in _endings(each))
    if others:
        warnings.warn(
            f"lora_ext.load_adapter: target_parameters names {some(others)} too, for which the "
            "file has no tensors or the model no parameter; without effect",
            stacklevel=3,
        )


def _named(paths: Iterable[str], names: Iterable[str]) -> list[str]:
    """The paths that are one of the names, or end with a dot and a name."""
    wanted = frozenset(names)
    return [path for path in paths if not wanted.isdisjoint(_endings(path))]


def _endings(path: str) -> list[str]:
    return [path, *(path[i + 1 :] for i, char in enumerate(path) if char == ".")]


def _is_in_saved(path: str, names: tuple[str, ...]) -> bool:
    parents = [path, *(path[:i] for i, char in enumerate(path) if char == ".")]
    return any(is_name_of(name, parent) for parent in parents for name in names)
