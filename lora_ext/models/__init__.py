"""Functions for models with our layers: select, count and group parameters. What adds, chooses,
merges and removes adapters is `lora_ext`'s."""

from .model import lora_layers, lora_state_dict, mark_only_lora_as_trainable
from .trainable import TrainableParameters, lora_plus_groups, trainable_parameters

__all__ = [
    "TrainableParameters",
    "lora_layers",
    "lora_plus_groups",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "trainable_parameters",
]
