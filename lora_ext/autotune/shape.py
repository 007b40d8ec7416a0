"""The unit that is timed: one LoRA linear with a number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
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


Layers = nn.Module | Sequence[tuple[int, int, int] | Mapping[str, Any] | Shape]


def shapes_of(layers: Layers, rows: int | Iterable[int]) -> list[Shape]:
    """The distinct shapes of LoRA linears, once for each number of rows.

    Args:
        layers: a model with lora_ext's layers, or PEFT's; or a sequence of layers, each
            (out_features, in_features, rank), or a dict of these and, optionally, float_adapters
            and dropout. A `Shape`, or a dict with rows, has its own rows.
        rows: batch times sequence length, as the model will see it.

    Raises:
        ValueError: the model has no LoRA linear, or a size is not valid.
        TypeError: a layer is none of these.
    """
    if not isinstance(rows, (int, Iterable)) or isinstance(rows, (str, bytes)):
        raise TypeError(f"lora_ext.warmup: expected rows as a number or several, but got {rows!r}")
    counts = sorted({rows} if isinstance(rows, int) else set(rows))
    if isinstance(layers, nn.Module):
        found = set(_shapes_in(layers))
        if not found:
            raise ValueError(
                "lora_ext.warmup: expected a model with LoRA linears, but it has none;"
                " see lora_ext.apply_lora and lora_ext.accelerate"
            )
        return sorted(replace(layer, rows=count) for layer in found for count in counts)
    if not isinstance(layers, Iterable) or isinstance(layers, (str, Mapping)):
        raise TypeError(
            "lora_ext.warmup: expected a model, or a sequence of layers such as"
            f" [(4096, 4096, 16)], but got {layers!r}"
        )
    return sorted({shape for layer in layers for shape in _given(layer, counts)})


def _given(layer: Any, counts: Sequence[int]) -> list[Shape]:
    if isinstance(layer, Shape):
        return [layer]
    needed = ("out_features", "in_features", "rank")
    if isinstance(layer, Mapping):
        known = {field.name for field in fields(Shape)}
        if not set(needed) <= set(layer) <= known:
            raise TypeError(
                f"lora_ext.warmup: expected a layer with {', '.join(sorted(needed))}, and of"
                f" {', '.join(sorted(known - set(needed)))} any, but got {dict(layer)}"
            )
        own: dict[str, Any] = dict(layer)
    elif isinstance(layer, Sequence) and not isinstance(layer, str) and len(layer) == 3:
        own = dict(zip(needed, layer, strict=True))
    else:
        raise TypeError(
            "lora_ext.warmup: expected a model, or layers as (out_features, in_features, rank) or"
            f" dicts, but got {layer!r:.60}"
        )
    each = [own.pop("rows")] if "rows" in own else counts
    return [Shape(rows=count, **own) for count in each]


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
