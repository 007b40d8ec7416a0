"""Adds adapters to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..nn import LoRALayer, LoRAModule
from ..nn.adapter_spec import DEFAULT_ADAPTER, AdapterSpec, expect
from ..nn.frozen import take_frozen
from ..packing import pack_for
from ..quantized.panels import put_back_for_training
from .config import ALL_LINEAR, AnyConfig, LoraConfig, as_config
from .find import find_saved, find_targets, replacement_for
from .mixtures import chosen, warn_of_other_experts
from .model import (
    BIAS_SAVED_BY,
    SAVED_BY,
    adapter_names,
    check_not_peft,
    lora_layers,
    mark_only_lora_as_trainable,
    mark_saved,
    reshard,
)


def apply_lora(
    model: nn.Module,
    config: AnyConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    adapter_dtype: torch.dtype | None = None,
    pack: bool | int | Iterable[int] = False,
) -> nn.Module:
    """Adds an adapter to layers of a model, in place, and freezes the rest.

    nn.Linear, transformers' Conv1D, nn.Embedding and 1x1 nn.Conv2d are replaced by layers that
    share their parameters, and so are the quantised linear layers of bitsandbytes, torchao, HQQ and
    transformers (`lora_ext.nn.LoRAQuantizedLinear`) and transformers' experts, dense or quantised
    (`lora_ext.nn.LoRAExperts`);
    other subclasses raise an error, since they may compute something else.
    A model that has adapters gets one more, inactive until `set_adapter`; the first is active at
    once. Biases and modules to save exist only once for all adapters: those that a later config
    names are trained in addition.

    Args:
        model: any nn.Module that holds such layers.
        config: selects the layers and describes the adapter; PEFT's LoraConfig or this package's.
        adapter_name: the name of the adapter.
        adapter_dtype: of lora_a and lora_b; None is float32 on a half base, else the base's dtype.
        pack: on a CPU, keep packed copies of frozen weights where that was measured to be faster,
            as in `lora_ext.accelerate`.

    Returns:
        The model.

    Raises:
        TypeError: config is not a LoraConfig.
        ValueError: no layer matches (the message names near matches), a selected module cannot be
            adapted, a module to save holds or shares an adapted weight, the adapter exists, or a
            field of PEFT's config is not supported. The model is then unchanged.
    """
    check_not_peft(model, "apply_lora")
    config = as_config(config, "lora_ext.apply_lora: ")
    if adapter_dtype is not None:
        is_known = isinstance(adapter_dtype, torch.dtype) and adapter_dtype.is_floating_point
        expect(is_known, "apply_lora", "a floating torch.dtype as adapter_dtype", adapter_dtype)
    reshard(model)
    others = adapter_names(model)
    if adapter_name in others:
        raise ValueError(
            "lora_ext.apply_lora: expected a new adapter's name, but the model has "
            f"{adapter_name!r}; delete_adapter it first or choose another name"
        )
    targets = find_targets(model, config)
    if ALL_LINEAR in config.target_modules:
        warn_of_other_experts(model, "apply_lora", config)
    saved = find_saved(model, config)
    _check_saved([*lora_layers(model), *targets], saved)
    replaced: dict[int, nn.Module] = {}
    layers: list[LoRALayer] = []
    with undone_on_error(model) as undo:
        for path, module in targets:
            in_place = in_place_of(path, module)
            for layer, spec in layers_of(in_place, path, config):
                with at(path):
                    layer.add_adapter(adapter_name, spec, adapter_dtype)
                undo.callback(layer.delete_adapter, adapter_name)
                layers.append(layer)
            if in_place is not module:
                replaced[id(module)] = in_place
    install(model, replaced)
    trained = {"none": (), "lora_only": layers, "all": model.modules()}[config.bias]
    biases = [module for module in trained if module._parameters.get("bias") is not None]
    for module in saved:
        mark_saved(module, SAVED_BY, adapter_name)
    for module in biases:
        mark_saved(module, BIAS_SAVED_BY, adapter_name)
    if not others:
        mark_only_lora_as_trainable(model, config.bias)
    else:
        for layer in layers:
            if len(layer.adapters) == 1:
                layer.set_adapter(())  # inactive, as in the layers that have other adapters
        for module in biases:
            module.get_parameter("bias").requires_grad_(True)
        for module in saved:
            module.requires_grad_(True)
    pack_for(model, pack)
    return model


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[ExitStack]:
    """Within the block, on an error, what the stack holds is called, the last first, and
    requires_grad of all parameters is restored."""
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        yield undo
        undo.pop_all()


def in_place_of(path: str, module: nn.Module) -> LoRALayer | LoRAModule:
    """The target itself if it has layers of adapters, else a new module that may replace it.
    ValueError if it cannot have adapters."""
    if isinstance(module, (LoRALayer, LoRAModule)):
        return module
    kind = replacement_for(module)
    with at(path):
        return LoRAModule.around(module, ["weight"]) if kind is None else kind.around(module)


def layers_of(
    module: LoRALayer | LoRAModule, path: str, config: LoraConfig
) -> Iterable[tuple[LoRALayer, AdapterSpec]]:
    """The layers of a target, each with the spec of its adapter."""
    if isinstance(module, LoRALayer):
        return [(module, config.spec_for(path))]
    return chosen(module, path, config)


@contextmanager
def at(path: str) -> Iterator[None]:
    """Within the block, an error is a ValueError whose message ends with the path."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (at {path!r})") from None


def _check_saved(adapted: list, saved: list[nn.Module]) -> None:
    """Raises ValueError if training a module whole would train a weight that LoRA freezes."""
    for root in saved:
        inside = {id(part) for part in (*root.modules(), *root.parameters())}
        for path, layer in adapted:
            if id(layer) in inside or id(getattr(layer, "weight", None)) in inside:
                raise ValueError(
                    f"lora_ext.apply_lora: expected modules_to_save without adapted layers, but a "
                    f"{type(root).__name__} that it names holds {path!r} or shares its weight"
                )


def install(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """`replace` by modules with adapters; quantised ones without are then computed as a model with
    adapters needs it."""
    replace(model, replaced)
    put_back_for_training(model)
    take_frozen(model)


def replace(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Replaces modules, given by id, wherever the model holds them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
