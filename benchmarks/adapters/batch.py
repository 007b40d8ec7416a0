"""The tensors of one case: the frozen weight, the adapters, whose each row is, inputs in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import torch
from torch import Tensor

from ..shapes import STEP
from .cases import Case

SCALING = 2.0
_ROTATED_BYTES = 32 << 20


@dataclass
class Batch:
    """The frozen weight is `weight`; adapter g is lora_a[g], lora_b[g]."""

    case: Case
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [G, r, K]
    lora_b: Tensor  # [G, N, r]
    index: Tensor  # int32 [rows]
    inputs: list[Tensor]
    grads: list[Tensor]

    @cached_property
    def scaling(self) -> Tensor:
        return torch.full((self.case.adapters,), SCALING, device=self.weight.device)

    @cached_property
    def offs(self) -> Tensor:
        """Ends of the adapters' rows, which lie together."""
        return self.index.bincount(minlength=self.case.adapters).cumsum(0).int()

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves, one matrix of each for each adapter."""
        wanted = self.case.mode == STEP
        return tuple(
            [matrix.clone().requires_grad_(wanted) for matrix in pool]
            for pool in (self.lora_a, self.lora_b)
        )

    def pools(self) -> tuple[Tensor, Tensor]:
        wanted = self.case.mode == STEP
        return tuple(t.clone().requires_grad_(wanted) for t in (self.lora_a, self.lora_b))

    def rotation(self) -> Iterator[tuple[Tensor, Tensor]]:
        return cycle(list(zip(self.inputs, self.grads, strict=True)))


def make_batch(case: Case) -> Batch:
    place = {"device": case.device}
    generator = torch.Generator(**place).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    k = n = case.width

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, **place).mul_(std).to(dtype)

    index = torch.arange(case.rows, **place) * case.adapters // case.rows
    if case.layout == "mixed":
        index = index[torch.randperm(case.rows, generator=generator, **place)]
    step = case.mode == STEP
    copies = max(3, min(16, _ROTATED_BYTES // (case.rows * k * dtype.itemsize)))
    if case.device == "cuda":
        copies = 1  # cuda_timing evicts them from the cache
    return Batch(
        case,
        weight=normal(n, k, std=k**-0.5),
        lora_a=normal(case.adapters, case.rank, k, std=k**-0.5),
        lora_b=normal(case.adapters, n, case.rank, std=case.rank**-0.5),
        index=index.int(),
        inputs=[normal(case.rows, k).requires_grad_(step) for _ in range(copies)],
        grads=[normal(case.rows, n) if step else torch.empty(0) for _ in range(copies)],
    )
