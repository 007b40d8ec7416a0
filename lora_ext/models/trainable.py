"""The number of a model's parameters that are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ..nn import LoRAParameter, LoRAQuantizedLinear
from .model import adapter_names, lora_layers


@dataclass(frozen=True)
class TrainableParameters:
    """Numbers of parameters; str() is a sentence.

    Attributes:
        trainable, total: for the whole model including adapters, shared parameters once; for
            quantised layers with adapters, the elements of the weight, however they are packed.
        adapters: name -> number of elements, active or not.
        adapter_bytes: name -> bytes, as saved.
    """

    trainable: int
    total: int
    adapters: dict[str, int]
    adapter_bytes: dict[str, int]

    @property
    def percent(self) -> float:
        """100 trainable / total."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        adapters = "; ".join(
            f"adapter {name!r}: {count:,} ({self.adapter_bytes[name] / 2**20:.2f} MiB)"
            for name, count in self.adapters.items()
        )
        return (
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.percent:.3f}%); "
            f"{adapters or 'no adapters'}"
        )


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """How many parameters are trained, how many there are, and how large each adapter is."""
    parameters = list(model.parameters())
    counts, sizes = dict.fromkeys(adapter_names(model), 0), dict.fromkeys(adapter_names(model), 0)
    packed = 0
    for _, layer in lora_layers(model):
        if isinstance(layer, LoRAQuantizedLinear):
            out_features, in_features = layer.matrix_shape
            packed += out_features * in_features - layer.stored_weight.numel()
        elif isinstance(layer, LoRAParameter) and layer.stack is not None:
            packed += math.prod(layer.stack.shape) - layer.stored_weight.numel()
        for table in layer.tables().values():
            for name, parameter in table.items():
                counts[name] += parameter.numel()
                sizes[name] += parameter.numel() * parameter.element_size()
    return TrainableParameters(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters) + packed,
        adapters=counts,
        adapter_bytes=sizes,
    )
