"""LoRA on the experts of a mixture: the whole layer, from tokens and their routes to its output.

Models and PEFT's layers describe what they hold as `Experts` and `ExpertsAdapter`s; nothing here
knows who they are.
"""

from .description import Experts, ExpertsAdapter
from .layer import lora_experts

__all__ = ["Experts", "ExpertsAdapter", "lora_experts"]
