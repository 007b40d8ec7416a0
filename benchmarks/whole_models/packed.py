"""Models whose frozen weights are packed where that is faster here, and a packed frozen one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ext
from lora_ext.packed_weight import PackedWeight, packed_linear

from ..markdown import Column, floor_column, mebibytes, ratio_columns, table_of
from ..results import Row
from ..timing import Plan, compared
from .calls import forward_of, step_of
from .cases import BATCH, LENGTH, Case, base_model, inputs
from .step import adapted

CASES = (
    Case("Llama", "all linear", "float32"),
    Case("Llama", "all linear", "bfloat16"),
    Case("MiniLM", "all linear", "float32"),
)
# Of `step.adapted`; each also packed, and the frozen model with the packs of ours.
_UNPACKED = ("frozen", "ours", "peft", "peft_accelerated")
_PACKED = ("ours", "peft_accelerated")
FROZEN_PACKED = "frozen packed"
_LABELS = {
    FROZEN_PACKED: "frozen, packed",
    "ours": "ours",
    "ours packed": "ours, packed",
    "peft": "PEFT",
    "peft_accelerated": "PEFT, accelerated",
    "peft_accelerated packed": "PEFT, accelerated, packed",
}
_COPIES = 3


class _Product(torch.autograd.Function):
    """x W^T + bias of a frozen weight, and dx = dy W, each from the pack where a call takes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, pack: PackedWeight) -> Tensor:
        matrix, packed, ctx.packed_t = pack.operands(x)
        ctx.matrix = matrix
        return F.linear(x, matrix, bias) if packed is None else packed_linear(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed = ctx.packed_t
        dx = grad.matmul(ctx.matrix) if packed is None else packed_linear(grad, packed, None)
        return dx, None, None


class PackedLinear(nn.Module):
    """A frozen layer on a pack: the floor of what packing gives."""

    def __init__(self, pack: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.pack, self.bias_of = pack, bias

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias_of, self.pack)


def frozen_packed(model: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of the frozen model whose layers have the packs of a model of ours."""
    packs = {
        path: layer.packed
        for path, layer in model.named_modules()
        if getattr(layer, "packed", None) is not None
    }
    frozen = copy.deepcopy(base)
    for path, pack in packs.items():
        parent, _, name = path.rpartition(".")
        bias: Any = frozen.get_submodule(path).bias
        setattr(frozen.get_submodule(parent), name, PackedLinear(pack, bias))
    return frozen


def measure(
    plan: Plan, progress: Callable[[str], None], cases: Sequence[Case] = CASES
) -> list[Row]:
    """Steps and forwards of 2048 tokens, with what packing found and costs, as plain JSON."""
    found = []
    for case in cases:
        base = base_model(case)
        pairs = inputs(case, base, _COPIES)
        rows = (BATCH[case.model] * LENGTH[case.model],)
        models: dict[str, nn.Module] = {name: adapted(case, base, name) for name in _UNPACKED}
        row: Row = {"id": case.id}
        for name in _PACKED:
            progress(f"{case.id}: packs {name}")
            model = adapted(case, base, name)
            warm = lora_ext.warmup(model, rows=rows, progress=False)
            models[f"{name} packed"] = model
            assert warm.packing is not None
            if name == "ours":
                row["packing"] = str(warm.packing).splitlines()
                row["bytes"] = warm.packing.nbytes
                row["weights"] = sum(p.nbytes for p in base.parameters())
                models[FROZEN_PACKED] = frozen_packed(model, base)
        for key, call_of in (("timing", step_of), ("forward", forward_of)):
            progress(f"{case.id}: {'steps' if key == 'timing' else 'forwards'}, packed and not")
            calls = {name: call_of(model, pairs) for name, model in models.items()}
            for call in calls.values():
                call()
            row[key] = compared(calls, plan)
        found.append(row)
    return found


def table(rows: Sequence[Row], key: str) -> str:
    """Times over the frozen model's as torch runs it."""
    columns: list[Column] = [
        ("model, layers, base", lambda row: row["id"]),
        floor_column("frozen", key),
        *ratio_columns(_LABELS, "frozen", key),
    ]
    columns.append(("weights", lambda row: mebibytes(row["weights"])))
    columns.append(("packs", lambda row: mebibytes(row["bytes"])))
    return table_of(rows, columns)
