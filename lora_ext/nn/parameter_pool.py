"""A parameter's part of an `lora_ext.AdapterPool`: slots for adapters of a mixture's experts or its
router."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adapter_spec import MAX_RANK
from .layer_pool import LayerPool


class ParameterPool(LayerPool):
    """Slots for adapters of a `LoRAParameter`: of a matrix, or a stack of E.

    An adapter of rank r has the first numbers of its slot's memory, without gaps, in the layout in
    which a `LoRAParameter` keeps factors. So nothing is padded for a rank below that of the slot,
    and a forward reads a slot as it reads the factors of any other adapter.

        lora_a [E r, in]     the first E r rows of lora_a[s]
        lora_b [out, r E]    the first out r E numbers of lora_b[s]

    Attributes:
        lora_a: ``[capacity, E R, in]`` for a largest rank R.
        lora_b: ``[capacity, out, R E]``, contiguous on every device.
        count: E, 1 for a matrix.
        projections: how many projections each matrix holds, as LoRAConfig counts them: R is so many
            times the pool's max_rank, at most 512.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        capacity: int,
        max_rank: int,
        names: dict[str, int],
        dtype: torch.dtype,
        device: torch.device,
        count: int,
        projections: int = 1,
    ) -> None:
        self.count, self.projections = count, projections  # first: the base's __init__ reads them
        super().__init__(shape, capacity, max_rank, names, dtype, device)

    @property
    def largest_rank(self) -> int:
        return min(self.projections * self.max_rank, MAX_RANK)

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return super().shapes(rank * self.count)

    def _parts(self, lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        (width, _), shape_b = self.shapes(rank)
        return lora_a[:width], lora_b.view(-1)[: math.prod(shape_b)].view(shape_b)

    def _laid_out(self, lora_b: Tensor) -> Tensor:
        return lora_b.contiguous()
