"""Putting adapters into a model, and taking them out again."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..nn import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear, LoRAQuantizedLinear
from ..nn.conv import unsupported_reason
from ..nn.linear import DEFAULT_ADAPTER, is_conv1d
from ..packing import pack_for
from ..quantized.layers import is_quantized
from .config import LoRAConfig, not_a_config
from .model import (
    BIAS_SAVED_BY,
    SAVED_BY,
    adapter_names,
    check_not_peft,
    compute_merged,
    disown,
    lora_layers,
    mark_only_lora_as_trainable,
    own,
    reshard,
)
from .patterns import matches

ALL_LINEAR = "all-linear"
_LINEAR = (LoRALinear, LoRAQuantizedLinear)


def replacement_for(module: nn.Module) -> type[LoRALayer] | None:
    """The class that takes the module's place, None for what LoRA is not defined on here."""
    if is_conv1d(module):
        return LoRALinear
    if not isinstance(module, LoRALayer) and is_quantized(module):
        return LoRAQuantizedLinear
    if type(module) is nn.Conv2d and unsupported_reason(module):
        return None
    table = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding, nn.Conv2d: LoRAConv2d}
    return table.get(type(module))


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    adapter: str = DEFAULT_ADAPTER,
    *,
    pack: bool | int | Iterable[int] = False,
) -> nn.Module:
    """Adds an adapter to layers of a model, in place, and freezes the rest.

    nn.Linear, transformers' Conv1D, nn.Embedding and 1x1 nn.Conv2d are replaced by layers that
    share their parameters, and so are the quantised linear layers of bitsandbytes, torchao, HQQ and
    transformers (`lora_ext.nn.LoRAQuantizedLinear`); other subclasses are refused, since they may
    compute something else. A model that has adapters gets one more, inactive until `set_adapter`;
    the first is active at once.
    Biases and modules to save exist once: those that a further config names are trained too.

    Args:
        model: any nn.Module that holds such layers.
        config: which ones, and what adapter.
        adapter: its name.
        pack: on a CPU, keep packed copies of frozen weights where that was measured to be faster,
            as in `lora_ext.accelerate`.

    Returns:
        The model.

    Raises:
        TypeError: config is no LoRAConfig.
        ValueError: no layer matches (near matches are named), a module that is named cannot be
            adapted, a module to save holds or shares an adapted weight, or the adapter exists. The
            model is then unchanged.
    """
    check_not_peft(model, "apply_lora")
    if not isinstance(config, LoRAConfig):
        given = not_a_config(config)
        raise TypeError(f"lora_ext.apply_lora: expected a lora_ext.LoRAConfig, but got {given}")
    reshard(model)
    others = adapter_names(model)
    if adapter in others:
        raise ValueError(
            f"lora_ext.apply_lora: expected a new adapter's name, but the model has {adapter!r}; "
            "delete_adapter it first or choose another name"
        )
    targets = find_targets(model, config)
    saved = find_saved(model, config)
    _check_saved([*lora_layers(model), *targets], saved)
    replaced: dict[int, LoRALayer] = {}
    layers: list[LoRALayer] = []
    with frozen_only_by_success(model):
        try:
            for path, module in targets:
                layer = _with_adapter(path, module, config, adapter)
                layers.append(layer)
                if layer is not module:
                    replaced[id(module)] = layer
        except BaseException:
            for layer in layers:
                layer.delete_adapter(adapter)
            raise
    install(model, replaced)
    biases = _trained_biases(model, layers, config.bias)
    for module in saved:
        own(module, SAVED_BY, adapter)
    for module in biases:
        own(module, BIAS_SAVED_BY, adapter)
    if not others:
        mark_only_lora_as_trainable(model, config.bias)
        pack_for(model, pack)
        return model
    for layer in layers:
        if len(layer.adapters) == 1:
            layer.set_adapter(())  # as in the layers that have other adapters
    for module in biases:
        module.get_parameter("bias").requires_grad_(True)
    for module in saved:
        module.requires_grad_(True)
    pack_for(model, pack)
    return model


def _trained_biases(model: nn.Module, layers: list[LoRALayer], bias: str) -> list[nn.Module]:
    """The modules whose own bias a config's `bias` trains."""
    modules = {"none": (), "lora_only": layers, "all": model.modules()}[bias]
    return [module for module in modules if module._parameters.get("bias") is not None]


@contextmanager
def frozen_only_by_success(model: nn.Module) -> Iterator[None]:
    """On an error all parameters have the requires_grad that they had."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise


def _with_adapter(path: str, module: nn.Module, config: LoRAConfig, adapter: str) -> LoRALayer:
    """The module, or the layer that takes its place, with one more adapter."""
    try:
        if isinstance(module, LoRALayer):
            layer = module
        else:
            kind = replacement_for(module)
            assert kind is not None
            layer = kind.around(module)
        layer.add_adapter(adapter, config.spec_for(path), config.adapter_dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (at {path!r})") from None
    return layer


def _check_saved(adapted: list, saved: list[nn.Module]) -> None:
    """Raises ValueError where training a module whole would train a weight that LoRA freezes."""
    for root in saved:
        inside = {id(part) for part in (*root.modules(), *root.parameters())}
        for path, layer in adapted:
            if id(layer) in inside or id(getattr(layer, "weight", None)) in inside:
                raise ValueError(
                    f"lora_ext.apply_lora: expected modules_to_save to hold no adapted weight, but "
                    f"a {type(root).__name__} that it names holds or shares that of {path!r}"
                )


def install(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Puts modules in the place of others, given by id, wherever the model holds them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])


def find_targets(model: nn.Module, config: LoRAConfig) -> list[tuple[str, nn.Module]]:
    """The (path, module) pairs that get the adapter, each module once.

    Raises:
        ValueError: a pattern matches nothing, or only what cannot be adapted.
    """
    modules = _modules_of(model)
    inside_saved = [path for path, _ in modules if _matches_any(config.modules_to_save, path)]

    def excluded(path: str) -> bool:
        return _matches_any(config.exclude_modules, path) or any(
            path == root or path.startswith(f"{root}.") for root in inside_saved
        )

    candidates = [(path, module) for path, module in modules if not excluded(path)]
    found = []
    for pattern in config.target_modules:
        if pattern == ALL_LINEAR:
            found += _all_linear(model, candidates)
        else:
            found += _matched(pattern, candidates, modules)
    unique = {id(module): (path, module) for path, module in reversed(found)}
    order = {id(module): place for place, (_, module) in reversed(list(enumerate(modules)))}
    return [unique[key] for key in sorted(unique, key=order.__getitem__)]


def find_saved(model: nn.Module, config: LoRAConfig) -> list[nn.Module]:
    """The modules that config.modules_to_save names.

    Raises:
        ValueError: a pattern matches nothing.
    """
    modules = _modules_of(model)
    found: dict[int, nn.Module] = {}
    for pattern in config.modules_to_save:
        hits = {id(module): module for path, module in modules if matches(pattern, path)}
        if not hits:
            raise ValueError(_nothing("modules_to_save", pattern, [path for path, _ in modules]))
        found |= hits
    return list(found.values())


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of all but the model itself and parts of our own layers, each a module too."""
    layers = [layer for _, layer in lora_layers(model)]
    own = {id(part) for layer in layers for part in layer.modules()} - set(map(id, layers))
    named = model.named_modules(remove_duplicate=False)
    return [(path, module) for path, module in named if path and id(module) not in own]


def _matches_any(patterns: Iterable[str], path: str) -> bool:
    return any(matches(pattern, path) for pattern in patterns)


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, LoRALayer) or replacement_for(module) is not None


def _all_linear(
    model: nn.Module, candidates: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    found: list[tuple[str, nn.Module]] = [
        (path, module)
        for path, module in candidates
        if module is not output
        and (isinstance(module, _LINEAR) or replacement_for(module) in _LINEAR)
    ]
    if not found:
        raise ValueError(
            "lora_ext.apply_lora: expected linear layers for target_modules 'all-linear', but the "
            f"{type(model).__name__} has none left (nn.Linear, transformers' Conv1D or a quantised "
            "one, without exclude_modules, modules_to_save and the output embedding)"
        )
    return found


def _matched(pattern: str, candidates: list, modules: list) -> list[tuple[str, nn.Module]]:
    hits = [(path, module) for path, module in candidates if matches(pattern, path)]
    found = [(path, module) for path, module in hits if _is_adaptable(module)]
    if found and _is_pattern(pattern):
        return found
    if len(found) == len(hits) and found:
        return found
    if hits:
        path, module = next((p, m) for p, m in hits if not _is_adaptable(m))
        raise ValueError(
            f"lora_ext.apply_lora: target_modules {pattern!r} names {path!r}, a "
            f"{type(module).__module__}.{type(module).__qualname__}; expected nn.Linear, "
            "nn.Embedding, transformers' Conv1D, a 1x1 nn.Conv2d without groups and padding or a "
            "quantised linear layer that is known, exactly of these classes"
        )
    if any(matches(pattern, path) for path, _ in modules):
        raise ValueError(
            f"lora_ext.apply_lora: expected target_modules {pattern!r} to match a layer, but "
            "exclude_modules or modules_to_save take away all that it matches"
        )
    adaptable = [path for path, module in modules if _is_adaptable(module)]
    raise ValueError(_nothing("target_modules", pattern, adaptable))


def _is_pattern(pattern: str) -> bool:
    return pattern.startswith("re:") or any(mark in pattern for mark in "*?[")


def _nothing(field: str, pattern: str, paths: list[str]) -> str:
    """The message for a pattern that matches none of the paths, with the nearest names."""
    ends = {".".join(path.split(".")[-n:]) for path in paths for n in (1, 2)} | set(paths)
    near = difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.5)
    hint = f"near it: {', '.join(map(repr, near))}" if near else f"there are: {_some(paths)}"
    return (
        f"lora_ext.apply_lora: expected {field} {pattern!r} to match a module, but it matches none "
        f"of {len(paths)}; {hint}"
    )


def _some(paths: list[str]) -> str:
    names = sorted({path.split(".")[-1] for path in paths if not path.split(".")[-1].isdigit()})
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")


def merge_and_unload(model: nn.Module, adapters: str | Iterable[str] | None = None) -> nn.Module:
    """Replaces the layers by plain ones with the adapters merged in, in place; PEFT's function.

    Sums in float32, rounded once. All or nothing: if an update is not finite nothing is replaced.
    The model keeps one weight a layer; the original is gone unless something else holds it, such as
    a tied embedding, which keeps its values.

    Args:
        adapters: None merges what is active.

    Returns:
        The model, without adapters.

    Raises:
        ValueError: no layer has one of the names, or the model itself is a layer.
        RuntimeError: an update is not finite, or a weight is sharded or quantised.
    """
    _check_not_layer(model, "models.merge_and_unload")
    replaced = {}
    for layer, (_, weight, bias) in compute_merged(model, adapters, "models.merge_and_unload"):
        if weight is None:
            replaced[id(layer)] = layer.restored()
        else:
            replaced[id(layer)] = layer.as_base(weight, layer.bias if bias is None else bias)
    install(model, replaced)
    disown(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Replaces the layers by plain ones with the original weights, in place; adapters are gone.

    Raises:
        ValueError: the model itself is a layer.
        RuntimeError: a weight is sharded over processes.
    """
    _check_not_layer(model, "models.unload")
    check_not_peft(model, "models.unload")
    reshard(model)
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.check_whole("unload")
    install(model, {id(layer): layer.restored() for layer in layers})
    disown(model)
    return model


def _check_not_layer(model: nn.Module, function: str) -> None:
    if isinstance(model, LoRALayer):
        raise ValueError(
            f"lora_ext.{function}: expected a model that holds the layers, but got the layer "
            f"itself, a {type(model).__name__}, which cannot be replaced in place"
        )
