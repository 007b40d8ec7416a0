"""What is measured: numbers of rows and of adapters, forward and step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..shapes import DROPOUT, FORWARD, SHORT, STEP


@dataclass(frozen=True)
class Case:
    """y [rows, width] of x [rows, width] on one frozen weight; each row has one of the adapters.

    Attributes:
        group: "target", or the curve that the case is a point of: "rows", "adapters".
        layout: rows of an adapter together ("ranges"), or as they come ("mixed").
        tokens: rows of a sample, which PEFT has a name for; 0: those of a sample differ.
        capacity: slots of a pool that has room for more adapters; of a forward.
        effort: how much longer than other cases to measure.
    """

    group: str
    mode: str
    rows: int
    adapters: int
    width: int = 2048
    dtype: str = "bfloat16"
    rank: int = 16
    layout: str = "ranges"
    dropout_p: float = 0.0
    device: str = "cpu"
    tokens: int = 1
    capacity: int = 0
    effort: float = 1.0

    @property
    def id(self) -> str:
        dropout = f" dropout {self.dropout_p:g}" if self.dropout_p else ""
        layout = "" if self.layout == "ranges" else f" {self.layout}"
        size = f"K=N={self.width} r={self.rank}"
        return (
            f"{self.mode} {SHORT[self.dtype]} {self.rows} rows x {self.adapters} adapters "
            f"{size}{layout}{dropout}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def all_cases() -> Iterator[Case]:
    """In order of importance."""
    for rows in (32, 256, 2048):
        yield Case("target", FORWARD, rows, 32)
    for rows in (32, 256, 2048):
        yield Case("target", STEP, rows, 32, dropout_p=DROPOUT)
    for mode, p in ((FORWARD, 0.0), (STEP, DROPOUT)):
        yield Case("target", mode, 256, 32, layout="mixed", dropout_p=p)
        yield Case("target", mode, 256, 32, dtype="float32", dropout_p=p)
    for mode, p in ((FORWARD, 0.0), (STEP, DROPOUT)):
        for each in (1, 4, 16, 64, 512):
            yield Case("rows", mode, 8 * each, 8, dropout_p=p)
        for adapters in (1, 10, 100, 1000):
            yield Case("adapters", mode, 1000, adapters, width=1024, dropout_p=p)
