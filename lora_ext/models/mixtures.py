"""Which parameters of a mixture's experts and routers a config selects, and with which adapter.

"all-linear", and patterns that match the experts' module, select all its weights, as PEFT does for
the model types that it knows: ``gate_up_proj`` holds two projections, so its rank is 2 r and its
alpha 2 alpha. A parameter's name with that of the module, such as "experts.down_proj", selects this
parameter only, with r and alpha unchanged. A router is selected by its name ("mlp.gate",
"mlp.gate.weight").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from ..experts.decorated import packing
from ..nn import LoRALayer, LoRAModule, LoRAParameter
from ..nn.adapter_spec import MAX_RANK, AdapterSpec
from ..nn.experts import is_experts
from ..nn.module import adaptable_parameters
from ..versions import TOO_OLD
from .config import ALL_LINEAR, LoraConfig
from .patterns import is_name_of, is_pattern, matches

# The parameter that has the rows of two projections.
_FUSED = "gate_up_proj"


def routers(modules: Sequence[tuple[str, nn.Module]]) -> set[int]:
    """The ids of routers, of a model's (path, module) pairs: modules next to experts whose weight
    has a row for each expert, and that are not linear layers."""
    counts = {
        path.rpartition(".")[0]: module.num_experts
        for path, module in modules
        if is_experts(module)
    }
    found = set()
    for path, module in modules:
        count, weight = counts.get(path.rpartition(".")[0]), module._parameters.get("weight")
        if count is None or weight is None or isinstance(module, (nn.Linear, LoRALayer)):
            continue
        if weight.dim() == 2 and weight.shape[0] == count:
            found.add(id(module))
    return found


def warn_of_other_experts(model: nn.Module, where: str, config: LoraConfig) -> None:
    """Warns of experts that "all-linear" leaves out, since their layout is unknown, and raises
    ValueError if they are packed; where: what was called."""
    found = set()
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "expert" not in f"{path} {kind}".lower() or is_experts(module):
            continue
        if isinstance(module, nn.modules.conv._ConvNd) or "parametrizations" in path.split("."):
            continue
        packed = packing(module)
        if packed and not any(matches(pattern, path) for pattern in config.exclude_modules):
            raise ValueError(
                f"lora_ext.{where}: expected experts that 'all-linear' can adapt, but of {path!r}, "
                f"a {kind}, {packed}; exclude_modules=['experts'] leaves them out"
            )
        if not packed and any(p.dim() > 2 for p in module.parameters(recurse=False)):
            found.add(kind)
    if found:
        why = TOO_OLD["transformers"] or (
            "transformers' use_experts_implementation does not decorate them; PEFT's "
            "target_parameters may take them: "
            "lora_ext.accelerate(peft.get_peft_model(model, config))"
        )
        warnings.warn(
            f"lora_ext.{where}: 'all-linear' leaves out the experts of {sorted(found)}: {why}",
            stacklevel=3,
        )


def names_parameter(pattern: str, path: str, module: nn.Module) -> bool:
    """Whether a pattern is the name of a module's parameter, with a part of the module's path."""
    if is_pattern(pattern) or "." not in pattern:
        return False
    return any(is_name_of(pattern, f"{path}.{name}") for name in adaptable_parameters(module))


def chosen(
    module: LoRAModule, path: str, config: LoraConfig
) -> Iterable[tuple[LoRAParameter, AdapterSpec]]:
    """The parameters of experts, or of a router, that the config selects, each with its adapter;
    the module at `path` is among its targets."""
    targets = config.target_modules
    is_whole = any(pattern == ALL_LINEAR or matches(pattern, path) for pattern in targets)
    for layer in module.layers():
        name = f"{path}.{layer.parameter}"
        is_named = any(
            names_parameter(pattern, path, module) and matches(pattern, name) for pattern in targets
        )
        if any(matches(pattern, name) for pattern in config.exclude_modules):
            continue
        if is_whole and layer.parameter == _FUSED:
            if 2 * config.r > MAX_RANK:
                raise ValueError(
                    f"lora_ext.apply_lora: expected r of 1 to {MAX_RANK // 2} for the experts' "
                    f"{name}, which holds two projections and gets the rank 2 r, but got "
                    f"r={config.r}; give a smaller r, or name {_FUSED!r} in exclude_modules"
                )
            both = replace(config, r=2 * config.r, lora_alpha=2 * config.lora_alpha)
            yield layer, both.spec_for(name)
        elif is_whole or is_named:
            yield layer, config.spec_for(name)
