"""Times the products of one kind of layer, alternating: by torch and by panels, on plain and on
packed weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..packed_weight import MOST_TIME, PackedWeight, packed_linear
from .layers import Kind

_ROUNDS, _FEWER_ROUNDS = 8, 4
_LONG_ROUND = 0.2  # seconds; of rounds this long fewer are enough
# A product has to be faster in this many of four rounds; otherwise it counts as slower.
_WINS = 3
_SECONDS_OF_ROUND = 0.02  # at least, so that a round is not one call of some microseconds

Product = Callable[[int], Tensor]


def ratio_of(
    packs: Sequence[PackedWeight], bias: Tensor | None, kind: Kind, rows: int, backward: bool
) -> tuple[float, float]:
    """(median microseconds of the plain product, time of the packed one over it).

    Args:
        packs: packs of several layers, which the products use in turn: in a model the caches also
            have another layer's weight when a layer begins.
        bias: the bias of forward.
        kind, rows: of x ``[rows, in]``, or backward of dy ``[rows, out]``.
        backward: dx = dy W instead of y = x W^T + bias.

    Returns:
        A ratio of at least 1 if the pack was not faster in three of four rounds.
    """
    x, plain = _operands(packs, kind, rows, backward)
    bias = None if backward else bias
    packed: list[Any] = [pack.copies[backward] for pack in packs]

    def plainly(i: int) -> Tensor:
        return _product(x, plain[i], bias)

    def from_pack(i: int) -> Tensor:
        return packed_linear(x, packed[i], bias)

    return _compared(plainly, from_pack, len(packs))


def panels_of(
    packs: Sequence[PackedWeight], kind: Kind, rows: int, backward: bool
) -> tuple[torch.dtype | None, float]:
    """(dtype of the panels with which the plain product is fastest, or None: torch's; its time over
    that of the product which is taken now).

    Args:
        packs, kind, rows, backward: as in `ratio_of`; packs are not used, but their weights.
    """
    x, plain = _operands(packs, kind, rows, backward)
    depth, cols = plain[0].shape
    by_rule = _C.cpu_panels_of(kind.dtype, depth, cols, backward == kind.transposed, rows)
    best, least = by_rule, 1.0
    for panels in (None, *_C.cpu_panel_candidates(kind.dtype)):
        if panels != by_rule:
            first, second = (
                partial(_turn, x, plain, "none" if each is None else str(each)[6:])
                for each in (by_rule, panels)
            )
            _, ratio = _compared(first, second, len(packs))
            if ratio <= min(least, MOST_TIME):
                best, least = panels, ratio
    return best, least


def _turn(x: Tensor, matrices: list[Tensor], panels: str, i: int) -> Tensor:
    return _product(x, matrices[i], None, panels)


def _operands(
    packs: Sequence[PackedWeight], kind: Kind, rows: int, backward: bool
) -> tuple[Tensor, list[Tensor]]:
    """(x, the matrices with which it is multiplied)."""
    features = kind.out_features if backward else kind.in_features
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(kind.dtype)
    return x, [pack.matrix if backward else pack.matrix.t() for pack in packs]


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, panels: str | None = None) -> Tensor:
    y = x.new_empty(len(x), matrix.shape[1])
    _C.cpu_product(x, matrix, bias, y, panels)
    return y


def _compared(first: Product, second: Product, count: int) -> tuple[float, float]:
    """(median microseconds of the first product, time of the second one over it); at least 1 if it
    was not faster in three of four rounds.

    Args:
        count: of weights.
    """
    products = (first, second)
    each = [_seconds(product, count, 1) for product in products]  # also the warm-up
    turns = max(1, round(_SECONDS_OF_ROUND / (min(each) * count)))
    rounds = _ROUNDS if max(each) * count * turns < _LONG_ROUND else _FEWER_ROUNDS
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in ((0, 1), (1, 0))[index % 2]:
            times[which].append(_seconds(products[which], count, turns))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    ratio = statistics.median(ratios)
    if 4 * sum(each < 1.0 for each in ratios) < _WINS * len(ratios):
        ratio = max(ratio, 1.0)
    return 1e6 * statistics.median(times[0]), ratio


def _seconds(product: Product, count: int, turns: int) -> float:
    """Seconds of one product, using all weights in turn."""
    begin = time.perf_counter()
    for _ in range(turns):
        for i in range(count):
            product(i)
    return (time.perf_counter() - begin) / (turns * count)
