"""The layer that replaces a module for which a file has tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..models.find import replacement_for
from ..nn import LoRAConv2d, LoRALayer, LoRALinear, LoRAMergedLinear, LoRAQuantizedLinear
from ..nn.adapter_spec import AdapterSpec
from ..nn.experts import LoRAExperts, is_experts
from ..nn.linear import is_conv1d
from ..nn.module import LoRAModule, adaptable_parameters
from .errors import AdapterError, some
from .owners import check_real


def example_path(modules: Mapping[str, nn.Module]) -> str:
    """The path of one module that can have an adapter, as an example for messages."""
    adaptable = (path for path, m in modules.items() if replacement_for(m) is not None)
    return next(adaptable, "<path>")


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter of the weight is an adapter of the module: W is ``[out, in]``."""
    if isinstance(module, LoRALinear):
        return not module.fan_in_fan_out
    return (
        type(module) is nn.Linear
        or isinstance(module, LoRAQuantizedLinear)
        or (replacement_for(module) is LoRAQuantizedLinear)
    )


def layer_for(path: str, module: nn.Module) -> LoRALayer:
    """The layer that replaces a module which gets an adapter.

    Raises:
        AdapterError: it cannot have one.
    """
    if isinstance(module, LoRAMergedLinear):
        raise AdapterError(
            f"expected a layer with plain factors at {path!r}, but it is a LoRAMergedLinear, which "
            "keeps them by groups"
        )
    if isinstance(module, LoRALayer):
        layer = module
    else:
        kind = replacement_for(module)
        if kind is not None and issubclass(kind, LoRAModule):
            raise AdapterError(
                f"expected target_parameters of adapter_config.json to name weights of {path!r} "
                f"({some(adaptable_parameters(module))}), for which the file has tensors, but it "
                "names none"
            )
        if kind is None:
            raise AdapterError(
                "expected nn.Linear, nn.Embedding, Conv1D, a 1x1 nn.Conv2d or a quantised linear "
                f"layer that is known at {path!r}, but the adapter is for a "
                f"{type(module).__module__}.{type(module).__qualname__}"
            )
        try:
            layer = kind.around(module)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{path!r} cannot be adapted: {error}") from None
    check_real(f"the weight of {path!r}", layer.stored_weight)
    return layer


def module_for(path: str, module: nn.Module) -> LoRAModule:
    """The module that replaces one whose parameters get an adapter.

    Raises:
        AdapterError: they cannot have one.
    """
    if isinstance(module, LoRAModule):
        return module
    if isinstance(module, LoRALayer):
        raise AdapterError(
            f"expected {path!r} to have no adapter, since target_parameters names a parameter of "
            f"it, but it is a {type(module).__name__}; unload it first"
        )
    kind = LoRAExperts if is_experts(module) else LoRAModule
    try:
        return kind.around(module)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path!r} cannot be adapted: {error}") from None


def can_subtract(spec: AdapterSpec, layer: LoRALayer, module: nn.Module) -> bool:
    """Whether PEFT's init and this library's subtract the same product. PEFT's OLoRA decomposes a
    Conv1D's weight in its stored layout, and its convolutions have neither init."""
    if isinstance(layer, LoRAConv2d) or spec.scaling <= 0:
        return False
    return spec.init == "pissa" or not getattr(layer, "fan_in_fan_out", is_conv1d(module))
