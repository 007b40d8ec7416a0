"""Adapters of the contract by a short name, as words of PEFT's LoraConfig."""

from typing import Any

import peft_helpers

from contract.subject import Dropout

ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    **peft_helpers.ADAPTERS,
    "two": {name: peft_helpers.ADAPTERS["three"][name] for name in ("a", "b")},
    "lora_bias of one": {
        "a": peft_helpers.ADAPTERS["three"]["a"],
        "b": {"r": 3, "lora_alpha": 6, "lora_bias": True},
        "c": peft_helpers.ADAPTERS["three"]["c"],
    },
}
# Of "three", which are then not one call of the op.
DIFFERENT = {"a": 0.4, "b": 0.6, "c": 0.4}


def dropouts(dropout: Dropout, name: str) -> float:
    """That of one adapter."""
    return dropout[name] if isinstance(dropout, dict) else dropout
