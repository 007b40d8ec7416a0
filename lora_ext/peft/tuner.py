"""PEFT's LoraModel, with layers that are accelerated from the start."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import model as peft_model
from torch import nn

from .swap import swap


class LoraModel(peft_model.LoraModel):
    """`peft.tuners.lora.LoraModel` whose later adapters are accelerated too.

    A further adapter may target modules that had none: PEFT wraps those in new layers of its own
    classes.
    """

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        peft_model.LoraModel.inject_adapter(self, model, *args, **kwargs)
        if isinstance(self, LoraModel):  # not in a bound method that outlived `decelerate`
            swap(model)
