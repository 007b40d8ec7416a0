"""What of a model is trained: how many parameters, and in which groups for an optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import LoRAEmbedding, LoRAParameter, LoRAQuantizedLinear
from .model import adapter_names, lora_layers

# The tables of PEFT's layers.
_OF_PEFT = {"lora_A": "lora_a", "lora_B": "lora_b"}
_OF_PEFT |= {"lora_embedding_A": "embedding", "lora_embedding_B": "embedding"}


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


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer with LoRA+'s rates: lora_b learns `ratio` times faster.

    LoRA+ (Hayou et al. 2024) shows that one rate for both factors is too small for lora_b in wide
    layers. Other trained parameters (biases, modules to save) have the rate `lr`.

    Args:
        model: with adapters of this package or of PEFT; parameters that need no gradient are left
            out.
        lr: rate of lora_a and of the rest.
        ratio: rate of lora_b over lr; the paper advises 16 and up for hard tasks.
        weight_decay: for all matrices; vectors have none.
        embedding_lr: rate of both factors of embeddings, as in PEFT's create_loraplus_optimizer.

    Returns:
        Dicts of params, lr, weight_decay and name, none of them empty.

    Raises:
        ValueError: nothing is trainable, or a number is negative.
    """
    if min(lr, ratio, weight_decay, embedding_lr) < 0:
        raise ValueError(
            "lora_ext.models.lora_plus_groups: expected lr, ratio, weight_decay and embedding_lr "
            f"of 0 or more, but got {lr}, {ratio}, {weight_decay} and {embedding_lr}"
        )
    kinds = {}
    for _, layer in lora_layers(model):
        is_embedding = isinstance(layer, LoRAEmbedding)
        for table, kind in (("lora_a", "lora_a"), ("lora_b", "lora_b"), ("lora_bias", "lora_b")):
            for parameter in getattr(layer, table).values():
                kinds[parameter] = "embedding" if is_embedding else kind
    for module in model.modules():
        for table, kind in _OF_PEFT.items():
            held = module._modules.get(table)
            kinds |= {} if held is None else dict.fromkeys(held.parameters(), kind)
    rates = {"lora_a": lr, "lora_b": lr * ratio, "embedding": embedding_lr, "other": lr}
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind = kinds.get(parameter, "other")
        decay = weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault(
            (kind, decay), {"params": [], "lr": rates[kind], "weight_decay": decay, "name": kind}
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError(
            "lora_ext.models.lora_plus_groups: expected a model with trainable parameters, but all "
            "are frozen; call apply_lora or set_adapter first"
        )
    return list(groups.values())
