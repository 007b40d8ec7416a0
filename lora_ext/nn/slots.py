"""The place in which a pool keeps a layer's adapters: one piece of memory for each factor.

    lora_a [capacity, r, in]    lora_b [capacity, out, r]    ranks, scaling [capacity]

The parameters of an adapter there are views of its slot, so that whoever writes them, an optimizer
or a hot-swap, has written the pool. What the op takes without gradients is the pool itself, if all
adapters of a call still are such views: each use compares addresses, and nothing can be stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FREE = 0  # the rank of a slot that nobody has


class PoolCall(NamedTuple):
    """What the op takes of a pool."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    ranks: Tensor
    slots: tuple[int, ...]  # of each name, -1 of one that the layer lacks


class Slots:
    """The slots of one layer."""

    def __init__(self, layer: Any, capacity: int, r: int, dtype: torch.dtype) -> None:
        (_, in_features), (out_features, _) = layer.factor_shapes(r)
        self.capacity, self.r = capacity, r
        self.names: dict[str, int] = {}  # name -> slot
        self._make(layer.weight.device, dtype, in_features, out_features)

    def _make(
        self, device: torch.device, dtype: torch.dtype, in_features: int, out_features: int
    ) -> None:
        capacity, r = self.capacity, self.r
        like = {"device": device, "dtype": dtype}
        with torch.inference_mode(False):
            self.lora_a = torch.zeros(capacity, r, in_features, **like)
            self.lora_b = torch.zeros(capacity, out_features, r, **like)
            self.ranks = torch.full((capacity,), FREE, dtype=torch.int32, device=device)
            self.scaling = torch.zeros(capacity, device=device)

    def views(self, slot: int, rank: int) -> tuple[Tensor, Tensor]:
        return self.lora_a[slot, :rank], self.lora_b[slot, :, :rank]

    @torch.no_grad()
    def take(self, layer: Any, name: str, slot: int) -> None:
        """Moves an adapter of the layer into a slot; its parameters stay the same objects."""
        own = layer.lora_a[name], layer.lora_b[name]
        rank = own[0].shape[0]
        for parameter, view in zip(own, self.views(slot, rank), strict=True):
            view.copy_(parameter)
            parameter.data = view
        self.scaling[slot] = layer.adapters[name].scaling
        self.ranks[slot] = rank  # last: a replay of a graph sees a free slot until all is there
        self.names[name] = slot

    def free(self, name: str) -> None:
        """The slot's memory is kept, and is nobody's."""
        self.ranks[self.names.pop(name)] = FREE

    def call(self, layer: Any, names: Sequence[str]) -> PoolCall | None:
        """For an index into names; None where an adapter of the layer is not in its slot."""
        slots = []
        for name in names:
            lora_a = layer.lora_a._parameters.get(name)
            if lora_a is None:
                slots.append(-1)
                continue
            slot = self.names.get(name)
            lora_b = layer.lora_b._parameters[name]
            if slot is None or not self._holds(slot, lora_a, lora_b):
                return None
            slots.append(slot)
        return PoolCall(self.lora_a, self.lora_b, self.scaling, self.ranks, tuple(slots))

    def _holds(self, slot: int, lora_a: Tensor, lora_b: Tensor) -> bool:
        a, b = self.lora_a, self.lora_b
        return (
            lora_a.data_ptr() == a.data_ptr() + slot * a.stride(0) * a.itemsize
            and lora_b.data_ptr() == b.data_ptr() + slot * b.stride(0) * b.itemsize
            and lora_a.dtype == a.dtype
            and lora_a.stride() == a.stride()[1:]
            and lora_b.stride() == b.stride()[1:]
        )

    def follow(self, layer: Any) -> None:
        """After the layer was moved or cast: memory of the kind that its parameters now have."""
        first: nn.Parameter | None = next(iter(layer.lora_a.values()), None)
        like = layer.weight if first is None else first
        dtype = self.lora_a.dtype if first is None else first.dtype
        if like.device == self.lora_a.device and dtype == self.lora_a.dtype:
            return
        names = dict(self.names)
        self._make(like.device, dtype, self.lora_a.shape[2], self.lora_b.shape[1])
        for name, slot in names.items():
            self.take(layer, name, slot)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.lora_a, self.lora_b, self.ranks, self.scaling))
