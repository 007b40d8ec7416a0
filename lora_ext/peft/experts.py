"""transformers' experts with PEFT's adapters on their parameters, as operands of `lora_experts`.

PEFT's wrapper of a parameter refuses lora_dropout, since it computes W + B A, which has no place
for it. `accelerate(model, expert_dropout=p)` makes the probability an attribute of each wrapper;
nothing of PEFT's reads it, and it is not stored in files.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft.tuners.lora import layer as peft_layers
from torch import nn

from ..call import Decision, Path
from ..experts import Experts, ExpertsAdapter, decorated
from ..model_layers import peft_layers as layers_of
from ..nn.adapter_spec import MAX_RANK, check_dropout
from ..nn.experts import AdaptedExperts
from ..quantized.stacks import has_own_hooks_alone
from ..rows.row_adapters import RowAdapters
from ..versions import TOO_OLD
from .chain import EXPERT_DROPOUT, Chain, Target, chain_of, chain_state, has_updates
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
            decorated.packing(base)
            or TOO_OLD["transformers"]
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
    is_turned, ranks = wrapper._did_swap_in_out_features == base.is_transposed, [0]
    for adapter in adapters:
        lora_a, lora_b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        if is_turned or (lora_a.shape[1], lora_b.shape[0]) != (in_features, out_features):
            return "lora_A and lora_B have the shapes of the transposed weight"
        ranks.append(lora_a.shape[0] // experts)
    if (max if by_row else sum)(ranks) <= MAX_RANK:
        return ""
    what = "an adapter's rank is" if by_row else "the ranks of the active adapters sum to"
    return f"{what} more than {MAX_RANK}"


def decision(
    chain: Chain, names: Sequence[str], rows: RowAdapters | None, others: Callable[..., Any]
) -> Decision:
    """That for `lora_experts`; arguments as of `AdaptedExperts`."""
    own = type(chain.base), names, rows, partial(_adapted, chain), others
    return AdaptedExperts(chain.base, *own).decision()


def _adapted(chain: Chain) -> tuple:
    """As `AdaptedExperts.adapted`."""
    p = chain.dropout  # read once, so that it is one number for a compiler
    sides: list[dict[str, ExpertsAdapter]] = [{}, {}]
    for wrapper, parameter, names in chain.targets:
        for name in names:
            factors = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            adapter = ExpertsAdapter(*factors, wrapper.scaling[name], p)
            sides[parameter == "down_proj"][name] = adapter
    return Experts.of(chain.base), *sides


# ---- dropout ----


def check_has_dropout(model: nn.Module, p: Any) -> None:
    """Raises ValueError where experts of the model would not have the dropout."""
    check_dropout(p, "accelerate", "expert_dropout")
    if p == 0.0:
        return
    chains = _chains(model)
    if not chains:
        raise ValueError(
            f"lora_ext.accelerate: expected adapters on the experts of a mixture for "
            f"expert_dropout={p}, but got a {type(model).__name__} without; name the experts in "
            "LoraConfig(target_parameters=[...]), or leave expert_dropout out: for linear layers "
            "there is LoraConfig(lora_dropout=...)"
        )
    for path, chain in chains.items():
        obstacle = _obstacle(chain)
        if obstacle:
            raise ValueError(
                f"lora_ext.accelerate: expected experts that lora_ext computes for "
                f"expert_dropout={p}, but {path!r} needs PEFT's own forward, which has no dropout: "
                f"{obstacle}; leave expert_dropout out, or these experts out of target_parameters"
            )


def warn_of_packed(model: nn.Module) -> None:
    """Whose lora_A has 16 columns for 32 features in MXFP4."""
    reasons = ((path, decorated.packing(each.base)) for path, each in _chains(model).items())
    found = {path: why for path, why in reasons if why}
    if found:
        path, why = next(iter(found.items()))
        warnings.warn(
            f"lora_ext.accelerate: expected adapters on experts that are not packed, since PEFT "
            f"sizes them by what is stored, but got {len(found)} such as {path!r}: {why}",
            stacklevel=3,
        )


def put_dropout(model: nn.Module, p: float | None = None) -> None:
    """Sets the probability on all wrappers of experts. None: those that have none get the largest
    in the model, as those of an adapter that is added later."""
    chains = list(_chains(model).values())
    found = [
        [state[EXPERT_DROPOUT] for state in states if EXPERT_DROPOUT in state]
        for states in ([target.wrapper.__dict__ for target in each.targets] for each in chains)
    ]
    most = max((each for own in found for each in own), default=0.0)
    for chain, own in zip(chains, found, strict=True):
        value = max(own, default=most) if p is None else float(p)
        for target in chain.targets:
            setattr(target.wrapper, EXPERT_DROPOUT, value)


def remove_dropout(model: nn.Module) -> None:
    """Leaves nothing of it on PEFT's wrappers, and says so where there was a dropout."""
    most = 0.0
    for module in model.modules():
        if isinstance(module, peft_layers.ParamWrapper) and EXPERT_DROPOUT in module.__dict__:
            most = max(most, module.__dict__[EXPERT_DROPOUT])
            delattr(module, EXPERT_DROPOUT)
    if most:
        warnings.warn(
            f"lora_ext.decelerate: expert_dropout={most} ends here, since PEFT has none for experts"
            "; a later accelerate needs it again: "
            f"lora_ext.accelerate(model, expert_dropout={most})",
            stacklevel=3,
        )


def refuse_pefts_forward(chain: Chain, reason: str) -> None:
    """Raises RuntimeError if PEFT's own forward is about to leave out the dropout of an update."""
    p = chain.dropout
    if p == 0.0 or not has_updates(chain):
        return
    raise RuntimeError(
        f"lora_ext.accelerate: expected experts that lora_ext computes for expert_dropout={p} in "
        f"training, but this forward is PEFT's own, which has no dropout: {reason}; call "
        "model.eval(), or turn it off by lora_ext.accelerate(model, expert_dropout=0)"
    )


def _chains(model: nn.Module) -> dict[str, Chain]:
    """The chains around modules of experts, by the path of the outermost wrapper."""
    wrappers = (pair for pair in layers_of(model) if isinstance(pair[1], peft_layers.ParamWrapper))
    chains = {path: chain_of(wrapper) for path, wrapper in wrappers}
    return {
        path: chain
        for path, chain in chains.items()
        if any(target.wrapper.num_experts > 1 for target in chain.targets)
    }


def _obstacle(chain: Chain) -> str:
    """Why the update of a chain needs PEFT's own forward, or ""."""
    state = chain_state(chain)
    if state is not None and state[0] == Path.PEFT:
        return state[1]
    return reason(chain)
