"""LoRALinear: nn.Linear with adapters; FromLinear: made from an existing layer, in one call."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..call import Call
from ..call.op import lora_linear
from ..dtypes import HALVES
from ..packed_weight import Base
from ..torch_state import is_autocast, is_traced, is_transformed
from .adapter_spec import optional_spec
from .fused import FusedLoRALayer

_Parameter = nn.Parameter
_Layer = TypeVar("_Layer", bound="FromLinear")


class FromLinear(FusedLoRALayer):
    """Base class of the layers that replace a linear layer, dense or quantised."""

    @classmethod
    def from_linear(
        cls: type[_Layer],
        linear: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> _Layer:
        """Makes the layer from an existing one, whose tensors and hooks it shares.

        Args:
            linear: the base, frozen from now on. For `LoRALinear` an nn.Linear or transformers'
                Conv1D, for `LoRAQuantizedLinear` a quantised layer of another library.
            r: rank; 0 adds no adapter.
            lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias: as in `AdapterSpec`.
            adapter_dtype: of lora_a and lora_b, as in `LoRALinear`.

        Raises:
            TypeError: linear is none of them (a subclass may compute something else), or its
                forward is replaced on the instance.
            ValueError: a number is out of its range.
        """
        # Checked before anything is made.
        settings = lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias
        spec = optional_spec(r, *settings)
        layer = cls.around(linear)
        layer._add_default(spec, adapter_dtype)
        return layer


class LoRALinear(FromLinear, nn.Linear):
    """A drop-in for nn.Linear with low-rank adapters on a frozen weight (Hu et al. 2021).

        y = x W^T + bias + scaling * (drop(x) lora_a^T) lora_b^T

    The weight is frozen and keeps nn.Linear's keys in the state dict; the caller decides whether
    the bias is trained. `add_adapter` adds adapters; `set_adapter` activates one or several.

    Args:
        in_features, out_features, bias, device, dtype: nn.Linear's.
        r: rank; 0 adds no adapter.
        lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias: as in `AdapterSpec`.
        fan_in_fan_out: the weight is stored as ``[in, out]``, as in transformers' Conv1D.
        adapter_dtype: of lora_a ``[r, in]`` and lora_b ``[out, r]``; None is float32 on a half
            weight, else the weight's dtype.

    Shape:
        x ``[..., in_features]`` in the weight's dtype to y ``[..., out_features]``.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        fan_in_fan_out: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        # Checked before anything is allocated.
        settings = lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias
        spec = optional_spec(r, *settings)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_lora()
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous())
        self._add_default(spec, adapter_dtype)

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        if not is_conv1d(base):
            super()._check_base(base)

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        if base is not None:
            self.fan_in_fan_out = is_conv1d(base)
            self.out_features, self.in_features = self.matrix(self.weight).shape

    def as_base(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if self.fan_in_fan_out and self.base_type is nn.Linear:
            weight = weight.t().contiguous()  # the only layout of nn.Linear
        return super().as_base(weight, bias)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    def packable(self) -> Base | None:
        return Base(self.weight, self.bias, self.fan_in_fan_out)

    def forward(self, input: Tensor) -> Tensor:
        rows = None if self.row_adapters is None else self.adapters_of_rows()
        if rows is None and type(self) is LoRALinear:  # a subclass may override `matrix`, `factors`
            operands = fast_path_operands(self, input)
            if operands is not None:
                return lora_linear(input, *operands)
        return self.decide(Call(input, rows)).run(input)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with weight ``[in, out]``; does not import
    transformers."""
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def fast_path_operands(layer: Any, x: Tensor) -> tuple | None:
    """(weight, lora_a, lora_b, bias, scaling, dropout_p) of one plain adapter, the most common
    forward, for `lora_linear`; or None.

    `FusedLoRALayer.decide` handles all cases; with one row its checks would take as long as the
    product. If the conditions here hold, it would call the op with the same operands (tested).
    """
    state = layer.__dict__
    names = state["active_adapters"]
    if (
        len(names) != 1
        or state["merged_adapters"]
        or state["_disabled"]
        or state["fan_in_fan_out"]
        or type(x) is not Tensor
        or x.is_nested
        or is_traced()
        or is_transformed()
    ):
        return None
    name, tables, own = names[0], state["_modules"], state["_parameters"]
    if name in tables["lora_a_init"]._parameters or name in tables["lora_bias"]._parameters:
        return None
    weight = own.get("weight")
    lora_a = tables["lora_a"]._parameters.get(name)
    lora_b = tables["lora_b"]._parameters.get(name)
    if type(weight) is not _Parameter or lora_a is None or lora_b is None:
        return None  # parametrized, or quantised in the meantime
    if lora_a.dtype in HALVES and (lora_a.dtype is not x.dtype or is_autocast(x)):
        return None
    packed = state["packed"]
    if packed is not None:
        if packed.weight is not weight or not packed.is_packed:
            return None
        weight = packed
    spec = state["adapters"][name]
    dropout_p = spec.lora_dropout if state["training"] else 0.0
    return weight, lora_a, lora_b, own.get("bias"), spec.scaling, dropout_p
