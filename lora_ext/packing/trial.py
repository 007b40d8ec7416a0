"""Times the product of one kind of layer on plain and on packed weights, alternating."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..packed_weight import PackedWeight, packed_linear
from .layers import Kind

_ROUNDS, _FEWER_ROUNDS = 8, 4
_LONG_ROUND = 0.2  # seconds; of rounds this long fewer are enough
# The pack has to be faster in this many of four rounds; otherwise it counts as slower.
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
    features = kind.out_features if backward else kind.in_features
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(kind.dtype)
    plain = [pack.matrix for pack in packs]
    packed: list[Any] = [pack.copies[backward] for pack in packs]

    def plainly(i: int) -> Tensor:
        weight = plain[i] if backward else plain[i].t()
        y = x.new_empty(rows, weight.shape[1])
        _C.cpu_product(x, weight, None if backward else bias, y)
        return y

    def from_pack(i: int) -> Tensor:
        return packed_linear(x, packed[i], None if backward else bias)

    products = (plainly, from_pack)
    each = [_seconds(product, len(packs), 1) for product in products]  # also the warm-up
    turns = max(1, round(_SECONDS_OF_ROUND / (min(each) * len(packs))))
    rounds = _ROUNDS if max(each) * len(packs) * turns < _LONG_ROUND else _FEWER_ROUNDS
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in ((0, 1), (1, 0))[index % 2]:
            times[which].append(_seconds(products[which], len(packs), turns))
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
