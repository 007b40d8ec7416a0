"""Compares and times the products of one kind of layer: by torch and by panels, on plain and on
packed weights; and the results, for print()."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_ext._C as _C

from ..measure import Measured, Times, fastest, interleaved_us, share
from ..packed_weight import MOST_TIME, PackedWeight, packed_linear
from .layers import Kind

_ROWS_COMPARED = 4  # at each end of a product
_EXACT_BYTES = 2**26  # of the weight in float64, at a time

# Products by name: torch's, of packs, and of panels by their dtype.
_TORCH, _PACK = "none", "pack"


class Found(NamedTuple):
    """What is fastest with one number of rows.

    Attributes:
        rows: of x.
        panels: dtype of the panels with which the plain product is fastest, or None: torch's.
        gain: its time over that of the product which is taken without a measurement.
        us: its microseconds.
        ratio: time of the packed product over it; infinite if that has other values.
    """

    rows: int
    panels: torch.dtype | None
    gain: float
    us: float
    ratio: float

    def __str__(self) -> str:
        text = "torch" if self.panels is None else f"lora_ext in {str(self.panels)[6:]}"
        gained = f" ({self.gain:.2f} of the time without warmup)"
        return f"{text} at {self.rows} rows" + gained * (self.gain < 1.0)


class Trial:
    """The products of a kind of weight with one x.

    Args:
        packs: packs of several layers, which the products use in turn: in a model the caches also
            have another layer's weight when a layer begins.
        bias: the bias of forward.
        kind, rows: of x ``[rows, in]``, or backward of dy ``[rows, out]``.
        backward: dx = dy W instead of y = x W^T + bias.
    """

    def __init__(
        self,
        packs: Sequence[PackedWeight],
        bias: Tensor | None,
        kind: Kind,
        rows: int,
        backward: bool,
    ) -> None:
        depth = kind.matrix(backward)[1]
        x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(0))
        self.kind, self.rows, self.backward = kind, rows, backward
        self.x, self.bias = x.to(kind.dtype), None if backward else bias
        self.plain = [pack.matrix if backward else pack.matrix.t() for pack in packs]
        self.packed: list[Any] = [pack.copies[backward] for pack in packs]
        self.names = [_TORCH, *map(_name, _C.cpu_panel_candidates(kind.dtype))]
        if self.packed[0] is not None:
            self.names.append(_PACK)

    def product(self, name: str, i: int) -> Tensor:
        """With the i-th weight."""
        if name == _PACK:
            return packed_linear(self.x, self.packed[i], self.bias)
        y = self.x.new_empty(self.rows, self.plain[i].shape[1])
        _C.cpu_product(self.x, self.plain[i], self.bias, y, name)
        return y

    def wrong(self) -> list[str]:
        """The products that must not be timed since their values differ, compared at the first and
        last rows, all columns, with float64: an error may be 4 times that of torch's product, and
        at the largest value a unit of the dtype and what float32's sums of this depth may lose."""
        matrix = self.plain[0]
        exact = _exact(_ends(self.x), matrix, self.bias)
        is_finite = exact.isfinite()

        def error(name: str) -> float:
            y = _ends(self.product(name, 0)).double()
            return (y - exact)[is_finite].abs().max().item() if is_finite.any() else 0.0

        of_sums = 4 * torch.finfo(torch.float32).eps * math.sqrt(len(matrix))
        most = exact.where(is_finite, 0.0).abs().max().item()
        bound = 4 * error(_TORCH) + (torch.finfo(self.kind.dtype).eps + of_sums) * most
        return [name for name in self.names if name != _TORCH and not error(name) <= bound]

    def times(self, wrong: Collection[str]) -> Times:
        """Microseconds of all weights by each product that is not wrong."""

        def in_turn(name: str) -> None:
            for i in range(len(self.plain)):
                self.product(name, i)

        calls = {name: partial(in_turn, name) for name in self.names if name not in wrong}
        return interleaved_us(calls, self.x.device)

    def ruled(self, wrong: Collection[str]) -> str:
        """The plain product that is taken without a measurement, or torch's if that is wrong."""
        panels = _C.cpu_panels_of(*self.kind.matrix(self.backward), self.rows)
        return _TORCH if panels is None or _name(panels) in wrong else _name(panels)

    def found(self, wrong: Collection[str]) -> Found:
        """What is fastest, of products that are not wrong."""
        times = self.times(wrong)
        plain = {name: each for name, each in times.items() if name != _PACK}
        best, gain = fastest(plain, self.ruled(wrong), MOST_TIME)
        us = statistics.median(times[best]) / len(self.plain)
        ratio = share(times, _PACK, best) if _PACK in times else math.inf
        panels = None if best == _TORCH else getattr(torch, best)
        return Found(self.rows, panels, gain, us, ratio)


def _name(panels: torch.dtype) -> str:
    return str(panels).removeprefix("torch.")


def _ends(rows: Tensor) -> Tensor:
    most = min(_ROWS_COMPARED, len(rows))
    return torch.cat([rows[:most], rows[len(rows) - most :]])


def _exact(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    columns = max(1, _EXACT_BYTES // (8 * len(matrix)))
    parts = [x.double() @ part.double() for part in matrix.split(columns, dim=1)]
    return torch.cat(parts, dim=1) + (0.0 if bias is None else bias)


@dataclass
class Products:
    """The products with one kind of weight in one direction.

    Attributes:
        kind: sizes and dtype.
        backward: dx = dy W, else y = x W^T.
        found: what is fastest with each number of rows.
        wrong: what is not taken since its values differ from torch's: panels by name, or "pack".
        count: how many weights there are.
        packed: how many were packed.
    """

    kind: Kind
    backward: bool
    found: tuple[Found, ...]
    wrong: tuple[str, ...]
    count: int
    packed: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copies."""
        return self.packed * self.kind.nbytes

    @property
    def ratios(self) -> Measured:
        """(rows, time of the packed product over the plain one's), as measured."""
        return tuple((each.rows, each.ratio) for each in self.found)

    @property
    def saved(self) -> float:
        """Microseconds of a row that packs save, for each byte."""
        won = [each for each in self.found if each.ratio <= MOST_TIME]
        return sum(each.us * (1 - each.ratio) / each.rows for each in won) / self.kind.nbytes

    @property
    def name(self) -> str:
        """Kind and direction."""
        return f"{self.kind}, {'backward' if self.backward else 'forward'}"

    @property
    def of_plain(self) -> str:
        """How plain products are computed, as text."""
        wrong = "; not used, since values differ from torch's: " + ", ".join(
            "packed" if name == "pack" else f"lora_ext in {name}" for name in self.wrong
        )
        fastest = f"{self.name}: fastest is {', '.join(map(str, self.found))}"
        return fastest + wrong * bool(self.wrong)

    def __str__(self) -> str:
        if "pack" in self.wrong:
            return f"{self.name}: not packed: values of packed weights differ"
        ratios = ", ".join(f"{ratio:.2f} at {rows} rows" for rows, ratio in self.ratios)
        done = f"{self.packed} of {self.count} packed" if self.packed else "not packed"
        size = f", {self.nbytes / 2**20:.3g} MiB" if self.nbytes else ""
        return f"{self.name}: packed {ratios} of the time without; {done}{size}"


@dataclass(frozen=True, repr=False)
class Packing:
    """The results for a model; str() gives a readable text.

    Attributes:
        kinds: one for each kind of weight and direction: which plain product is fastest with each
            number of rows, what packs take, and how many there are.
        budget: bytes that packs were allowed to take.
        reasons: why other weights are not packed.
    """

    kinds: tuple[Products, ...] = ()
    budget: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all packed copies."""
        return sum(kind.nbytes for kind in self.kinds)

    def __repr__(self) -> str:
        packed = sum(kind.packed for kind in self.kinds)
        return f"Packing({packed} packs, {self.nbytes / 2**20:.3g} MiB)"

    def __str__(self) -> str:
        lines = [*(each.of_plain for each in self.kinds), *map(str, self.kinds)]
        lines += [f"not packed: {reason}" for reason in self.reasons]
        mib = 2**20
        total = f"{self.nbytes / mib:.3g} MiB of packed weights, of {self.budget / mib:.3g} allowed"
        return "\n".join([*lines, total])
