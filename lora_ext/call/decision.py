"""How one forward of a layer is computed: decided once, for the forward and for `explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..quantized.base import QuantizedBase
from .apply import Dense, apply
from .kernel_path import kernel_path
from .row_index import RowIndex
from .updates import Slots, Update


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


def fused(
    base: Dense | QuantizedBase, updates: Sequence[Update] | Slots, rows: RowIndex | None = None
) -> Decision:
    """That for one call of `lora_linear`, onto which only a lora_bias of each row is added:
    arguments as of `apply`."""
    run = partial(apply, base, updates=updates, rows=rows)
    if rows is not None:
        has_bias = not isinstance(updates, Slots) and any(each.bias is not None for each in updates)
        return Decision(run, "added" if has_bias else "fused", of_rows(updates), None, base)
    return Decision(run, "fused", "", partial(_fused_path, base, updates), base)


def added(
    forward: Callable[[Tensor], Tensor],
    updates: Sequence[Update] | Slots,
    rows: RowIndex | None,
    reason: str,
    path: str = "added",
) -> Decision:
    """That for updates onto what the base's own forward returns, for a reason."""

    def run(x: Tensor) -> Tensor:
        return apply(forward(x), x, updates, rows)

    return Decision(run, path, reason, None if rows is None else lambda _: (path, of_rows(updates)))


def _fused_path(base: Dense | QuantizedBase, updates: Any, count: int | None) -> tuple[str, str]:
    if isinstance(base, QuantizedBase):
        return "fused", base.note
    return kernel_path(base.weight, updates, count)


def of_rows(names: Sequence[Any]) -> str:
    """The reason of rows with adapters of their own, of which the layer has these."""
    return f"each row its own adapter, {len(names)} in this batch"
