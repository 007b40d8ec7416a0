"""A chain of PEFT's parameter wrappers around one module, and its current adapters."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
from peft.tuners.lora import layer as peft_layers
from torch import Tensor

from ..call import Path
from ..quantized.stack import QuantizedStack
from ..quantized.stacks import PARAMETRIZED, is_packing, parametrized, stack_of, stacks_of
from ..rows.row_adapters import RowAdapters
from ..torch_state import has_any_global_hook, is_onnx_export, is_plain
from .layer import NONE_ACTIVE, names_of
from .reasons import adapters_state, has_hooks, update_of

# Releases that do not remove the update of one adapter from a stack that already has a
# parametrization.
_LEAVES_UPDATES = ("0.21.0", "0.21.1", "0.21.2")
# The class of such an update.
_LEFT = "_LoraFactorsProxy"

# Attribute of wrappers of experts: `accelerate`'s expert_dropout.
EXPERT_DROPOUT = "expert_dropout"


class Target(NamedTuple):
    """One parameter of the module.

    Attributes:
        wrapper: PEFT's wrapper.
        name: of the parameter.
        adapters: the adapters that are added to it now: to all rows, or each to its rows.
    """

    wrapper: Any
    name: str
    adapters: list[str]


class Chain(NamedTuple):
    """Attributes:
    targets: one for each wrapper, the outermost first.
    base: the module whose parameters they wrap.
    """

    targets: list[Target]
    base: Any

    @property
    def dropout(self) -> float:
        """The probability of dropout in experts for a forward now, 0 outside training."""
        outermost = self.targets[0].wrapper  # all have the same
        return getattr(outermost, EXPERT_DROPOUT, 0.0) if outermost.training else 0.0


def chain_of(outermost: Any, rows: RowAdapters | None = None) -> Chain:
    """The chain that begins with a wrapper, with the adapters of a block or the active ones."""
    targets: list[Target] = []
    module: Any = outermost
    while isinstance(module, peft_layers.ParamWrapper):
        is_off = rows is None and (module._disable_adapters or module.merged_adapters)
        tables: Any = module._modules
        here = [] if is_off else names_of(module, tables["lora_A"]._modules, rows)
        targets.append(Target(module, module.parameter_name, here))
        module = tables["base_layer"]
    return Chain(targets, module)


def chain_state(chain: Chain) -> tuple[Path, str] | None:
    """(path, reason) from the conditions that hold for chains around any module, or None: to
    compute what is added, or a quantised base, which the module would dequantise as a whole."""
    outermost = chain.targets[0].wrapper
    for wrapper, _, _ in chain.targets:
        if wrapper._disable_adapters and wrapper.merged_adapters:
            return Path.PEFT, "adapters are disabled and merged, which PEFT's forward undoes"
        state = adapters_state(wrapper)
        if state is not None and state[0] == Path.PEFT:
            return state
        if wrapper is not outermost and (has_hooks(wrapper) or "forward" in wrapper.__dict__):
            return Path.PEFT, "PEFT's wrapper of another parameter of the module has hooks"
    if not has_updates(chain):
        is_observed = has_any_global_hook() or is_onnx_export()
        if is_observed or not stacks_of(chain.base):
            return base_state(chain)
    for name in parametrized(chain.base):
        reason = _parametrization_reason(chain, name)
        if reason:
            return Path.PEFT, reason
    for wrapper, name, adapters in chain.targets:
        stored = stack_of(chain.base, name)
        if isinstance(stored, str):
            return Path.PEFT, stored
        is_dense = isinstance(stored, Tensor) and is_plain(stored)
        if not (is_dense or isinstance(stored, QuantizedStack)):
            return Path.PEFT, "a parameter is quantised or sharded"
        for adapter in adapters:
            found = update_of(wrapper, adapter)
            if isinstance(found, str):
                return Path.PEFT, found
    return None


def has_updates(chain: Chain) -> bool:
    """Whether a forward now adds anything."""
    return any(target.adapters for target in chain.targets)


def base_state(chain: Chain) -> tuple[Path, str]:
    """(path, reason) of a forward that adds nothing."""
    return adapters_state(chain.targets[0].wrapper) or (Path.BASE, NONE_ACTIVE)


def _parametrization_reason(chain: Chain, name: str) -> str:
    """Why PEFT's forward is needed for a parametrized parameter of the module, or ""."""
    reason = stack_of(chain.base, name)
    if isinstance(reason, QuantizedStack):
        return ""
    first, *others = parametrized(chain.base)[name]._modules.values()
    if is_packing(first) and any(type(other).__name__ == _LEFT for other in others):
        return (
            f"peft {peft.__version__} left an update in the parameter in an earlier forward of its "
            "own; load the model again and accelerate it before its first forward"
        )
    is_left = any(
        len(adapters) == 1 and wrapper.num_experts > 1 and target in parametrized(chain.base)
        for wrapper, target, adapters in chain.targets
    )
    note = f", to which peft {peft.__version__} adds the update once more in each forward"
    is_noted = is_left and peft.__version__ in _LEAVES_UPDATES
    return (reason if isinstance(reason, str) else PARAMETRIZED) + note * is_noted
