"""Quantised layers of other libraries as bases of the op: the weight and the dtype of their
product, or why the layer's own forward has to be called.

A layer is supported if its own forward multiplies x by the dequantised weight. If it also quantises
x, its product is different, and `lora_update` adds onto its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import HALVES
from .of_bitsandbytes import eight_bit_base, four_bit_base
from .of_fp8 import fp8_base
from .of_gguf import diffusers_gguf_base, gguf_base
from .of_hqq import hqq_base
from .of_torchao import torchao_base
from .weight import QuantizedBase

__all__ = [
    "QuantizedBase",
    "is_quantized",
    "is_without_kernel",
    "own_type",
    "quantized_base",
    "unread_codes",
]


def quantized_base(
    layer: nn.Module, x: Tensor | None, kind: type | None = None
) -> QuantizedBase | str | None:
    """The base for x, or why the layer has to be called; None for a layer that is not quantised.

    Args:
        layer: of any class.
        x: ``[..., in]``; None for an x in the layer's preferred dtype.
        kind: for a layer of this package with adapters, the class that it replaces; None for the
            layer's own class.
    """
    find = _kind_of(own_type(type(layer)) if kind is None else kind)
    if find is None:
        return None
    if x is not None and x.dtype not in (torch.float32, *HALVES):
        return "x is not in float32, bfloat16 or float16"
    return find(layer, x)


def is_quantized(layer: nn.Module) -> bool:
    """Whether `quantized_base` supports the layer's class."""
    return quantized_base(layer, None) is not None


def unread_codes(layer: nn.Module) -> str:
    """What a linear layer's weight is packed in, if no code of this package reads it (GPTQ's and
    AWQ's `qweight`, compressed-tensors' `weight_packed`), and what is read; or ""."""
    if not hasattr(layer, "out_features") or is_quantized(layer):
        return ""
    own = {**layer._parameters, **layer._buffers}
    codes = [name for name, t in own.items() if t is not None and t.dim() > 1 and _are_codes(t)]
    if not codes:
        return ""
    return (
        f"its weight is packed, in {codes[0]!r} of {own[codes[0]].dtype}, as lora_ext does not "
        "read; bitsandbytes' 4 bits and int8, torchao's, GGUF, HQQ, FP8 and MXFP4 are read"
    )


def _are_codes(tensor: Tensor) -> bool:
    return not (tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize > 1))


def own_type(kind: type) -> type:
    """A library's class of a frozen module, also where `lora_ext.nn.frozen` put one over it."""
    return getattr(kind, "frozen_type", kind)


def is_without_kernel(layer: Any, kind: type) -> bool:
    """Whether a layer's own forward cannot run where its weight is: transformers' FP8 on a CPU."""
    if _kind_of(kind) is not fp8_base:
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and weight.device.type == "cpu" and weight.element_size() == 1


# (layer, x or None for an x in the dtype that the layer prefers) -> its base, or why it has to be
# called, or None for a layer that is not quantised.
_Finder = Callable[[Any, Tensor | None], QuantizedBase | str | None]

# By name, since none of these libraries has to be installed.
_FINDERS: dict[str, _Finder] = {
    "bitsandbytes.nn.modules.Linear4bit": four_bit_base,
    "bitsandbytes.nn.modules.LinearNF4": four_bit_base,
    "bitsandbytes.nn.modules.LinearFP4": four_bit_base,
    "bitsandbytes.nn.modules.Linear8bitLt": eight_bit_base,
    "diffusers.quantizers.gguf.utils.GGUFLinear": diffusers_gguf_base,
    "hqq.core.quantize.HQQLinear": hqq_base,
    "torch.nn.modules.linear.Linear": torchao_base,
    "transformers.integrations.finegrained_fp8.FP8Linear": fp8_base,
    "transformers.integrations.gguf.utils.GgufLinear": gguf_base,
}
_kinds: dict[type, _Finder | None] = {}


def _kind_of(kind: type) -> _Finder | None:
    # A compiled graph would be guarded by what the cache holds, and compiled again when it grows.
    if not torch.compiler.is_compiling() and kind in _kinds:
        return _kinds[kind]
    found = _FINDERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if not torch.compiler.is_compiling():
        _kinds[kind] = found
    return found
