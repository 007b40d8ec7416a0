"""What is timed: one LoRA linear with so many rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
        model: one with lora_ext's layers, or PEFT's.
        rows: batch times sequence length, as the model will see it.

    Raises:
        ValueError: the model has no LoRA linear.
    """
    layers = {*_own_layers(model), *_peft_layers(model)}
    if not layers:
        raise ValueError(
            "lora_ext.tune.shapes_of: expected a model with LoRA linears, but it has none;"
            " see lora_ext.apply_lora and lora_ext.accelerate"
        )
    return sorted(replace(layer, rows=count) for layer in layers for count in set(rows))


def _own_layers(model: nn.Module) -> Iterator[Shape]:
    from ..model import lora_layers
    from ..modules import LoRALinear

    for _, layer in lora_layers(model):
        if isinstance(layer, LoRALinear):
            for name, spec in layer.adapters.items():
                wide = layer.lora_a[name].dtype == torch.float32
                sizes = (layer.in_features, layer.out_features, spec.r)
                yield Shape(1, *sizes, wide, spec.dropout > 0.0)


def _peft_layers(model: nn.Module) -> Iterator[Shape]:
    from ..peft.report import peft_layers

    layer: Any
    for _, layer in peft_layers(model):
        for name, lora_a in layer.lora_A.items():
            if type(lora_a) is nn.Linear:
                out_features = layer.lora_B[name].weight.shape[0]
                rank, in_features = lora_a.weight.shape
                dropout = getattr(layer.lora_dropout[name], "p", 0.0) > 0.0
                wide = lora_a.weight.dtype == torch.float32
                yield Shape(1, in_features, out_features, rank, wide, dropout)
