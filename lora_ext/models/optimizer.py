"""Parameter groups for optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import LoRAEmbedding
from .model import lora_layers

# The tables of PEFT's layers.
_OF_PEFT = {"lora_A": "lora_a", "lora_B": "lora_b"}
_OF_PEFT |= {"lora_embedding_A": "embedding", "lora_embedding_B": "embedding"}


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
