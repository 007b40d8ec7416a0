"""Converts PEFT's factors of experts to pools of the grouped op, and the pools' gradients back.

    lora_A [E r, in]     A_e = rows e r .. (e + 1) r       already a pool
    lora_B [out, r E]    B_e = columns e, e + E, ...       the expert is fastest: copied into a pool

Several adapters that all rows have become one adapter with the sum of their ranks; rows with
adapters of their own are in `row_factors`. Only experts with rows are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import HALVES
from .expert_groups import ExpertGroup

_ops = torch.ops.lora_ext


class Factors(NamedTuple):
    """The adapters of one projection.

    Attributes:
        lora_a, lora_b: one tensor for each adapter, in PEFT's layout.
        scalings: one number for each adapter.
        ends: of the routes: each row has one of the adapters, or none; None: it has all. An adapter
            that is not on this projection then has rank 0.
    """

    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scalings: Sequence[float]
    ends: Tensor | None = None

    def scaling(self, dtype: torch.dtype) -> float | None:
        """The op's scaling for all adapters; None if each scaling is multiplied into its B: they
        differ, or x is wider than the op's float32 scaling."""
        first = self.scalings[0]
        is_one = all(scaling == first for scaling in self.scalings)
        return first if is_one and (dtype != torch.float64 or first == 1.0) else None

    def ranks(self, experts: int) -> list[int]:
        """The rank of one expert, for each adapter."""
        return [len(a) // experts for a in self.lora_a]

    def rank(self, experts: int) -> int:
        """The number of columns of S = drop(x) A^T: all ranks, or the largest if each row has one
        of the adapters."""
        ranks = self.ranks(experts)
        return sum(ranks) if self.ends is None else max(ranks)


class Pools(NamedTuple):
    """The update of a group's rows, as the grouped op takes it.

    Attributes:
        lora_a: ``[n, R, in]``.
        lora_b: ``[n, out, R]``.
        scaling: ``[n]`` float32, all elements equal.
        offs: int32 ``[n]``, the end of the rows of each, counted from the first row of the group.
        experts: the number of each; empty if it is known only on the device.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    offs: Tensor
    experts: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Those of the op, besides x; dropout is applied to rows beforehand."""
        lists = {"lora_a": [self.lora_a], "lora_b": [self.lora_b]}
        return {**lists, "scaling": self.scaling, "offs": self.offs}

    @property
    def rank(self) -> int:
        """The number of columns of S."""
        return self.lora_a.shape[1]

    def part(self, expert: int, begin: int, end: int) -> Pools:
        """The update of one expert's rows alone."""
        one = self._place(expert)
        offs = self.offs[one] - begin
        return Pools(self.lora_a[one], self.lora_b[one], self.scaling[one], offs, (expert,))

    def gradients_of(self, expert: int, gradients: list[Tensor]) -> list[Tensor]:
        """Those of one expert, of a list of the pool's or an empty one."""
        return [each[self._place(expert)] for each in gradients]

    def _place(self, expert: int) -> slice:
        place = self.experts.index(expert)
        return slice(place, place + 1)


class Updates:
    """The updates of all groups, for an x in `dtype`."""

    def __init__(self, factors: Factors, experts: int, dtype: torch.dtype) -> None:
        self._given = factors, experts, dtype

    def of(self, group: ExpertGroup) -> Pools:
        factors, experts, dtype = self._given
        return pools_of(factors, experts, group, dtype)


def pools_of(factors: Factors, experts: int, group: ExpertGroup, dtype: torch.dtype) -> Pools:
    """The factors of a group's experts as pools, for an x in `dtype`."""
    kept, hit = dtype_of(factors, dtype), group.hit
    first = [some(a_by_expert(a, experts), hit).to(kept) for a in factors.lora_a]
    second = [pool_of_b(b, experts, hit).to(kept) for b in factors.lora_b]
    scaling = factors.scaling(dtype)
    if scaling is None:
        second = [b * scaling for b, scaling in zip(second, factors.scalings, strict=True)]
        scaling = 1.0
    lora_a = first[0] if len(first) == 1 else torch.cat(first, 1)
    lora_b = second[0] if len(second) == 1 else torch.cat(second, 2)
    scalings = torch.full((len(lora_a),), scaling, dtype=torch.float32, device=lora_a.device)
    numbers = tuple(expert for expert, _, _ in group.experts or ())
    return Pools(lora_a, lora_b, scalings, group.offs, numbers)


def dtype_of(factors: Factors, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the pools: one that the op supports with x and that rounds no factor to half."""
    is_same = all(factor.dtype == dtype for factor in (*factors.lora_a, *factors.lora_b))
    is_op_scaling = factors.ends is not None or factors.scaling(dtype) is not None
    if dtype in HALVES and not (is_same and is_op_scaling):
        return torch.float32
    return dtype


class Gradients:
    """Gradients of factors in PEFT's layout; the gradients of pools are written into them.

    Args:
        dtype: of x.
        wanted_a, wanted_b: for which adapters the gradient is requested.
        has_all: whether every expert will be written; if not, the others have zeros.
    """

    def __init__(
        self,
        factors: Factors,
        experts: int,
        dtype: torch.dtype,
        wanted_a: Sequence[bool],
        wanted_b: Sequence[bool],
        has_all: bool,
    ) -> None:
        make = torch.empty_like if has_all else torch.zeros_like
        self._factors, self._experts = factors, experts
        self._is_in_b = factors.scaling(dtype) is None
        self.lora_a = made(make, factors.lora_a, wanted_a)
        self.lora_b = made(make, factors.lora_b, wanted_b)

    def write(
        self, group: ExpertGroup, update: Pools, lora_a: list[Tensor], lora_b: list[Tensor]
    ) -> None:
        """Writes the gradients of a group's pools, lists of one or empty, if requested."""
        self._write(group.hit, lora_a[0] if lora_a else None, lora_b[0] if lora_b else None)

    copy = write  # of tensors that `targets` has not made

    def targets(self, update: Pools) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors for the gradients of a group's pools, which `write` is given then; empty lists if
        no gradient is requested."""
        return (
            [torch.empty_like(update.lora_a)] if is_any(self.lora_a) else [],
            [torch.empty_like(update.lora_b)] if is_any(self.lora_b) else [],
        )

    def finish(self) -> None:
        """To be called after the last group."""

    def _write(self, hit: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
        begin = 0
        for i, of_a in enumerate(self.lora_a):
            rank = len(self._factors.lora_a[i]) // self._experts
            ranks, begin = slice(begin, begin + rank), begin + rank
            of_b = self.lora_b[i]
            if of_a is not None and lora_a is not None:
                _put(a_by_expert(of_a, self._experts), hit, lora_a[:, ranks])
            if of_b is not None and lora_b is not None:
                part = lora_b[:, :, ranks]
                if self._is_in_b:
                    part = part * self._factors.scalings[i]
                put_b(of_b, self._experts, hit, part)


def is_any(gradients: Sequence[Tensor | None]) -> bool:
    return any(each is not None for each in gradients)


def made(make, factors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    contiguous = torch.contiguous_format
    return [
        make(factor, memory_format=contiguous) if wants else None
        for factor, wants in zip(factors, wanted, strict=True)
    ]


def a_by_expert(lora_a: Tensor, experts: int) -> Tensor:
    """``[E, r, in]``, a view where the factor is contiguous."""
    return lora_a.reshape(experts, -1, lora_a.shape[1])


def b_by_expert(lora_b: Tensor, experts: int) -> Tensor:
    """``[E, out, r]``, a view where the factor is contiguous."""
    return lora_b.reshape(len(lora_b), -1, experts).permute(2, 0, 1)


def some(by_expert: Tensor, hit: Tensor | None) -> Tensor:
    return by_expert if hit is None else by_expert.index_select(0, hit)


def pool_of_b(
    lora_b: Tensor, experts: int, hit: Tensor | None, memory: Tensor | None = None
) -> Tensor:
    """``[n, out, r]``, contiguous.

    Args:
        memory: a pool that is no longer used, which may be overwritten.
    """
    if lora_b.is_cpu:
        numbers = _numbers(experts, hit)
        if memory is not None and len(memory) >= len(numbers):
            pool = memory[: len(numbers)]
        else:
            pool = lora_b.new_empty(len(numbers), len(lora_b), lora_b.shape[1] // experts)
        _ops.experts_copy(pool, lora_b.contiguous(), numbers, experts)
        return pool
    return some(b_by_expert(lora_b, experts), hit).contiguous()


def _put(by_expert: Tensor, hit: Tensor | None, part: Tensor) -> None:
    if hit is None:
        by_expert.copy_(part)
    else:
        by_expert.index_copy_(0, hit, part.to(by_expert.dtype))


def put_b(gradient: Tensor, experts: int, hit: Tensor | None, part: Tensor) -> None:
    """Writes ``[n, out, r]`` into a gradient of PEFT's layout."""
    if gradient.is_cpu:
        part = part.to(gradient.dtype).contiguous()
        _ops.experts_copy(gradient, part, _numbers(experts, hit), experts)
    else:
        _put(b_by_expert(gradient, experts), hit, part)


def _numbers(experts: int, hit: Tensor | None) -> Tensor:
    return torch.arange(experts, device="cpu") if hit is None else hit
