"""The factors of rows that have adapters of their own, as pools of the grouped op.

An element of a pool is a segment: the rows of one expert and one adapter, or of one expert alone,
which have rank 0. Segments are in the order of rows, as the routes sort them.

    pool of A [n, R, in]     A_e of the segment's adapter in its first r ranks
    pool of B [n, out, R]    B_e likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .expert_groups import ExpertGroup
from .factors import Factors, Pools, a_by_expert, dtype_of, pool_of_b, some

class Segments(NamedTuple):
    """Attributes:
    offs: int32 ``[n]``, the end of the rows of each, counted from the first row of the group.
    adapters: the adapter of each, -1 for the base alone.
    parts: for each adapter (its segments, their experts), int64.
    """

    offs: Tensor
    adapters: Sequence[int]
    parts: list[tuple[Tensor, Tensor]]


def pools_by_row(factors: Factors, experts: int, group: ExpertGroup, dtype: torch.dtype) -> Pools:
    """The factors of a group's segments as pools, for an x in `dtype`."""
    assert factors.ends is not None
    found = _on_device if group.experts is None else _on_host
    offs, adapters, parts = found(factors.ends, len(factors.lora_a), experts, group)
    ranks = factors.ranks(experts)
    each = [0 if adapter < 0 else ranks[adapter] for adapter in adapters]
    kept, most = dtype_of(factors, dtype), factors.rank(experts)
    # What is past a rank is not read, but would be a NaN's source if it were.
    make = torch.empty if min(each) == most else torch.zeros
    sides = {"dtype": kept, "device": offs.device}
    lora_a = make(len(each), most, factors.lora_a[0].shape[1], **sides)
    lora_b = make(len(each), factors.lora_b[0].shape[0], most, **sides)
    is_in_b = factors.is_in_b(dtype)
    for i, (slots, hit) in enumerate(parts):
        rank = ranks[i]
        if rank == 0 or len(slots) == 0:
            continue
        first = some(a_by_expert(factors.lora_a[i], experts), hit)
        lora_a[:, :rank].index_copy_(0, slots, first.to(kept))
        second = pool_of_b(factors.lora_b[i], experts, hit).to(kept)
        if is_in_b:
            second = second * factors.scalings[i]
        lora_b[:, :, :rank].index_copy_(0, slots, second)
    own = [1.0 if is_in_b or adapter < 0 else factors.scalings[adapter] for adapter in adapters]
    scaling = torch.tensor(own, dtype=torch.float32, device=offs.device)
    counts = None
    if min(each) < most:
        counts = torch.tensor(each, dtype=torch.int32, device=offs.device)
    return Pools(lora_a, lora_b, scaling, offs, counts, parts)


def _on_host(ends: Tensor, adapters: int, experts: int, group: ExpertGroup) -> Segments:
    """The segments that have rows."""
    assert group.experts is not None
    kinds = adapters + 1
    first, last = group.experts[0][0], group.experts[-1][0]
    offs: list[int] = []
    own: list[int] = []
    slots: list[list[int]] = [[] for _ in range(adapters)]
    hit: list[list[int]] = [[] for _ in range(adapters)]
    before = group.begin
    for place, end in enumerate(ends[first * kinds : (last + 1) * kinds].tolist()):
        if end == before:
            continue
        expert, adapter = first + place // kinds, place % kinds - 1
        if adapter >= 0:
            slots[adapter].append(len(offs))
            hit[adapter].append(expert)
        offs.append(end - group.begin)
        own.append(adapter)
        before = end
    device = group.offs.device
    parts = [
        (torch.tensor(s, dtype=torch.int64), torch.tensor(e, dtype=torch.int64))
        for s, e in zip(slots, hit, strict=True)
    ]
    parts = [(s.to(device), e.to(device)) for s, e in parts]
    return Segments(torch.tensor(offs, dtype=torch.int32, device=device), own, parts)


def _on_device(ends: Tensor, adapters: int, experts: int, group: ExpertGroup) -> Segments:
    """All segments, with and without rows: which ones have any is not read on the host."""
    kinds = adapters + 1
    numbers = torch.arange(experts, device=ends.device)
    parts = [(numbers * kinds + adapter + 1, numbers) for adapter in range(adapters)]
    return Segments(ends, list(range(-1, adapters)) * experts, parts)
