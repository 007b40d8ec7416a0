"""Which rows and experts are processed together.

On a CPU a group is consecutive experts with a few hundred rows: the rows gathered for a group, and
the group's product, stay in the cache until the update is added. On a GPU, if the grouped product
supports the operands, all experts are one group, and the number of rows of each is not read on the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_state import is_captured

# A group ends at the expert with which it has this number of rows.
_ROWS = 512


class ExpertGroup(NamedTuple):
    """Consecutive experts.

    Attributes:
        begin, end: their rows.
        offs: int32, the end of each expert's rows, counted from the first row of the group.
        hit: numbers of the experts, all of which have rows; None: all experts, with or without.
        experts: (number, begin, end) of each; None if this is known only on the device.
    """

    begin: int
    end: int
    offs: Tensor
    hit: Tensor | None
    experts: list[tuple[int, int, int]] | None

    def numbers(self, experts: int) -> Tensor:
        """The expert of each row; rows after those of the last expert get the last expert."""
        rows = torch.arange(self.begin, self.end, device=self.offs.device, dtype=torch.int32)
        return torch.searchsorted(self.offs, rows, right=True).clamp_(max=experts - 1)


class ExpertGroups(NamedTuple):
    """Attributes:
    each: the groups.
    has_all: whether every expert is in one of the groups.
    rest: the first row after those of the last expert; None if known only on the device.
    """

    each: list[ExpertGroup]
    has_all: bool
    rest: int | None

    @property
    def is_whole(self) -> bool:
        """Whether one group has all rows, with their experts known only on the device."""
        return self.rest is None

    def clear_rest(self, *tensors: Tensor | None) -> None:
        """Writes zeros to the rows after those of the last expert."""
        for tensor in tensors:
            if tensor is None:
                continue
            if self.rest is None:
                rows = torch.arange(len(tensor), device=tensor.device)
                is_rest = rows >= self.each[0].offs[-1]
                tensor.masked_fill_(is_rest.view(-1, *[1] * (tensor.dim() - 1)), 0)
            elif self.rest < len(tensor):
                tensor[self.rest :] = 0


def on_host_numbers(numbers: Tensor) -> list[int]:
    """Numbers of rows; RuntimeError in the capture of a CUDA graph, which cannot read them."""
    if is_captured(numbers):
        raise RuntimeError(
            "lora_ext.experts.lora_experts: expected a call that needs nothing on the host while a "
            "CUDA graph is captured, but how many rows each expert or adapter has is read there; "
            "call the layer outside of the capture"
        )
    return numbers.tolist()


def on_device(offs: Tensor, rows: int) -> ExpertGroups:
    """All experts in one group."""
    return ExpertGroups([ExpertGroup(0, rows, offs, None, None)], True, None)


def on_host(bounds: Sequence[int], device: torch.device) -> ExpertGroups:
    """Groups of a few hundred rows.

    Args:
        bounds: offs as Python numbers.
        device: that of the rows.
    """
    each = []
    first, last, experts = 0, 0, []
    for number, end in enumerate(bounds):
        if end > last:
            experts.append((number, last - first, end - first))
            last = end
        if experts and (last - first >= _ROWS or number + 1 == len(bounds)):
            each.append(_run(first, last, experts, len(bounds), device))
            first, experts = last, []
    count = sum(len(group.experts or ()) for group in each)
    return ExpertGroups(each, count == len(bounds), last)


def _run(
    first: int,
    last: int,
    experts: list[tuple[int, int, int]],
    all_experts: int,
    device: torch.device,
) -> ExpertGroup:
    offs = torch.tensor([end for *_, end in experts], dtype=torch.int32, device=device)
    hit = None
    if len(experts) < all_experts:
        hit = torch.tensor([number for number, *_ in experts], device=device)
    return ExpertGroup(first, last, offs, hit, experts)
