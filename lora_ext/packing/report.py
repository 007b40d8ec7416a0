"""The results of packing, for print()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..measure import Measured
from ..packed_weight import MOST_TIME
from .layers import Kind


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
