"""The FLOPs that `torch.utils.flop_counter.FlopCounterMode` counts for our ops: 2 for each
multiply-add of the base product and of the products with the factors, as torch counts a matrix
product; nothing for dropout, biases and sums.

    forward    rows (2 in out + 2 r (in + out))
    backward   the same for dX, and 2 r in and 2 r out more for each of dlora_a and dlora_b

With many adapters each row counts with the rank of its adapter, if the values of the index are
known; in a traced program they are not, and each row counts with the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .quantized.stacks import weight_from_flat
from .torch_state import FakeTensor

_ops = torch.ops.lora_ext


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _forward(x: Tensor, out: int, base: bool, ranks: int) -> int:
    """ranks: summed over rows."""
    in_features = x.shape[-1]
    products = 2 * _rows(x) * in_features * out if base else 0
    return products + 2 * ranks * (in_features + out)


def _backward(x: Tensor, out: int, base: bool, ranks: int, ranks_a: int, ranks_b: int, dx: bool):
    """ranks, ranks_a, ranks_b: all ranks, and those of the adapters for which the gradient of
    lora_a or of lora_b is requested, summed over rows."""
    in_features = x.shape[-1]
    flops = 2 * _rows(x) * in_features * out if base and dx else 0
    flops += 2 * (ranks if dx else ranks_a) * out  # dS
    flops += 2 * ranks * in_features if dx else 0
    return flops + 2 * ranks_a * in_features + 2 * ranks_b * out


def _has_values(tensor: Tensor) -> bool:
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def _ranks(
    x: Tensor, lora_a: Sequence[Tensor], index: Tensor | None, offs: Tensor | None, ranks: Any
) -> list[int]:
    """For each adapter, its rank times its number of rows; a single adapter has all rows."""
    where = index if index is not None else offs
    assert where is not None
    is_pool = lora_a[0].dim() == 3
    count = len(lora_a[0]) if is_pool else len(lora_a)
    each = [lora_a[0].shape[1]] * count if is_pool else [a.shape[0] for a in lora_a]
    if not _has_values(where) or not (ranks is None or _has_values(ranks)):
        return [max(each) * _rows(x)] + [0] * (count - 1)
    if ranks is not None:
        each = ranks.tolist()
    if index is not None:
        index = index.flatten()
        rows = torch.bincount(index[index >= 0].long(), minlength=count).tolist()
    else:
        ends = where.tolist()
        rows = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return [rank * n for rank, n in zip(each, rows, strict=True)]


def _wanted(ranks: list[int], wanted: Sequence[bool]) -> int:
    wanted = list(wanted) * len(ranks) if len(wanted) == 1 else wanted
    return sum(rank for rank, wants in zip(ranks, wanted, strict=True) if wants)


@register_flop_formula([_ops.lora, _ops.lora_forward], get_raw=True)
def _(x, weight, y, lora_a, *_, **__) -> int:
    out = y.shape[-1] if weight is None else weight.shape[0]
    return _forward(x, out, weight is not None, _rows(x) * lora_a.shape[0])


@register_flop_formula(_ops.lora_backward, get_raw=True)
def _(grad, s, wanted, x, weight, y, lora_a, *_, **__) -> int:
    dx, da, db, _bias = wanted
    ranks = _rows(x) * lora_a.shape[0]
    return _backward(x, grad.shape[-1], weight is not None, ranks, ranks * da, ranks * db, dx)


@register_flop_formula([_ops.lora_grouped, _ops.lora_grouped_forward], get_raw=True)
def _(x, weight, y, lora_a, lora_b, scaling, index=None, offs=None, ranks=None, *_, **__) -> int:
    out = y.shape[-1] if weight is None else weight.shape[0]
    return _forward(x, out, weight is not None, sum(_ranks(x, lora_a, index, offs, ranks)))


@register_flop_formula(_ops.lora_grouped_backward, get_raw=True)
def _(
    grad, s, wanted, wanted_a, wanted_b, x, weight, y, lora_a, lora_b, scaling, index=None,
    offs=None, ranks=None, *_, **__
) -> int:  # fmt: skip
    each = _ranks(x, lora_a, index, offs, ranks)
    wants = (_wanted(each, wanted_a), _wanted(each, wanted_b))
    return _backward(x, grad.shape[-1], weight is not None, sum(each), *wants, wanted[0])


def _rows_of_experts(perm: Tensor, offs: Tensor) -> int:
    return int(offs[-1]) if len(offs) and _has_values(offs) else perm.shape[0]


def _ranks_of_experts(
    rows: int, experts: int, lora_a: Sequence[Tensor], ends: Tensor | None
) -> list[int]:
    """For each adapter, its rank times its number of rows, which is that of all without ends."""
    each = [a.shape[0] // experts for a in lora_a]
    if ends is None:
        return [rows * rank for rank in each]
    if not _has_values(ends):
        return [max(each) * rows] + [0] * (len(each) - 1)
    counts = ends.diff(prepend=ends.new_zeros(1)).view(experts, -1).sum(0).tolist()
    return [rank * n for rank, n in zip(each, counts[1:], strict=True)]


@register_flop_formula([_ops.experts_forward, _ops.experts_forward_on_host], get_raw=True)
def _(x, weight, numbers, dtype, _b, perm, _t, offs, ends, _p, _r, lora_a, *_, **__) -> int:
    experts, out, _ = weight_from_flat(weight, numbers, dtype).shape
    x = x.new_empty(()).expand(_rows_of_experts(perm, offs), x.shape[-1])
    return _forward(x, out, True, sum(_ranks_of_experts(len(x), experts, lora_a, ends)))


@register_flop_formula([_ops.experts_backward, _ops.experts_backward_on_host], get_raw=True)
def _(grad, x, _, s, wanted, weight, numbers, dtype, *rest, **__) -> int:
    _, perm, _, offs, ends, _, _, lora_a, *_ = rest
    experts, out, _ = weight_from_flat(weight, numbers, dtype).shape
    x = x.new_empty(()).expand(_rows_of_experts(perm, offs), x.shape[-1])
    each = _ranks_of_experts(len(x), experts, lora_a, ends)
    dx, adapters = wanted[0], len(each)
    wants = (_wanted(each, wanted[2 : 2 + adapters]), _wanted(each, wanted[2 + adapters :]))
    return _backward(x, out, True, sum(each), *wants, dx)


@register_flop_formula(_ops.experts_product, get_raw=True)
def _(x, weight, _b, _la, _lb, rank, _s, offs, x_rows, _m, _p, _d, first=0, *_, **__) -> int:
    if first:  # a further slice of experts: all are counted with the first
        return 0
    rows = _rows_of_experts(x if x_rows is None else x_rows, offs)
    x = x.new_empty(()).expand(rows, x.shape[-1])
    return _forward(x, weight.shape[1], True, rows * rank)


@register_flop_formula(_ops.experts_product_backward, get_raw=True)
def _(
    grad, x, s, _w, wanted, weight, _la, _lb, rank, _s, offs, _x, _g, _m, _p, _d, first=0, *_, **__
) -> int:  # fmt: skip
    if first:
        return 0
    dx, da, db = wanted
    ranks = _rows_of_experts(s, offs) * rank
    x = x.new_empty(()).expand(ranks // rank, x.shape[-1])
    return _backward(x, weight.shape[1], True, ranks, ranks * da, ranks * db, dx)
