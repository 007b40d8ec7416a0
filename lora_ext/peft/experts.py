"""transformers' experts with PEFT's adapters on their parameters, as operands of `lora_experts`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..experts import Experts, ExpertsAdapter, decorated, lora_experts
from ..nn.adapter_spec import MAX_RANK
from ..nn.row_adapters import RowAdapters
from ..quantized.stacks import has_own_hooks_alone
from ..torch_state import is_transformed
from ..versions import TOO_OLD
from .chain import Chain, Target
from .reasons import has_hooks

with contextlib.suppress(ImportError):  # before transformers 5
    import transformers.integrations.moe  # noqa: F401
decorated.is_decorated(nn.Module)  # finds the decorator here, where no compiler traces it


def reason(chain: Chain, by_row: bool = False) -> str:
    """Why PEFT's own forward is needed for any input, or "".

    Args:
        by_row: whether each row has one of the adapters instead of all.
    """
    base = chain.base
    found = _module_reason(base) or decorated.obstacle(base)
    if found:
        return found
    for target in chain.targets:
        if target.name not in (decorated.up_name(base), "down_proj"):
            return "a parameter other than the experts' weights has adapters"
        found = found or _target_reason(target, base, by_row)
    return found


def _module_reason(base: Any) -> str:
    if not decorated.is_decorated(type(base)):
        return (
            TOO_OLD["transformers"]
            or "the module is not one of transformers' use_experts_implementation"
        )
    if "forward" in base.__dict__:
        return "the experts' forward was replaced, as by an offload hook"
    has_others = has_hooks(base) and not has_own_hooks_alone(base)
    return "the experts have hooks" if has_others else ""


def _target_reason(target: Target, base: Any, by_row: bool) -> str:
    wrapper, name, adapters = target
    experts, *sides = decorated.weight_of(base, name).shape
    if experts == 1:
        return "one expert, which PEFT adapts as a single matrix"
    in_features, out_features = sides if base.is_transposed else reversed(sides)
    if adapters and wrapper._did_swap_in_out_features == base.is_transposed:
        return "lora_A and lora_B have the shapes of the transposed weight"
    rank = 0
    for adapter in adapters:
        lora_a, lora_b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        own = lora_a.shape[0] // experts
        rank = max(rank, own) if by_row else rank + own
        if (lora_a.shape[1], lora_b.shape[0]) != (in_features, out_features):
            return "lora_A and lora_B have the shapes of the transposed weight"
    if rank > MAX_RANK and by_row:
        return f"an adapter's rank is more than {MAX_RANK}"
    return f"the ranks of the active adapters sum to more than {MAX_RANK}" * (rank > MAX_RANK)


def forward(
    chain: Chain, args: tuple, kwargs: Any, names: Sequence[str], rows: RowAdapters | None
) -> Any:
    """The experts' output, or NotImplemented: as of `matrices.forward`."""
    found = None
    if not is_transformed():
        found = decorated.operands(chain.base, type(chain.base), args, kwargs)
    if found is None:
        return NotImplemented
    index = None if rows is None else rows.index_for(found[0], names)
    p = chain.dropout  # read once, so that it is one number for a compiler
    given = None if rows is None else names
    up, down = (_adapters(target, given, p) for target in _pair(chain))
    return lora_experts(Experts.of(chain.base), *found, up, down, index)


def _pair(chain: Chain) -> tuple[Target | None, Target | None]:
    """The targets of the first projection and of the second."""
    found = {target.name: target for target in chain.targets}
    down = found.pop("down_proj", None)
    return next(iter(found.values()), None), down


def _adapters(
    target: Target | None, names: Sequence[str] | None, p: float
) -> list[ExpertsAdapter | None]:
    """The adapters that all rows have, or those that rows may have: None for one that the target
    lacks."""
    if target is None:
        return []
    wrapper, _, here = target
    return [
        ExpertsAdapter(
            wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name], p
        )
        if name in here
        else None
        for name in (here if names is None else names)
    ]


def note(chain: Chain, by_row: bool) -> str:
    """What is computed, as text."""
    names = ", ".join(sorted(target.name for target in chain.targets if target.adapters))
    updates = f", updates of {names}" if names else ""
    dropout = f", expert_dropout {chain.dropout}" if chain.dropout else ""
    return f"rows of each expert{updates}{dropout}{decorated.quantised_note(chain.base)}"
