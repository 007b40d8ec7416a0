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
        experts: (number, begin, end) of each, all of which have rows; None if this is known only on
            the device: offs is of all experts then, with or without.
    """

    begin: int
    end: int
    offs: Tensor
    experts: list[tuple[int, int, int]] | None

    def numbers(self, experts: int) -> Tensor:
        """The expert of each row; rows after those of the last expert get the last expert."""
        rows = torch.arange(self.begin, self.end, device=self.offs.device, dtype=torch.int32)
        return torch.searchsorted(self.offs, rows, right=True).clamp_(max=experts - 1)


def clear_rest(groups: Sequence[ExpertGroup], *tensors: Tensor | None) -> None:
    """Writes zeros to the rows after those of the last expert."""
    end = groups[-1].end if groups else 0
    for tensor in tensors:
        if tensor is None:
            continue
        if groups and groups[0].experts is None:
            rows = torch.arange(len(tensor), device=tensor.device)
            is_rest = rows >= groups[0].offs[-1]
            tensor.masked_fill_(is_rest.view(-1, *[1] * (tensor.dim() - 1)), 0)
        elif end < len(tensor):
            tensor[end:] = 0


def on_host_numbers(numbers: Tensor) -> list[int]:
    """Numbers of rows; RuntimeError in the capture of a CUDA graph, which cannot read them."""
    if is_captured(numbers):
        raise RuntimeError(
            "lora_ext.experts.lora_experts: expected a call that needs nothing on the host while a "
            "CUDA graph is captured, but how many rows each expert or adapter has is read there; "
            "call the layer outside of the capture"
        )
    return numbers.tolist()


def on_host(bounds: Sequence[int], device: torch.device, rows: int = 0) -> list[ExpertGroup]:
    """Groups of a few hundred rows.

    Args:
        bounds: offs as Python numbers.
        device: that of the rows.
        rows: with how many rows a group ends; 0: the default.
    """
    groups = []
    first, last, experts = 0, 0, []
    for number, end in enumerate(bounds):
        if end > last:
            experts.append((number, last - first, end - first))
            last = end
        if experts and (last - first >= (rows or _ROWS) or number + 1 == len(bounds)):
            ends = [end for *_, end in experts]
            offs = torch.tensor(ends, dtype=torch.int32, device=device)
            groups.append(ExpertGroup(first, last, offs, experts))
            first, experts = last, []
    return groups
