"""Which modules a config means: PEFT's rules, on the paths of the model before it had adapters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..model import lora_layers, named_modules
from ..modules import LoRALinear
from ..modules.linear import is_conv1d
from ..patterns import full_match, is_name_of
from ..patterns.automaton import Budget
from .peft_config import ALL_LINEAR, AdapterConfig

_CLASSIFIER_HEADS = ("score", "classifier")


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Path -> module, without the model itself and without the parts of adapters' layers."""
    own = {id(part) for _, layer in lora_layers(model) for part in layer.modules()}
    own -= {id(layer) for _, layer in lora_layers(model)}
    named = named_modules(model, remove_duplicate)
    return {path: module for path, module in named if path and id(module) not in own}


def targeted_paths(model: nn.Module, config: AdapterConfig, budget: Budget) -> list[str]:
    """The modules that PEFT gives an adapter, in order.

    Raises:
        ValueError: an expression is not of the subset that takes linear time, or takes too long.
    """
    modules = base_modules(model)
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        chosen = _all_linear(model, modules, config.task_type)
    else:
        chosen = chosen_paths(modules, config, budget)
    return [path for path in chosen if not _is_in_saved(path, config.modules_to_save)]


def chosen_paths(paths: Iterable[str], config: AdapterConfig, budget: Budget) -> list[str]:
    """Those that target_modules and layers_to_transform name and exclude_modules does not."""
    targets = _Chooser(config.target_modules, budget)
    excluded = _Chooser(config.exclude_modules, budget)
    return [
        path
        for path in paths
        if targets.chooses(path)
        and (targets.names_exactly(path) or _is_layer_chosen(path, config))
        and not excluded.chooses(path)
    ]


def saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The modules that modules_to_save names: as in PEFT, those whose path ends with a name, at a
    dot or not. A name may match none: PEFT adds names of heads that a model may not have."""
    return [path for path in base_modules(model, False) if path.endswith(names)] if names else []


class _Chooser:
    """target_modules or exclude_modules: an expression, or names that are a path or its end."""

    def __init__(self, wanted: str | tuple[str, ...], budget: Budget) -> None:
        self.expression = wanted if isinstance(wanted, str) else ""
        self.names = frozenset() if isinstance(wanted, str) else frozenset(wanted)
        self.budget = budget

    def chooses(self, path: str) -> bool:
        if self.expression:
            return full_match(self.expression, path, self.budget)
        ends = (path[i + 1 :] for i, char in enumerate(path) if char == ".")
        return path in self.names or any(end in self.names for end in ends)

    def names_exactly(self, path: str) -> bool:
        return path in self.names


def _is_layer_chosen(path: str, config: AdapterConfig) -> bool:
    """Whether the first number in the path that follows a list of layers is wanted."""
    if config.layers_to_transform is None:
        return True
    parts = path.split(".")
    for place in range(1, len(parts) - 1):
        before = ".".join(parts[:place])
        is_list = (
            any(is_name_of(name, before) for name in config.layers_pattern)
            if config.layers_pattern
            else place >= 2
        )
        if parts[place].isdecimal() and is_list:
            return int(parts[place]) in config.layers_to_transform
    return False


def _is_in_saved(path: str, names: tuple[str, ...]) -> bool:
    parents = [path, *(path[:i] for i, char in enumerate(path) if char == ".")]
    return any(is_name_of(name, parent) for parent in parents for name in names)


def _all_linear(
    model: nn.Module, modules: dict[str, nn.Module], task_type: str | None
) -> list[str]:
    """nn.Linear and Conv1D but the output embedding, or a sequence classifier's head."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if output is None and callable(get_output) and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in _CLASSIFIER_HEADS)
        output = next((head for head in heads if head is not None), None)
    linear = (nn.Linear, LoRALinear)
    return [
        path
        for path, module in modules.items()
        if module is not output and (isinstance(module, linear) or is_conv1d(module))
    ]
