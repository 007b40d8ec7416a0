"""FromLinear: makes a layer with an adapter from an existing linear layer, in one call."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from .adapter_spec import DEFAULT_ADAPTER, AdapterSpec
from .fused import FusedLoRALayer

_Layer = TypeVar("_Layer", bound="FromLinear")


class FromLinear(FusedLoRALayer):
    """Base class of the layers that replace a linear layer, dense or quantised."""

    @classmethod
    def from_linear(
        cls: type[_Layer],
        linear: nn.Module,
        *,
        r: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> _Layer:
        """Makes the layer from an existing one, whose tensors and hooks it shares.

        Args:
            linear: the base, frozen from now on. For `LoRALinear` an nn.Linear or transformers'
                Conv1D, for `LoRAQuantizedLinear` a quantised layer of another library.
            r: rank; 0 adds no adapter.
            alpha, dropout, use_rslora, init, lora_bias: as in `AdapterSpec`.
            adapter_dtype: of lora_a and lora_b, as in `LoRALinear`.

        Raises:
            TypeError: linear is none of them (a subclass may compute something else), or its
                forward is replaced on the instance.
            ValueError: a number is out of its range.
        """
        # Checked before anything is made.
        spec = AdapterSpec(r, alpha, dropout, use_rslora, init, lora_bias) if r != 0 else None
        layer = cls.around(linear)
        if spec is not None:
            layer.add_adapter(DEFAULT_ADAPTER, spec, adapter_dtype)
        return layer
