"""The results of packing, for print()."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..measure import Measured
from .layers import Kind


@dataclass(frozen=True)
class Packed:
    """One kind of weight in one direction.

    Attributes:
        kind: sizes and dtype.
        backward: dx = dy W, else y = x W^T.
        ratios: (rows, time of the packed product over the plain one's), as measured.
        packed: how many weights were packed.
        count: how many there are.
        nbytes: of the packed copies.
    """

    kind: Kind
    backward: bool
    ratios: Measured
    packed: int
    count: int
    nbytes: int

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        ratios = ", ".join(f"{ratio:.2f} at {rows} rows" for rows, ratio in self.ratios)
        if math.inf in dict(self.ratios).values():
            return f"{self.kind}, {direction}: left as they are: a pack's values differ"
        done = f"{self.packed} of {self.count} packed" if self.packed else "left as they are"
        size = f", {self.nbytes / 2**20:.3g} MiB" if self.nbytes else ""
        return f"{self.kind}, {direction}: {ratios} of the plain product; {done}{size}"


@dataclass(frozen=True)
class Panels:
    """The plain products of one kind of weight in one direction.

    Attributes:
        kind, backward: as in `Packed`.
        fastest: (rows, dtype of the panels or None for torch's product, its time over that of the
            product which is taken without a measurement).
        wrong: what is not taken since its values differ from torch's: panels by name, or "pack".
    """

    kind: Kind
    backward: bool
    fastest: tuple[tuple[int, torch.dtype | None, float], ...]
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        each = (
            f"{'torch' if panels is None else f'panels of {str(panels)[6:]}'} at {rows} rows"
            + (f" ({ratio:.2f} of what is taken without measurement)" if ratio < 1.0 else "")
            for rows, panels, ratio in self.fastest
        )
        wrong = "; not taken, since values differ from torch's: " + ", ".join(
            name if name == "pack" else f"panels of {name}" for name in self.wrong
        )
        fastest = f"{self.kind}, {direction}: fastest is {', '.join(each)}"
        return fastest + wrong * bool(self.wrong)


@dataclass(frozen=True, repr=False)
class Packing:
    """The results for a model; str() gives a readable text.

    Attributes:
        kinds: one for each kind of weight and direction.
        budget: bytes that packs were allowed to take.
        reasons: why other weights are not packed.
        panels: how plain products are computed, one for each kind of weight and direction.
    """

    kinds: tuple[Packed, ...] = ()
    budget: int = 0
    reasons: tuple[str, ...] = ()
    panels: tuple[Panels, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all packed copies."""
        return sum(kind.nbytes for kind in self.kinds)

    def __repr__(self) -> str:
        packed = sum(kind.packed for kind in self.kinds)
        return f"Packing({packed} packs, {self.nbytes / 2**20:.3g} MiB)"

    def __str__(self) -> str:
        lines = [str(each) for each in (*self.panels, *self.kinds)]
        lines += [f"not packed: {reason}" for reason in self.reasons]
        mib = 2**20
        total = f"{self.nbytes / mib:.3g} MiB of packed weights, of {self.budget / mib:.3g} allowed"
        return "\n".join([*lines, total])
