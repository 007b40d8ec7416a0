"""FusedLoRALayer: layers whose base is a matrix product, computed by `lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..call import Decision
from ..call.apply import Dense, Slots, Update, obstacle, takes_op
from ..call.decision import added, fused
from ..packed_weight import Base, Packable, PackedWeight, pack_weight
from ..quantized.weight import QuantizedBase
from ..torch_state import is_plain
from .base import LoRALayer
from .row_adapters import RowAdapters


class FusedLoRALayer(Packable, LoRALayer):
    """y = x W^T + bias + sum over active adapters of scaling * (drop(x) A^T) B^T.

    Several active adapters become one with the sum of their ranks, and share one dropout mask.
    """

    # The path of updates that are not one call with the weight.
    added_path = "library"
    # Why `packable` has none.
    unpacked_reason = "the weight is not a matrix"

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        self.packed: PackedWeight | None = None

    def base_forward(self, x: Tensor) -> Tensor:
        weight, bias = self.base_operands()
        return F.linear(x, self.matrix(weight), bias)

    def decide(self, x: Any, rows: RowAdapters | None) -> Decision:
        if isinstance(x, Proxy) and not (rows is None and self.computes_base):
            return Decision(self._traced, "fused")
        if rows is None or x is None or self._disabled:
            return super().decide(x, rows)
        if x.is_nested:
            raise TypeError(
                "lora_ext.use_adapters: expected a dense x, but got a nested tensor; pad it, or "
                "call the model outside of the block"
            )
        pool = self.pool
        if rows.slots is None or pool is None or pool.needs_lists(self, x):
            return super().decide(x, rows)
        self.check_unmerged()
        return self._call(x, pool.updates, rows)

    def _traced(self, x: Any) -> Any:
        """torch.fx.symbolic_trace: the layer is one node, as nn.Linear is."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _decide_for(self, names: Sequence[str], x: Any, rows: RowAdapters | None) -> Decision:
        return self._call(x, self._updates_of(names), rows)

    def _call(
        self, x: Any, updates: Sequence[Update] | Slots, rows: RowAdapters | None
    ) -> Decision:
        base = self.base_for(x, updates, rows)
        if isinstance(base, str):
            return added(self.base_forward, updates, rows, base, self.added_path)
        return fused(base, updates, rows)

    def base_for(
        self, x: Tensor | None, updates: Any, rows: RowAdapters | None
    ) -> Dense | QuantizedBase | str:
        """The base for one call of the op, or why its own forward has to be called.

        Args:
            x: ``[..., in]``; None for an x in the base's preferred dtype.
            updates: as of `apply`.
            rows: which of them each row has, None: all.
        """
        if rows is None:
            if x is not None and not takes_op(x):
                return "a nested x, ONNX export or torch.func: added by torch"
            reason = obstacle(updates, self.weight.dtype)
            if reason:
                return f"{reason}: added by torch"
        weight, bias = self.base_operands()
        if not is_plain(weight) and type(weight).__module__.startswith("torchao."):
            raise TypeError(
                f"lora_ext.nn.{type(self).__name__}: expected the weight with which the layer was "
                f"made, but torchao put a {type(weight).__name__} in its place; call "
                "torchao.quantization.quantize_ before apply_lora"
            )
        return Dense(self.pack_of(weight) or self.matrix(weight), bias)

    def _updates_of(self, names: Sequence[str]) -> list[Update]:
        """The updates of these adapters; plain ones take a microsecond each."""
        tables, adapters, training = self.__dict__["_modules"], self.adapters, self.training
        first, second = tables["lora_a"]._parameters, tables["lora_b"]._parameters
        has_other_factors = type(self).factors is not LoRALayer.factors
        changed, biases = tables["lora_a_init"]._parameters, tables["lora_bias"]
        found = []
        for name in names:
            spec = adapters.get(name) or self.pool.specs[name]
            lora_a, lora_b = first.get(name), second.get(name)
            if lora_a is None or lora_b is None or name in changed or has_other_factors:
                lora_a, lora_b = self.factors(name)
            bias = biases[name] if spec.lora_bias else None
            dropout = spec.lora_dropout if training else 0.0
            found.append(Update(name, lora_a, lora_b, bias, spec.scaling, dropout))
        return found

    def packable(self) -> Base | None:
        """The weight of a linear layer."""
        return None

    def pack_weight(self, backward: bool = False) -> PackedWeight:
        """Keeps a copy of the weight in oneDNN's layout for the CPU (`lora_ext.pack_weight`).

        The copy is dropped when the module is moved or cast. ``layer.packed = None`` frees it.

        Args:
            backward: also pack the transpose, for training: a second copy.

        Returns:
            The `PackedWeight`, whose ``reason`` says why there is none.
        """
        base = self.packable()
        if base is None:
            return PackedWeight(self.stored_weight, None, None, self.unpacked_reason)
        packed = pack_weight(base.weight, backward=backward, transposed=base.transposed)
        self.packed = packed.of_layer()
        return self.packed

    def _apply(self, fn, recurse=True):
        self.packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)
