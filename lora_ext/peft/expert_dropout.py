"""`accelerate(model, expert_dropout=p)`: dropout of adapters on a mixture's experts.

PEFT's wrapper of a parameter refuses lora_dropout, since it computes W + B A, which has no place
for it. The probability is an attribute of each wrapper; nothing of PEFT's reads it, and it is not
stored in files.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora import layer as peft_layers
from torch import nn

from ..model_layers import peft_layers as layers_of
from ..nn.adapter_spec import check_dropout
from . import experts
from .chain import EXPERT_DROPOUT, Chain, chain_of, chain_state, has_updates
from .reasons import PEFT


def check(model: nn.Module, p: Any) -> None:
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
        reason = _obstacle(chain)
        if reason:
            raise ValueError(
                f"lora_ext.accelerate: expected experts that lora_ext computes for "
                f"expert_dropout={p}, but {path!r} needs PEFT's own forward, which has no dropout: "
                f"{reason}; leave expert_dropout out, or these experts out of target_parameters"
            )


def put(model: nn.Module, p: float) -> None:
    """Sets the probability on all wrappers of experts."""
    for chain in _chains(model).values():
        _put(chain, p)


def put_on_new(model: nn.Module) -> None:
    """Sets the largest probability in the model on the wrappers of experts that have none, as those
    of an adapter that is added later."""
    chains = list(_chains(model).values())
    most = max((found for chain in chains for found in _found(chain)), default=0.0)
    for chain in chains:
        _put(chain, max(_found(chain), default=most))


def remove(model: nn.Module) -> None:
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


def refuse_pefts_forward(chain: Chain) -> None:
    """Raises RuntimeError if PEFT's own forward is about to leave out the dropout of an update."""
    p = chain.dropout
    if p == 0.0 or not has_updates(chain):
        return
    reason = _obstacle(chain) or "these arguments, or a transform of torch.func, are not supported"
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
    if state is not None and state[0] == PEFT:
        return state[1]
    return experts.reason(chain)


def _found(chain: Chain) -> list[float]:
    states = [target.wrapper.__dict__ for target in chain.targets]
    return [state[EXPERT_DROPOUT] for state in states if EXPERT_DROPOUT in state]


def _put(chain: Chain, p: float) -> None:
    for target in chain.targets:
        setattr(target.wrapper, EXPERT_DROPOUT, float(p))
