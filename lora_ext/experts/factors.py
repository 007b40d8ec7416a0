"""The factors of experts as the grouped op takes them, and their gradients in PEFT's layout.

    lora_A [E r, in]     A_e = rows e r .. (e + 1) r
    lora_B [out, r E]    B_e = columns e, e + E, ...       the expert is fastest: copied

The rows of a group are sorted by expert and, of one expert, by adapter; rows with the base alone
come first. Each pair of an expert and an adapter that has rows is an element of the op's lists.
Ranks may differ, and nothing is padded. Adapters that all rows have are one adapter with the sum of
their ranks, whose pairs are a pool. Only the factors of pairs with rows are read: for a block of
experts at a time, since the numbers of many experts are in one cache line of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..dtypes import HALVES
from .expert_groups import ExpertGroup, Rows, Update
from .operands import Gradient

_ops = torch.ops.lora_ext

# Experts whose factors are copied at a time: a cache line of half precision.
_BLOCK = 32


class Updates:
    """The updates of all groups, and the gradients of their factors.

    Args:
        gradient: says of which factors gradients are requested; None: of none.
        are_all_written: whether the gradient of each expert is, with rows or without.

    Attributes:
        dlora_a, dlora_b: the gradients in PEFT's layout, whole after the last group; None where it
            is not requested.
    """

    def __init__(
        self,
        rows: Rows,
        gradient: Gradient | None = None,
        are_all_written: bool = False,
    ) -> None:
        projection = rows.projection
        self._call, self._rows, self._experts = projection, rows, projection.weight.shape[0]
        self._is_by_row = projection.routes.ends is not None
        ranks, scalings = projection.ranks(), list(projection.scalings)
        # The adapters of each update, all or one, and its rank and scaling.
        places = range(len(ranks))
        self._updates = [[place] for place in places] if self._is_by_row else [list(places)]
        self._ranks = [sum(ranks[place] for place in update) for update in self._updates]
        # Scalings that differ within an update are multiplied into B, and one of float64.
        is_wide = projection.weight.dtype == torch.float64 and scalings[:1] != [1.0]
        self._is_in_b = not self._is_by_row and (is_wide or len(set(scalings)) > 1)
        self._scalings = [1.0] if self._is_in_b else scalings
        self._dtype = self._dtype_of(projection.weight.dtype)
        self._wanted = ((), ()) if gradient is None else gradient[-2:]
        every = zip((projection.lora_a, projection.lora_b), self._wanted, strict=True)
        self.dlora_a, self.dlora_b = (
            self._made(factors, wanted or [False] * len(factors), are_all_written)
            for factors, wanted in every
        )

    def of(self, groups: Sequence[ExpertGroup]) -> Iterator[ExpertGroup]:
        """All groups in their order, each with the update of its rows. When the next is requested,
        the tensors for gradients have been written to."""
        every = self._of_pairs if self._is_by_row else self._of_pools
        for block in _blocks(groups):
            yield from every(block) if any(self._ranks) else block

    def _of_pools(self, block: list[ExpertGroup]) -> Iterator[ExpertGroup]:
        every, place = [expert for group in block for expert in group.experts], 0
        hit = None if len(every) == self._experts else every
        pools = self._pools(0, hit)
        for group in block:
            count = len(group.offs)
            own = [[] if pool is None else [pool[place : place + count]] for pool in pools]
            a, b, da, db = own
            place += count
            scaling = pools[0].new_full((count,), self._scalings[0], dtype=torch.float32)
            yield group._replace(update=Update(a, b, scaling, None, group.offs, da, db))
        self._put(0, hit, *pools[2:])

    def _of_pairs(self, block: list[ExpertGroup]) -> Iterator[ExpertGroup]:
        runs = [self._runs(group) for group in block]
        hit: dict[int, list[int]] = {}
        for expert, adapter, _ in chain(*runs):
            if adapter >= 0:
                hit.setdefault(adapter, []).append(expert)
        pools = {adapter: self._pools(adapter, experts) for adapter, experts in hit.items()}
        made: list[dict] = [{}, {}, {}, {}]  # for each pair what is an element of a pool
        for adapter, every in pools.items():
            for found, pool in zip(made, every, strict=True):
                pairs = ((expert, adapter) for expert in hit[adapter])
                found.update(() if pool is None else zip(pairs, pool.unbind(0), strict=True))
        for group, own in zip(block, runs, strict=True):
            yield group._replace(update=self._update(group, own, made))
        for adapter, (_, _, da, db) in pools.items():
            self._put(adapter, hit[adapter], da, db)

    def _runs(self, group: ExpertGroup) -> list[tuple[int, int, int]]:
        """(expert, adapter, number of rows) of each run of rows; adapter -1: the base alone."""
        runs = self._rows.runs(*_span(group))
        found = [(expert, i if i >= 0 and self._ranks[i] else -1, n) for expert, i, n in runs]
        rest = group.where.stop - group.where.start - sum(n for *_, n in found)
        return [*found, (self._experts, -1, rest)]

    def _update(
        self, group: ExpertGroup, runs: list[tuple[int, int, int]], made: list[dict]
    ) -> Update | None:
        pairs = [(expert, adapter) for expert, adapter, _ in runs if adapter >= 0]
        if not pairs:
            return None
        a, b, *gradients = ([found[pair] for pair in pairs] if found else [] for found in made)
        device = group.offs.device
        wide = torch.promote_types(self._call.weight.dtype, torch.float32)
        scaling = torch.tensor([self._scalings[k] for _, k in pairs], dtype=wide, device=device)
        places = iter(range(len(pairs)))
        numbers = [next(places) if adapter >= 0 else -1 for _, adapter, _ in runs]
        index = torch.repeat_interleave(
            torch.tensor(numbers, dtype=torch.int32, device="cpu"),
            torch.tensor([rows for *_, rows in runs], device="cpu"),
        )
        return Update(a, b, scaling, index.to(device), None, *gradients)

    def _pools(
        self, adapter: int, hit: list[int] | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A ``[n, R, in]`` and B ``[n, out, R]`` of some experts, and memory for their gradients if
        any is requested."""
        call, own = self._call, self._updates[adapter]
        some_a = [some(a_by_expert(call.lora_a[i], self._experts), hit) for i in own]
        some_b = [pool_of_b(call.lora_b[i], self._experts, hit) for i in own]
        lora_a, lora_b = ([each.to(self._dtype) for each in some] for some in (some_a, some_b))
        if self._is_in_b:
            lora_b = [b * call.scalings[i] for b, i in zip(lora_b, own, strict=True)]
        pools = _joined(lora_a, 1), _joined(lora_b, 2)
        made = zip(pools, self._wanted, strict=True)
        da, db = (torch.empty_like(pool) if any(wanted) else None for pool, wanted in made)
        return *pools, da, db

    def _put(
        self, adapter: int, hit: list[int] | None, lora_a: Tensor | None, lora_b: Tensor | None
    ) -> None:
        """Writes gradients of the form of `_pools` into those in PEFT's layout."""
        begin = 0
        for i in self._updates[adapter]:
            ranks = slice(begin, begin + len(self._call.lora_a[i]) // self._experts)
            begin, of_a, of_b = ranks.stop, self.dlora_a[i], self.dlora_b[i]
            if of_a is not None and lora_a is not None:
                _put(a_by_expert(of_a, self._experts), hit, lora_a[:, ranks])
            if of_b is not None and lora_b is not None:
                part = lora_b[:, :, ranks]
                part = part * self._call.scalings[i] if self._is_in_b else part
                put_b(of_b, self._experts, hit, part)

    def _dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """One that the op supports with x and that rounds no factor to half."""
        every = (*self._call.lora_a, *self._call.lora_b)
        is_same = all(factor.dtype == dtype for factor in every)
        return torch.float32 if dtype in HALVES and (self._is_in_b or not is_same) else dtype

    def _made(
        self, factors: Sequence[Tensor], wanted: Sequence[bool], are_all_written: bool
    ) -> list[Tensor | None]:
        """Gradients of factors: zeros where not all experts will be written."""
        found: list[Tensor | None] = []
        for place, (factor, wants) in enumerate(zip(factors, wanted, strict=True)):
            kind = (place + 1) * self._is_by_row
            is_whole = are_all_written or (wants and self._rows.has_all(kind))
            make = torch.empty_like if is_whole else torch.zeros_like
            found.append(make(factor, memory_format=torch.contiguous_format) if wants else None)
        return found


def _blocks(groups: Sequence[ExpertGroup]) -> Iterator[list[ExpertGroup]]:
    """Consecutive groups, of up to `_BLOCK` experts together."""
    block: list[ExpertGroup] = []
    for group in groups:
        if block and _span(group)[1] > _span(block[0])[0] + _BLOCK:
            yield block
            block = []
        block.append(group)
    if block:
        yield block


def _span(group: ExpertGroup) -> tuple[int, int]:
    """(first, last + 1) of a group's experts."""
    return group.experts[0], group.experts[-1] + 1


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def a_by_expert(lora_a: Tensor, experts: int) -> Tensor:
    """``[E, r, in]``, a view where the factor is contiguous."""
    return lora_a.reshape(experts, -1, lora_a.shape[1])


def b_by_expert(lora_b: Tensor, experts: int) -> Tensor:
    """``[E, out, r]``, a view where the factor is contiguous."""
    return lora_b.reshape(len(lora_b), -1, experts).permute(2, 0, 1)


def some(by_expert: Tensor, hit: list[int] | None) -> Tensor:
    """Those of some experts, None for all; a view where their numbers are consecutive."""
    if hit is None:
        return by_expert
    if hit[-1] - hit[0] + 1 == len(hit):
        return by_expert[hit[0] : hit[-1] + 1]
    return by_expert.index_select(0, torch.tensor(hit, device=by_expert.device))


def pool_of_b(lora_b: Tensor, experts: int, hit: list[int] | None) -> Tensor:
    """``[n, out, r]``, contiguous."""
    if not lora_b.is_cpu:
        return some(b_by_expert(lora_b, experts), hit).contiguous()
    numbers = _numbers(hit, experts)
    pool = lora_b.new_empty(len(numbers), len(lora_b), lora_b.shape[1] // experts)
    _ops.experts_copy(pool, lora_b.contiguous(), numbers, experts)
    return pool


def _put(by_expert: Tensor, hit: list[int] | None, part: Tensor) -> None:
    if hit is None:
        by_expert.copy_(part)
    else:
        numbers = torch.tensor(hit, device=by_expert.device)
        by_expert.index_copy_(0, numbers, part.to(by_expert.dtype))


def put_b(gradient: Tensor, experts: int, hit: list[int] | None, part: Tensor) -> None:
    """Writes ``[n, out, r]`` into a gradient of PEFT's layout."""
    if gradient.is_cpu:
        part = part.to(gradient.dtype).contiguous()
        _ops.experts_copy(gradient, part, _numbers(hit, experts), experts)
    else:
        _put(b_by_expert(gradient, experts), hit, part)


def _numbers(hit: list[int] | None, experts: int) -> Tensor:
    return torch.tensor(list(range(experts)) if hit is None else hit, device="cpu")
