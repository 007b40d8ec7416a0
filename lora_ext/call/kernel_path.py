"""Which kernels compute one call of `lora_linear`, and why, for `explain`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import lora_ext._C as _C

from ..invariance import invariance_note, is_on
from ..kernels.kernel_plan import problem_of
from ..packed_weight import PackedWeight
from .updates import Update

# The number of rows of x that represents "many".
MANY_ROWS = 2**31
# From here on PEFT's bfloat16 products were faster than ours on an EPYC with AVX512_BF16.
_HIGH_RANK = 96


def kernel_path(
    operand: Tensor | PackedWeight, updates: Sequence[Update], rows: int | None
) -> tuple[str, str]:
    """("fused", "packed" or "library", the reason).

    Args:
        operand: the base's weight ``[out, in]``, or its pack.
        updates: the updates that are added.
        rows: number of rows of x as ``[rows, in]``; None for many.
    """
    rows = MANY_ROWS if rows is None else rows
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
