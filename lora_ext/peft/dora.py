"""DoRA (Liu et al. 2024, sections 4.2 and 4.3; peft.tuners.lora.dora).

    g = magnitude / ||W + s B A||          one number per output, the norm held constant
    y = g * (x W^T + s (x A^T) B^T) + bias
    y = x W^T + bias + (g - 1) * (xd W^T) + g * s (xd A^T) B^T          with dropout, xd = drop(x)

In each forward PEFT computes B A in the weight's size by a product with an identity matrix, a copy
of W in x's dtype, and their sum. Here the norm is computed in blocks of rows of the weight; g is
multiplied into B, so that the gradients of the adapters are computed from dy itself and keep their
precision; the rest is added to the base product in blocks of rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from torch import Tensor

from ..call.apply import Update, stacked
from ..call.op import base_linear, lora_linear
from ..dropout import draw_seed
from ..quantized.weight import QuantizedWeight, dense
from ..torch_state import compute_dtype
from .reasons import has_hooks
from .row_blocks import combine, drop, shrink, without_autocast

# Elements of the weight that are widened at a time for its norm: 4 MiB of float32.
_BLOCK = 1 << 20


def linear_reason(layer: Any, name: str) -> str:
    """Why an adapter of a linear layer needs PEFT's forward, or ""."""
    if layer.lora_B[name].bias is not None:
        return "DoRA with a lora_bias, which PEFT does not make"
    return _magnitude_reason(layer, name, peft_dora.DoraLinearLayer)


def embedding_reason(layer: Any, name: str) -> str:
    """Why an adapter of an embedding needs PEFT's forward, or ""."""
    if has_hooks(layer._modules["base_layer"]):
        return "DoRA on a base layer with hooks"
    return _magnitude_reason(layer, name, peft_dora.DoraEmbeddingLayer)


def _magnitude_reason(layer: Any, name: str, kind: type) -> str:
    vector = layer.lora_magnitude_vector[name]
    if type(vector) is not kind or has_hooks(vector):
        return "DoRA's magnitude vector is not PEFT's own, or has hooks"
    if layer.ephemeral_gpu_offload:
        return "DoRA with ephemeral_gpu_offload"
    return ""


def linear(
    layer: Any, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, update: Update
) -> Tensor:
    """y of the equations above, for any weight that `lora_linear` accepts."""
    factor = _factor_of(layer, weight, update, update.lora_a.dtype)
    if update.dropout == 0.0 and _is_cached(layer.lora_magnitude_vector[update.name]):
        # The fastest way if the norm is known.
        lora_a, lora_b, scaling = stacked([update], compute_dtype(x))
        y = lora_linear(x, weight, lora_a, lora_b, None, scaling)
        return (y * factor if bias is None else torch.addcmul(bias, y, factor)).to(y.dtype)
    scaled_b = update.lora_b * factor[:, None]
    if update.dropout == 0.0:
        part = shrink(x, update.lora_a, 0.0, None)
        # If the factor is 1, as at initialisation, this is bit for bit the base's y with its bias.
        offset = None if bias is None else (1 - factor) * bias
        return combine(offset, base_linear(x, weight, bias), factor, part, scaled_b, update.scaling)
    seed = draw_seed(x.device)
    part = shrink(x, update.lora_a, update.dropout, seed)
    u = base_linear(drop(x, update.dropout, seed), weight, None)
    return combine(base_linear(x, weight, bias), u, factor - 1, part, scaled_b, update.scaling)


def embedding(layer: Any, y: Tensor, part: Tensor, update: Update) -> Tensor:
    """g * (y + s S B^T) for the base's output y and S ``[..., r]``, the lookup in A."""
    table = layer._modules["base_layer"].weight
    rounded_to = torch.promote_types(table.dtype, update.lora_a.dtype)
    factor = _factor_of(layer, table.t(), update, rounded_to)
    return combine(None, y, factor, part, update.lora_b * factor[:, None], update.scaling)


def _factor_of(
    layer: Any, weight: Tensor | QuantizedWeight, update: Update, rounded_to: torch.dtype
) -> Tensor:
    """g ``[out]`` for the weight ``[out, in]``, at least float32. Under `peft.helpers.DoraCaching`
    the norm is cached where PEFT caches its own, and for as long."""
    vector, key = layer.lora_magnitude_vector[update.name], f"lora_ext-weight-norm-{update.name}"
    is_cached = _is_cached(vector)
    if not is_cached and vector._dora_cache:  # only then: a compiled checkpoint must not write
        vector._cache_clear()
    norm = vector._cache_get(key, None) if is_cached else None
    if norm is None:
        given: Any = nullcontext(weight)
        if isinstance(weight, QuantizedWeight):  # in the dtype that PEFT uses at initialisation
            given = dense(weight, update.lora_a.new_empty(0, dtype=weight.dtype))
        with given as matrix:
            norm = weight_norm(matrix, update.lora_a, update.lora_b, update.scaling, rounded_to)
        if is_cached:
            vector._cache_store(key, norm)
    return vector.weight.to(norm.dtype) / norm


def _is_cached(vector: Any) -> bool:
    return peft_dora.ENABLE_DORA_CACHING and not vector.training


@torch.no_grad()
def weight_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    rounded_to: torch.dtype,
) -> Tensor:
    """||W + s B A|| of each row ``[out]``, in float32 (float64 for float64), a constant.

    At initialisation the magnitude is PEFT's norm, rounded to the dtype in which PEFT computes.
    With the same rounding here the factor is 1, and the layer computes the base.

    Args:
        weight: ``[out, in]``, any strides.
        lora_a: ``[r, in]``.
        lora_b: ``[out, r]``.
        rounded_to: the dtype in which PEFT computes.
    """
    out_features, in_features = weight.shape
    wide = torch.float64 if torch.float64 in (lora_a.dtype, rounded_to) else torch.float32
    with without_autocast(weight):
        lora_a, lora_b = lora_a.to(wide), lora_b.to(wide) * scaling
        if weight.stride(0) < weight.stride(1):  # stored as [in, out]
            norm = _sum_over_columns(weight, lora_a, lora_b).sqrt_()
        else:
            step = max(1, _BLOCK // max(1, in_features))
            blocks = [slice(begin, begin + step) for begin in range(0, out_features, step)]
            norms = [
                torch.addmm(weight[rows].to(wide), lora_b[rows], lora_a).norm(dim=1)
                for rows in blocks
            ]
            norm = torch.cat(norms)
        return norm.to(rounded_to).to(wide)


def _sum_over_columns(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The sum of squares of each row, over blocks of columns."""
    out_features, in_features = weight.shape
    total = lora_a.new_zeros(out_features)
    step = max(1, _BLOCK // max(1, out_features))
    for begin in range(0, in_features, step):
        columns = slice(begin, begin + step)
        block = torch.addmm(weight[:, columns].to(lora_a.dtype), lora_b, lora_a[:, columns])
        total += block.square_().sum(1)
    return total
