"""The models that are trained side by side; all start from the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import lora_ext

from .classifier import Classifier

TARGETS = ["query", "key", "value", "dense"]  # all linear layers of the encoder
RANK = 16
ALPHA = 32
DROPOUT = 0.05
LEARNING_RATE = 2e-3
HEAD_ONLY_RATE = 3e-2  # of 1e-3, 1e-2, 3e-2 and 1e-1 the best: a fair rival
SEED = 0

# name -> what the report calls it
LABELS = {
    "frozen": "frozen, head only",
    "ours": "lora_ext",
    "peft": "PEFT",
    "ours_dropout": f"lora_ext, dropout {DROPOUT:g}",
    "peft_dropout": f"PEFT, dropout {DROPOUT:g}",
}


@dataclass
class TrainedModel:
    """One model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name, the same in ours and in PEFT, -> parameter."""
        return trainable_parameters(self.model)


def config(dropout: float) -> lora_ext.LoraConfig:
    """Ours: which layers, which rank, and that the head is trained whole and saved."""
    return lora_ext.LoraConfig(
        target_modules=TARGETS,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        modules_to_save=["head"],
    )


def _adapted(base: Classifier, name: str) -> nn.Module:
    dropout = DROPOUT if name.endswith("_dropout") else 0.0
    model = copy.deepcopy(base)
    if name == "frozen":
        return model
    if name.startswith("ours"):
        return lora_ext.apply_lora(model, config(dropout))
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            target_modules=TARGETS,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            modules_to_save=["head"],
        ),
    )


def _common_name(name: str) -> str:
    """PEFT's name of a parameter as ours."""
    name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
    name = name.replace(".experts.base_layer.lora_", ".experts.lora.up_proj.lora_")
    name = name.replace(".experts.lora_", ".experts.lora.down_proj.lora_")
    for factor in ("A", "B"):
        name = name.replace(f"lora_{factor}.default.weight", f"lora_{factor.lower()}.default")
    return name


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer changes, by names that ours and PEFT share."""
    named = model.named_parameters()
    return {_common_name(name): p for name, p in named if p.requires_grad}


def make_variants(
    base: Classifier,
    names: list[str],
    adapted: Callable[[Classifier, str], nn.Module] = _adapted,
) -> dict[str, TrainedModel]:
    """A copy of the base for each name, with the adapters that it stands for, ready to train.

    Adapters and head have the same initial values in all variants, those of the first that has
    them, and AdamW the same settings but for the rate of the head alone.
    """
    torch.manual_seed(SEED)
    variants: dict[str, TrainedModel] = {}
    initial: dict[str, torch.Tensor] = {}
    for name in names:
        model = adapted(base, name).train()
        parameters = trainable_parameters(model)
        for key, parameter in parameters.items():
            value = initial.setdefault(key, parameter.detach().clone())
            with torch.no_grad():
                parameter.copy_(value)
        rate = HEAD_ONLY_RATE if name == "frozen" else LEARNING_RATE
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate)
        variants[name] = TrainedModel(model, optimizer)
    adapted = {name: v.trainable.keys() for name, v in variants.items() if name != "frozen"}
    for name, keys in adapted.items():
        if keys != initial.keys():
            raise RuntimeError(
                f"benchmarks.finetune: expected {name} to train what the others train, but it "
                f"differs in {sorted(keys ^ initial.keys())[:3]}"
            )
    return variants
