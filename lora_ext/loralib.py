"""Models and state dicts of loralib, the package of microsoft/LoRA, which is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .models.apply import at, install, undone_on_error
from .models.config import BIASES
from .models.model import bias_keys, checked_names, lora_layers
from .nn import LoRAEmbedding, LoRALayer, LoRALinear, LoRAMergedLinear
from .nn.adapter_spec import DEFAULT_ADAPTER, AdapterSpec, expect

__all__ = ["convert_loralib", "load_loralib_state_dict", "loralib_state_dict"]

_KINDS: dict[str, tuple[type[LoRALayer], type[nn.Module]]] = {
    "Linear": (LoRALinear, nn.Linear),
    "MergedLinear": (LoRAMergedLinear, nn.Linear),
    "Embedding": (LoRAEmbedding, nn.Embedding),
}
_SUFFIXES = {".lora_A": "lora_a", ".lora_B": "lora_b"}


def convert_loralib(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> nn.Module:
    """Replaces loralib's Linear, MergedLinear and Embedding by layers of this package, in place.

    Weights and adapters are the same Parameter objects, so an optimizer goes on; the outputs are
    loralib's. A layer that loralib merged is first unmerged by loralib's own ``train()``. From then
    on nothing is merged by ``eval()``: call `lora_ext.merge_adapter` if you want that.

    Args:
        model: holds loralib layers.
        adapter_name: the name to give to their adapters.

    Returns:
        The model.

    Raises:
        ValueError: there are no loralib layers, or one of another kind (its convolutions,
            subclasses), or with a setting that the layers here do not have. The model is then
            unchanged.
    """
    found: list[tuple[str, Any]]
    found = [(path, module) for path, module in model.named_modules() if _kind(module)]
    others = [path for path, m in found if _kind(m) not in _KINDS]
    if not found or others:
        got = f"other layers of loralib at {others}" if others else "none"
        raise ValueError(
            f"lora_ext.loralib.convert_loralib: expected layers of loralib out of {list(_KINDS)}, "
            f"but got {got}"
        )
    layers: dict[int, nn.Module] = {}
    with undone_on_error(model):
        for path, module in found:
            with at(path):
                layers[id(module)] = _converted(module, adapter_name)
    for _, module in found:
        if module.merged:
            was_training = module.training
            module.train(True)  # takes the product out of the weight
            module.training = was_training
    install(model, layers)
    return model


def _kind(module: nn.Module) -> str:
    """The name of the loralib class that the module is an instance of, or ""."""
    kind = type(module)
    if not hasattr(module, "r"):
        return ""
    if kind.__module__ == "loralib.layers":
        return kind.__name__
    derives = any(parent.__module__ == "loralib.layers" for parent in kind.__mro__)
    return f"{kind.__module__}.{kind.__qualname__}" if derives else ""


def _converted(module: Any, adapter: str) -> LoRALayer:
    kind, base_type = _KINDS[_kind(module)]
    layer = kind.around(_base_of(module, base_type))
    if isinstance(layer, LoRALinear):
        layer.fan_in_fan_out = module.fan_in_fan_out
        layer.out_features, layer.in_features = layer.matrix(layer.weight).shape
    if not hasattr(module, "lora_A"):  # r = 0, or no group enabled
        return layer
    if isinstance(layer, LoRAMergedLinear):
        layer.enable_groups(module.enable_lora)
    alpha = module.lora_alpha
    if alpha / module.r != module.scaling:  # set by hand
        alpha = module.scaling * module.r
    spec = AdapterSpec(module.r, alpha, getattr(module.lora_dropout, "p", 0.0))
    layer.add_adapter(adapter, spec, module.lora_A.dtype)
    layer.lora_a[adapter], layer.lora_b[adapter] = module.lora_A, module.lora_B
    return layer


def _base_of(module: nn.Module, base_type: type[nn.Module]) -> nn.Module:
    """The plain layer that a loralib layer derives from, with its parameters and hooks."""
    base = base_type.__new__(base_type)
    nn.Module.__init__(base)
    wanted = base_type(1, 1).__dict__
    base.__dict__.update({k: v for k, v in module.__dict__.items() if k in wanted})
    base._parameters = {k: v for k, v in module._parameters.items() if not k.startswith("lora_")}
    base._modules = {}
    return base


def loralib_state_dict(
    model: nn.Module, adapter_name: str = DEFAULT_ADAPTER, bias: str = "none"
) -> dict[str, Tensor]:
    """One adapter as ``loralib.lora_state_dict`` gives it: ``<path>.lora_A``, ``<path>.lora_B``.

    As in loralib it does not contain alpha, which must be known to load it.

    Args:
        bias: which biases to include: "none", "all" or "lora_only", those of layers with adapters.

    Raises:
        ValueError: no layer has the adapter, or it uses something that loralib does not have:
            PiSSA's or OLoRA's init, a lora_bias, a 1x1 convolution.
    """
    expect(bias in BIASES, "loralib.loralib_state_dict", f"bias in {BIASES}", bias)
    checked_names(model, adapter_name, "loralib.loralib_state_dict")
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    for path, layer in lora_layers(model, remove_duplicate=False):
        if adapter_name not in layer.adapters:
            continue
        _check_known_to_loralib(path, layer, adapter_name)
        for suffix, table in _SUFFIXES.items():
            own = f"{path}.{table}.{adapter_name}".lstrip(".")
            result[f"{path}{suffix}".lstrip(".")] = state[own]
    biases = bias_keys(model, state, bias)
    return result | {key: value for key, value in state.items() if key in biases}


def _check_known_to_loralib(path: str, layer: LoRALayer, adapter: str) -> None:
    spec = layer.adapters[adapter]
    reason = ""
    if not isinstance(layer, (LoRALinear, LoRAEmbedding)):
        reason = f"is a {type(layer).__name__}, whose lora_a and lora_b loralib stores otherwise"
    elif spec.subtracts_init:
        reason = f"has init {spec.init_lora_weights!r}, which loralib has not"
    elif spec.lora_bias:
        reason = "has a lora_bias, which loralib has not"
    if reason:
        raise ValueError(
            f"lora_ext.loralib.loralib_state_dict: {path!r} {reason}; use save_adapter, PEFT's "
            "format"
        )


def load_loralib_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = DEFAULT_ADAPTER
) -> None:
    """Loads a state dict of loralib into adapters that the model already has.

    Args:
        model: with layers from `apply_lora`, `convert_loralib` or the classes themselves.
        state: from ``loralib.lora_state_dict`` or a whole ``state_dict()``. Read files with
            ``torch.load(path, weights_only=True)``: others can run code.
        adapter_name: which adapter to fill.

    Raises:
        ValueError: a key does not belong to the model, an adapter of the model has no key, a shape
            does not fit, or a value is not finite. Nothing is then written.
    """
    layers = {
        path: layer
        for path, layer in lora_layers(model, remove_duplicate=False)
        if adapter_name in layer.adapters
    }
    targets = {
        f"{path}{suffix}".lstrip("."): getattr(layer, table)[adapter_name]
        for path, layer in layers.items()
        for suffix, table in _SUFFIXES.items()
    }
    needed = set(targets)
    own = model.state_dict()
    targets |= {key: tensor for key, tensor in own.items() if key in state}
    where = "lora_ext.loralib.load_loralib_state_dict"
    missing, unknown = sorted(needed - set(state)), sorted(set(state) - set(targets))
    if missing or unknown or not needed:
        raise ValueError(
            f"{where}: expected the keys of adapter {adapter_name!r} and no unknown ones, "
            f"but missing are {missing[:4]} and unknown {unknown[:4]} (of {len(missing)} and "
            f"{len(unknown)}); add layers with apply_lora, or load the model that was saved"
        )
    for key, tensor in state.items():
        if tensor.shape != targets[key].shape:
            raise ValueError(
                f"{where}: expected {key} of shape {list(targets[key].shape)}, but got "
                f"{list(tensor.shape)}; r and enable_lora must be those of the checkpoint"
            )
        if key in needed and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: expected finite values in {key}, but got NaN or Inf")
    for layer in layers.values():
        layer.unmerge()
    with torch.no_grad():
        for key, tensor in state.items():
            targets[key].copy_(tensor)
