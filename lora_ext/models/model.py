"""Functions for the adapters of a whole model: all its layers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..model_layers import peft_layers
from ..nn import LoRALayer, LoRAModule, LoRAParameter
from ..nn.adapter_spec import expect
from .config import BIASES

# Attribute of a module that is trained whole: the names of the adapters to which it belongs.
SAVED_BY = "lora_ext_saved_by"
# Attribute of a module: the names of the adapters with which its bias is trained and stored.
BIAS_SAVED_BY = "lora_ext_bias_saved_by"

# Wrappers of torch (activation checkpointing, FSDP1) that state dicts leave out of the keys.
_UNNAMED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """The model's ``named_modules`` with the paths of its state dict."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield ".".join(part for part in path.split(".") if part not in _UNNAMED), module


def lora_layers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, LoRALayer]]:
    """The (path, layer) pairs of layers with adapters; shared layers once, or at each path."""
    for path, module in named_modules(model, remove_duplicate):
        if isinstance(module, LoRALayer):
            yield path, module


def adapter_modules(model: nn.Module) -> set[int]:
    """The ids of modules that are parts of layers with adapters and are not in the base model."""
    layers = [layer for _, layer in lora_layers(model)]
    own = {id(part) for layer in layers for part in layer.modules()}
    own -= {id(layer) for layer in layers if not isinstance(layer, LoRAParameter)}
    return own | {id(module.lora) for module in model.modules() if isinstance(module, LoRAModule)}


def saved_modules(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The (path, module) pairs that an adapter's config named in modules_to_save."""
    for path, module in named_modules(model):
        names = getattr(module, SAVED_BY, ())
        if names if adapter is None else adapter in names:
            yield path, module


def mark_saved(module: nn.Module, attribute: str, adapter: str) -> None:
    """Adds the adapter to the names in the module's attribute SAVED_BY or BIAS_SAVED_BY."""
    names = getattr(module, attribute, ())
    setattr(module, attribute, (*(name for name in names if name != adapter), adapter))


def unmark_saved(model: nn.Module, adapter: str | None = None) -> None:
    """Undoes `mark_saved` for an adapter, or for all."""
    for module in model.modules():
        for attribute in (SAVED_BY, BIAS_SAVED_BY):
            names = [n for n in getattr(module, attribute, ()) if adapter not in (None, n)]
            if names:
                setattr(module, attribute, tuple(names))
            elif hasattr(module, attribute):
                delattr(module, attribute)


def reshard(model: nn.Module) -> None:
    """Reshards the parameters that FSDP2 leaves unsharded in its root after a forward without a
    backward: each rank has a copy of them, rounded by the mixed precision policy."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # slow to import; absent if unused
    if fsdp is not None:
        sharded: list[Any] = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
        for module in sharded:
            module.reshard()


# What a PeftModel has instead of a function here, if its method has another name.
_OF_PEFT = {
    "models.lora_state_dict": "peft.get_peft_model_state_dict(model)",
    "models.mark_only_lora_as_trainable": "model.set_adapter(name)",
    "save_adapter": "model.save_pretrained(folder)",
    "AdapterPool": "lora_ext.use_adapters(model, names) takes its own adapters",
    "apply_lora": "model.add_adapter(name, peft.LoraConfig(...))",
}


def check_not_peft(model: nn.Module, function: str) -> None:
    """Raises ValueError for a model whose LoRA layers are all PEFT's, accelerated or not."""
    layers = next(lora_layers(model), None) or next(peft_layers(model), None)
    if layers is not None and not isinstance(layers[1], LoRALayer):
        raise ValueError(
            f"lora_ext.{function}: expected layers of lora_ext, but the model's are PEFT's, with "
            f"PEFT's own methods, accelerated or not: {_OF_PEFT.get(function, f'model.{function}')}"
        )


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order in which the layers have them."""
    return list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.adapters))


def checked_names(model: nn.Module, names: str | Iterable[str], function: str) -> tuple[str, ...]:
    check_not_peft(model, function)
    names = (names,) if isinstance(names, str) else tuple(names)
    known = adapter_names(model)
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise ValueError(
            f"lora_ext.{function}: expected distinct names out of {known}, but got {list(names)}"
        )
    return names


def set_adapter(model: nn.Module, adapter_name: str | Iterable[str]) -> None:
    """Makes exactly these adapters active and trainable; the updates of several add up.

    Modules that were trained whole for an adapter exist only once: they do not change.

    Raises:
        ValueError: no layer has one of the names, or a name comes twice.
    """
    adapter_name = checked_names(model, adapter_name, "set_adapter")
    for _, layer in lora_layers(model):
        layer.set_adapter([name for name in adapter_name if name in layer.adapters])


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes an adapter from every layer. The layers and the other active adapters stay.

    Raises:
        ValueError: no layer has the name.
    """
    checked_names(model, adapter_name, "delete_adapter")
    for _, layer in lora_layers(model):
        if adapter_name in layer.adapters:
            layer.delete_adapter(adapter_name)
    unmark_saved(model, adapter_name)


def merge_adapter(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> None:
    """Merges adapters into a second weight in every layer, or, on an error, in none.

    W + sum of scaling * B A is computed in float32 and rounded once. The model's function stays the
    same: active adapters that are not merged are added as before. The original weights are kept:
    `unmerge` is exact and state dicts contain them. See `LoRALayer.merge`.

    Args:
        adapter_names: active adapters; None merges the active adapters of each layer.

    Raises:
        ValueError: no layer has one of the names, or it is not active.
        RuntimeError: an update is not finite, or a weight is sharded or quantised.
    """
    for layer, merged in compute_merged(model, adapter_names, "merge_adapter", only_active=True):
        layer.install_merged(*merged)


def compute_merged(
    model: nn.Module, names: str | Iterable[str] | None, function: str, only_active: bool = False
) -> list:
    """All merged tensors, computed before any layer is changed."""
    check_not_peft(model, function)
    reshard(model)
    wanted = None if names is None else checked_names(model, names, function)
    found: list[tuple[LoRALayer, list[str] | None]] = []
    for path, layer in lora_layers(model):
        own = None if wanted is None else [name for name in wanted if name in layer.adapters]
        if only_active and own:
            layer.check_active(own, f" at {path!r}")
        found.append((layer, own))
    return [(layer, layer.compute_merged(own)) for layer, own in found]


def unmerge_adapter(model: nn.Module) -> None:
    """Drops the merged weights; the original weights were never changed."""
    check_not_peft(model, "unmerge_adapter")
    for _, layer in lora_layers(model):
        layer.unmerge()


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes the base model, without adapters."""
    check_not_peft(model, "disable_adapter")
    with ExitStack() as stack:
        for _, layer in lora_layers(model):
            stack.enter_context(layer.disable_adapter())
        yield model


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes everything except the active adapters, the modules to save and, optionally, biases.

    loralib's function of this name, with inactive adapters frozen too.

    Args:
        bias: "none", "all", or "lora_only", the biases of layers with adapters.

    Raises:
        ValueError: bias is none of them.
    """
    expect(bias in BIASES, "models.mark_only_lora_as_trainable", f"bias in {BIASES}", bias)
    check_not_peft(model, "models.mark_only_lora_as_trainable")
    own = {
        id(parameter)
        for _, layer in lora_layers(model)
        for table in layer.tables().values()
        for parameter in table.values()
    }
    for name, parameter in model.named_parameters():
        is_bias = name.split(".")[-1] == "bias" and id(parameter) not in own
        parameter.requires_grad_(bias == "all" and is_bias)
    for _, layer in lora_layers(model):
        layer.set_adapter(layer.active_adapters)
        own_bias = layer._parameters.get("bias")
        if bias == "lora_only" and own_bias is not None:
            own_bias.requires_grad_(True)
    for _, module in saved_modules(model):
        module.requires_grad_(True)


def adapter_keys(model: nn.Module, adapter: str | None = None) -> set[str]:
    """The keys of an adapter's tensors in the model's state dict, or of all adapters'."""
    return {
        f"{path}.{table}.{name}".lstrip(".")
        for path, layer in lora_layers(model, remove_duplicate=False)
        for table, entries in layer.tables().items()
        for name in list(entries)
        if adapter in (None, name)
    }


def bias_keys(model: nn.Module, keys: Iterable[str], bias: str) -> set[str]:
    """Those of the keys of a state dict that a mode of `bias` adds: biases of the base."""
    if bias == "all":
        return {key for key in keys if key.split(".")[-1] == "bias"} - adapter_keys(model)
    layers = lora_layers(model, remove_duplicate=False) if bias == "lora_only" else ()
    return {f"{path}.bias".lstrip(".") for path, layer in layers if layer.bias is not None}


def lora_state_dict(
    model: nn.Module, bias: str = "none", adapter_name: str | None = None
) -> dict[str, Tensor]:
    """The part of ``model.state_dict()`` that training changes; load it with ``strict=False``.

    Args:
        bias: which biases to include: "none", "all", or "lora_only", those of layers with adapters.
        adapter_name: one adapter's tensors alone; None for all.

    Returns:
        Keys ``<path>.lora_a.<adapter>`` and so on, the biases, and the parameters and buffers of
        modules to save; tensors share memory with the model.

    Raises:
        ValueError: bias is none of the three, or no layer has the adapter.
    """
    expect(bias in BIASES, "models.lora_state_dict", f"bias in {BIASES}", bias)
    check_not_peft(model, "models.lora_state_dict")
    if adapter_name is not None:
        checked_names(model, adapter_name, "models.lora_state_dict")
    state = model.state_dict()
    wanted = adapter_keys(model, adapter_name) | bias_keys(model, state, bias)
    saved = tuple(f"{path}." for path, _ in saved_modules(model, adapter_name))
    return {k: tensor for k, tensor in state.items() if k in wanted or k.startswith(saved)}
