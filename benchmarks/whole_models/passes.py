"""passes.png: what a LoRA layer's forward in training reads and writes, by PEFT and by lora_ext.

By sizes of tensors, not measured. `PEFT` are the operations of PEFT's default on a CPU, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..figures import Figure, finish, plt
from ..shapes import DROPOUT
from .calls import RANK

TOKENS, WIDTH = 2048, 1024
_MIB = 2**20
# Bytes: activations and W in bfloat16, what is computed with the float32 adapters in float32.
_X16, _X32 = 2 * TOKENS * WIDTH, 4 * TOKENS * WIDTH
_W, _FACTOR, _S = 2 * WIDTH * WIDTH, 4 * WIDTH * RANK, 4 * TOKENS * RANK


class Pass(NamedTuple):
    """One walk over memory: what it computes, and its operands and results in bytes."""

    label: str
    read: int
    written: int


PEFT = (
    Pass("y = x Wᵀ", _X16 + _W, _X16),
    Pass("x to float32", _X16, _X32),
    Pass("dropout: draw a mask", 0, _X32),
    Pass("mask / (1 - p)", _X32, _X32),
    Pass("x * mask", 2 * _X32, _X32),
    Pass("S = x Aᵀ", _X32 + _FACTOR, _S),
    Pass("u = S Bᵀ", _S + _FACTOR, _X32),
    Pass("u * scaling", _X32, _X32),
    Pass("y + u", _X16 + _X32, _X32),
    Pass("y to bfloat16", _X32, _X16),
)
OURS = (
    Pass("S = drop(x) Aᵀ", _X16 + _FACTOR, _S),
    Pass("y = x Wᵀ + s S Bᵀ", _X16 + _W + _S + _FACTOR, _X16),
)


def mebibytes(passes: Sequence[Pass]) -> float:
    """What they read and write together."""
    return sum(each.read + each.written for each in passes) / _MIB


def figure() -> Figure:
    """Bars of both, on one scale."""
    heights = [len(PEFT) + 1, len(OURS) + 1]
    drawn, panels = plt.subplots(
        2, 1, figsize=(6.5, 6.2), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for axes, name, passes in zip(panels, ("PEFT", "lora_ext"), (PEFT, OURS), strict=True):
        read = [each.read / _MIB for each in passes]
        written = [each.written / _MIB for each in passes]
        places = range(len(passes))
        axes.barh(places, read, 0.72, color="#0072B2", label="read")
        ends = axes.barh(places, written, 0.72, left=read, color="#E69F00", label="written")
        totals = [f"{a + b:.0f}" for a, b in zip(read, written, strict=True)]
        axes.bar_label(ends, totals, fontsize=10, padding=3)
        axes.set_yticks(places, [each.label for each in passes], fontsize=10)
        axes.invert_yaxis()
        finish(axes, f"{name}: {len(passes)} passes, {mebibytes(passes):.0f} MiB", size=11)
    panels[0].legend(frameon=False, fontsize=10, loc="lower right")
    panels[1].set_xlabel("MiB", fontsize=10)
    drawn.tight_layout()
    said = (
        f"A LoRA layer's forward in training, {WIDTH} x {WIDTH} in bfloat16, {TOKENS} tokens,\n"
        f"rank {RANK}, PEFT's default float32 adapters, dropout {DROPOUT}; by sizes of tensors.\n"
        "Where torch's x Wᵀ is faster (Xeon with AMX), lora_ext calls it and adds s S Bᵀ after it."
    )
    drawn.text(0.01, -0.01, said, fontsize=9, ha="left", va="top")
    return drawn
