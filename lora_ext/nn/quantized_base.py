"""Updates on a base that is dequantised for the op, for layers of this package and of PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..functional import lora_linear
from ..quantized.base import QuantizedBase
from .mixed import mixed_linear
from .row_index import RowIndex
from .updates import Update, stacked, with_biases


def linear_on(base: QuantizedBase, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """The base plus the sum of the updates, as one call of the op.

    Args:
        base: the base for this x.
        x: ``[..., in]``.
        updates: at least one; `updates_obstacle` must return "" for them.
    """
    given = x.to(base.dtype)
    lora_a, lora_b, scaling = stacked(updates, given)
    bias = with_biases(base.call_bias, updates)
    y = lora_linear(given, base.weight, lora_a, lora_b, bias, scaling, updates[0].dropout)
    return y.to(base.y_dtype)


def mixed_linear_on(
    base: QuantizedBase, x: Tensor, updates: Sequence[Update], rows: RowIndex
) -> Tensor:
    """The base plus each row's own update."""
    given = x.to(base.dtype)
    return mixed_linear(given, base.weight, base.call_bias, updates, rows).to(base.y_dtype)


def pool_linear_on(base: QuantizedBase, x: Tensor, pool: Any, index: Tensor) -> Tensor:
    """The base plus the update of each row's slot in a `LayerPool`."""
    given = x.to(base.dtype)
    return pool.linear(given, base.weight, base.call_bias, index).to(base.y_dtype)
