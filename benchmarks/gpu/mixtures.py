"""Layers of experts that are measured on a GPU, in order of importance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..shapes import FORWARD, SHORT, STEP

NF4 = "NF4"
_TOKENS = (4096, 1)


@dataclass(frozen=True)
class Shape:
    """Experts of a model's published configuration, and transformers' module of them.

    Attributes:
        inner: the width between the two projections, of which the first makes gate and up.
        module: its folder in transformers.models, and the name before "Experts" and "Config".
    """

    experts: int
    slots: int
    hidden: int
    inner: int
    module: tuple[str, str]


SHAPES = {
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768, ("qwen3_moe", "Qwen3Moe")),
    "Mixtral 8x7B": Shape(8, 2, 4096, 14336, ("mixtral", "Mixtral")),
    # Transposed weights, biases, a gate of its own.
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, ("gpt_oss", "GptOss")),
}


@dataclass(frozen=True)
class Mixture:
    """A layer of experts without its router: out [tokens, hidden] of x [tokens, hidden].

    Attributes:
        layer: of SHAPES.
        base: how the frozen weights are stored: "dense", or NF4.
        effort: how much longer than other cells to measure.
        cut: divides the widths, to try the code.
    """

    layer: str
    mode: str
    tokens: int
    dtype: str = "bfloat16"
    base: str = "dense"
    rank: int = 16
    device: str = "cuda"
    effort: float = 1.0
    cut: int = 1

    @property
    def shape(self) -> Shape:
        full = SHAPES[self.layer]
        # torch's grouped product takes rows of whole 16 bytes.
        hidden, inner = (each // self.cut // 8 * 8 for each in (full.hidden, full.inner))
        return replace(full, hidden=hidden, inner=inner)

    @property
    def id(self) -> str:
        base = "" if self.base == "dense" else f" {self.base}"
        size = f"{self.tokens} tokens r={self.rank}"
        return f"{self.layer}{base} {self.mode} {SHORT[self.dtype]} {size}"

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def mixtures() -> list[Mixture]:
    """Training size, then one token; of the first model also in float16 and NF4."""
    first, *others = SHAPES
    kinds = [(first, {}), (first, {"base": NF4}), *((name, {}) for name in others)]
    kinds.append((first, {"dtype": "float16"}))
    return [
        Mixture(name, mode, tokens, **fields)
        for tokens in _TOKENS
        for name, fields in kinds
        for mode in (STEP, FORWARD)
    ]


def on_cpu(chosen: list[Mixture]) -> list[Mixture]:
    """The same set, small: to try the code without a GPU."""
    return [replace(each, tokens=min(each.tokens, 16), cut=32, device="cpu") for each in chosen]
