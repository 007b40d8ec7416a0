"""Which CUDA kernels compute a LoRA linear: the planner's plan for shapes, cards and tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lora_ext._C as _C

from ..device import indexed, need_kernels
from ..invariance import invariance_note

# Compute capability times 10, number of SMs, bytes of shared memory of an SM and, at most, of a
# block.
CARDS = {
    "A100": _C.Card(80, 108, 167936, 166912),
    "A10": _C.Card(86, 72, 102400, 101376),
    "L40S": _C.Card(89, 142, 102400, 101376),
    "H100": _C.Card(90, 132, 233472, 232448),
    "B200": _C.Card(100, 148, 233472, 232448),
    "RTX 5090": _C.Card(120, 170, 102400, 101376),
}


@dataclass(frozen=True)
class CallPlan:
    """How one call of `lora_linear` is computed; str() gives a readable text.

    Attributes:
        forward, backward: the plans, each with ``kernel`` (False: the library route), ``hybrid``
            (the library's base product, our kernels for the rest), ``reason``, ``workspace``
            (bytes) and more; None on the CPU.
        forward_check, backward_check: the result of the kernels' check on the device: "passed",
            "not yet", or what failed; "" without kernels or without a device.
        cpu: "" on CUDA; on the CPU, the kernels or the reason for the library route.
    """

    forward: _C.Plan | None
    backward: _C.Plan | None
    forward_check: str = ""
    backward_check: str = ""
    cpu: str = ""

    def __str__(self) -> str:
        if self.cpu:
            return self.cpu
        parts = (
            ("forward", self.forward, self.forward_check),
            ("backward", self.backward, self.backward_check),
        )
        return "\n".join(
            f"{name}: {plan}" + (f"\n  check on this device: {check}" if check else "")
            for name, plan, check in parts
        )


def plan(
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    card: str | torch.device = "A100",
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    dropout: bool = False,
    aligned: bool = True,
    route: str = "auto",
) -> CallPlan:
    """The plan for a shape on a card; pure arithmetic, so the card need not be present.

    Args:
        rows, in_features, out_features, rank: M, K, N and r of `lora_linear`.
        card: a name in `CARDS`, or a CUDA device; without an index, the current one.
        dtype: of x and weight.
        adapter_dtype: of lora_a and lora_b; default: dtype.
        dropout: whether dropout_p > 0.
        aligned: whether the rows of every operand begin at multiples of 16 bytes.
        route: "auto", "kernel", "hybrid" or "library", as in `set_cuda_route`.

    Raises:
        ValueError: the card, the route or a size is not valid.
    """
    if min(rows, in_features, out_features, rank) < 1:
        raise ValueError(
            "lora_ext.kernels.plan: expected sizes of at least 1, but got"
            f" {(rows, in_features, out_features, rank)}"
        )
    problem = problem_of(
        rows, in_features, out_features, rank, dtype, adapter_dtype or dtype, dropout
    )
    problem.aligned = problem.aligned_weight = aligned
    problem.aligned_a = problem.aligned_b = aligned
    chosen = _card(card)
    return CallPlan(
        _C.plan_forward(chosen, problem, route), _C.plan_backward(chosen, problem, route)
    )


def problem_of(
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
) -> _C.Problem:
    """The planner's problem for contiguous operands; arguments as in `plan`."""
    problem = _C.Problem(rows, out_features, in_features, rank)
    problem.dtype = dtype
    problem.float_adapters = adapter_dtype == torch.float32
    problem.dropout = dropout
    return problem


def _card(card: str | torch.device) -> _C.Card:
    if isinstance(card, torch.device):
        if not _C.with_cuda:
            raise ValueError("lora_ext.kernels.plan: this build has no CUDA kernels; name a GPU")
        return _C.cuda_card(indexed(card))
    if card not in CARDS:
        raise ValueError(
            f"lora_ext.kernels.plan: expected one of {', '.join(CARDS)}, but got {card!r}"
        )
    return CARDS[card]


def _flat(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def explain_call(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float = 0.0
) -> CallPlan:
    """How ``lora_linear(x, weight, lora_a, lora_b, dropout_p=...)`` is computed, with backward."""
    x, weight, lora_a, lora_b = (t.detach() for t in (_flat(x), weight, lora_a, lora_b))
    rank = lora_a.shape[0]
    if x.device.type == "cpu":
        reason = _C.cpu_library_reason(x.dtype, rank)
        path = f"library: {reason}" if reason else f"{_C.cpu_isa()} kernels"
        return CallPlan(None, None, cpu=f"{path}{invariance_note()}")
    if x.device.type != "cuda" or not _C.with_cuda:
        return CallPlan(None, None, cpu=f"library: no kernels for {x.device} in this build")
    return explain_cuda_call(x, weight, lora_a, lora_b, dropout_p)


def explain_cuda_call(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float
) -> CallPlan:
    """`explain_call` for operands that the kernel route supports; x is [M, K]."""
    forward = _C.explain_forward(x, weight, lora_a, lora_b, dropout_p)
    backward = _C.explain_backward(x, weight, lora_a, lora_b, dropout_p)
    return CallPlan(forward.plan, backward.plan, forward.check, backward.check)


def set_pdl(enabled: bool) -> None:
    """Sets whether a kernel may begin before the previous one has ended, for the whole process.

    This is programmatic dependent launch (PDL), on compute capability 9.0: `lora_gemm` begins while
    the kernel that computes its low-rank operand still runs, and waits for it; `lora_wgrad` begins
    on SMs that the last tiles of dX leave idle. On by default.

    Raises:
        RuntimeError: the build has no CUDA kernels.
    """
    need_kernels("kernels.set_pdl")
    _C.set_pdl(enabled)


def set_reserved_sms(count: int) -> None:
    """Sets how many SMs of each device the kernels leave to other work, for the whole process.

    Calls are planned for the remaining SMs. A persistent grid divides its tiles among as many
    blocks as fit on the device. Next to NCCL's kernels, under MPS or in a green context not all of
    them start at once, and those that start late process as many tiles as the others, so a product
    can take up to twice as long. Reserve the SMs that the other work uses (NCCL: `NCCL_MAX_CTAS`);
    0 by default. With fewer SMs sums are split differently, so last bits may differ.

    Raises:
        ValueError: a negative count.
        RuntimeError: the build has no CUDA kernels.
    """
    if count < 0:
        raise ValueError(
            f"lora_ext.kernels.set_reserved_sms: expected a count of SMs, but got {count}"
        )
    need_kernels("kernels.set_reserved_sms")
    _C.set_reserved_sms(count)


def set_cuda_route(name: str) -> None:
    """Chooses the route of half-precision calls on CUDA, for the whole process.

    Args:
        name: "auto" lets the planner choose; "kernel" uses our kernels wherever they can compute
            the call, and torch's for x W^T and dY W whose rows do not begin at multiples of 16
            bytes; "hybrid" does the same, but uses torch's products for every x W^T and dY W;
            "library" uses torch's products for everything.

    Raises:
        ValueError: the name is not one of these.
        RuntimeError: the build has no CUDA kernels.
    """
    need_kernels("kernels.set_cuda_route")
    _C.set_cuda_route(name)
