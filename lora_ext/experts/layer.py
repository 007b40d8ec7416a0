"""LoRAExperts: the experts of a mixture with adapters."""

from __future__ import annotations

from torch import nn

from ..nn.module import LoRAModule

# What transformers' `use_experts_implementation` puts on each instance.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module of experts under transformers' `use_experts_implementation`, with or
    without adapters: its weights are two stacks ``[E, ...]``."""
    return all(mark in module.__dict__ for mark in _MARKS)


class LoRAExperts(LoRAModule):
    """The experts of a mixture with low-rank adapters on their frozen stacks of weights.

        z = x W1_e^T (+ b1_e) + s1 (x A1_e^T) B1_e^T        h = gate(z)
        y = h W2_e^T (+ b2_e) + s2 (h A2_e^T) B2_e^T        out[t] = sum over its experts of w y

    for the experts e that the router gave token t. It stands for the classes of transformers that
    are decorated with `use_experts_implementation`, and is of a class of its own that derives from
    the base's, too. `lora` has a `LoRAParameter` for each stack: ``gate_up_proj`` (``up_proj``
    where there is no gate) and ``down_proj``, each with lora_a ``[E r, in]`` and lora_b
    ``[out, r E]`` as PEFT's ParamWrapper has them.
    """

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        if not is_experts(base) or isinstance(base, LoRAModule):
            raise TypeError(
                "lora_ext.experts.LoRAExperts: expected experts under transformers' "
                "use_experts_implementation, but got "
                f"{type(base).__module__}.{type(base).__qualname__}"
            )
        if base._is_expert_parallel:
            raise ValueError(
                "lora_ext.experts.LoRAExperts: expected all experts in this process, but they are "
                "expert parallel; load the model without, or leave them out by "
                "exclude_modules=['experts']"
            )
