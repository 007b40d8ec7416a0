"""The settings of one adapter in one layer, and their valid ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..call.apply import MAX_RANK

DEFAULT_ADAPTER = "default"  # name of an adapter that is given none
INITS = (True, "gaussian", "pissa", "olora")


def expect(condition: bool, where: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"lora_ext.{where}: expected {expected}, but got {got!r}")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float's range
        return False


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter in one layer: y += scaling * (drop(x) lora_a^T) lora_b^T.

    Attributes:
        r: rank, 1 to 512.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability in [0, 1) that an element of x is zero in the update, in training.
        use_rslora: scaling alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
        init_lora_weights: True (lora_a uniform as nn.Linear's weight, lora_b zero), "gaussian"
            (lora_a of standard deviation 1 / r, lora_b zero), "pissa" (the r largest singular
            triplets of the weight, Meng et al. 2024) or "olora" (r columns of its QR, Bueyuekakyuez
            2024).
        lora_bias: a trainable bias of lora_b, scaled like the update (PEFT's lora_bias).

    Raises:
        ValueError: a value is out of its range.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False

    def __post_init__(self) -> None:
        check_rank(self.r, "nn.AdapterSpec")
        check_alpha(self.lora_alpha, "nn.AdapterSpec")
        check_dropout(self.lora_dropout, "nn.AdapterSpec")
        init = self.init_lora_weights
        is_known = isinstance(init, bool | str) and init in INITS
        expect(is_known, "nn.AdapterSpec", f"init_lora_weights to be one of {INITS}", init)

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def subtracts_init(self) -> bool:
        """Whether the initial product is subtracted, so that training starts at the weight."""
        return self.init_lora_weights in ("pissa", "olora")


def optional_spec(r: int, *settings: Any, **more: Any) -> AdapterSpec | None:
    """The spec of the adapter that a constructor adds, of `AdapterSpec`'s settings; None for r = 0,
    which adds none."""
    return AdapterSpec(r, *settings, **more) if r != 0 else None


def check_rank(rank: Any, where: str) -> None:
    expect(
        is_integer(rank) and 1 <= rank <= MAX_RANK,
        where,
        f"an integer rank r of 1 to {MAX_RANK}",
        rank,
    )


def check_dropout(p: Any, where: str, name: str = "lora_dropout") -> None:
    expect(is_finite(p) and 0.0 <= p < 1.0, where, f"{name} in [0, 1)", p)


def check_alpha(alpha: Any, where: str) -> None:
    expect(is_finite(alpha), where, "a finite number lora_alpha", alpha)
