"""FusedLoRALayer: layers whose base is a matrix product, computed by `lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C
from ..config import MAX_RANK
from ..functional import lora_linear
from ..kernel_plan import plan
from ..prepack import PackedWeight, prepack
from .base import LoRALayer


class FusedLoRALayer(LoRALayer):
    """y = x W^T + bias + sum over active adapters of scaling * (drop(x) A^T) B^T."""

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        self.packed: PackedWeight | None = None

    def adapted(self, x: Tensor) -> Tensor:
        """The layer with its active adapters on x ``[..., in]``: ``[..., out]``.

        Several adapters become one of the summed rank, and share one dropout mask. What one call of
        the op cannot do (`_obstacle`, a nested x) is done by torch in PEFT's order.
        """
        names = self.added_adapters
        if x.is_nested or self._obstacle(names):
            return self._added_by_torch(x, names)
        lora_a, lora_b, scaling = self._stacked(names, x)
        dropout_p = self.adapters[names[0]].dropout
        weight, bias = self._operand(), self._bias_with(names)
        return lora_linear(x, weight, lora_a, lora_b, bias, scaling, dropout_p, self.training)

    def _operand(self) -> Tensor | PackedWeight:
        """The weight to add to as ``[out, in]``, or its pack."""
        if self.packed is not None and self.packed.weight is not self.weight:
            self.packed = None  # another weight took the place of the packed one, as in FSDP
        weight, _ = self.base_operands()
        if weight is self.weight and self.packed is not None and self.packed.is_packed:
            return self.packed
        return self.matrix(weight)

    def _bias_with(self, names: Sequence[str]) -> Tensor | None:
        """The base's bias with those of the adapters."""
        _, bias = self.base_operands()
        for name in names:
            if name in self.lora_bias:
                update = self.lora_bias[name] * self.adapters[name].scaling
                bias = update if bias is None else bias + update
        return bias

    def _obstacle(self, names: Sequence[str]) -> str:
        """Why the adapters cannot be one call of the op, or ""."""
        for name in names:
            if name in self.lora_bias and self.lora_bias[name].itemsize > self.weight.itemsize:
                return f"the lora_bias of {name!r} is wider than y, and the op would round it"
        if len(names) == 1:
            return ""
        first = names[0]
        for name in names:
            if self.lora_a[name].dtype != self.lora_a[first].dtype:
                return f"adapters {first!r} and {name!r} differ in dtype"
            if self._dropout(name) != self._dropout(first):
                return f"adapters {first!r} and {name!r} differ in dropout"
        if sum(map(self.rank, names)) > MAX_RANK:
            return f"the ranks of the active adapters sum to more than {MAX_RANK}"
        return ""

    def _dropout(self, name: str) -> float:
        return self.adapters[name].dropout if self.training else 0.0

    def _stacked(self, names: Sequence[str], x: Tensor) -> tuple[Tensor, Tensor, float]:
        """(A ``[R, in]``, B ``[out, R]``, scaling) with the adapters' summed product.

        Half adapters that x, as the op will see it, does not match become float32.
        """
        factors = [self.factors(name) for name in names]
        scalings = [self.adapters[name].scaling for name in names]
        one_scaling = all(value == scalings[0] for value in scalings)
        dtype = factors[0][0].dtype
        is_half = dtype in (torch.bfloat16, torch.float16)
        # A half B times a scaling would be rounded again.
        if is_half and not (one_scaling and dtype == _compute_dtype(x)):
            factors = [(a.float(), b.float()) for a, b in factors]
        if len(names) == 1:
            return *factors[0], scalings[0]
        lora_a = torch.cat([a for a, _ in factors])
        if one_scaling:
            return lora_a, torch.cat([b for _, b in factors], dim=1), scalings[0]
        lora_b = [b * value for (_, b), value in zip(factors, scalings, strict=True)]
        return lora_a, torch.cat(lora_b, dim=1), 1.0

    def _added_by_torch(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The layer in PEFT's order of operations: sums in the widest dtype, rounded once."""
        weight, bias = self.base_operands()
        base = F.linear(x, self.matrix(weight), bias)
        total = base
        for name in names:
            total = total + self._update(x, name)
        return total.to(base.dtype)

    def _update(self, x: Tensor, name: str) -> Tensor:
        """scaling * ((drop(x) A^T) B^T + lora_bias) in the adapter's dtype."""
        lora_a, lora_b = self.factors(name)
        bias = self.lora_bias.get(name)
        dropped = F.dropout(x.to(lora_a.dtype), self._dropout(name))
        return F.linear(F.linear(dropped, lora_a), lora_b, bias) * self.adapters[name].scaling

    def _adapted_path(self, rows: int | None) -> tuple[str, str]:
        names = self.added_adapters
        obstacle = self._obstacle(names)
        if obstacle:
            return "library", f"{obstacle}: added by torch"
        rows = 2**31 if rows is None else rows
        rank = sum(map(self.rank, names))
        weight = self.weight
        if weight.device.type == "cpu":
            reason = _C.cpu_library_reason(rows, rank, weight.dtype, self.lora_a[names[0]].dtype)
        elif weight.device.type == "cuda" and _C.with_cuda:
            return self._cuda_path(rows, rank, names)
        else:
            reason = f"{weight.device.type}: torch's products compute base and update"
        if reason:
            return "library", reason
        operand = self._operand()
        if isinstance(operand, PackedWeight) and operand.route(rows)[0] == "packed":
            return "packed", f"{_C.cpu_isa()} kernels, oneDNN packed weight, rank {rank}"
        return "fused", f"{_C.cpu_isa()} kernels, rank {rank}"

    def _cuda_path(self, rows: int, rank: int, names: Sequence[str]) -> tuple[str, str]:
        weight = self.matrix(self.weight)
        forward = plan(
            min(rows, 2**16),
            weight.shape[1],
            weight.shape[0],
            rank,
            card=weight.device,
            dtype=weight.dtype,
            adapter_dtype=self.lora_a[names[0]].dtype,
            dropout=any(self._dropout(name) > 0 for name in names),
            route=_C.cuda_route(),
        ).forward
        if forward is None or not forward.kernel:
            return "library", forward.reason if forward else ""
        if forward.hybrid:
            return "fused", f"CUDA kernels around the library's base product, rank {rank}"
        return "fused", f"CUDA kernels, {forward.tile} tiles, rank {rank}"

    def pack_weight(self, backward: bool = False) -> PackedWeight:
        """Keeps a copy of the weight in oneDNN's layout for the CPU (`lora_ext.prepack`).

        The copy is dropped when the module is moved or cast. ``layer.packed = None`` frees it.

        Args:
            backward: also pack the transpose, for training: a second copy.

        Returns:
            The `PackedWeight`, whose ``reason`` says why there is none.
        """
        if self.matrix(self.weight) is not self.weight:
            reason = "the weight is not stored as [out, in]"
            self.packed = PackedWeight(self.weight, None, None, reason)
        else:
            self.packed = prepack(self.weight, backward=backward)
        return self.packed

    def _apply(self, fn, recurse=True):
        self.packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or that to which autocast will bring it."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
