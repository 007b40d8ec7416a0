"""A few rows on a layer whose library has a product without dequantisation: this product followed
by `lora_update`, or the op on the dequantised weight.

The choice uses measurements on this device (`lora_ext.warmup`), otherwise a number of rows. The
measurements are kept in this process only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..invariance import is_on
from ..packed_weight import Measured, near
from .weight import QuantizedWeight

FEW_ROWS = "few rows, for which the library has a product of its own"


class Kind(NamedTuple):
    """The properties that determine which is faster."""

    device: torch.device
    format: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        out_features, in_features = self.shape
        return f"{self.format} {in_features}x{out_features} {str(self.dtype)[6:]}"


_measured: dict[Kind, Measured] = {}
_forced: list[bool] = []  # open blocks of `forced`, the innermost last


def own_product_wins(
    weight: QuantizedWeight, x: Tensor, dtype: torch.dtype, most_rows: int
) -> bool:
    """Whether x ``[..., in]`` is to be multiplied with the layer's own product; within
    `lora_ext.batch_invariant` none is.

    Args:
        weight: the layer's.
        x: the input, which needs no gradient.
        dtype: of the product.
        most_rows: the own product is taken up to this number of rows if nothing was measured.
    """
    if is_on():
        return False
    if _forced:
        return _forced[-1]
    in_features = weight.shape[1]
    if _measured and (times := _measured.get(kind_of(weight, dtype))):
        return near(x.numel() // in_features, times) > 1.0
    return x.numel() <= most_rows * in_features


def kind_of(weight: QuantizedWeight, dtype: torch.dtype) -> Kind:
    """The key for products with a weight in `dtype`."""
    return Kind(weight.device, weight.format, weight.shape, dtype)


def keep(kind: Kind, times: Sequence[tuple[int, float]]) -> None:
    """Sets the measurements for later calls: (rows, time of the op over that of the own
    product)."""
    _measured[kind] = tuple(times)


def forget() -> None:
    """Discards all measurements."""
    _measured.clear()


@contextmanager
def forced(own_product: bool) -> Iterator[None]:
    """Within the block each layer with its own product uses it, or none does: to time both."""
    _forced.append(own_product)
    try:
        yield
    finally:
        _forced.pop()
