"""The unit that is timed: one LoRA linear with a number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import lora_ext._C as _C


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of a LoRA linear, and the properties that select its kernels.

    Attributes:
        rows, in_features, out_features, rank: M, K, N and r of `lora_linear`.
        float_adapters: lora_a and lora_b are float32, else of x's dtype.
        dropout: dropout_p > 0.

    Raises:
        ValueError: a size is not valid.
    """

    rows: int
    in_features: int
    out_features: int
    rank: int
    float_adapters: bool = False
    dropout: bool = False

    def __post_init__(self) -> None:
        sizes = (self.rows, self.in_features, self.out_features, self.rank)
        if not all(isinstance(size, int) and 1 <= size < 2**40 for size in sizes):
            raise ValueError(
                f"lora_ext.warmup: expected sizes of at least 1 and below 2^40, but got {sizes}"
            )

    def __str__(self) -> str:
        adapters = ", float32 adapters" if self.float_adapters else ""
        dropout = ", dropout" if self.dropout else ""
        layer = f"{self.in_features}x{self.out_features} r={self.rank} M={self.rows}"
        return layer + adapters + dropout

    @property
    def problem(self) -> _C.Problem:
        """The planner's problem, for operands with the alignment of torch's allocator."""
        problem = _C.Problem(self.rows, self.out_features, self.in_features, self.rank)
        problem.float_adapters, problem.dropout = self.float_adapters, self.dropout
        chunk = 4 if self.float_adapters else 8  # elements in 16 bytes
        problem.aligned = self.in_features % 8 == self.out_features % 8 == 0
        problem.aligned_weight = self.in_features % 8 == 0
        problem.aligned_a = self.in_features % chunk == 0
        problem.aligned_b = self.rank % chunk == 0
        return problem


def shapes_of(model: nn.Module, rows: int | Iterable[int]) -> list[Shape]:
    """The distinct shapes of a model's LoRA linears, once for each number of rows.

    Args:
        model: with lora_ext's layers, or PEFT's.
        rows: batch times sequence length, as the model will see it.

    Raises:
        ValueError: the model has no LoRA linear, or a number of rows is not valid.
        TypeError: it is no model, or rows are no numbers.
    """
    if not isinstance(rows, (int, Iterable)) or isinstance(rows, (str, bytes)):
        raise TypeError(f"lora_ext.warmup: expected rows as a number or several, but got {rows!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"lora_ext.warmup: expected a model, but got {model!r:.60}")
    counts = {rows} if isinstance(rows, int) else set(rows)
    found = set(_shapes_in(model))
    if not found:
        raise ValueError(
            "lora_ext.warmup: expected a model with LoRA linears, but it has none;"
            " see lora_ext.apply_lora and lora_ext.accelerate"
        )
    return sorted(replace(layer, rows=count) for layer in found for count in counts)


def _shapes_in(model: nn.Module) -> Iterator[Shape]:
    """Those of the adapters of linear layers, ours and PEFT's, with one row."""
    from ..model_layers import peft_layers
    from ..models.model import lora_layers
    from ..nn import LoRALinear, LoRAQuantizedLinear

    for _, own in lora_layers(model):
        if isinstance(own, LoRALinear | LoRAQuantizedLinear):
            out_features, in_features = own.matrix_shape
            for name, spec in own.adapters.items():
                wide = own.lora_a[name].dtype == torch.float32
                yield Shape(1, in_features, out_features, spec.r, wide, spec.lora_dropout > 0.0)
    layer: Any
    for _, layer in peft_layers(model):
        for name, lora_a in layer.lora_A.items():
            if type(lora_a) is nn.Linear:
                out_features = layer.lora_B[name].weight.shape[0]
                rank, in_features = lora_a.weight.shape
                dropout = getattr(layer.lora_dropout[name], "p", 0.0) > 0.0
                wide = lora_a.weight.dtype == torch.float32
                yield Shape(1, in_features, out_features, rank, wide, dropout)
