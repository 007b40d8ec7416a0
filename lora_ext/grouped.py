"""Calls with many adapters: `lora_linear` and `lora_update` if an index or offs is given.

    y[m] = x[m] W^T + bias + scaling[g] (drop(x)[m] A_g^T) B_g^T      g: the adapter of row m

Factors are lists of matrices, whose ranks may differ, or a pool: two tensors with one slot for each
adapter. No factor is copied for each row or padded to the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Factors", "Scaling"]  # the types in public signatures

Factors: TypeAlias = Tensor | Sequence[Tensor]
Scaling: TypeAlias = float | Sequence[float] | Tensor


def operands(
    function: str, x: Tensor, lora_a: Factors, lora_b: Factors, scaling: Scaling
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The factors and the scaling as the op takes them.

    Raises:
        TypeError: a factor is not a tensor, or scaling is not a number.
    """
    first, second = _listed(function, "lora_a", lora_a), _listed(function, "lora_b", lora_b)
    adapters = len(first[0]) if len(first) == 1 and first[0].dim() == 3 else len(first)
    check_no_gradient(function, scaling)
    return first, second, _scaling(function, scaling, adapters, x)


def check_no_gradient(function: str, scaling: Scaling) -> None:
    """Raises RuntimeError for a scaling that requires grad, since it gets no gradient."""
    each = scaling if isinstance(scaling, list | tuple) else (scaling,)
    if torch.is_grad_enabled() and any(isinstance(s, Tensor) and s.requires_grad for s in each):
        raise RuntimeError(
            f"lora_ext.{function}: expected a scaling without gradient, but got a tensor that "
            "requires grad; to train it, multiply lora_b by it and leave scaling at 1"
        )


def _listed(function: str, name: str, factors: Factors) -> list[Tensor]:
    if isinstance(factors, Tensor):
        if factors.dim() != 3:
            raise RuntimeError(
                f"lora_ext.{function}: expected {name} of many adapters as a list of matrices or a "
                f"pool of 3 dimensions, but got a tensor of shape {list(factors.shape)}"
            )
        return [factors]
    listed = list(factors)
    for i, factor in enumerate(listed):
        if not isinstance(factor, Tensor):
            raise TypeError(
                f"lora_ext.{function}: expected {name}[{i}] to be a tensor, but got "
                f"{type(factor).__name__}"
            )
    return listed


def _scaling(function: str, scaling: Scaling, adapters: int, x: Tensor) -> Tensor:
    if isinstance(scaling, Tensor) and scaling.dim() > 0:
        return scaling
    kind = {
        "dtype": torch.float64 if x.dtype is torch.float64 else torch.float32,
        "device": x.device,
    }
    try:
        if isinstance(scaling, Sequence):
            if torch.compiler.is_compiling() or not (x.is_cuda and torch.cuda.is_initialized()):
                return torch.tensor(scaling, **kind)
            # Without waiting for the device: from pinned memory. A graph that is captured would
            # read that again in each replay, so there torch refuses the copy, as it does from
            # other memory.
            pinned = not torch.cuda.is_current_stream_capturing()
            # The host by its name: torch.set_default_device may name another, without pages.
            host = torch.tensor(scaling, dtype=kind["dtype"], device="cpu", pin_memory=pinned)
            return host.to(x.device, non_blocking=pinned)
        return torch.full((adapters,), float(scaling), **kind)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"lora_ext.{function}: expected scaling to be a number, a sequence of numbers or a "
            f"float32 tensor, one for each adapter, but got {scaling!r}"
        ) from error
