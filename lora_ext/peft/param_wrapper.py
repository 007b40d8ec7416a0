"""PEFT's wrapper of a parameter (`target_parameters`) with another forward.

PEFT nests one wrapper in another for each parameter of a module, and each registers a
parametrization, W + B A, during the module's forward. Here the outermost wrapper processes the
whole chain: for experts it computes the layer without computing W + B A; for matrices, such as a
router's weight, it computes this sum and passes it to the module.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as peft_layers

from ..call import Decision
from ..experts import decorated
from . import wrappers
from .chain import chain_of
from .layer import Accelerated, Call, forward_over


class ParamWrapper(Accelerated, peft_layers.ParamWrapper):
    """`peft.tuners.lora.layer.ParamWrapper`, the outermost of its chain, with another forward and
    nothing else.

        forward(hidden_states, top_k_index, top_k_weights)     for experts: `lora_ext.experts`
        forward(...)     for any other module, with W + B A for each W of the chain

    Within a block of `lora_ext.use_adapters`, and with PEFT's adapter_names, rows have different
    adapters: `wrappers`.

    Parameters, state dict, merging and switching are PEFT's. `lora_ext.accelerate` sets this class
    on a wrapper, `lora_ext.decelerate` restores PEFT's.
    """

    # Set on the instance by `accelerate(model, expert_dropout=p)`; a graph guards what is declared.
    expert_dropout: float = 0.0

    forward = forward_over(peft_layers.ParamWrapper)

    def decide(self, call: Call) -> Decision:
        return wrappers.decide(self, call)

    def example(self, rows: Any) -> Any:
        return None

    def workspace_bytes(self) -> int:
        """Bytes of one dequantised expert."""
        return decorated.workspace_bytes(chain_of(self).base)
