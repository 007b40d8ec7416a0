"""Fused LoRA linear layers for PyTorch: merged speed, never merged.

    y = x W^T + scaling * (drop(x) lora_a^T) lora_b^T + bias

`lora_linear` computes the layer and, through autograd, the gradients of x, lora_a, lora_b and
bias; the weight is frozen. `lora_update` adds the update alone onto the y of any other base.
`accelerate` runs a PEFT model on them, `decelerate` undoes this. Without PEFT, `LoRALinear` is the
layer, `apply_lora` adds such layers to a model according to a `LoraConfig`, `save_adapter` and
`load_adapter` write and read adapters in PEFT's format. `use_adapters` selects an adapter for each
sample of a batch, `AdapterPool` holds many adapters. `pack_weight` keeps a frozen weight in
oneDNN's layout on the CPU, `batch_invariant` keeps the bits of a row the same in batches of any
size, `warmup` checks and times the kernels on a GPU, `explain` reports what the layers of a model
run and why, `build_info` what was compiled and what runs here.

The rest is in modules that are named after their purpose:

    functional   the op, its dropout mask, packed weights      adapters   folders of adapters
    nn           layers                                        loralib    loralib's models
    models       what a model's layers do together             kernels    plans, cards, routes
    reference    the op in torch alone                         autotune   routes that were timed
    pool         many adapters in tensors of fixed size    pretrained  folders as they are stored
"""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from .build_info import build_info, import_error_hint, torch_mismatch, version

if torch_mismatch():
    raise ImportError(torch_mismatch())

try:
    from . import _C
except ImportError as error:
    raise ImportError(import_error_hint()) from error

# Not in __all__: `from lora_ext import *` must not hide torch's nn or functional.
from . import (  # noqa: F401
    adapters,
    autotune,
    functional,
    kernels,
    loralib,
    models,
    nn,
    pool,
    pretrained,
    reference,
)
from . import flops as flops  # registers the formulas with torch's FLOP counter
from .adapters import load_adapter, save_adapter
from .autotune import warmup
from .functional import lora_linear, lora_update, pack_weight
from .invariance import batch_invariant
from .models.apply import apply_lora
from .models.config import LoraConfig
from .models.mixed import use_adapters
from .models.model import (
    delete_adapter,
    disable_adapter,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from .models.unload import merge_and_unload, unload
from .nn import LoRALinear
from .peft import accelerate, decelerate
from .pool import AdapterPool
from .reports import explain

__version__ = version()

if _C.with_cuda:
    autotune.planner_cache.load_user_caches()

__all__ = [
    "AdapterPool",
    "LoRALinear",
    "LoraConfig",
    "__version__",
    "accelerate",
    "apply_lora",
    "batch_invariant",
    "build_info",
    "decelerate",
    "delete_adapter",
    "disable_adapter",
    "explain",
    "load_adapter",
    "lora_linear",
    "lora_update",
    "merge_adapter",
    "merge_and_unload",
    "pack_weight",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge_adapter",
    "use_adapters",
    "warmup",
]
