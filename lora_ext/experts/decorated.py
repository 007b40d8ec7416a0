"""transformers' experts: the classes decorated with `use_experts_implementation`.

The decorator states the layout of the weights; the forwards that transformers registers for them
are interchangeable. No module is imported that has not been imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FLOATS
from ..quantized.layers import own_type
from ..quantized.stack import QuantizedStack
from ..quantized.stacks import parameter_names, stack_of, stacks_of
from ..torch_state import is_exported, is_plain, is_transformed
from .devices import has_kernels

# The forwards of transformers, which all compute the same. Nothing is known about others.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
_DEVICES = ("cpu", "cuda")
_MODULE = "transformers.integrations.moe"


# The code of the decorator's forward. It is a global, since dynamo would trace into a cache.
_forward: CodeType | None = None


def is_decorated(kind: type) -> bool:
    """Whether a class, or the one that it was put over, has the forward that transformers'
    decorator gives, and no other."""
    global _forward
    if _forward is None:
        decorate = getattr(sys.modules.get(_MODULE), "use_experts_implementation", None)
        if decorate is None:
            return False  # not imported, or transformers < 5
        _forward = decorate(type("Experts", (nn.Module,), {})).forward.__code__
    return getattr(own_type(kind).forward, "__code__", None) is _forward


def packing(module: nn.Module) -> str:
    """What the weights of experts are packed in, if they are unknown or adapters of the sizes that
    are stored do not fit, and what to do; or "". MXFP4's, once loaded, are no tensors of torch."""
    stored = {name: module._parameters.get(name) for name in parameter_names(module)}
    stacks = {name: p for name, p in stored.items() if p is not None and p.dim() > 2}
    packed = {n: p for n, p in stacks.items() if p.dtype not in FLOATS}
    forms = sorted({str(p.dtype) for n, p in packed.items() if _sizes(module, n) != p.shape})
    forms = ["MXFP4"] if type(module).__name__ == "Mxfp4GptOssExperts" else forms
    cure = "load the model with config=lora_ext.pretrained.packed_config(folder)"
    return f"the experts' weights are packed in {' and '.join(forms)}; {cure}" if forms else ""


def _sizes(module: nn.Module, name: str) -> tuple[int, ...]:
    """Of a quantised stack, or ()."""
    found = stack_of(module, name)
    return found.shape if isinstance(found, QuantizedStack) else ()


# Attributes that instances of older releases lack, with what holds there by their sources: 5.0 has
# no `has_gate`, no `is_concatenated`, 5.17 no `_is_expert_parallel`, 5.19 no `has_post_expert_norm`


def has_gate(module: Any) -> bool:
    return getattr(module, "has_gate", True)


def is_concatenated(module: Any) -> bool:
    """Whether the rows of gate and up are not interleaved; in 5.0 those of GPT-OSS alone are."""
    return getattr(module, "is_concatenated", not module.is_transposed)


def is_parallel(module: Any) -> bool:
    """Whether this process has a part of the experts, or, before 5.18, of each of them, too."""
    plan = getattr(module, "_hf_tp_plan", None)
    return getattr(module, "_is_expert_parallel", plan is not None)


def norm_of(module: Any) -> Any:
    """The norm of each row of the down projection's result, or None."""
    return module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None


def up_name(module: Any) -> str:
    """The name of the first projection's weight."""
    return "gate_up_proj" if has_gate(module) else "up_proj"


def weight_of(module: Any, name: str) -> Tensor | QuantizedStack:
    """The weight of a projection of a module without an `obstacle`, not dequantised."""
    found = stack_of(module, name)
    assert isinstance(found, (Tensor, QuantizedStack))
    return found


def quantised_note(module: Any) -> str:
    """How quantised experts are computed, as the end of a text; "" if none are."""
    stacks = stacks_of(module)
    if not stacks:
        return ""
    formats, most = sorted({stack.format for stack in stacks}), max(map(together, stacks))
    return (
        f", {' and '.join(formats)}, {f'up to {most}' if most > 1 else 'one'} dequantised at a time"
    )


def together(stack: QuantizedStack) -> int:
    """The most experts that are dequantised at a time."""
    return stack.slice_size if stack.has_slices and has_kernels(stack.device) else 1


def obstacle(module: Any) -> str:
    """Why `lora_experts` cannot compute a decorated module for any input, or ""."""
    if is_parallel(module):
        return "the experts are split over processes"
    if getattr(module.config, "_experts_implementation", None) not in _IMPLEMENTATIONS:
        return "the experts' implementation is not one of transformers' own"
    if is_exported():
        return "the model is exported or traced"
    if is_transformed():
        return "a transform of torch.func or forward-mode AD is active"
    names = (up_name(module), "down_proj")
    first = stack_of(module, names[0])
    for name in names:
        reason = _weight_obstacle(stack_of(module, name), first)
        if reason:
            return reason
    biases = [getattr(module, f"{name}_bias") for name in names] if module.has_bias else []
    return "the experts' biases are trained" if any(map(_is_trained, biases)) else ""


def _weight_obstacle(weight: Any, first: Any) -> str:
    if isinstance(weight, str):
        return weight
    is_dense = is_plain(weight) and weight.dim() == 3 and weight.dtype in FLOATS
    if not (isinstance(weight, QuantizedStack) or is_dense):
        return "the experts' weights are parametrized, quantised or sharded"
    if weight.dtype != first.dtype or weight.device != first.device:
        return "the experts' weights differ in dtype or device"
    if weight.device.type not in _DEVICES:
        return "the experts are on a device other than CPU and CUDA"
    return "the experts' weights are trained" if _is_trained(weight) else ""


def _is_trained(weight: Tensor | QuantizedStack) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def in_order(kind: type, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """The arguments of a forward, (x, top_k_index, top_k_weights), whose names depend on the model;
    () if they are others. kind: the module's class, or the class that it replaces."""
    if kwargs:
        names = kind.forward.__wrapped__.__code__.co_varnames[1:4]  # type: ignore[attr-defined]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(named) != len(args) + len(kwargs) or named.keys() != set(names):
            return ()
        args = tuple(named[name] for name in names)
    return args if len(args) == 3 else ()
