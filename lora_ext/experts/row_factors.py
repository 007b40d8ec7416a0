"""The factors of rows that have adapters of their own, as lists of matrices for the grouped op.

The rows of a group are sorted by expert and, of one expert, by adapter; rows with the base alone
come first. Each pair of an expert and an adapter that has rows is an element of the op's lists:

    A_e [r, in]     a view of PEFT's lora_A, which has the expert as its slowest index
    B_e [out, r]    a copy: lora_B has the expert as its fastest index, so that the numbers of many
                    experts are in one cache line; they are copied for a block of experts at a time

Ranks may differ, and nothing is padded. Which pairs have rows is read on the host.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .expert_groups import ExpertGroup, on_host_numbers
from .factors import Factors, a_by_expert, dtype_of, is_any, made, pool_of_b, put_b

# Experts whose B is copied at a time: a cache line of half precision.
_BLOCK = 32


class RowUpdate(NamedTuple):
    """The update of a group's rows, as the grouped op takes it.

    Attributes:
        lora_a: ``[r, in]`` of each pair.
        lora_b: ``[out, r]``.
        scaling: one for each pair.
        of_row: int32 ``[rows]``, the pair of each row, or -1.
        pairs: (expert, adapter) of each.
    """

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scaling: Tensor
    of_row: Tensor
    pairs: list[tuple[int, int]]

    def arguments(self) -> dict[str, Any]:
        """Those of the op, besides x; dropout is applied to rows beforehand."""
        lists = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        return {**lists, "scaling": self.scaling, "index": self.of_row}

    @property
    def rank(self) -> int:
        """The number of columns of S: the largest rank."""
        return max(len(a) for a in self.lora_a)

    def part(self, expert: int, begin: int, end: int) -> RowUpdate | None:
        """The update of one expert's rows alone; None if none of them has one."""
        some = self._pairs_of(expert)
        if some.start == some.stop:
            return None
        of_row = (self.of_row[begin:end] - some.start).clamp_(min=-1)
        lists = self.lora_a[some], self.lora_b[some]
        return RowUpdate(*lists, self.scaling[some], of_row, self.pairs[some])

    def gradients_of(self, expert: int, gradients: list[Tensor]) -> list[Tensor]:
        """Those of one expert, of a list of the pairs' or an empty one."""
        return gradients[self._pairs_of(expert)]

    def _pairs_of(self, expert: int) -> slice:
        first = bisect_left(self.pairs, (expert, 0))
        return slice(first, bisect_left(self.pairs, (expert + 1, 0)))


class RowUpdates:
    """The updates of all groups, in their order, for an x in `dtype`."""

    def __init__(self, factors: Factors, experts: int, dtype: torch.dtype) -> None:
        assert factors.ends is not None
        self._factors, self._experts = factors, experts
        self._ends = on_host_numbers(factors.ends)
        self._kept = dtype_of(factors, dtype)
        self._wide = torch.promote_types(dtype, torch.float32)
        self._ranks = factors.ranks(experts)
        self._a = [
            a_by_expert(a, experts).unbind(0) if rank else ()
            for a, rank in zip(factors.lora_a, self._ranks, strict=True)
        ]
        # B_e of the pairs of a block of experts, and the memory of each adapter for the next block.
        self._b: dict[tuple[int, int], Tensor] = {}
        self._block_end = 0
        self._memory: dict[int, Tensor] = {}

    def of(self, group: ExpertGroup) -> RowUpdate | None:
        """None if no row of the group has an adapter on this projection."""
        first, last = _span(group, self._experts)
        pairs, numbers, counts = self._pairs(first, last, group.begin)
        if not pairs:
            return None
        if last > self._block_end:
            self._copy_b(first, max(last, min(first + _BLOCK, self._experts)))
        device = group.offs.device
        scalings = [self._factors.scalings[adapter] for _, adapter in pairs]
        index = torch.repeat_interleave(
            torch.tensor(numbers, dtype=torch.int32, device="cpu"),
            torch.tensor(counts, device="cpu"),
        )
        rest = group.end - group.begin - len(index)
        index = torch.nn.functional.pad(index, (0, rest), value=-1)
        return RowUpdate(
            [self._a[adapter][expert].to(self._kept) for expert, adapter in pairs],
            [self._b[pair] for pair in pairs],
            torch.tensor(scalings, dtype=self._wide, device=device),
            index.to(device),
            pairs,
        )

    def _pairs(
        self, first: int, last: int, begin: int
    ) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """(the pairs with rows of some experts; the pair, or -1, and the number of rows of each run
        of rows)."""
        kinds = len(self._ranks) + 1
        pairs, numbers, counts = [], [], []
        for place in range(first * kinds, last * kinds):
            end = self._ends[place]
            if end == begin:
                continue
            expert, adapter = place // kinds, place % kinds - 1
            has_update = adapter >= 0 and self._ranks[adapter] > 0
            numbers.append(len(pairs) if has_update else -1)
            counts.append(end - begin)
            if has_update:
                pairs.append((expert, adapter))
            begin = end
        return pairs, numbers, counts

    def _copy_b(self, first: int, last: int) -> None:
        """Copies B of the pairs with rows of some experts."""
        begin = self._ends[first * (len(self._ranks) + 1) - 1] if first else 0
        pairs, _, _ = self._pairs(first, last, begin)
        self._b.clear()
        self._block_end = last
        for adapter, hit in _by_adapter(pairs).items():
            lora_b = self._factors.lora_b[adapter]
            numbers = torch.tensor(hit, device=lora_b.device)
            pool = pool_of_b(lora_b, self._experts, numbers, self._memory.get(adapter))
            self._memory.setdefault(adapter, pool)
            pool = pool.to(self._kept)
            for expert, matrix in zip(hit, pool.unbind(0), strict=True):
                self._b[expert, adapter] = matrix


class RowGradients:
    """Gradients of factors in PEFT's layout, from those of the pairs.

    Args:
        wanted_a, wanted_b: for which adapters the gradient is requested.
    """

    def __init__(
        self,
        factors: Factors,
        experts: int,
        wanted_a: Sequence[bool],
        wanted_b: Sequence[bool],
    ) -> None:
        self._experts = experts
        has_all = _have_all(factors, experts)
        self.lora_a = _gradients(factors.lora_a, wanted_a, has_all)
        self.lora_b = _gradients(factors.lora_b, wanted_b, has_all)
        self._a = [
            () if a is None or len(a) == 0 else a_by_expert(a, experts).unbind(0)
            for a in self.lora_a
        ]
        # Of each adapter the experts whose gradient of B_e is not in lora_b yet, and these
        # gradients: those of a block of experts are put into lora_b together.
        self._hit: list[list[int]] = [[] for _ in factors.lora_b]
        self._memory: list[Tensor | None] = [None] * len(factors.lora_b)
        self._block_end = 0

    def targets(self, update: RowUpdate) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors for the gradients of a group's pairs, which `write` is given then; empty lists if
        no gradient is requested."""
        return self._targets_a(update), self._targets_b(update)

    def write(
        self, group: ExpertGroup, update: RowUpdate, lora_a: list[Tensor], lora_b: list[Tensor]
    ) -> None:
        """Takes the gradients of a group's pairs in the tensors of `targets`."""
        for (expert, adapter), part in zip(update.pairs, lora_a, strict=False):
            gradient = self.lora_a[adapter]
            if gradient is not None and gradient.dtype != part.dtype:
                self._a[adapter][expert].copy_(part)

    def copy(
        self, group: ExpertGroup, update: RowUpdate, lora_a: list[Tensor], lora_b: list[Tensor]
    ) -> None:
        """The same in other tensors; empty lists if they are not requested."""
        own_a, own_b = self.targets(update)
        for own, given in zip((*own_a, *own_b), (*lora_a, *lora_b), strict=True):
            own.copy_(given)
        self.write(group, update, own_a, own_b)

    def _targets_a(self, update: RowUpdate) -> list[Tensor]:
        """Rows of the gradients themselves where the dtype is the same."""
        if not is_any(self.lora_a):
            return []
        found = []
        for (expert, adapter), factor in zip(update.pairs, update.lora_a, strict=True):
            gradient = self.lora_a[adapter]
            in_place = gradient is not None and gradient.dtype == factor.dtype
            found.append(self._a[adapter][expert] if in_place else torch.empty_like(factor))
        return found

    def _targets_b(self, update: RowUpdate) -> list[Tensor]:
        """Rows of each adapter's memory for a block of experts."""
        if not is_any(self.lora_b):
            return []
        if update.pairs[-1][0] >= self._block_end:
            self.finish()
            self._block_end = update.pairs[0][0] + _BLOCK
        places: dict[int, list[int]] = {}
        for place, (_, adapter) in enumerate(update.pairs):
            places.setdefault(adapter, []).append(place)
        found = list(update.lora_b)  # of the same shapes
        for adapter, own in places.items():
            memory = self._memory_for(adapter, len(own), found[own[0]])
            hit = self._hit[adapter]
            for place, matrix in zip(own, memory[len(hit) :].unbind(0), strict=False):
                found[place] = matrix
            hit += [update.pairs[place][0] for place in own]
        return found

    def _memory_for(self, adapter: int, count: int, like: Tensor) -> Tensor:
        """Memory with room for so many matrices more."""
        memory, used = self._memory[adapter], len(self._hit[adapter])
        if memory is None or len(memory) < used + count:
            self._put(adapter)
            memory = like.new_empty(max(_BLOCK, count), *like.shape)
            self._memory[adapter] = memory
        return memory

    def finish(self) -> None:
        """To be called after the last group."""
        for adapter in range(len(self._hit)):
            self._put(adapter)

    def _put(self, adapter: int) -> None:
        gradient, memory, hit = self.lora_b[adapter], self._memory[adapter], self._hit[adapter]
        if gradient is not None and memory is not None and hit:
            numbers = torch.tensor(hit, device=gradient.device)
            put_b(gradient, self._experts, numbers, memory[: len(hit)])
        hit.clear()


def _have_all(factors: Factors, experts: int) -> list[bool]:
    """For each adapter, whether it has rows of every expert."""
    assert factors.ends is not None
    ends = factors.ends.cpu()
    counts = ends.diff(prepend=ends.new_zeros(1)).view(experts, -1)
    return (counts > 0).all(0)[1:].tolist()


def _gradients(
    factors: Sequence[Tensor], wanted: Sequence[bool], has_all: list[bool]
) -> list[Tensor | None]:
    """Zeros where not all experts will be written."""
    found: list[Tensor | None] = []
    for factor, wants, is_whole in zip(factors, wanted, has_all, strict=True):
        make = torch.empty_like if is_whole else torch.zeros_like
        found += made(make, [factor], [wants])
    return found


def _span(group: ExpertGroup, experts: int) -> tuple[int, int]:
    """(first, last + 1) of a group's experts."""
    if group.experts is None:
        return 0, experts
    return group.experts[0][0], group.experts[-1][0] + 1


def _by_adapter(pairs: list[tuple[int, int]]) -> dict[int, list[int]]:
    """The experts of each adapter."""
    found: dict[int, list[int]] = {}
    for expert, adapter in pairs:
        found.setdefault(adapter, []).append(expert)
    return found
