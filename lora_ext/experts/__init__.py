"""LoRA on the experts of a mixture: the whole layer, from tokens and their routes to its output.

Models and PEFT's layers pass their tensors as `Experts` and `ExpertsAdapter`s; nothing in this
package depends on either.
"""

from .layer import explained, lora_experts
from .operands import Experts, ExpertsAdapter

__all__ = ["Experts", "ExpertsAdapter", "explained", "lora_experts"]
