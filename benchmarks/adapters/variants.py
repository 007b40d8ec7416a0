"""The ways to compute a mixed batch that are compared, and the floors below them.

All take x [rows, K] and give y [rows, N]. `loop` is the structure of PEFT's mixed batch, which has
no training: the base once, then for each adapter the rows that are its own. `grouped` is that of
Megatron-Bridge, two grouped products on stacked factors; `gather` that of vLLM on a CPU, a copy of
the factors for each row. `bmm` takes as many rows of each adapter, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import STEP
from ..variants import Look, Unavailable, Variant, floor_of
from .batch import SCALING, Batch
from .cases import Case

_MOST_MODULES = 64  # of PEFT, which takes 0.1 s to make an adapter

# Colours are those of variants of one linear.
LOOKS = {
    "merged": Look("merged"),
    "frozen": Look("frozen"),
    "ours": Look("ours", "ours", "o"),
    "ours_offs": Look("ours, ranges", "ours_fp32", "s"),
    "ours_pool": Look("ours, a pool", "ours_packed", "D"),
    "ours_kernel": Look("ours, kernel route", "ours_library", "X"),
    "one": Look("one adapter", "frozen", "^"),
    "peft": Look("PEFT", "peft", "o"),
    "loop": Look("loop", "peft_default", "s"),
    "loop_ours": Look("loop of ours", "loralib", "v"),
    "grouped": Look("grouped_mm", "unsloth", "P"),
    "gather": Look("gather", "compiled", "X"),
    "bmm": Look("bmm", "naive", "d"),
}
LABELS = {name: look.label for name, look in LOOKS.items()}
OURS = ("ours", "ours_offs", "ours_pool", "ours_kernel")
PEERS = ("peft", "loop", "loop_ours", "grouped", "gather", "bmm")


def _base(batch: Batch, dropout_p: float) -> Variant:
    """merged and frozen: a product of the same size."""
    return Variant(lambda x: F.linear(x, batch.weight))


def _ours(batch: Batch, dropout_p: float, in_ranges: bool = False, route: str = "") -> Variant:
    """Lists of factors; whose the rows are by an index, or by the ends of ranges."""
    from lora_ext import lora_linear

    if in_ranges and batch.case.layout == "mixed":
        raise Unavailable("the rows of an adapter do not lie together")
    a, b = batch.factors()
    rest = (batch.weight, a, b, None, batch.scaling, dropout_p)
    rows = {"offs": batch.offs} if in_ranges else {"index": batch.index}
    return Variant(lambda x: lora_linear(x, *rest, **rows), (*a, *b), route=route)


def _ours_kernel(batch: Batch, dropout_p: float) -> Variant:
    """On our own kernels alone (CUDA), by ranges where there are some."""
    return _ours(batch, dropout_p, batch.case.layout == "ranges", route="kernel")


def _ours_pool(batch: Batch, dropout_p: float) -> Variant:
    """With free slots where the case has room for more adapters."""
    from lora_ext import lora_linear

    a, b = batch.pools()
    scaling, ranks = batch.scaling, None
    free = batch.case.capacity - batch.case.adapters
    if free > 0:
        a, b = (torch.cat([t, t.new_zeros(free, *t.shape[1:])]) for t in (a, b))
        ranks = F.pad(torch.full_like(scaling, batch.case.rank), (0, free)).int()
        scaling = F.pad(scaling, (0, free))
    rest = (batch.weight, a, b, None, scaling, dropout_p)
    return Variant(lambda x: lora_linear(x, *rest, index=batch.index, ranks=ranks), (a, b))


def _one(batch: Batch, dropout_p: float) -> Variant:
    """The op with one adapter for all rows."""
    from lora_ext import lora_linear

    wanted = batch.case.mode == STEP
    a, b = (t[0].clone().requires_grad_(wanted) for t in (batch.lora_a, batch.lora_b))
    rest = (batch.weight, a, b, None, SCALING, dropout_p)
    return Variant(lambda x: lora_linear(x, *rest), (a, b))


def _peft(batch: Batch, dropout_p: float) -> Variant:
    """PEFT's own layer with a name for each row, or sample."""
    if batch.case.mode == STEP:
        raise Unavailable("PEFT refuses a mixed batch in training")
    if batch.case.tokens == 0:
        raise Unavailable("a name is a sample's, and here its tokens differ")
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
    tokens = batch.case.tokens
    names = [str(g) for g in batch.index[::tokens].tolist()]
    lead = (len(names), tokens) if tokens > 1 else (len(names),)

    def call(x: Tensor) -> Tensor:
        return layer(x.view(*lead, -1), adapter_names=names).view(x.shape)

    return Variant(call, no_graph="PEFT makes its lists of rows on the host")


def _loop(batch: Batch, dropout_p: float) -> Variant:
    a, b = batch.factors()
    rows = [(batch.index == g).nonzero().flatten() for g in range(batch.case.adapters)]
    places = torch.cat(rows)

    def call(x: Tensor) -> Tensor:
        y = F.linear(x, batch.weight)
        parts = []
        for own, first, second in zip(rows, a, b, strict=True):
            dropped = F.dropout(x[own], dropout_p) if dropout_p else x[own]
            parts.append(F.linear(F.linear(dropped, first), second) * SCALING)
        return y.index_add(0, places, torch.cat(parts))

    return Variant(call, (*a, *b))


def _loop_ours(batch: Batch, dropout_p: float) -> Variant:
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

    return Variant(call, (*a, *b))


def _in_order(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """How to bring rows into the adapters' order, and back."""
    if batch.case.layout == "ranges":
        return None
    order = batch.index.argsort(stable=True)
    return order, order.argsort()


def _grouped(batch: Batch, dropout_p: float) -> Variant:
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None or batch.case.dtype != "bfloat16":
        raise Unavailable("torch has grouped_mm for bfloat16 alone")
    on_gpu = batch.case.device == "cuda"
    if on_gpu and batch.case.mode == STEP and batch.case.rows % (8 * batch.case.adapters):
        raise Unavailable("on CUDA torch may assert ranges of 16 bytes in its gradients")
    a, b = batch.pools()
    order = _in_order(batch)

    def call(x: Tensor) -> Tensor:
        dropped = F.dropout(x, dropout_p) if dropout_p else x
        dropped = dropped if order is None else dropped[order[0]]
        s = product(dropped, a.transpose(1, 2), offs=batch.offs)
        update = product(s, b.transpose(1, 2), offs=batch.offs)
        update = update if order is None else update[order[1]]
        return F.linear(x, batch.weight).add_(update, alpha=SCALING)

    return Variant(call, (a, b))


def _gather(batch: Batch, dropout_p: float) -> Variant:
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

    return Variant(call)


def _bmm(batch: Batch, dropout_p: float) -> Variant:
    case = batch.case
    if case.rows % case.adapters or case.layout == "mixed":
        raise Unavailable("the adapters do not have as many rows each, in order")
    a, b = batch.pools()
    shape = (case.adapters, case.rows // case.adapters, case.width)

    def call(x: Tensor) -> Tensor:
        dropped = F.dropout(x, dropout_p) if dropout_p else x
        update = dropped.view(shape) @ a.transpose(1, 2) @ b.transpose(1, 2)
        return F.linear(x, batch.weight).add_(update.view(x.shape), alpha=SCALING)

    return Variant(call, (a, b))


BUILDERS: dict[str, Callable[[Batch, float], Variant]] = {
    "merged": _base,
    "frozen": _base,
    "ours": _ours,
    "ours_offs": partial(_ours, in_ranges=True),
    "ours_pool": _ours_pool,
    "ours_kernel": _ours_kernel,
    "one": _one,
    "peft": _peft,
    "loop": _loop,
    "loop_ours": _loop_ours,
    "grouped": _grouped,
    "gather": _gather,
    "bmm": _bmm,
}


def names_for(case: Case) -> list[str]:
    """The variants measured in a case, in the order of the tables."""
    left_out = {"merged", "frozen"} - {floor_of(case.mode)}
    left_out |= set() if case.device == "cuda" else {"ours_kernel"}
    return [name for name in BUILDERS if name not in left_out]
