"""The frozen weights of a model's LoRA layers, each with the layers that multiply by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..packed_weight import Packable, unpackable_reason


class Kind(NamedTuple):
    """The properties that determine which product is faster.

    Attributes:
        out_features, in_features: N and K.
        dtype: of weight and x.
        transposed: the weight is stored as ``[in, out]``, as in Conv1D.
        bias: whether a bias is added.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    transposed: bool
    bias: bool

    def __str__(self) -> str:
        kept = ", stored as [in, out]" if self.transposed else ""
        return f"{self.in_features}x{self.out_features} {str(self.dtype)[6:]}{kept}"

    def matrix(self, backward: bool) -> tuple[torch.dtype, int, int, bool]:
        """(dtype, depth, columns, whether it is a transposed matrix) of what x, or dy, is
        multiplied with."""
        sizes = (self.in_features, self.out_features)
        depth, cols = sizes[::-1] if backward else sizes
        return self.dtype, depth, cols, backward == self.transposed

    @property
    def nbytes(self) -> int:
        """Bytes of one packed copy."""
        return self.out_features * self.in_features * self.dtype.itemsize


@dataclass
class Weight:
    """One parameter, with the layers that use it in one layout; tied layers share one."""

    parameter: Tensor
    kind: Kind
    bias: Tensor | None
    layers: list[Packable]


def packable_layers(model: nn.Module) -> list[Packable]:
    """The layers of this package, and accelerated ones of PEFT, that can use a pack."""
    return [module for module in model.modules() if isinstance(module, Packable)]


def weights_of(model: nn.Module) -> tuple[list[Weight], list[str]]:
    """(weights that oneDNN can pack, reasons why others cannot be packed)."""
    found: dict[tuple[int, bool], Weight] = {}
    reasons: dict[str, None] = {}
    for layer in packable_layers(model):
        base = layer.packable()
        if base is None:
            continue
        weight = base.weight
        reason = "the weight is trained" if weight.requires_grad else unpackable_reason(weight)
        if reason:
            reasons[reason] = None
            continue
        rows, cols = weight.shape
        n, k = (cols, rows) if base.transposed else (rows, cols)
        kind = Kind(n, k, weight.dtype, base.transposed, base.bias is not None)
        one = Weight(weight, kind, base.bias, [])
        found.setdefault((id(weight), base.transposed), one).layers.append(layer)
    return list(found.values()), list(reasons)
