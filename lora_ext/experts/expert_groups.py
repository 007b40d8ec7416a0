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


class Update(NamedTuple):
    """The update of a group's rows.

    Attributes:
        lora_a, lora_b: ``[r, in]`` and ``[out, r]`` of each pair with rows; or one pool of each,
            ``[n, R, in]`` and ``[n, out, R]``, if all rows have the same adapters.
        scaling: one for each pair.
        of_row: int32 ``[rows]``, the pair of each row, or -1; or None.
        offs: int32, the end of each pair's rows, if all rows have the same adapters.
        dlora_a, dlora_b: tensors for the gradients of lora_a and lora_b; empty if none is
            requested.
    """

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scaling: Tensor
    of_row: Tensor | None
    offs: Tensor | None
    dlora_a: list[Tensor]
    dlora_b: list[Tensor]

    def arguments(self) -> tuple:
        """Those of the ops that say what the update is; dropout is not among them."""
        return self[:5]

    @property
    def rank(self) -> int:
        """The number of columns of S: the largest rank."""
        return max(a.shape[-2] for a in self.lora_a)


class ExpertGroup(NamedTuple):
    """Consecutive experts.

    Attributes:
        projection: theirs.
        where: their rows.
        experts: the numbers of those that have rows, or of all.
        ends: the end of each expert's rows, counted from the first row of the group.
        offs: the same, int32 on the device of the rows.
        update: of the rows; None: no row has one.
    """

    projection: Projection
    where: slice
    experts: Sequence[int]
    ends: Sequence[int]
    offs: Tensor
    update: Update | None = None

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
        bounds, groups = self.bounds, []
        first, last, experts, ends = 0, 0, [], []
        for number, end in enumerate(bounds):
            if end > last:
                experts.append(number)
                ends.append(end - first)
                last = end
            if experts and (last - first >= (rows or _ROWS) or number + 1 == len(bounds)):
                offs = torch.tensor(ends, dtype=torch.int32, device=self.projection.weight.device)
                own = self.projection, slice(first, last)
                groups.append(ExpertGroup(*own, experts, ends, offs))
                first, experts, ends = last, [], []
        return groups
