"""FusedLoRALayer: layers whose base is a matrix product, computed by `lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..functional import lora_linear
from ..packed_weight import Base, Packable, PackedWeight, prepack
from ..torch_state import is_onnx_export, is_plain, is_transformed
from .base import LoRALayer
from .kernel_path import kernel_path
from .mixed import mixed_linear
from .row_adapters import RowAdapters
from .updates import Update, added_by_torch, obstacle, stacked, with_biases


def check_dense(x: Tensor) -> None:
    """Raises TypeError for a nested x, whose rows cannot have adapters of their own."""
    if x.is_nested:
        raise TypeError(
            "lora_ext.use_adapters: expected a dense x, but got a nested one; pad it, or call "
            "the model without the block"
        )


class FusedLoRALayer(Packable, LoRALayer):
    """y = x W^T + bias + sum over active adapters of scaling * (drop(x) A^T) B^T."""

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        self.packed: PackedWeight | None = None

    def adapted(self, x: Tensor) -> Tensor:
        """The layer with its active adapters on x ``[..., in]``: ``[..., out]``.

        Several adapters become one with the sum of their ranks, and share one dropout mask. Cases
        that one call of the op does not support (`obstacle`, a nested x, ONNX, torch.func) are
        computed by torch in PEFT's order of operations.
        """
        if isinstance(x, Proxy):
            return self._traced(x)
        updates = self._updates()
        is_others = x.is_nested or is_onnx_export() or is_transformed()
        if is_others or obstacle(updates, self.weight.dtype):
            weight, bias = self.base_operands()
            return added_by_torch(F.linear(x, self.matrix(weight), bias), x, updates)
        lora_a, lora_b, scaling = stacked(updates, x)
        _, bias = self.base_operands()
        dropout_p = updates[0].dropout
        bias = with_biases(bias, updates)
        return lora_linear(x, self._operand(), lora_a, lora_b, bias, scaling, dropout_p)

    def _traced(self, x: Any) -> Any:
        """torch.fx.symbolic_trace: the layer is one node, as nn.Linear is."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _operand(self) -> Tensor | PackedWeight:
        """The base's weight as ``[out, in]``, or its pack."""
        weight, _ = self.base_operands()
        if not is_plain(weight) and type(weight).__module__.startswith("torchao."):
            raise TypeError(
                f"lora_ext.nn.{type(self).__name__}: expected the weight with which the layer was "
                f"made, but torchao put a {type(weight).__name__} in its place; call "
                "torchao.quantization.quantize_ before apply_lora"
            )
        return self.pack_of(weight) or self.matrix(weight)

    def mixed(self, x: Tensor, rows: RowAdapters) -> Tensor:
        """The layer on x ``[..., in]``, each row with the adapter that the block selects for it."""
        if isinstance(x, Proxy):
            return self._traced(x)
        check_dense(x)
        pool, bias = self.pool, self.bias
        if not self._disabled:
            self.check_unmerged()
            if rows.slots is not None and pool is not None and not pool.needs_lists(self, x):
                index = rows.slots_of(x.shape[:-1], x.device)
                return pool.linear(x, self._operand(), bias, index)
            updates = self._updates_of(self.row_names(rows))
            if updates:
                return mixed_linear(x, self._operand(), bias, updates, rows)
        return F.linear(x, self.matrix(self.weight), bias)

    def _path_of_rows(self, names: Sequence[str]) -> str:
        return "fused"

    def _updates(self) -> list[Update]:
        """The updates of the active adapters."""
        return [self._update(name) for name in self.added_adapters]

    def _updates_of(self, names: Sequence[str]) -> list[Update]:
        """The updates of these adapters; plain ones take a microsecond each."""
        tables, adapters, training = self.__dict__["_modules"], self.adapters, self.training
        first, second = tables["lora_a"]._parameters, tables["lora_b"]._parameters
        subtracted = tables["lora_a_init"]._parameters
        has_plain_factors = type(self).factors is LoRALayer.factors
        pool = tables.get("pool")
        pooled, slots = ({}, {}) if pool is None else (pool.specs, pool.slots)
        found = []
        for name in names:
            spec = adapters.get(name)
            if spec is None:
                spec = pooled[name]
                lora_a, lora_b = slots[name]
                dropout = spec.dropout if training else 0.0
                found.append(Update(name, lora_a, lora_b, None, spec.scaling, dropout))
                continue
            lora_a, lora_b = first.get(name), second.get(name)
            is_plain = has_plain_factors and name not in subtracted
            if spec.lora_bias or lora_a is None or lora_b is None or not is_plain:
                found.append(self._update(name))
                continue
            dropout = spec.dropout if training else 0.0
            found.append(Update(name, lora_a, lora_b, None, spec.scaling, dropout))
        return found

    def _update(self, name: str) -> Update:
        """The update of one adapter, of the layer or of its pool."""
        spec = self.adapters[name]
        dropout = spec.dropout if self.training else 0.0
        bias = self.lora_bias[name] if spec.lora_bias else None
        return Update(name, *self.factors(name), bias, spec.scaling, dropout)

    def _adapted_path(self, rows: int | None) -> tuple[str, str]:
        updates = self._updates()
        reason = obstacle(updates, self.weight.dtype)
        if reason:
            return "library", f"{reason}: added by torch"
        return kernel_path(self._operand(), updates, rows)

    def packable(self) -> Base | None:
        """The weight of a linear layer."""
        return None

    def pack_weight(self, backward: bool = False) -> PackedWeight:
        """Keeps a copy of the weight in oneDNN's layout for the CPU (`lora_ext.prepack`).

        The copy is dropped when the module is moved or cast. ``layer.packed = None`` frees it.

        Args:
            backward: also pack the transpose, for training: a second copy.

        Returns:
            The `PackedWeight`, whose ``reason`` says why there is none.
        """
        transposed = getattr(self, "fan_in_fan_out", False)
        if self.matrix(self.weight) is self.weight or transposed:
            packed = prepack(self.weight, backward=backward, transposed=transposed)
            self.packed = packed.of_layer()
        else:
            reason = "the weight is no matrix"
            self.packed = PackedWeight(self.weight, None, None, reason)
        return self.packed

    def _apply(self, fn, recurse=True):
        self.packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)
