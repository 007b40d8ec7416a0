"""How one forward of a layer is computed: decided once, for the forward and for `explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_ext._C as _C

from ..invariance import invariance_note, is_on
from ..kernels.kernel_plan import problem_of
from ..packed_weight import PackedWeight
from ..quantized.weight import QuantizedBase
from .apply import Dense, Slots, Update, apply
from .row_index import RowIndex

# The number of rows of x that represents "many".
MANY_ROWS = 2**31
# From here on PEFT's bfloat16 products were faster than ours on an EPYC with AVX512_BF16.
_HIGH_RANK = 96


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
    return Decision(run, "fused", "", partial(kernel_path, base, updates), base)


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


def of_rows(names: Sequence[Any]) -> str:
    """The reason of rows with adapters of their own, of which the layer has these."""
    return f"each row its own adapter, {len(names)} in this batch"


def kernel_path(base: Dense | QuantizedBase, updates: Any, rows: int | None) -> tuple[str, str]:
    """("fused", "packed" or "library", the reason) of one call of `lora_linear`.

    Args:
        base: what the updates are added to.
        updates: `Update`s.
        rows: number of rows of x as ``[rows, in]``; None for many.
    """
    if isinstance(base, QuantizedBase):
        return "fused", base.note
    rows, operand = MANY_ROWS if rows is None else rows, base.weight
    weight = operand.matrix if isinstance(operand, PackedWeight) else operand
    rank = sum(update.lora_a.shape[0] for update in updates)
    if weight.device.type == "cuda" and _C.with_cuda:
        (out, within), has_dropout = weight.shape, any(each.dropout > 0 for each in updates)
        dtypes = weight.dtype, updates[0].lora_a.dtype
        problem = problem_of(min(rows, 2**16), within, out, rank, *dtypes, has_dropout)
        return cuda_path(weight.device, problem)
    if weight.device.type == "cpu":
        reason = _C.cpu_library_reason(weight.dtype, rank)
    else:
        reason = f"on {weight.device.type} torch's own matrix products compute the layer"
    if reason:
        return "library", f"{reason}{invariance_note()}"
    path, note = "fused", invariance_note()
    if isinstance(operand, PackedWeight) and not note:
        route, why = operand.route(rows)
        path, note = ("packed", f", {why}") if route == "packed" else ("fused", f"; {why}")
    if rank > _HIGH_RANK and all(u.lora_a.dtype == torch.bfloat16 for u in updates):
        note += (
            "; sums are in float32: with bfloat16 adapters of so high a rank PEFT may be faster on "
            "processors with fast bfloat16 products"
        )
    panels = None
    if is_on():
        panels = _C.cpu_panels(weight.dtype, batch_invariant=True)
    elif path != "packed" and rows >= _C.cpu_panel_rows:
        out, within = weight.shape
        panels = _C.cpu_panels_of(weight.dtype, within, out, weight.stride(0) != 1, rows)
    one_pass = "" if panels is None else f" in one pass, products in {str(panels)[6:]}"
    return path, f"{_C.cpu_isa()} kernels{one_pass}, rank {rank}{note}"


def cuda_path(device: torch.device, problem: _C.Problem) -> tuple[str, str]:
    """`kernel_path` on a device that supports the kernel route."""
    explained = _C.explain_problem(device, problem)
    forward, check = explained.plan, explained.check
    if not forward.kernel:
        return "library", forward.reason
    if check not in ("passed", "not yet"):
        return "library", f"the CUDA kernels failed their check on {device}: {check}"
    kernels = "beside cuBLAS's x W^T" if forward.hybrid else f"{forward.tile} tiles"
    basis = "predicted" if forward.predicted_us else forward.reason
    return "fused", f"CUDA kernels, {kernels}, rank {problem.rank}: {basis}"
