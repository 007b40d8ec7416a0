"""Fused LoRA linear layers for PyTorch: merged speed, never merged.

    y = x W^T + scaling * (drop(x) lora_a^T) lora_b^T + bias

`lora_linear` computes the layer and, through autograd, the gradients of x, lora_a, lora_b and
bias; the weight is frozen. `prepack` keeps a frozen weight in oneDNN's packed layout on the CPU.
`build_info` says what was compiled and which kernels run here.
"""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from .build_info import build_info, import_error_hint, torch_mismatch, version

if torch_mismatch():
    raise ImportError(torch_mismatch())

try:
    from . import _C  # noqa: F401  (registers the ops)
except ImportError as error:
    raise ImportError(import_error_hint()) from error

from . import reference
from .functional import dropout_mask, lora_linear
from .prepack import PackedWeight, prepack

__version__ = version()

__all__ = [
    "PackedWeight",
    "__version__",
    "build_info",
    "dropout_mask",
    "lora_linear",
    "prepack",
    "reference",
]
