"""A few rows on a layer whose library has a product without dequantisation: this product followed
by `lora_update`, or the op on the dequantised weight.

The choice uses measurements on this device (`lora_ext.warmup`), otherwise a number of rows. The
measurements are kept in this process only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..invariance import is_on
from ..measure import Measured, near
from .weight import QuantizedWeight

FEW_ROWS = "few rows, for which the quantising package has a product of its own"


class Kind(NamedTuple):
    """The properties that determine which is faster."""

    device: torch.device
    format: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        out_features, in_features = self.shape
        return f"{self.format} {in_features}x{out_features} {str(self.dtype)[6:]}"


# Time of the own product and the update over that of the op.
measured: dict[Kind, Measured] = {}


def own_product_wins(
    weight: QuantizedWeight, x: Tensor, dtype: torch.dtype, most_rows: int
) -> bool:
    """Whether x ``[..., in]`` is to be multiplied with the layer's own product; within
    `lora_ext.batch_invariant` none is. If nothing was measured, it is taken up to `most_rows` rows.
    The product is in `dtype`, and x needs no gradient.
    """
    if is_on():
        return False
    in_features = weight.shape[1]
    if measured and (times := measured.get(kind_of(weight, dtype))):
        return near(x.numel() // in_features, times) < 1.0
    return x.numel() <= most_rows * in_features


def kind_of(weight: QuantizedWeight, dtype: torch.dtype) -> Kind:
    """The key for products with a weight in `dtype`."""
    return Kind(weight.device, weight.format, weight.shape, dtype)
