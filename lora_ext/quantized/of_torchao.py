"""Layers of torchao: an nn.Linear with a tensor subclass as its weight.

    Int8Tensor                  W = code * scale, for each row, for all rows, or for groups of a row
    IntxUnpackedToInt8Tensor    W = (code - zero) * scale, 1 to 8 bits, in groups of a row
    Float8Tensor                W = code * scale, for each row, for all rows, or for blocks
    NF4Tensor                   W = table[code] * scale of its block, scales quantised again

The forwards dequantise in the original dtype of the weight, and cast. For types that also quantise
x, or that only a kernel can read, the layer's own forward is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..torch_state import compute_dtype
from ..versions import TOO_OLD
from .base import QuantizedBase, dtype_as_stored, with_bias_dtype
from .torchao_weights import CodesWeight, NF4Weight, ScaledCodesWeight, TorchaoWeight

QUANTISES_X = "torchao's weight quantises x, too"
SCALES_X = "torchao's weight scales x first"
ZERO_POINTS = "torchao's product leaves out the zero points of its weight"
ROW_BLOCKS = "torchao's weight shares a scale between some of its rows"
OTHER_DTYPE = "x is not in the dtype of torchao's weight, which its product needs"
TRAINED = "the base weight is trained"


def torchao_base(layer: Any, x: Tensor | None) -> QuantizedBase | str | None:
    """The base of an nn.Linear, or why it has to be called, or None if its weight is not torchao's.

    Args:
        layer: an nn.Linear.
        x: ``[..., in]``; None for an x in the original dtype of the weight.
    """
    weight = layer._parameters.get("weight")
    if not type(weight).__module__.startswith("torchao."):
        return None
    if TOO_OLD["torchao"]:
        return TOO_OLD["torchao"]
    if weight.requires_grad:
        return TRAINED
    name = type(weight).__name__
    find = _FINDERS.get(name)
    if find is None:
        return reason_of_type(name)
    return find(weight, layer._parameters.get("bias"), x)


def reason_of_type(name: str) -> str:
    """Why a tensor of this type cannot be dequantised here."""
    return _CALLED.get(name, f"torchao's {name} is not known")


def _int8(weight: Any, bias: Tensor | None, x: Tensor | None) -> QuantizedBase | str:
    if weight.act_quant_kwargs is not None:
        return QUANTISES_X
    if weight.act_pre_scale is not None:
        return SCALES_X
    rows, cols = weight.shape
    group = weight.block_size[-1]
    if group < cols:
        found = _codes(weight, f"int8 in groups of {group}")
    elif weight.scale.numel() not in (1, rows):
        return ROW_BLOCKS
    elif has_zero_points(weight.zero_point):
        return ZERO_POINTS
    else:
        found = ScaledCodesWeight(weight, "int8")
    if x is None:
        return QuantizedBase(found, bias, weight.dtype, weight.dtype)
    # Also under autocast, y is cast back to x's dtype.
    return QuantizedBase(found, bias, compute_dtype(x), x.dtype)


def _intx(weight: Any, bias: Tensor | None, x: Tensor | None) -> QuantizedBase | str:
    if weight.activation_quantization is not None:
        return QUANTISES_X
    bits, group = str(weight.target_dtype).removeprefix("torch."), weight.block_size[-1]
    format = bits if group == weight.shape[1] else f"{bits} in groups of {group}"
    dtype = dtype_as_stored(weight.dtype, x)
    if dtype is None:
        return OTHER_DTYPE
    return QuantizedBase(_codes(weight, format), bias, dtype, dtype)


def _float8(weight: Any, bias: Tensor | None, x: Tensor | None) -> QuantizedBase | str:
    if weight.act_quant_kwargs is not None:
        return QUANTISES_X
    dtype = dtype_as_stored(weight.dtype, x)
    if dtype is None:
        return OTHER_DTYPE
    found = TorchaoWeight(weight, str(weight.qdata.dtype).removeprefix("torch."))
    return QuantizedBase(found, bias, dtype, with_bias_dtype(dtype, bias))


def _nf4(weight: Any, bias: Tensor | None, x: Tensor | None) -> QuantizedBase | str:
    dtype = weight.dtype if x is None else compute_dtype(x)
    return QuantizedBase(NF4Weight(weight, "nf4"), bias, dtype, with_bias_dtype(dtype, bias))


def _codes(weight: Any, format: str) -> TorchaoWeight:
    """The weight for codes with scales for groups of a row; with zero points torchao computes
    it."""
    if weight.device.type != "cpu" or weight.block_size[0] != 1:
        return TorchaoWeight(weight, format)
    return (TorchaoWeight if has_zero_points(weight.zero_point) else CodesWeight)(weight, format)


# For each tensor of zero points, its version and whether any is not zero: reading this from a GPU
# synchronises with it.
_zero_points: Any = WeakIdKeyDictionary()


def has_zero_points(points: Tensor | None) -> bool:
    """Whether any is not 0; no, where their values cannot be read."""
    if points is None or points.is_meta or torch.compiler.is_compiling():
        return False
    version = 0 if points.is_inference() else points._version
    found = _zero_points.get(points)
    if found is None or found[0] != version:
        found = _zero_points[points] = (version, bool(points.any()))
    return found[1]


_FINDERS: dict[str, Callable[[Any, Tensor | None, Tensor | None], QuantizedBase | str]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "NF4Tensor": _nf4,
}
# None of these has a `dequantize`; those with the common reason also quantise x.
_CALLED = {
    "Int4Tensor": "torchao's Int4Tensor can be read by mslk's kernels alone",
    "Int4PreshuffledTensor": "torchao's Int4PreshuffledTensor can be read by mslk's kernels alone",
    "Int4PlainInt32Tensor": "torchao's Int4PlainInt32Tensor can be read on XPU and NPU alone",
    "Int4TilePackedTo4dTensor": "torchao's Int4TilePackedTo4dTensor can be read on CUDA alone",
    "IntxOpaqueTensor": QUANTISES_X,
    "Float8Sparse2x4_1DData1DMetadataTensor": QUANTISES_X,
    "Float8Sparse2x4_2DData2DMetadataTensor": QUANTISES_X,
}
