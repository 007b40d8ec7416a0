"""Which rows and experts are processed together.

On a CPU a group is consecutive experts with a few hundred rows: the rows gathered for a group, and
the group's product, stay in the cache until the update is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_state import is_captured
from .operands import Projection

# A group ends at the expert with which it has this number of rows.
_ROWS = 512


class ExpertGroup(NamedTuple):
    """Consecutive experts.

    Attributes:
        where: their rows.
        experts: the numbers of those that have rows, or of all.
        ends: the end of each expert's rows, counted from the first row of the group.
        offs: the same, int32 on the device of the rows.
    """

    where: slice
    experts: Sequence[int]
    ends: Sequence[int]
    offs: Tensor

    def parts(self) -> Iterator[tuple[int, slice]]:
        """(number, rows counted from the first of the group) of each expert."""
        begin = 0
        for expert, end in zip(self.experts, self.ends, strict=True):
            yield expert, slice(begin, end)
            begin = end


class Rows:
    """The rows of one pass of a projection.

    What is asked of `ends` is read from the device, once: not where a way needs no such number.

    Args:
        projection: the routes are those of the rows.
        in_place: rows that are read where they are, not gathered; None if all are gathered.
    """

    def __init__(self, projection: Projection, in_place: Tensor | None) -> None:
        self.projection, self.in_place = projection, in_place

    def __len__(self) -> int:
        return len(self.projection.routes.perm)

    @cached_property
    def ends(self) -> list[int]:
        """The end of the rows of each expert and kind. RuntimeError in the capture of a CUDA graph,
        which cannot read it."""
        numbers = self.projection.routes.kind_ends
        if is_captured(numbers):
            raise RuntimeError(
                "lora_ext.experts.lora_experts: expected a call that needs nothing on the host "
                "while a CUDA graph is captured, but how many rows each expert or adapter has is "
                "read there; call the layer outside of the capture"
            )
        return numbers.tolist()

    @cached_property
    def bounds(self) -> list[int]:
        """The end of the rows of each expert."""
        kinds = self.projection.routes.kinds
        return self.ends[kinds - 1 :: kinds]

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(expert, adapter, number of rows) of each run of rows with the same ones, of the experts
        from `first` to `last` - 1; the adapter is -1 for none, and where all rows have the same."""
        kinds = self.projection.routes.kinds
        begin = self.ends[first * kinds - 1] if first else 0
        for place in range(first * kinds, last * kinds):
            end = self.ends[place]
            if end > begin:
                yield place // kinds, place % kinds - 1, end - begin
                begin = end

    def has_all(self, kind: int) -> bool:
        """Whether every expert has rows of a kind."""
        kinds, before = self.projection.routes.kinds, [0, *self.ends]
        return all(self.ends[i] > before[i] for i in range(kind, len(self.ends), kinds))

    def groups(self, rows: int = 0) -> list[ExpertGroup]:
        """Groups of a few hundred rows, or of at least this number."""
        bounds, device = self.bounds, self.projection.weight.device
        groups: list[ExpertGroup] = []
        first, last, experts, ends = 0, 0, [], []
        for number, end in enumerate(bounds):
            if end > last:
                experts.append(number)
                ends.append(end - first)
                last = end
            if experts and (last - first >= (rows or _ROWS) or number + 1 == len(bounds)):
                offs = torch.tensor(ends, dtype=torch.int32, device=device)
                groups.append(ExpertGroup(slice(first, last), experts, ends, offs))
                first, experts, ends = last, [], []
        return groups
