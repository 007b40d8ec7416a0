"""How PEFT's layers compute their next forward, for `lora_ext.explain`."""

from __future__ import annotations

from typing import Any

from ..call import Decision, Path
from ..quantized.layers import unread_codes
from .reasons import adapters_state


def peft_decision(layer: Any, rows: int | None = None) -> Decision:
    """That of a PEFT layer's next forward, accelerated or not, as `LoRALayer.decision`."""
    if hasattr(type(layer), "decision"):
        return layer.decision(rows)
    from .swap import classes

    state = adapters_state(layer)
    if state is not None:
        return Decision(layer.forward, *state)
    reason = f"lora_ext has no forward for PEFT's {type(layer).__name__}"
    if type(layer) in classes():
        reason = "not accelerated; call lora_ext.accelerate(model)"
    elif why := unread_codes(layer.get_base_layer()):
        reason += f": {why}"
    return Decision(layer.forward, Path.PEFT, reason)
