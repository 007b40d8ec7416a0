"""Sorts the rows that a router chose by expert, and sums them back by token.

    S = T k rows; sorted row j is slot perm[j] % k of token perm[j] // k
    expert e has the sorted rows from offs[e - 1] to offs[e]

Where rows have adapters of their own, the rows of an expert are sorted by adapter: those without
one first. So one order serves the base's products and the updates.

A number that is no expert, such as E, which expert parallelism gives to the slots of other ranks,
or -1, is sorted to the end, after offs[-1]: those rows are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import HALVES
from .devices import has_kernels

_ops = torch.ops.lora_ext

# Elements in a block of tokens: 1 MiB of float32, which stays in a core's cache; on a GPU 64 MiB.
_CPU_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 24


class Routes(NamedTuple):
    """Attributes:
    perm: ``[S]`` int64, the flat slot of each sorted row.
    token: ``[S]`` int64, its token.
    offs: ``[E]`` int32.
    ends: ``[E (n + 1)]`` int32, the end of the rows of each expert and each of n adapters: of an
        expert that of its rows without an adapter, then of adapter 0, 1, ...; None if all rows
        have the same adapters.
    place: ``[S]`` int32, the sorted row of each flat slot, if the kernels of a GPU have sorted
        them: perm and token are int32, too. Else None.
    tables: bytes, what the kernels' products read of them, if `place` is there.
    """

    perm: Tensor
    token: Tensor
    offs: Tensor
    ends: Tensor | None = None
    place: Tensor | None = None
    tables: Tensor | None = None

    @property
    def kind_ends(self) -> Tensor:
        """The end of the rows of each expert and kind: those of an expert with the same adapter."""
        return self.offs if self.ends is None else self.ends

    @property
    def kinds(self) -> int:
        """How many kinds of rows an expert has: n + 1, or 1 if all have the same adapters."""
        return len(self.kind_ends) // len(self.offs)


def routes_of(
    top_k_index: Tensor, experts: int, adapter_index: Tensor | None = None, adapters: int = 0
) -> Routes:
    """The routes for expert numbers ``[T, k]``; the slots of one expert and adapter keep their
    order.

    Args:
        adapter_index: ``[T]`` integers, from 0 to adapters - 1; any other is the base alone. None:
            all rows have the same adapters.
    """
    is_known = top_k_index.dtype in (torch.int32, torch.int64)
    ids, kinds = top_k_index if is_known else top_k_index.long(), 1
    if adapter_index is not None:
        kinds = adapters + 1
        own = adapter_index.long() + 1
        own = own.masked_fill((own < 0) | (own >= kinds), 0)[:, None]
        # Clamped, so that the product cannot overflow: a number that is no expert may be any.
        ids = ids.clamp(-1, experts).long() * kinds + own
    place = tables = None
    groups = experts * kinds
    if has_kernels(top_k_index.device):
        perm, token, place, ends, tables = _ops.experts_routes(ids, groups, kinds)
    else:
        ids = ids.long()
        ids = ids.masked_fill(ids < 0, groups)  # which would be sorted to the first expert
        ids, perm = torch.sort(ids.reshape(-1), stable=True)
        numbers = torch.arange(groups, device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(ids, numbers, right=True, out_int32=True)
        token = perm // top_k_index.shape[-1]
    if adapter_index is None:
        return Routes(perm, token, ends, None, place, tables)
    offs = ends.view(experts, kinds)[:, -1].contiguous()
    return Routes(perm, token, offs, ends, place, tables)


def example_routes(device: torch.device, experts: int, rows: int, is_by_row: bool) -> Routes:
    """Those of some rows for each expert, as far as the choice of a way reads them."""
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device="cpu") * rows
    order = offs[:1].expand(experts * rows)
    ends = offs.repeat_interleave(2) if is_by_row else None
    return Routes(order, order, offs, ends, order if has_kernels(device) else None)


def for_kernels(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous numbers beside rows of a dtype: in it or in float32, which the kernels take."""
    is_known = numbers.dtype in (dtype, torch.float32)
    return (numbers if is_known else numbers.float()).contiguous()


def places_of(routes: Routes) -> Tensor:
    """The sorted row of each flat slot: the inverse of perm."""
    perm = routes.perm
    if routes.place is not None:
        return routes.place
    places = torch.empty_like(perm)
    places[perm] = torch.arange(perm.shape[0], device=perm.device)
    return places


def by_slot(of_rows: Tensor, like: Tensor, routes: Routes) -> Tensor:
    """Numbers of sorted rows by flat slot, as a tensor like another one."""
    found = torch.empty_like(like)
    found[routes.perm] = of_rows.to(like.dtype)
    return found


def sum_of_slots(rows: Tensor, routes: Routes, weights: Tensor | None, slots: int) -> Tensor:
    """out[t] = sum over t's slots of weight * row, in the slots' order; ``[T, n]``.

    Args:
        rows: ``[S, n]``, sorted.
        routes: their order.
        weights: ``[S]`` in the slots' order, or None for 1.
        slots: k.

    The sum is computed in at least float32 and rounded once to the dtype of the rows.
    """
    if routes.place is not None and rows.dtype in HALVES:
        if weights is not None:
            weights = for_kernels(weights, rows.dtype)
        return _ops.experts_sum(rows, routes.place, routes.offs, weights, slots)
    place = places_of(routes)
    tokens, width = len(place) // slots, rows.shape[1]
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_empty(tokens, width)
    block = _CPU_BLOCK if rows.is_cpu else _GPU_BLOCK
    step = max(1, block // max(1, slots * width))
    for begin in range(0, tokens, step):
        part = slice(begin * slots, (begin + step) * slots)
        block_rows = rows[place[part]].view(-1, slots, width)
        if weights is not None:
            block_rows = block_rows * weights[part].view(-1, slots, 1).to(wide)
        out[begin : begin + step] = block_rows.sum(1, dtype=wide)
    return out
