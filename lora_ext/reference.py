"""The LoRA linear and its update in plain torch: the reference for the kernels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    scaling: float | Tensor | Sequence[float] = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    index: Tensor | None = None,
) -> Tensor:
    """y = x W^T + scaling * (drop(x) lora_a^T) lora_b^T + bias, in PEFT's order of operations.

    Differentiable any number of times. Adapters may be wider than x: then the update is computed
    and added in their dtype and the sum is rounded once more to x's (`peft.tuners.lora.Linear`).

    Args:
        x: ``[..., in_features]``; weight, lora_a, lora_b, bias, scaling: as in `lora_linear`.
        keep_mask: bool of x's flattened shape ``[M, in_features]``; None keeps everything.
        keep_scale: factor of kept elements, 1 / keep probability.
        index: the adapter of each row of x in the sequences lora_a and lora_b, or -1 for none;
            with one scaling for all or one for each. It is computed by a loop over the adapters.
    """
    base = F.linear(x, weight, bias)
    return lora_update_reference(base, x, lora_a, lora_b, scaling, keep_mask, keep_scale, index)


def lora_update_reference(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float] = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    index: Tensor | None = None,
) -> Tensor:
    """y + scaling * (drop(x) lora_a^T) lora_b^T, in PEFT's order of operations.

    Differentiable any number of times. The sum is rounded once to y's dtype.

    Args:
        y, x, lora_a, lora_b, scaling: as in `lora_update`.
        keep_mask, keep_scale, index: as in `lora_linear_reference`.
    """
    wide = x.to(lora_a[0].dtype)
    if keep_mask is not None:
        wide = torch.where(keep_mask.view(x.shape), wide * keep_scale, torch.zeros_like(wide))
    if index is None:
        one: Any = (lora_a, lora_b, scaling)
        update = F.linear(F.linear(wide, one[0]), one[1]) * one[2]
        return (y + update).to(y.dtype)
    given = torch.as_tensor(scaling, dtype=torch.float64)
    each = given.expand(len(lora_a)) if given.dim() == 0 else given
    if len(each) != len(lora_a):
        raise RuntimeError(
            f"lora_ext.reference: expected one scaling, or one for each of {len(lora_a)} adapters, "
            f"but got {len(each)}"
        )
    adapters = index.reshape(-1)
    inputs = wide.reshape(len(adapters), x.shape[-1])
    out = y.reshape(len(adapters), y.shape[-1])
    for g, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        rows = (adapters == g).nonzero().flatten()
        update = F.linear(F.linear(inputs[rows], a), b) * each[g]
        out = out.index_copy(0, rows, (out[rows] + update).to(y.dtype))
    return out.view(y.shape)
