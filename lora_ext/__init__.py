"""Fused LoRA linear layers for PyTorch: merged speed, never merged.

    y = x W^T + scaling * (drop(x) lora_a^T) lora_b^T + bias

`lora_linear` computes the layer and, through autograd, the gradients of x, lora_a, lora_b and
bias; the weight is frozen. `LoRALinear` is the layer, `apply_lora` puts it into a model, and
`save_adapter` and `load_adapter` keep adapters in PEFT's format. `accelerate` runs a model of PEFT
on the same op. `prepack` keeps a frozen weight in oneDNN's packed layout on the CPU. `explain` says
what a model's layers run, `build_info` what was compiled and which kernels run here.
"""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from .build_info import build_info, import_error_hint, torch_mismatch, version

if torch_mismatch():
    raise ImportError(torch_mismatch())

try:
    from . import _C
except ImportError as error:
    raise ImportError(import_error_hint()) from error

from . import reference
from .adapters import (
    AdapterConfig,
    AdapterError,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from .apply import apply_lora, merge_and_unload, unload
from .config import AdapterSpec, LoRAConfig
from .functional import dropout_mask, lora_linear
from .kernel_checks import set_check_timeout
from .kernel_plan import CARDS, CallPlan, plan, set_cuda_route, set_early_launch
from .loralib import convert_loralib, load_loralib_state_dict, loralib_state_dict
from .model import (
    delete_adapter,
    disable_adapters,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge,
    set_adapter,
    unmerge,
)
from .modules import LoRAConv2d, LoRAEmbedding, LoRALinear, LoRAMergedLinear
from .optimizer import lora_plus_groups
from .peft import accelerate, decelerate
from .prepack import PackedWeight, prepack
from .reports import explain, trainable_parameters
from .winners import Warmup, load_cached, load_winners, warmup

__version__ = version()

if _C.with_cuda:
    load_cached()

__all__ = [
    "CARDS",
    "AdapterConfig",
    "AdapterError",
    "AdapterSpec",
    "CallPlan",
    "LoRAConfig",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMergedLinear",
    "PackedWeight",
    "Warmup",
    "__version__",
    "accelerate",
    "apply_lora",
    "build_info",
    "convert_loralib",
    "decelerate",
    "delete_adapter",
    "disable_adapters",
    "dropout_mask",
    "explain",
    "load_adapter",
    "load_loralib_state_dict",
    "load_winners",
    "lora_layers",
    "lora_linear",
    "lora_plus_groups",
    "lora_state_dict",
    "loralib_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merge_and_unload",
    "plan",
    "prepack",
    "read_adapter_config",
    "reference",
    "save_adapter",
    "set_adapter",
    "set_check_timeout",
    "set_cuda_route",
    "set_early_launch",
    "trainable_parameters",
    "unload",
    "unmerge",
    "warmup",
]
