"""Functions for models with our layers: select, merge, count and remove adapters."""

from .apply import apply_lora
from .config import LoraConfig
from .mixed import use_adapters
from .model import (
    delete_adapter,
    disable_adapter,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from .optimizer import lora_plus_groups
from .trainable import TrainableParameters, trainable_parameters
from .unload import merge_and_unload, unload

__all__ = [
    "LoraConfig",
    "TrainableParameters",
    "apply_lora",
    "delete_adapter",
    "disable_adapter",
    "lora_layers",
    "lora_plus_groups",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_adapter",
    "merge_and_unload",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge_adapter",
    "use_adapters",
]
