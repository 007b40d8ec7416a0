"""Removes adapters from a model, with or without merging them into its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..nn import LoRALayer, LoRAModule, LoRAParameter
from ..nn.frozen import take_frozen
from .apply import replace
from .model import check_not_peft, compute_merged, lora_layers, reshard, unmark_saved


def merge_and_unload(
    model: nn.Module, adapter_names: str | Iterable[str] | None = None
) -> nn.Module:
    """Replaces the layers by plain ones with the adapters merged in, in place, as PEFT does.

    Sums are computed in float32 and rounded once. If an update is not finite nothing is replaced.
    The model keeps one weight for each layer; the original is freed unless something else holds it,
    such as a tied embedding, which keeps its values.

    Args:
        adapter_names: None merges the active ones.

    Returns:
        The model, without adapters.

    Raises:
        ValueError: no layer has one of the names, or the model itself is a layer.
        RuntimeError: an update is not finite, or a weight is sharded or quantised.
    """
    _check_not_layer(model, "merge_and_unload")
    replaced: dict[int, nn.Module] = {}
    merged: dict[LoRAModule, dict[str, Tensor]] = {m: {} for m in _modules(model)}
    for layer, (_, weight, bias) in compute_merged(model, adapter_names, "merge_and_unload"):
        if isinstance(layer, LoRAParameter):
            if weight is not None:
                merged[layer.module][layer.parameter] = weight
        elif weight is None:
            replaced[id(layer)] = layer.restored()
        else:
            replaced[id(layer)] = layer.as_base(weight, layer.bias if bias is None else bias)
    replaced |= {id(module): module.restored(weights) for module, weights in merged.items()}
    replace(model, replaced)
    take_frozen(model, back=True)
    unmark_saved(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Replaces the layers by plain ones with the original weights, in place; drops the adapters.

    Raises:
        ValueError: the model itself is a layer.
        RuntimeError: a weight is sharded over processes.
    """
    _check_not_layer(model, "unload")
    check_not_peft(model, "unload")
    reshard(model)
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.check_whole("unload")
    replaced: list[Any] = [each for each in layers if not isinstance(each, LoRAParameter)]
    replace(model, {id(each): each.restored() for each in [*replaced, *_modules(model)]})
    take_frozen(model, back=True)
    unmark_saved(model)
    return model


def _modules(model: nn.Module) -> list[LoRAModule]:
    return [module for module in model.modules() if isinstance(module, LoRAModule)]


def _check_not_layer(model: nn.Module, function: str) -> None:
    if isinstance(model, (LoRALayer, LoRAModule)):
        raise ValueError(
            f"lora_ext.{function}: expected a model with LoRA layers inside, but got a single "
            f"{type(model).__name__}, which cannot be replaced in place"
        )
