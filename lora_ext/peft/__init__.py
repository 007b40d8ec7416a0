"""PEFT's LoRA models on the fused op: `accelerate` and `decelerate`.

PEFT itself is imported by the first call that needs it, never by ``import lora_ext``.
"""

from .accelerate import accelerate, decelerate

__all__ = ["accelerate", "decelerate"]
