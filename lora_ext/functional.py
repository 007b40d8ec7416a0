"""The fused LoRA linear, and its update alone, as functions."""

from .call.op import lora_linear, lora_update
from .dropout import dropout_mask
from .packed_weight import PackedWeight, pack_weight

__all__ = ["PackedWeight", "dropout_mask", "lora_linear", "lora_update", "pack_weight"]
