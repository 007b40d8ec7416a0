"""Times the products of one kind of layer, alternating: by torch and by panels, on plain and on
packed weights."""

from __future__ import annotations

import math
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
_ROWS_COMPARED = 4  # at each end of a product
_EXACT_BYTES = 2**26  # of the weight in float64, at a time

Product = Callable[[int], Tensor]


def wrong_products(
    packs: Sequence[PackedWeight], bias: Tensor | None, kind: Kind, rows: int, backward: bool
) -> list[str]:
    """The products that must not be timed since their values differ: the candidates' dtypes by
    name, and "pack". They are compared at the first and last rows, all columns, with float64: an
    error may be 4 times that of torch's product, and at the largest value a unit of the dtype and
    what float32's sums of this depth may lose.

    Args:
        packs, bias, kind, rows, backward: as in `ratio_of`; of the first pack.
    """
    x, plain = _operands(packs[:1], kind, rows, backward)
    bias = None if backward else bias
    exact = _exact(_ends(x), plain[0], bias)
    is_finite = exact.isfinite()

    def error(y: Tensor) -> float:
        return (_ends(y).double() - exact)[is_finite].abs().max().item() if is_finite.any() else 0.0

    bound = 4 * error(_product(x, plain[0], bias, "none"))
    of_sums = 4 * torch.finfo(torch.float32).eps * math.sqrt(len(plain[0]))
    most = exact.where(is_finite, 0.0).abs().max().item()
    bound += (torch.finfo(kind.dtype).eps + of_sums) * most
    products: dict[str, Callable[[], Tensor]] = {
        name: partial(_product, x, plain[0], bias, name)
        for name in map(_name, _C.cpu_panel_candidates(kind.dtype))
    }
    packed = packs[0].copies[backward]
    if packed is not None:
        products["pack"] = partial(packed_linear, x, packed, bias)
    return [name for name, product in products.items() if not error(product()) <= bound]


def _ends(rows: Tensor) -> Tensor:
    most = min(_ROWS_COMPARED, len(rows))
    return torch.cat([rows[:most], rows[len(rows) - most :]])


def _exact(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    columns = max(1, _EXACT_BYTES // (8 * len(matrix)))
    parts = [x.double() @ part.double() for part in matrix.split(columns, dim=1)]
    return torch.cat(parts, dim=1) + (0.0 if bias is None else bias)


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
    packs: Sequence[PackedWeight], kind: Kind, rows: int, backward: bool, wrong: Sequence[str] = ()
) -> tuple[torch.dtype | None, float]:
    """(dtype of the panels with which the plain product is fastest, or None: torch's; its time over
    that of the product which is taken now).

    Args:
        packs, kind, rows, backward: as in `ratio_of`; packs are not used, but their weights.
        wrong: panels that are neither timed nor taken, as `wrong_products` names them.
    """
    x, plain = _operands(packs, kind, rows, backward)
    depth, cols = plain[0].shape
    by_rule = _C.cpu_panels_of(kind.dtype, depth, cols, backward == kind.transposed, rows)
    if _name(by_rule) in wrong:
        by_rule = None
    best, least = by_rule, 1.0
    for panels in (None, *_C.cpu_panel_candidates(kind.dtype)):
        if panels != by_rule and _name(panels) not in wrong:
            first, second = (partial(_turn, x, plain, _name(each)) for each in (by_rule, panels))
            _, ratio = _compared(first, second, len(packs))
            if ratio <= min(least, MOST_TIME):
                best, least = panels, ratio
    return best, least


def _name(panels: torch.dtype | None) -> str:
    return "none" if panels is None else str(panels)[6:]


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
