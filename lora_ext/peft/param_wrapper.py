"""PEFT's wrapper of a parameter (`target_parameters`) with another forward.

PEFT nests one wrapper in another for each parameter of a module, and each registers a
parametrization, W + B A, during the module's forward. Here the outermost wrapper processes the
whole chain: for experts it computes the layer without computing W + B A; for matrices, such as a
router's weight, it computes this sum and passes it to the module.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as peft_layers
from torch import Tensor

from ..experts import decorated
from ..nn.row_adapters import current_row_adapters
from . import expert_dropout, experts, matrices, mixed_batch, mixed_wrappers
from .chain import base_state, chain_of, chain_state, has_updates
from .reasons import ADDED, FUSED, PEFT


class ParamWrapper(mixed_batch.ByRow, peft_layers.ParamWrapper):
    """`peft.tuners.lora.layer.ParamWrapper`, the outermost of its chain, with another forward and
    nothing else.

        forward(hidden_states, top_k_index, top_k_weights)     for experts: `lora_ext.experts`
        forward(...)     for any other module, with W + B A for each W of the chain

    Within a block of `lora_ext.use_adapters`, and with PEFT's adapter_names, rows have different
    adapters: `mixed_wrappers`.

    Parameters, state dict, merging and switching are PEFT's. `lora_ext.accelerate` sets this class
    on a wrapper, `lora_ext.decelerate` restores PEFT's.
    """

    # Set on the instance by `accelerate(model, expert_dropout=p)`; a graph guards what is declared.
    expert_dropout: float = 0.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "row_adapters", None) is not None:  # absent after `decelerate`
            rows = current_row_adapters(self)
            if rows is not None and not self._disable_adapters:
                return mixed_wrappers.forward(self, x, rows, args, kwargs)
        if type(self) is not peft_layers.ParamWrapper:
            chain = chain_of(self)
            if chain_state(chain) is None:
                kind = matrices if matrices.are_all(chain) else experts
                if not kind.reason(chain):
                    operands = kind.operands(chain, (x, *args), kwargs)
                    if operands is not None:
                        return kind.forward(chain, operands)
            expert_dropout.refuse_pefts_forward(chain)
        # Called by the class's name: in a bound method that outlives `decelerate`, self is of
        # PEFT's class.
        return peft_layers.ParamWrapper.forward(self, x, *args, **kwargs)

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """How the next forward on tensors in the parameters' dtype is computed, and why."""
        if self.row_adapters is not None:
            block = current_row_adapters(self)
            if block is not None and not self._disable_adapters:
                return mixed_wrappers.path(self, block)
        chain = chain_of(self)
        state = chain_state(chain)
        if state is not None:
            return state
        if matrices.are_all(chain):
            reason = matrices.reason(chain)
            return (PEFT, reason) if reason else (ADDED, matrices.SUM)
        reason = experts.reason(chain)
        if not has_updates(chain):
            path, why = base_state(chain)
            return path, why if reason else f"{why}: {experts.rows_of_experts(chain)}"
        return (PEFT, reason) if reason else (FUSED, experts.rows_of_experts(chain))

    def workspace_bytes(self) -> int:
        """Bytes of one dequantised expert."""
        return decorated.workspace_bytes(chain_of(self).base)
