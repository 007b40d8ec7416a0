"""How one forward of a layer is computed: decided once, for the forward and for `explain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_ext._C as _C

from ..invariance import invariance_note, is_on
from ..kernels.kernel_plan import problem_of
from ..packed_weight import PackedWeight
from ..quantized.weight import QuantizedBase
from ..rows.row_adapters import RowAdapters
from ..rows.row_index import RowIndex
from .apply import Dense, Slots, Update, apply, has_bias

# The number of rows of x that represents "many".
MANY_ROWS = 2**31
# From here on PEFT's bfloat16 products were faster than ours on an EPYC with AVX512_BF16.
_HIGH_RANK = 96


class Path(str, Enum):
    """How a forward of a layer is computed, as `explain` shows it."""

    FUSED = "fused"  # one call of `lora_linear` or `lora_experts`, our kernels
    PACKED = "packed"  # the same with a packed weight
    LIBRARY = "library"  # the same, whose products are torch's
    ADDED = "added"  # the base's own forward, then the update
    MERGED = "merged"  # one product with the merged weight
    BASE = "base"  # no update
    PEFT = "peft"  # PEFT's own forward
    SHARDED = "sharded"  # decided when the parameters are gathered

    __str__ = str.__str__


class Call(NamedTuple):
    """One forward of a layer.

    Attributes:
        x: of the layer; None of a module that has other arguments, before it is called.
        rows: the block whose adapters the rows of x have, None for the active ones.
        args, kwargs: what the forward gets besides x.
    """

    x: Any
    rows: RowAdapters | None = None
    args: tuple = ()
    kwargs: Mapping[str, Any] = {}


def example(
    layer: Any, dtype: torch.dtype, rows: int | None, block: RowIndex | None, *width: int
) -> Tensor:
    """An x ``[rows, *width]``, or of the rows of a block, of one element's memory.

    Args:
        layer: has parameters on the device of x.
        rows: None for many.
    """
    lead: Any = (MANY_ROWS if rows is None else rows,) if block is None else block.index.shape
    lead = (*lead, 1) if block is not None and len(lead) == 1 else lead
    device = next((parameter.device for parameter in layer.parameters()), None)
    return torch.empty((), dtype=dtype, device=device).expand(*lead, *width)


class Decision(NamedTuple):
    """What a layer does with one x, whose rows have its active adapters or each their own.

    A layer has one function that makes it, ``decide(call)``. Its forward returns
    ``decision.run(x)``; `explain` asks the same function with an `example`, and shows `explained`.
    So what is shown is what runs.

    Making one computes nothing and is cheap: what takes long to say is left to `detail`.

    Attributes:
        run: y of x. Other arguments of the forward are bound in it.
        path: one of `Path`.
        reason: why it is not fused, or a note on how it is; may be "".
        detail: the (path, reason) that `explain` shows instead, such as the kernels of a call.
        dequantized: whose workspace_bytes() are of the weight that is dequantised for it, if any.
    """

    run: Callable[..., Any]
    path: Path
    reason: str = ""
    detail: Callable[[], tuple[Path, str]] | None = None
    dequantized: Any = None

    def explained(self) -> tuple[Path, str]:
        """(path, reason) for `explain`."""
        return (self.path, self.reason) if self.detail is None else self.detail()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the dequantised weight, or of what there is of it at a time."""
        return 0 if self.dequantized is None else self.dequantized.workspace_bytes()

    def noted(self, note: str) -> Decision:
        """The same, with a note behind its reason."""

        def detail() -> tuple[Path, str]:
            path, reason = self.explained()
            return path, f"{reason}; {note}" if reason else note

        return self._replace(detail=detail)


def fused(call: Call, base: Dense | QuantizedBase, updates: Sequence[Update] | Slots) -> Decision:
    """That for one call of `lora_linear`, onto which only a lora_bias of each row is added: base
    and updates as of `apply`."""
    run = partial(apply, base, updates=updates, rows=call.rows)
    dequantized = base if isinstance(base, QuantizedBase) else None
    if call.rows is None:
        detail = partial(kernel_path, base, updates, call.x)
        return Decision(run, Path.FUSED, "", detail, dequantized)
    path = Path.ADDED if has_bias(updates) else Path.FUSED
    return Decision(run, path, "", partial(_by_row, path, call, updates), dequantized)


def added(
    call: Call,
    forward: Callable[[Tensor], Tensor],
    updates: Sequence[Update] | Slots,
    reason: str,
) -> Decision:
    """That for updates onto what the base's own forward returns, for a reason."""

    def run(x: Tensor) -> Tensor:
        return apply(forward(x), x, updates, call.rows)

    if call.rows is None:
        return Decision(run, Path.ADDED, reason)
    return Decision(run, Path.ADDED, "", partial(_by_row, Path.ADDED, call, updates, reason))


def _by_row(
    path: Path, call: Call, updates: Sequence[Update] | Slots, reason: str = ""
) -> tuple[Path, str]:
    """The detail of rows with adapters of their own. Not said before it is asked for: a graph that
    has read the names of a batch is compiled again for other ones."""
    rows = call.rows
    names = rows.names if rows is not None and isinstance(updates, Slots) else updates
    return path, by_row(call, names, reason) if reason else of_rows(names)


def of_rows(names: Sequence[Any]) -> str:
    """The reason of rows with adapters of their own, of which the layer has these."""
    return f"each row its own adapter, {len(names)} in this batch"


def by_row(call: Call, names: Sequence[Any], reason: str) -> str:
    """A reason, after that of rows with adapters of their own."""
    return reason if call.rows is None else f"{of_rows(names)}: {reason}"


def kernel_path(base: Dense | QuantizedBase, updates: Any, x: Tensor) -> tuple[Path, str]:
    """(`Path`, the reason) of one call of `lora_linear`.

    Args:
        base: what the updates are added to.
        updates: `Update`s.
        x: ``[..., in]``.
    """
    if isinstance(base, QuantizedBase):
        return Path.FUSED, base.note
    rows, operand = x.shape[:-1].numel(), base.weight
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
        return Path.LIBRARY, f"{reason}{invariance_note()}"
    path, note = Path.FUSED, invariance_note()
    if isinstance(operand, PackedWeight) and not note:
        route, why = operand.route(rows)
        is_packed = route == "packed"
        path, note = (Path.PACKED, f", {why}") if is_packed else (Path.FUSED, f"; {why}")
    if rank > _HIGH_RANK and all(u.lora_a.dtype == torch.bfloat16 for u in updates):
        note += (
            "; sums are in float32: with bfloat16 adapters of so high a rank PEFT may be faster on "
            "processors with fast bfloat16 products"
        )
    panels = None
    if is_on():
        panels = _C.cpu_panels(weight.dtype, batch_invariant=True)
    elif path != Path.PACKED and rows >= _C.cpu_panel_rows:
        out, within = weight.shape
        panels = _C.cpu_panels_of(weight.dtype, within, out, weight.stride(0) != 1, rows)
    one_pass = "" if panels is None else f" in one pass, products in {str(panels)[6:]}"
    return path, f"{_C.cpu_isa()} kernels{one_pass}, rank {rank}{note}"


def cuda_path(device: torch.device, problem: _C.Problem) -> tuple[Path, str]:
    """`kernel_path` on a device that supports the kernel route."""
    explained = _C.explain_problem(device, problem)
    forward, check = explained.plan, explained.check
    if not forward.kernel:
        return Path.LIBRARY, forward.reason
    if check not in ("passed", "not yet"):
        return Path.LIBRARY, f"the CUDA kernels failed their check on {device}: {check}"
    kernels = "beside cuBLAS's x W^T" if forward.hybrid else f"{forward.tile} tiles"
    basis = "predicted" if forward.predicted_us else forward.reason
    return Path.FUSED, f"CUDA kernels, {kernels}, rank {problem.rank}: {basis}"
