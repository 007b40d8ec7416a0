"""The LoRA linear and its update written plainly in torch: what the kernels are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
) -> Tensor:
    """y = x W^T + scaling * (drop(x) lora_a^T) lora_b^T + bias, in PEFT's order of operations.

    Differentiable any number of times. Adapters may be wider than x: then the update is computed
    and added in their dtype and the sum is rounded once more to x's (`peft.tuners.lora.Linear`).

    Args:
        x: ``[..., in_features]``; weight, lora_a, lora_b, bias, scaling: as in `lora_linear`.
        keep_mask: bool of x's flattened shape ``[M, in_features]``; None keeps everything.
        keep_scale: factor of kept elements, 1 / keep probability.
    """
    base = F.linear(x, weight, bias)
    return lora_update_reference(base, x, lora_a, lora_b, scaling, keep_mask, keep_scale)


def lora_update_reference(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
) -> Tensor:
    """y + scaling * (drop(x) lora_a^T) lora_b^T, in PEFT's order of operations.

    Differentiable any number of times. The sum is rounded once to y's dtype.

    Args:
        y, x, lora_a, lora_b, scaling: as in `lora_update`.
        keep_mask, keep_scale: as in `lora_linear_reference`.
    """
    wide = x.to(lora_a.dtype)
    if keep_mask is not None:
        wide = torch.where(keep_mask.view(x.shape), wide * keep_scale, torch.zeros_like(wide))
    update = F.linear(F.linear(wide, lora_a), lora_b) * scaling
    return (y + update).to(y.dtype)
