"""The paths of PEFT's layers, for `lora_ext.explain`."""

from __future__ import annotations

from typing import Any

from ..quantized.weight import workspace_bytes
from .reasons import BASE, FUSED, PEFT, adapters_state, is_passed_over


def peft_path(layer: Any, rows: int | None = None) -> tuple[str, str, int]:
    """(path, reason, bytes of workspace) of a PEFT layer's next forward, accelerated or not."""
    if hasattr(type(layer), "decision"):
        decision = layer.decision()
        path, reason = decision.explained(rows)
        if path != BASE and is_passed_over(layer):
            replaced = "the layer's forward was replaced, as by hooks, before lora_ext.accelerate"
            return PEFT, replaced, 0
        is_of_experts = path == FUSED and hasattr(layer, "workspace_bytes")
        nbytes = layer.workspace_bytes() if is_of_experts else workspace_bytes(decision.base)
        return path, reason, nbytes
    from .swap import classes

    state = adapters_state(layer)
    if state is not None:
        return *state, 0
    if type(layer) in classes():
        return PEFT, "not accelerated; call lora_ext.accelerate(model)", 0
    return PEFT, f"lora_ext has no forward for PEFT's {type(layer).__name__}", 0
