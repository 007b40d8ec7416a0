"""transformers' experts with PEFT's adapters on their parameters, as operands of `lora_experts`."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from ..experts import Experts, ExpertsAdapter, decorated, lora_experts
from ..nn.adapter_spec import MAX_RANK
from ..quantized.stacks import has_own_hooks_alone
from ..torch_state import is_transformed
from .chain import Chain, Target
from .reasons import has_hooks

with contextlib.suppress(ImportError):  # before transformers 5
    import transformers.integrations.moe  # noqa: F401
decorated.is_decorated(nn.Module)  # finds the decorator here, where no compiler traces it


def reason(chain: Chain) -> str:
    """Why PEFT's own forward is needed for any input, or ""."""
    base = chain.base
    found = _module_reason(base) or decorated.obstacle(base)
    if found:
        return found
    for target in chain.targets:
        if target.name not in (decorated.up_name(base), "down_proj"):
            return "a parameter other than the experts' weights has adapters"
        found = found or _target_reason(target, base)
    return found


def _module_reason(base: Any) -> str:
    if not decorated.is_decorated(type(base)):
        return "the module is not one of transformers' use_experts_implementation"
    if "forward" in base.__dict__:
        return "the experts' forward is replaced on the instance"
    has_others = has_hooks(base) and not has_own_hooks_alone(base)
    return "the experts have hooks" if has_others else ""


def _target_reason(target: Target, base: Any) -> str:
    wrapper, name, adapters = target
    experts, *sides = decorated.weight_of(base, name).shape
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


def operands(chain: Chain, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """(x, top_k_index, top_k_weights), or None if they need PEFT's own forward."""
    if is_transformed():
        return None
    return decorated.operands(chain.base, type(chain.base), args, kwargs)


def forward(chain: Chain, operands: tuple) -> Tensor:
    """``[T, H]`` of the experts with their adapters."""
    p = chain.dropout
    found: dict[str, list[ExpertsAdapter]] = {}
    for wrapper, name, adapters in chain.targets:
        found[name] = [
            ExpertsAdapter(
                wrapper.lora_A[adapter].weight,
                wrapper.lora_B[adapter].weight,
                wrapper.scaling[adapter],
                p,
            )
            for adapter in adapters
        ]
    down = found.pop("down_proj", [])
    up = next(iter(found.values()), [])
    x, index, weights = operands
    return lora_experts(Experts.of(chain.base), x, index, weights, up, down)


def rows_of_experts(chain: Chain) -> str:
    """What is computed, as text."""
    names = ", ".join(sorted(target.name for target in chain.targets if target.adapters))
    updates = f", updates of {names}" if names else ""
    dropout = f", expert_dropout {chain.dropout}" if chain.dropout else ""
    return f"rows of each expert{updates}{dropout}{decorated.quantised_note(chain.base)}"
