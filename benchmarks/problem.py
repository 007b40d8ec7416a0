"""The tensors of one cell: frozen base layer, adapters, and inputs to rotate through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import Any

import torch

from .shapes import FORWARD, Cell

SCALING = 2.0  # lora_alpha = 2 r
_ROTATED_BYTES = 32 << 20  # inputs rotate through about this much memory
_MIN_COPIES, _MAX_COPIES = 3, 16


@dataclass
class Problem:
    """Everything that the variants of one cell share.

    lora_a and lora_b are stored in float32 with values that the cell's dtype represents exactly, so
    that adapters in either dtype are the same matrices.
    """

    weight: torch.Tensor  # [N, K], frozen, in the cell's dtype
    bias: torch.Tensor | None  # [N]
    lora_a: torch.Tensor  # [r, K], float32
    lora_b: torch.Tensor  # [N, r], float32
    inputs: list[torch.Tensor]  # each [..., K]
    grads: list[torch.Tensor]  # upstream gradients, each [..., N]
    scaling: float = SCALING
    _copies: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of x and of the base weight."""
        return self.weight.dtype

    def adapters(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh leaves lora_a [r, K] and lora_b [N, r] that require grad."""
        return tuple(t.to(dtype, copy=True).requires_grad_() for t in (self.lora_a, self.lora_b))

    def rotation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (x, upstream gradient) pairs."""
        return cycle(list(zip(self.inputs, self.grads, strict=True)))

    @cached_property
    def packed(self) -> Any:
        """lora_ext's packed copy of the weight, for forward and backward."""
        import lora_ext

        return lora_ext.pack_weight(self.weight, backward=True)

    @cached_property
    def merged(self) -> torch.Tensor:
        """weight + scaling * lora_b lora_a, in the cell's dtype: [N, K]."""
        delta = self.scaling * (self.lora_b @ self.lora_a)
        return (self.weight.float() + delta).to(self.dtype)


def make_problem(cell: Cell, seed: int = 0) -> Problem:
    """Random tensors of unit scale; base and LoRA parts contribute about equally to y."""
    dtype = getattr(torch, cell.dtype)
    on_gpu = cell.device == "cuda"  # where the half a billion numbers of a large cell take no time
    generator = torch.Generator(cell.device if on_gpu else "cpu").manual_seed(seed)
    n, k, r = cell.out_features, cell.in_features, cell.rank

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=generator.device)
        return drawn.mul_(std).to(cell.device, dtype)

    element = torch.empty((), dtype=dtype).element_size()
    copies = -(-_ROTATED_BYTES // (cell.rows * k * element))
    copies = max(_MIN_COPIES, min(_MAX_COPIES, copies))
    if on_gpu:
        copies = 1  # cuda_timing evicts them from the cache
    step = cell.mode != FORWARD
    return Problem(
        weight=normal(n, k, std=k**-0.5),
        bias=normal(n) if cell.bias else None,
        lora_a=normal(r, k, std=k**-0.5).float(),
        lora_b=normal(n, r, std=r**-0.5).float(),
        inputs=[normal(cell.rows, k).requires_grad_(step) for _ in range(copies)],
        grads=[normal(cell.rows, n) if step else torch.empty(0) for _ in range(copies)],
    )
