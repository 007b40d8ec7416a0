"""A few rows on a layer that has a product of its own, which does not dequantise: by that product,
with `lora_update` after it, or by the op on the dequantised weight.

What was measured on this device decides (`lora_ext.warmup`), else a number of rows. The former is
kept in this process alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..packed_weight import Measured, near
from .weight import QuantizedWeight

FEW_ROWS = "few rows, for which the library has a product of its own"


class Kind(NamedTuple):
    """What decides which is faster."""

    device: torch.device
    format: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        out_features, in_features = self.shape
        return f"{self.format} {in_features}x{out_features} {str(self.dtype)[6:]}"


_measured: dict[Kind, Measured] = {}
_forced: list[bool] = []  # within `forced`, the innermost last


def own_product_wins(
    weight: QuantizedWeight, x: Tensor, dtype: torch.dtype, most_rows: int
) -> bool:
    """Whether x ``[..., in]`` is to be multiplied by the layer's own product.

    Args:
        weight: the layer's.
        x: without a gradient.
        dtype: of the product.
        most_rows: up to which the own product is taken where nothing was measured.
    """
    if _forced:
        return _forced[-1]
    in_features = weight.shape[1]
    if _measured and (times := _measured.get(kind_of(weight, dtype))):
        return near(x.numel() // in_features, times) > 1.0
    return x.numel() <= most_rows * in_features


def kind_of(weight: QuantizedWeight, dtype: torch.dtype) -> Kind:
    """The key of products on a weight in a dtype."""
    return Kind(weight.device, weight.format, weight.shape, dtype)


def keep(kind: Kind, times: Sequence[tuple[int, float]]) -> None:
    """From now on calls go by these (rows, time of the op over that of the own product)."""
    _measured[kind] = tuple(times)


def forget() -> None:
    """Nothing counts as measured."""
    _measured.clear()


@contextmanager
def forced(own_product: bool) -> Iterator[None]:
    """Within, each layer with a product of its own takes it, or none does: to time both."""
    _forced.append(own_product)
    try:
        yield
    finally:
        _forced.pop()
