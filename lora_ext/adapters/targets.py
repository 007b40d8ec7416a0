"""Which modules and parameters the names in a config select, and names that select exactly some:
PEFT's rules, on the paths that the model had before it got adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from ..models.find import is_adaptable
from ..models.model import adapter_modules, named_modules
from ..nn.experts import is_experts
from ..quantized.stacks import parameter_names as names_in
from ..quantized.stacks import parametrized
from .errors import AdapterError, some
from .peft_config import AdapterConfig

_SPECIAL = frozenset(".^$*+?{}[]\\|()")
_MAX_EXPRESSION = 1024


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Path -> module, without the model itself and without parts of layers with adapters."""
    own = adapter_modules(model)
    modules = named_modules(model, remove_duplicate)
    return {path: module for path, module in modules if path and id(module) not in own}


def selected_paths(
    model: nn.Module,
    targets: str | tuple[str, ...],
    excluded: tuple[str, ...],
    saved: tuple[str, ...],
) -> list[str]:
    """The modules that PEFT gives an adapter, in order, by target_modules, which are names or an
    expression that this library wrote, exclude_modules and modules_to_save."""
    paths = list(base_modules(model))
    if isinstance(targets, str):
        chosen = [path for path in paths if re.fullmatch(targets, path)]
    else:
        chosen = named(paths, targets)
    out = set(named(chosen, excluded))
    return [path for path in chosen if path not in out and not _is_in_saved(path, saved)]


def saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The modules that modules_to_save names: as in PEFT, those whose path ends with a name, with a
    dot before it or not. A name may match none: PEFT adds names of heads that a model may not
    have."""
    return [path for path in base_modules(model, False) if path.endswith(names)] if names else []


def named(paths: Iterable[str], names: Iterable[str]) -> list[str]:
    """The paths that are one of the names, or end with a dot and a name."""
    wanted = frozenset(names)
    return [path for path in paths if not wanted.isdisjoint(_endings(path))]


def _endings(path: str) -> list[str]:
    return [path, *(path[i + 1 :] for i, char in enumerate(path) if char == ".")]


def _is_in_saved(path: str, names: tuple[str, ...]) -> bool:
    return bool(named([path, *(path[:i] for i, char in enumerate(path) if char == ".")], names))


def _parameters_of(modules: dict[str, nn.Module]) -> list[str]:
    return [f"{path}.{name}" for path, module in modules.items() for name in names_in(module)]


# ---- of a file that is read ----


def warn_of_others(
    model: nn.Module, config: AdapterConfig, paths: Iterable[str], names: Sequence[str]
) -> None:
    """Warns of layers that target_modules names, not by an expression or an index, and of
    parameters that target_parameters names, but for which the file has no tensors.

    The model is as before the adapter is added, to the modules at `paths`: to the layers and
    parameters `names`.
    """
    modules = base_modules(model)
    targets, excluded = config.target_modules, config.exclude_modules
    if not (isinstance(targets, str) or isinstance(excluded, str) or config.layers_to_transform):
        others = set(selected_paths(model, targets, excluded, config.modules_to_save))
        others = [path for path in others.difference(paths) if is_adaptable(modules[path])]
        others = [path for path in others if not is_experts(modules[path])]  # no target of PEFT's
        _warn("target_modules", others, "tensors; they stay as they are")
    every, targets = _parameters_of(modules), config.target_parameters
    others = set(named(every, targets)).difference(names, (f"{path}.weight" for path in names))
    others |= set(targets).difference(ending for each in every for ending in _endings(each))
    _warn("target_parameters", others, "tensors or the model no parameter; without effect")


def _warn(field: str, others: Collection[str], what: str) -> None:
    if others:
        warnings.warn(
            f"lora_ext.load_adapter: {field} names {some(others)} too, for which the file has no "
            f"{what}",
            stacklevel=4,
        )


# ---- of a file that is written ----


def module_names(
    model: nn.Module, paths: Iterable[str], saved: tuple[str, ...]
) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
    """(target_modules, exclude_modules) that select exactly the layers at these paths: the last
    parts of their paths if these suffice, else the paths; others whose paths end alike are
    excluded. AdapterError if no names select exactly these layers, beside `saved` in
    modules_to_save."""
    paths = tuple(paths)
    short = tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    others = tuple(p for p in selected_paths(model, paths, (), saved) if p not in paths)
    expression = "|".join(map(escaped, paths))
    candidates = [(short, ()), (paths, ()), (paths, others)]
    if len(expression) <= _MAX_EXPRESSION:
        candidates.append((expression, ()))
    for targets, excluded in candidates:
        if set(selected_paths(model, targets, excluded, saved)) == set(paths):
            return targets, excluded
    raise AdapterError(
        f"expected layers that PEFT's target_modules can select, but {some(paths)} cannot be "
        f"told from {some(others)}, or are inside modules to save"
    )


def parameter_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The target_parameters that select exactly the parameters of these names, which they had
    before there were adapters: the last two parts of their names if these suffice, else the names.
    AdapterError if others have names that end alike."""
    modules = base_modules(model)
    every = _parameters_of(modules)
    short = tuple(sorted({".".join(name.split(".")[-2:]) for name in names}))
    # PEFT finds the parameters of modules with parametrizations by their whole names alone.
    is_whole = any(parametrized(modules[name.rpartition(".")[0]]) for name in names)
    others: list[str] = []
    for targets in (tuple(names),) if is_whole else (short, tuple(names)):
        others = [name for name in named(every, targets) if name not in names]
        if not others:
            return targets
    raise AdapterError(
        f"expected parameters that PEFT's target_parameters can select, but {some(names)} cannot "
        f"be told from {some(others)}"
    )


def escaped(path: str) -> str:
    """A regular expression that matches this path only."""
    return "".join(f"\\{char}" if char in _SPECIAL else char for char in path)


def anchored(path: str) -> str:
    """A key of rank_pattern, or of alpha_pattern, that matches this path alone."""
    return f"^{escaped(path)}"
