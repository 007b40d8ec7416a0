"""What is trained side by side: the head alone, adapters of lora_ext, adapters of PEFT."""

from __future__ import annotations

import copy

from torch import nn

import lora_ext

from ..finetune.classifier import Classifier
from ..finetune.trained_models import ALPHA, RANK

# PEFT's names of all linear layers and of the experts' weights; ours are "all-linear".
MODULES = ["query", "key", "value", "attention.output.dense"]
PARAMETERS = ["experts.up_proj", "experts.down_proj"]
LABELS = {"frozen": "frozen, head only", "ours": "lora_ext", "peft": "PEFT"}


def adapted(base: Classifier, name: str) -> nn.Module:
    """A copy of the base with the adapters of one of LABELS."""
    model = copy.deepcopy(base)
    if name == "frozen":
        return model
    if name == "ours":
        config = lora_ext.LoraConfig(
            "all-linear",
            r=RANK,
            lora_alpha=ALPHA,
            exclude_modules=["head"],
            modules_to_save=["head"],
        )
        return lora_ext.apply_lora(model, config)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=MODULES,
        target_parameters=PARAMETERS,
        modules_to_save=["head"],
    )
    return get_peft_model(model, config)
