"""What a quantised layer is to the op, for one x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_state import compute_dtype, is_autocast
from .weight import QuantizedWeight


class QuantizedBase(NamedTuple):
    """The base of one call.

    Attributes:
        weight: what it multiplies by.
        bias: ``[out]`` or None.
        dtype: that of the product; x is brought to it.
        y_dtype: that of the y that the layer returns.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype
    y_dtype: torch.dtype

    @property
    def call_bias(self) -> Tensor | None:
        """The bias as the op takes it, in the product's dtype or float32."""
        bias = self.bias
        if bias is None or bias.dtype in (self.dtype, torch.float32):
            return bias
        return bias.to(self.dtype)

    @property
    def note(self) -> str:
        """What `lora_ext.explain` says of it."""
        mib = self.weight.workspace_bytes(self.dtype) / 2**20
        return f"{self.weight.format} through a workspace of {mib:.3g} MiB"


def workspace_bytes(found: QuantizedBase | str | None) -> int:
    """Of the dequantised weight of what `quantized_base` found, 0 where it is not dequantised."""
    return found.weight.workspace_bytes(found.dtype) if isinstance(found, QuantizedBase) else 0


def dtype_as_stored(stored: torch.dtype, x: Tensor | None) -> torch.dtype | None:
    """That of a product which never casts the weight to x's dtype, None where x is in another."""
    if x is None:
        return stored
    return compute_dtype(x) if is_autocast(x) or x.dtype == stored else None


def with_bias_dtype(dtype: torch.dtype, bias: Tensor | None) -> torch.dtype:
    """That of ``y + bias``, out of place, for a y in a dtype."""
    return dtype if bias is None else torch.promote_types(dtype, bias.dtype)
