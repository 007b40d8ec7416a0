"""The merged weight and bias of a layer with adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..experts.factors import a_by_expert, b_by_expert
from ..torch_state import is_sharded
from .named_adapters import NamedAdapters

# Rows of the weight that are widened at a time: limits temporaries to 16 MiB at 4096 columns.
_ROWS = 512


def merged_tensors(layer: NamedAdapters, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """(W + sum of scaling * B A, bias + sum of scaling * lora_bias) as new tensors.

    The bias is None if no adapter has one: the base's bias is then used.

    Sums are computed in float32 (float64 for a float64 weight), also under autocast, and rounded
    once to the weight's dtype.

    Raises:
        RuntimeError: an update is not finite, a sum is beyond the weight's dtype, or the weight is
            sharded over processes.
    """
    if is_sharded(layer.weight):
        raise RuntimeError(
            f"lora_ext.nn.{type(layer).__name__}.merge: expected a whole weight, but it is sharded "
            "(DTensor); merge before fully_shard, or save the adapter and merge in one process"
        )
    wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    # Not inference tensors, even inside inference_mode: a later forward may record gradients of x.
    without_autocast = torch.autocast(layer.weight.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), without_autocast:
        updates = []
        for name in names:
            lora_a, lora_b = layer.factors(name)
            updates.append((name, lora_a.to(wide), lora_b.to(wide) * layer.adapters[name].scaling))
        merged = torch.empty_like(layer.weight)
        source, target = layer.matrix(layer.weight.detach()), layer.matrix(merged)
        if source.dim() == 2:
            _merge_matrix(layer, source, target, updates)
        else:  # a stack of matrices
            count = len(source)
            of_each = [(n, a_by_expert(a, count), b_by_expert(b, count)) for n, a, b in updates]
            for e, matrix in enumerate(source):
                _merge_matrix(layer, matrix, target[e], [(n, a[e], b[e]) for n, a, b in of_each])
        return merged, _merged_bias(layer, names, wide)


def _merge_matrix(
    layer: NamedAdapters, source: Tensor, target: Tensor, updates: list[tuple[str, Tensor, Tensor]]
) -> None:
    """Writes source + sum of B A, both ``[out, in]``, into target."""
    for begin in range(0, source.shape[0], _ROWS):
        rows = slice(begin, begin + _ROWS)
        total = source[rows].to(updates[0][1].dtype, copy=True)
        for name, lora_a, lora_b in updates:
            update = lora_b[rows] @ lora_a
            _check_finite(layer, name, update)
            total += update
        target[rows] = _rounded(layer, total, source[rows])


def _merged_bias(layer: NamedAdapters, names: Sequence[str], wide: torch.dtype) -> Tensor | None:
    """The base's bias plus those of the adapters, None if these have none."""
    total = None
    for name in names:
        if name in layer.lora_bias:
            update = layer.lora_bias[name].to(wide) * layer.adapters[name].scaling
            _check_finite(layer, name, update)
            total = update if total is None else total + update
    if total is None:
        return None
    if layer.bias is None:
        return _rounded(layer, total, layer.weight.new_zeros(()))
    return _rounded(layer, layer.bias.to(wide) + total, layer.bias)


def _rounded(layer: NamedAdapters, total: Tensor, base: Tensor) -> Tensor:
    """The sum in the base's dtype."""
    rounded = total.to(base.dtype)
    if not torch.isfinite(rounded).all() and torch.isfinite(base).all():
        raise RuntimeError(
            f"lora_ext.nn.{type(layer).__name__}.merge: expected a merged weight within the range "
            f"of {base.dtype}, but got a sum of up to {total.abs().max().item():.3g}; nothing was "
            "merged"
        )
    return rounded


def _check_finite(layer: NamedAdapters, name: str, update: Tensor) -> None:
    if not torch.isfinite(update).all():
        raise RuntimeError(
            f"lora_ext.nn.{type(layer).__name__}.merge: expected a finite update, but adapter "
            f"{name!r} holds NaN or Inf, or its product overflows; nothing was merged"
        )
