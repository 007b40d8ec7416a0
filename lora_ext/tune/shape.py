"""What is timed: one LoRA linear with so many rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of a LoRA linear, and what selects its kernels.

    Attributes:
        rows, in_features, out_features, rank: M, K, N and r of `lora_linear`.
        float_adapters: lora_a and lora_b are float32, else of x's dtype.
        dropout: dropout_p > 0.
    """

    rows: int
    in_features: int
    out_features: int
    rank: int
    float_adapters: bool = False
    dropout: bool = False

    def __str__(self) -> str:
        adapters = ", float32 adapters" if self.float_adapters else ""
        dropout = ", dropout" if self.dropout else ""
        layer = f"{self.in_features}x{self.out_features} r={self.rank} M={self.rows}"
        return layer + adapters + dropout


def shapes_of(model: nn.Module, rows: Iterable[int]) -> list[Shape]:
    """The distinct shapes of a model's LoRA linears, once for each number of rows.

    Args:
        model: one with lora_ext's layers.
        rows: batch times sequence length, as the model will see it.

    Raises:
        ValueError: the model has no LoRA linear.
    """
    from ..model import lora_layers
    from ..modules import LoRALinear

    rows = list(rows)
    found = set()
    for _, layer in lora_layers(model):
        if not isinstance(layer, LoRALinear):
            continue
        for name, spec in layer.adapters.items():
            sizes = (layer.in_features, layer.out_features, spec.r)
            wide = layer.lora_a[name].dtype == torch.float32
            dropout = spec.dropout > 0.0
            found |= {Shape(count, *sizes, wide, dropout) for count in rows}
    if not found:
        raise ValueError(
            "lora_ext.tune.shapes_of: expected a model with LoRA linears, but it has none;"
            " see lora_ext.apply_lora"
        )
    return sorted(found)
