"""Drop-in layers with named low-rank adapters on a frozen weight."""

from .adapter_spec import AdapterSpec
from .base import LoRALayer
from .conv import LoRAConv2d
from .embedding import LoRAEmbedding
from .experts import LoRAExperts
from .linear import LoRALinear
from .merged_linear import LoRAMergedLinear
from .module import LoRAModule
from .parameter import LoRAParameter
from .quantized import LoRAQuantizedLinear

__all__ = [
    "AdapterSpec",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALayer",
    "LoRALinear",
    "LoRAMergedLinear",
    "LoRAModule",
    "LoRAParameter",
    "LoRAQuantizedLinear",
]
