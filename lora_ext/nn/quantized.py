"""LoRAQuantizedLinear: quantised linear layers of other libraries, with adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call
from ..call.apply import takes_op, updates_obstacle
from ..call.decision import example
from ..call.op import base_linear
from ..quantized.layers import (
    QuantizedBase,
    is_quantized,
    is_without_kernel,
    own_type,
    quantized_base,
)
from ..rows.row_adapters import RowAdapters
from ..torch_state import is_plain
from .fused import FusedLoRALayer
from .linear import FromLinear
from .named_adapters import TABLES
from .over import Over, check_own_forward, empty_over


class LoRAQuantizedLinear(Over, FromLinear):
    """A frozen, quantised linear layer of another library with low-rank adapters.

        y = base(x) + sum over active adapters of scaling * ((drop(x) lora_a^T) lora_b^T + bias)

    If the base multiplies by its dequantised weight, base and update are one call of the op with
    this weight, forward and backward; otherwise the base's own forward runs and `lora_update` adds
    the rest. `path` returns which, and why. `lora_ext.quantized.layers` lists the supported layers.

    `around` and `from_linear` make one. Its class is made for the base's class and also derives
    from it, such as LoRALinear4bit from bitsandbytes' Linear4bit: the base's attributes keep their
    names, and its own methods write and read its part of a state dict.

    Shape:
        x ``[..., in_features]`` to y ``[..., out_features]`` in the dtype that the base returns;
        lora_a ``[r, in_features]``, lora_b ``[out_features, r]``, float32 unless adapter_dtype is
        given.

    `merge` raises RuntimeError: W + B A would have to be quantised again.
    """

    # The replaced class is a base of the layer's own class, see `class_over`.
    in_features: int
    out_features: int
    # What `_init_lora` and its callers set.
    own_names = Over.own_names | {
        *("base_attributes", "adapters", "active_adapters", "merged_adapters", "_disabled"),
        *("packed", "pool", "row_adapters", "merged_weight", "merged_bias"),
        *TABLES,
    }
    can_merge = False
    unpacked_reason = "the weight is quantised"

    @classmethod
    def around(cls, base: nn.Module) -> Any:
        """The layer that replaces `base`, without an adapter; it shares the tensors, mode and hooks
        of `base`.

        Raises:
            TypeError: base is not a supported quantised layer, or its forward is replaced on the
                instance.
        """
        cls._check_base(base)
        check_own_forward("lora_ext.nn.LoRAQuantizedLinear", base)
        layer = empty_over(LoRAQuantizedLinear, own_type(type(base)))
        layer._init_lora(base)
        return layer

    @classmethod
    def _name_over(cls, base_type: type[nn.Module]) -> str:
        # The weight of a plain one is a torchao tensor.
        return "LoRATorchaoLinear" if base_type is nn.Linear else super()._name_over(base_type)

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        if isinstance(base, FusedLoRALayer) or not is_quantized(base):
            raise TypeError(
                "lora_ext.nn.LoRAQuantizedLinear: expected a quantised linear layer of "
                "bitsandbytes, torchao, HQQ, transformers or diffusers, exactly of its class, but "
                f"got {type(base).__module__}.{type(base).__qualname__}"
            )

    def _adopt(self, base: nn.Module) -> None:
        super()._adopt(base)
        # torchao sets one on the instance, which would hide ours.
        shown = self.__dict__.pop("extra_repr", None)
        self.base_attributes = {} if shown is None else {"extra_repr": shown}

    def restored(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        base = super().restored(weights)
        base.__dict__.update(self.base_attributes)
        return base

    def as_base(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        self._refuse_merge()

    # Used instead of a dense weight.

    @property
    def stored_weight(self) -> Tensor:
        kept = self._parameters
        found = kept.get("weight")
        if found is None:
            found = kept.get("W_q")  # HQQ's name for it
        if found is None:
            raise RuntimeError(
                f"lora_ext.nn.{type(self).__name__}: expected a weight that is quantised, but the "
                "layer has none yet; load or quantise it first"
            )
        return found

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def weight_values(self) -> Tensor:
        found = quantized_base(self, None, self.base_type)
        if not isinstance(found, QuantizedBase):
            raise ValueError(
                f"lora_ext.nn.{type(self).__name__}: expected a weight that lora_ext can "
                f"dequantise, for an init from its values, but {found}; choose "
                "init_lora_weights=True"
            )
        with torch.no_grad():
            return found.weight.dequantize(torch.float32)

    def _check_weight(self, where: str) -> None:
        """Accepts a weight of any dtype."""

    # What a forward computes.

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)

    def base_forward(self, x: Tensor) -> Tensor:
        """The forward of the base layer, without adapters."""
        return base_forward(self, x, self.base_type)

    def example(self, rows: int | None, block: RowAdapters | None) -> Tensor:
        found = quantized_base(self, None, self.base_type)
        dtype = found.dtype if isinstance(found, QuantizedBase) else torch.float32
        return example(self, dtype, rows, block, self.in_features)

    def base_for(self, updates: Any, call: Call) -> QuantizedBase | str:
        x, rows = call.x, call.rows
        if rows is None and not (is_plain(x) and takes_op(x)):
            return "a tensor subclass, ONNX export or torch.func: added by torch"
        found = quantized_base(self, x, self.base_type)
        if not isinstance(found, QuantizedBase):
            return found or "its weight is no longer quantised"
        return updates_obstacle(found.dtype, x, updates, rows) or found

    # Methods of nn.Module.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.state_dict, also for a base whose own method writes only its own part."""
        if self.base_type.state_dict is nn.Module.state_dict:
            return super().state_dict(*args, **kwargs)
        words = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)) | kwargs
        if words.get("destination") is None:
            words["destination"] = OrderedDict()
        words = {"prefix": "", "keep_vars": False} | words
        super().state_dict(**words)
        for name, child in self._modules.items():
            if child is not None:
                child.state_dict(**{**words, "prefix": f"{words['prefix']}{name}."})
        return words["destination"]


def base_forward(layer: nn.Module, x: Tensor, kind: type) -> Tensor:
    """The forward of a library's class; if it has no kernel for the device, x times the dequantised
    weight."""
    base = quantized_base(layer, x, kind) if is_without_kernel(layer, kind) else None
    if isinstance(base, QuantizedBase):
        return base_linear(x, base.weight, base.call_bias)
    return kind.forward(layer, x)  # type: ignore[attr-defined]
