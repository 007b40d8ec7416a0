"""How one forward of a layer is computed: decided once, for the forward and for `explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Decision(NamedTuple):
    """What a layer does with one x, whose rows have its active adapters or each their own.

    A layer has one function that makes it, of the layer, x and the open block of `use_adapters`.
    Its forward returns ``decision.run(x)``; `explain` asks the same function with x = None, which
    stands for an x that suits the base, and shows `explained`. So what is shown is what runs.

    Making one computes nothing and is cheap: what takes long to say is left to `detail`.

    Attributes:
        run: y of x. Other arguments of the forward are bound in it; for x = None it is not called.
        path: as `explain` shows it: "fused", "added", "library", "merged", "peft" or "base".
        reason: why it is not fused, or a note on how it is; may be "".
        detail: number of rows of x, None for many -> the (path, reason) that `explain` shows
            instead, such as the kernels of a fused call.
        base: the `QuantizedBase` that is dequantised for it, if any.
    """

    run: Callable[..., Any]
    path: str
    reason: str = ""
    detail: Callable[[int | None], tuple[str, str]] | None = None
    base: Any = None

    def explained(self, rows: int | None = None) -> tuple[str, str]:
        """(path, reason) for `explain`.

        Args:
            rows: number of rows of x as ``[rows, in]``; None for many.
        """
        return (self.path, self.reason) if self.detail is None else self.detail(rows)
