"""Names in a config that select exactly some layers, or parameters, in PEFT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..quantized.stacks import parameter_names as names_in
from ..quantized.stacks import parametrized
from .errors import AdapterError, some
from .parameters import is_named
from .targets import base_modules, selected_paths

_SPECIAL = frozenset(".^$*+?{}[]\\|()")
_MAX_EXPRESSION = 1024


def module_names(
    model: nn.Module, paths: Sequence[str], saved: tuple[str, ...]
) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
    """(target_modules, exclude_modules) that select exactly the layers: the last parts of their
    paths if these suffice, else the paths; others whose paths end alike are excluded.

    Args:
        model: with the layers.
        paths: of the layers.
        saved: names in modules_to_save.

    Raises:
        AdapterError: no names select exactly these layers.
    """
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
    """The target_parameters that select exactly these parameters: the last two parts of their
    names if these suffice, else the names.

    Args:
        model: with adapters on them.
        names: of parameters, in the model before it had adapters.

    Raises:
        AdapterError: others have names that end alike.
    """
    modules = base_modules(model)
    every = [f"{p}.{n}" for p, module in modules.items() for n in names_in(module)]
    short = tuple(sorted({".".join(name.split(".")[-2:]) for name in names}))
    # PEFT finds the parameters of modules with parametrizations by their whole names alone.
    is_whole = any(parametrized(modules[name.rpartition(".")[0]]) for name in names)
    others: list[str] = []
    for targets in (tuple(names),) if is_whole else (short, tuple(names)):
        others = [name for name in every if is_named(name, targets) and name not in names]
        if not others:
            return targets
    raise AdapterError(
        f"expected parameters that PEFT's target_parameters can select, but {some(names)} cannot "
        f"be told from {some(others)}"
    )


def escaped(path: str) -> str:
    """A regular expression that matches this path only."""
    return "".join(f"\\{char}" if char in _SPECIAL else char for char in path)
