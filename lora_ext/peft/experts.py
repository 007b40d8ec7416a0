"""Experts of transformers whose parameters have adapters, as `lora_experts` takes them.

Their classes are those that `use_experts_implementation` decorates: it says in which layout the
parameters are, and forwards that it knows can take the place of one another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FLOATS
from ..experts import Experts, ExpertsAdapter, lora_experts
from ..nn.adapter_spec import MAX_RANK
from ..nn.updates import is_plain, is_transformed
from .chain import Chain, Target
from .reasons import has_hooks, no_export_reason

# Transformers' own: each computes the same. Of others nobody knows.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
_DEVICES = ("cpu", "cuda")

try:
    from transformers.integrations.moe import use_experts_implementation
except ImportError:  # before 5.0
    _DECORATED = None
else:
    _DECORATED = use_experts_implementation(type("Experts", (nn.Module,), {})).forward.__code__


def reason(chain: Chain) -> str:
    """Why PEFT's own forward is needed whatever the input is, or ""."""
    base = chain.base
    found = _module_reason(base) or no_export_reason()
    if found:
        return found
    names = ("gate_up_proj" if base.has_gate else "up_proj", "down_proj")
    first = base._parameters.get(names[0])
    for name in names:
        found = found or _weight_reason(base._parameters.get(name), first)
    if base.has_bias and any(_is_trained(getattr(base, f"{name}_bias")) for name in names):
        found = found or "the experts' biases are trained"
    for target in chain.targets:
        if target.name not in names:
            return "a parameter other than the experts' weights has adapters"
        found = found or _target_reason(target, base)
    return found


def _module_reason(base: Any) -> str:
    if not is_decorated(type(base)):
        return "the module is not one of transformers' use_experts_implementation"
    if "forward" in base.__dict__:
        return "the experts' forward is replaced on the instance"
    if has_hooks(base):
        return "the experts have hooks"
    if base._is_expert_parallel:
        return "the experts are parallel"
    if getattr(base.config, "_experts_implementation", None) not in _IMPLEMENTATIONS:
        return "the experts' implementation is not one of transformers' own"
    return ""


def _weight_reason(weight: Any, first: Any) -> str:
    if weight is None or not is_plain(weight) or weight.dim() != 3 or weight.dtype not in FLOATS:
        return "the experts' weights are computed, quantised or sharded"
    if weight.dtype != first.dtype or weight.device != first.device:
        return "the experts' weights differ in dtype or device"
    if weight.device.type not in _DEVICES:
        return "no kernels for this device"
    return "the experts' weights are trained" if _is_trained(weight) else ""


def _is_trained(weight: Tensor) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def _target_reason(target: Target, base: Any) -> str:
    wrapper, name, adapters = target
    experts, *sides = base._parameters[name].shape
    if experts == 1:
        return "one expert, whose factors PEFT takes for a matrix's"
    in_features, out_features = sides if base.is_transposed else reversed(sides)
    if adapters and wrapper._did_swap_in_out_features == base.is_transposed:
        return "the factors are of the weight's other side"
    rank = 0
    for adapter in adapters:
        lora_a, lora_b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        rank += lora_a.shape[0] // experts
        if (lora_a.shape[1], lora_b.shape[0]) != (in_features, out_features):
            return "the factors are of the weight's other side"
    return f"the ranks of the active adapters sum to more than {MAX_RANK}" * (rank > MAX_RANK)


def is_decorated(kind: type) -> bool:
    """Whether a class has the forward that transformers' decorator gives, and no other."""
    return _DECORATED is not None and getattr(kind.forward, "__code__", None) is _DECORATED


def operands(chain: Chain, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """(x, top_k_index, top_k_weights), or None where they need PEFT's own forward."""
    if kwargs:
        names = type(chain.base).forward.__wrapped__.__code__.co_varnames[1:4]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(named) != len(args) + len(kwargs) or named.keys() != set(names):
            return None
        args = tuple(named[name] for name in names)
    if len(args) != 3 or not all(map(is_plain, args)) or is_transformed():
        return None
    x, index, weights = args
    width = chain.base.down_proj.shape[2 if chain.base.is_transposed else 1]
    is_fit = (
        x.dim() == index.dim() == weights.dim() == 2
        and index.shape == weights.shape
        and x.shape == (index.shape[0], width)
        and x.dtype in FLOATS
        and weights.dtype in FLOATS
        and not index.is_floating_point()
        and x.device == chain.base.down_proj.device
    )
    return args if is_fit else None


def forward(chain: Chain, operands: tuple) -> Tensor:
    """``[T, H]`` of the experts with their adapters."""
    found: dict[str, list[ExpertsAdapter]] = {}
    for wrapper, name, adapters in chain.targets:
        found[name] = [
            ExpertsAdapter(
                wrapper.lora_A[adapter].weight,
                wrapper.lora_B[adapter].weight,
                wrapper.scaling[adapter],
            )
            for adapter in adapters
        ]
    down = found.pop("down_proj", [])
    up = next(iter(found.values()), [])
    x, index, weights = operands
    return lora_experts(Experts.of(chain.base), x, index, weights, up, down)


def rows_of_experts(chain: Chain) -> str:
    """What is computed, for people."""
    names = ", ".join(sorted(target.name for target in chain.targets if target.adapters))
    return f"rows of each expert, updates of {names}"
