"""The ways to compute a mixed batch that are compared, and the floors below them.

All take x [rows, K] and give y [rows, N]. `loop` is the structure of PEFT's mixed batch, which has
no training: the base once, then for each adapter the rows that are its own. `grouped` is that of
Megatron-Bridge, two grouped products on stacked factors; `gather` that of vLLM on a CPU, a copy of
the factors for each row. `bmm` takes as many rows of each adapter, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import FORWARD, STEP
from ..variants import Unavailable
from .cases import Case

SCALING = 2.0
_ROTATED_BYTES = 32 << 20
_MOST_MODULES = 64  # of PEFT, which takes 0.1 s to make an adapter

LABELS = {
    "merged": "merged",
    "frozen": "frozen",
    "ours": "ours",
    "ours_pool": "ours, a pool",
    "one": "one adapter",
    "peft": "PEFT",
    "loop": "loop",
    "loop_ours": "loop of ours",
    "grouped": "grouped_mm",
    "gather": "gather",
    "bmm": "bmm",
}
PEERS = ("peft", "loop", "loop_ours", "grouped", "gather", "bmm")


@dataclass
class Batch:
    """The tensors of one case."""

    case: Case
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [G, r, K]
    lora_b: Tensor  # [G, N, r]
    index: Tensor  # int32 [rows]
    inputs: list[Tensor]
    grads: list[Tensor]

    @cached_property
    def scaling(self) -> Tensor:
        return torch.full((self.case.adapters,), SCALING)

    @cached_property
    def offs(self) -> Tensor:
        """Ends of the adapters' rows, which lie together."""
        return self.index.bincount(minlength=self.case.adapters).cumsum(0).int()

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves, one matrix of each for each adapter."""
        wanted = self.case.mode == STEP
        return tuple(
            [matrix.clone().requires_grad_(wanted) for matrix in pool]
            for pool in (self.lora_a, self.lora_b)
        )

    def pools(self) -> tuple[Tensor, Tensor]:
        wanted = self.case.mode == STEP
        return tuple(t.clone().requires_grad_(wanted) for t in (self.lora_a, self.lora_b))

    def rotation(self) -> Iterator[tuple[Tensor, Tensor]]:
        return cycle(list(zip(self.inputs, self.grads, strict=True)))


def make_batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    k = n = case.width

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(std).to(dtype)

    index = torch.arange(case.rows) * case.adapters // case.rows
    if case.layout == "mixed":
        index = index[torch.randperm(case.rows, generator=generator)]
    step = case.mode == STEP
    copies = max(3, min(16, _ROTATED_BYTES // (case.rows * k * dtype.itemsize)))
    return Batch(
        case,
        weight=normal(n, k, std=k**-0.5),
        lora_a=normal(case.adapters, case.rank, k, std=k**-0.5),
        lora_b=normal(case.adapters, n, case.rank, std=case.rank**-0.5),
        index=index.int(),
        inputs=[normal(case.rows, k).requires_grad_(step) for _ in range(copies)],
        grads=[normal(case.rows, n) if step else torch.empty(0) for _ in range(copies)],
    )


@dataclass
class Way:
    """y = call(x); leaves: what has a gradient beside x."""

    call: Callable[[Tensor], Tensor]
    leaves: list[Tensor]


def _base(batch: Batch, dropout_p: float) -> Way:
    """merged and frozen: a product of the same size."""
    return Way(lambda x: F.linear(x, batch.weight), [])


def _ours(batch: Batch, dropout_p: float) -> Way:
    from lora_ext import lora_linear

    a, b = batch.factors()
    rest = (batch.weight, a, b, None, batch.scaling, dropout_p)
    return Way(lambda x: lora_linear(x, *rest, index=batch.index), [*a, *b])


def _ours_pool(batch: Batch, dropout_p: float) -> Way:
    from lora_ext import lora_linear

    a, b = batch.pools()
    rest = (batch.weight, a, b, None, batch.scaling, dropout_p)
    return Way(lambda x: lora_linear(x, *rest, index=batch.index), [a, b])


def _one(batch: Batch, dropout_p: float) -> Way:
    """The op with one adapter for all rows."""
    from lora_ext import lora_linear

    wanted = batch.case.mode == STEP
    a, b = (t[0].clone().requires_grad_(wanted) for t in (batch.lora_a, batch.lora_b))
    rest = (batch.weight, a, b, None, SCALING, dropout_p)
    return Way(lambda x: lora_linear(x, *rest), [a, b])


def _peft(batch: Batch, dropout_p: float) -> Way:
    """PEFT's own layer with a name for each row."""
    if batch.case.mode == STEP:
        raise Unavailable("PEFT refuses a mixed batch in training")
    if batch.case.adapters > _MOST_MODULES:
        raise Unavailable(f"more than {_MOST_MODULES} adapters")
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    model = nn.ModuleDict({"proj": nn.Linear(batch.case.width, batch.case.width, bias=False)})
    model["proj"].weight = nn.Parameter(batch.weight, requires_grad=False)
    config = LoraConfig(
        r=batch.case.rank, lora_alpha=SCALING * batch.case.rank, target_modules=["proj"]
    )
    for g in range(batch.case.adapters):
        inject_adapter_in_model(config, model, str(g))
    layer = model["proj"].eval()
    for g in range(batch.case.adapters):
        layer.lora_A[str(g)].weight.data = batch.lora_a[g]
        layer.lora_B[str(g)].weight.data = batch.lora_b[g]
    names = [str(g) for g in batch.index.tolist()]
    return Way(lambda x: layer(x, adapter_names=names), [])


def _loop(batch: Batch, dropout_p: float) -> Way:
    a, b = batch.factors()
    rows = [(batch.index == g).nonzero().flatten() for g in range(batch.case.adapters)]

    def call(x: Tensor) -> Tensor:
        y = F.linear(x, batch.weight)
        parts = [x]
        for own, first, second in zip(rows, a, b, strict=True):
            dropped = F.dropout(x[own], dropout_p) if dropout_p else x[own]
            parts.append(F.linear(F.linear(dropped, first), second) * SCALING)
        return y.index_add(0, torch.cat(rows), torch.cat(parts[1:]))

    return Way(call, [*a, *b])


def _loop_ours(batch: Batch, dropout_p: float) -> Way:
    """The op, adapter by adapter, each on rows of its own."""
    from lora_ext import lora_linear

    if batch.case.layout == "mixed":
        raise Unavailable("the rows of an adapter do not lie together")
    a, b = batch.factors()
    ends = [0, *batch.offs.tolist()]

    def call(x: Tensor) -> Tensor:
        parts = [
            lora_linear(x[begin:end], batch.weight, first, second, None, SCALING, dropout_p)
            for begin, end, first, second in zip(ends, ends[1:], a, b, strict=False)
        ]
        return torch.cat(parts)

    return Way(call, [*a, *b])


def _in_order(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """How to bring rows into the adapters' order, and back."""
    if batch.case.layout == "ranges":
        return None
    order = batch.index.argsort(stable=True)
    return order, order.argsort()


def _grouped(batch: Batch, dropout_p: float) -> Way:
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None or batch.case.dtype != "bfloat16":
        raise Unavailable("torch has grouped_mm for bfloat16 alone")
    a, b = batch.pools()
    order = _in_order(batch)

    def call(x: Tensor) -> Tensor:
        dropped = F.dropout(x, dropout_p) if dropout_p else x
        dropped = dropped if order is None else dropped[order[0]]
        s = product(dropped, a.transpose(1, 2), offs=batch.offs)
        update = product(s, b.transpose(1, 2), offs=batch.offs)
        update = update if order is None else update[order[1]]
        return F.linear(x, batch.weight).add_(update, alpha=SCALING)

    return Way(call, [a, b])


def _gather(batch: Batch, dropout_p: float) -> Way:
    case = batch.case
    copies = case.rows * case.rank * case.width * batch.weight.itemsize
    if case.mode == STEP:
        raise Unavailable("as in vLLM, forward alone")
    if copies > 1 << 28:
        raise Unavailable("a copy of the factors for each row would take more than 256 MiB")
    index = batch.index.long()

    def call(x: Tensor) -> Tensor:
        s = torch.einsum("mk,mrk->mr", x, batch.lora_a[index])
        update = torch.einsum("mr,mnr->mn", s, batch.lora_b[index])
        return F.linear(x, batch.weight).add_(update, alpha=SCALING)

    return Way(call, [])


def _bmm(batch: Batch, dropout_p: float) -> Way:
    case = batch.case
    if case.rows % case.adapters or case.layout == "mixed":
        raise Unavailable("the adapters do not have as many rows each, in order")
    a, b = batch.pools()
    shape = (case.adapters, case.rows // case.adapters, case.width)

    def call(x: Tensor) -> Tensor:
        dropped = F.dropout(x, dropout_p) if dropout_p else x
        update = dropped.view(shape) @ a.transpose(1, 2) @ b.transpose(1, 2)
        return F.linear(x, batch.weight).add_(update.view(x.shape), alpha=SCALING)

    return Way(call, [a, b])


def floor_of(mode: str) -> str:
    return "merged" if mode == FORWARD else "frozen"


BUILDERS: dict[str, Callable[[Batch, float], Way]] = {
    "merged": _base,
    "frozen": _base,
    "ours": _ours,
    "ours_pool": _ours_pool,
    "one": _one,
    "peft": _peft,
    "loop": _loop,
    "loop_ours": _loop_ours,
    "grouped": _grouped,
    "gather": _gather,
    "bmm": _bmm,
}
