"""A quantised layer as the base of one call of the op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_state import compute_dtype, is_autocast
from .weight import QuantizedWeight


class QuantizedBase(NamedTuple):
    """The base of one call.

    Attributes:
        weight: the weight that x is multiplied by.
        bias: ``[out]`` or None.
        dtype: the dtype of the product; x is cast to it.
        y_dtype: the dtype of the y that the layer returns.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype
    y_dtype: torch.dtype

    @property
    def call_bias(self) -> Tensor | None:
        """The bias for the op, in the product's dtype or float32."""
        bias = self.bias
        if bias is None or bias.dtype in (self.dtype, torch.float32):
            return bias
        return bias.to(self.dtype)

    @property
    def note(self) -> str:
        """The note for `lora_ext.explain`."""
        mib = self.weight.workspace_bytes(self.dtype) / 2**20
        return f"{self.weight.format}, dequantised into {mib:.3g} MiB"


def workspace_bytes(found: QuantizedBase | str | None) -> int:
    """Bytes of the dequantised weight of `quantized_base`'s result, 0 if it is not dequantised."""
    return found.weight.workspace_bytes(found.dtype) if isinstance(found, QuantizedBase) else 0


def stored_base(
    weight: QuantizedWeight, bias: Tensor | None, x: Tensor | None, reason: str
) -> QuantizedBase | str:
    """The base of a product that never casts the weight to x's dtype; `reason` if x's differs."""
    dtype = weight.dtype
    if x is not None:
        if x.dtype != dtype and not is_autocast(x):
            return reason
        dtype = compute_dtype(x)
    return QuantizedBase(weight, bias, dtype, dtype)
