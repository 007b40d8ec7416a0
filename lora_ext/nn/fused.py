"""FusedLoRALayer: layers whose base is a matrix product, computed by `lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..call import Call, Decision, Path
from ..call.apply import Dense, Slots, Update, obstacle, takes_op
from ..call.decision import added, fused
from ..packed_weight import Base, Packable, PackedWeight, pack_weight
from ..quantized.weight import QuantizedBase
from ..torch_state import is_plain
from .base import LoRALayer


class FusedLoRALayer(Packable, LoRALayer):
    """y = x W^T + bias + sum over active adapters of scaling * (drop(x) A^T) B^T.

    Several active adapters become one with the sum of their ranks, and share one dropout mask.
    """

    # Why `packable` has none.
    unpacked_reason = "the weight is not a matrix"

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        self.packed: PackedWeight | None = None

    def base_forward(self, x: Tensor) -> Tensor:
        weight, bias = self.base_operands()
        return F.linear(x, self.matrix(weight), bias)

    def linear_forward(self, x: Tensor) -> Tensor:
        """The base's y of the rows x of its product."""
        return self.base_forward(x)

    def forward(self, input: Any) -> Any:
        return self.decide(Call(input, self.adapters_of_rows())).run(input)

    def decide(self, call: Call) -> Decision:
        x, rows = call.x, call.rows
        if isinstance(x, Proxy) and not (rows is None and self.computes_base):
            return Decision(self._traced, Path.FUSED)
        if rows is None or self._disabled:
            return super().decide(call)
        if x.is_nested:
            raise TypeError(
                "lora_ext.use_adapters: expected a dense x, but got a nested tensor; pad it, or "
                "call the model outside of the block"
            )
        pool = self.pool
        if rows.slots is None or pool is None or pool.needs_lists(self, x):
            return super().decide(call)
        self.check_unmerged()
        return self._decide_with(pool.updates, call)

    def _traced(self, x: Any) -> Any:
        """torch.fx.symbolic_trace: the layer is one node, as nn.Linear is."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _decide_for(self, names: Sequence[str], call: Call) -> Decision:
        return self._decide_with(self._updates_of(names), call)

    def _decide_with(self, updates: Sequence[Update] | Slots, call: Call) -> Decision:
        base = self.base_for(updates, call)
        if isinstance(base, str):
            return added(call, self.linear_forward, updates, base)
        return fused(call, base, updates)

    def base_for(self, updates: Any, call: Call) -> Dense | QuantizedBase | str:
        """The base for one call of the op, or why its own forward has to be called."""
        if call.rows is None:
            if not takes_op(call.x):
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
