"""Functions for models with our layers: select, merge, count and remove adapters."""

from .apply import apply_lora
from .config import LoRAConfig
from .mixed import use_adapters
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
from .optimizer import lora_plus_groups
from .trainable import TrainableParameters, trainable_parameters
from .unload import merge_and_unload, unload

__all__ = [
    "LoRAConfig",
    "TrainableParameters",
    "apply_lora",
    "delete_adapter",
    "disable_adapters",
    "lora_layers",
    "lora_plus_groups",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merge_and_unload",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
    "use_adapters",
]
