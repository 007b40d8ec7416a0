"""The parts of a layer of experts, as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..quantized.stack import QuantizedStack
from .decorated import has_gate, norm_of, up_name, weight_of


class Experts(NamedTuple):
    """The frozen part of the experts, E matrices for each of two projections.

    Attributes:
        up: ``[E, N, H]``, gate and up together or up alone; ``[E, H, N]`` if transposed. This
            and `down` may be quantised.
        down: ``[E, H, I]``; ``[E, I, H]`` if it is transposed.
        up_bias, down_bias: ``[E, N]`` and ``[E, H]``, or None.
        is_transposed: whether both have ``[in, out]`` for each expert.
        gate: from ``[S, N]`` to ``[S, I]``, applied to each row: activation and product.
        norm: a function of each row of the down projection's result, or None.
        is_gate_trained: whether the gate has parameters that require a gradient.
    """

    up: Tensor | QuantizedStack
    down: Tensor | QuantizedStack
    gate: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    is_transposed: bool = False
    norm: Callable[[Tensor], Tensor] | None = None
    is_gate_trained: bool = False

    @classmethod
    def of(cls, module: Any, adapters: Any = None) -> Experts:
        """The experts of a module decorated with transformers' `use_experts_implementation`, whose
        child `adapters` is no part of the gate."""
        name, parts = up_name(module), [m for m in module.children() if m is not adapters]
        return cls(
            weight_of(module, name),
            weight_of(module, "down_proj"),
            # `_apply_gate` exists also in a module without a gate, but it would split its input.
            module._apply_gate if has_gate(module) else module.act_fn,
            getattr(module, f"{name}_bias") if module.has_bias else None,
            module.down_proj_bias if module.has_bias else None,
            module.is_transposed,
            norm_of(module),
            any(each.requires_grad for part in parts for each in part.parameters()),
        )


class ExpertsAdapter(NamedTuple):
    """scaling * B_e A_e drop(x) for each expert e of one projection, in PEFT's layout.

    Attributes:
        lora_a: ``[E r, in]``; A_e is the rows from e r to (e + 1) r.
        lora_b: ``[out, r E]``; B_e is the columns e, e + E, e + 2 E, ...
        scaling: a number, or a tensor of one element, which can change without a new graph.
        dropout: the probability that an element of x is zero in the update of this call.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float | Tensor
    dropout: float = 0.0
