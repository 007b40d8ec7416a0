"""Layers and stacks of torchao: an nn.Linear, or a module with a parameter ``[E, rows, columns]``,
with a tensor subclass as its weight.

    Int8Tensor                  W = (code - zero) * scale, for each row, for all, or for groups
    IntxUnpackedToInt8Tensor    W = (code - zero) * scale, 1 to 8 bits, in groups of a row
    Float8Tensor                W = code * scale, for each row, for all rows, or for blocks
    NF4Tensor                   W = table[code] * scale of its block, scales quantised again

The forwards dequantise in the original dtype of the weight, and cast, in the bits of torchao's own
`dequantize`. Codes of int8 without zero points are dequantised by this package's kernel on the CPU,
others by torch's functions in torchao's order.

For types that also quantise x, or that only a kernel can read, the layer's own forward is called.
Stacks are Int8Tensor or Float8Tensor: none of the others can hold one on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import HALVES
from ..torch_state import compute_dtype, is_captured, is_plain
from ..versions import TOO_OLD
from .codes import FourBits, ScaledCodes
from .stack import QuantizedStack, kept
from .weight import QuantizedBase, QuantizedWeight, stored_base

QUANTISES_X = "torchao's weight quantises x, too"
SCALES_X = "torchao's weight scales x first"
ZERO_POINTS = "torchao's product leaves out the zero points of its weight"
ROW_BLOCKS = "torchao's weight shares a scale between some of its rows"
OTHER_DTYPE = "x is not in the dtype of torchao's weight, which its product needs"
TRAINED = "the base weight is trained"


def torchao_base(layer: Any, x: Tensor | None) -> QuantizedBase | str | None:
    """The base of an nn.Linear, or why it has to be called, or None if its weight is not
    torchao's."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if not type(weight).__module__.startswith("torchao."):
        return None
    name, found = type(weight).__name__, _found(weight)
    if isinstance(found, str):
        return found
    if name in ("IntxUnpackedToInt8Tensor", "Float8Tensor"):
        base = stored_base(found, bias, x, OTHER_DTYPE)
    else:
        dtype = weight.dtype if x is None else compute_dtype(x)
        # Also under autocast, the y of int8 is cast back to x's dtype.
        y_dtype = x.dtype if x is not None and name == "Int8Tensor" else dtype
        base = QuantizedBase(found, bias, dtype, y_dtype)
    if isinstance(base, str) or bias is None or name not in ("Float8Tensor", "NF4Tensor"):
        return base
    # The bias is added out of place.
    return base._replace(y_dtype=torch.promote_types(base.dtype, bias.dtype))


def torchao_stack(module: nn.Module, name: str, tensor: Any) -> QuantizedStack | str | None:
    """The stack of a module's parameter, or why it is not supported; None for one that is not a
    stack of torchao's."""
    if not type(tensor).__module__.startswith("torchao.") or tensor.dim() != 3:
        return None
    if torch.compiler.is_compiling():
        return _found(tensor)
    version = _version(tensor.__dict__.get("zero_point"))
    kind = (type(tensor), tensor.dtype, tensor.requires_grad, version)
    key = (*tensor.__dict__.values(), *kind)
    return kept(module, name, key, lambda: _found(tensor))


def _found(tensor: Any) -> Any:
    """The weight of a matrix, or the stack, or why the library has to be called."""
    name, is_stack = type(tensor).__name__, tensor.dim() == 3
    reason = TOO_OLD["torchao"] or _reason(name, tensor)
    if reason:
        return reason
    if name == "NF4Tensor":
        return NF4Weight(tensor)
    codes, scale, zero = tensor.qdata, tensor.scale, getattr(tensor, "zero_point", None)
    if scale.numel() == 1:
        ones = (1,) * tensor.dim()
        scale, zero = scale.view(ones), None if zero is None else zero.view(ones)
    if is_stack and not _fit(codes, scale, zero, tensor.dtype):
        return "a quantised parameter has a form that lora_ext does not know"
    if not (torch.compiler.is_compiling() or is_captured(codes) or has_zero_points(zero)):
        zero = None
    stored = str(getattr(tensor, "target_dtype", codes.dtype)).removeprefix("torch.")
    made = ScaledCodes(codes, scale, zero, tensor.dtype, stored)
    # Forwards that multiply by codes and then scale round W once, to any dtype.
    made.is_cast = not (is_stack or (name == "Int8Tensor" and _is_of_rows(tensor)))
    return QuantizedStack(made) if is_stack else made


def _is_of_rows(tensor: Any) -> bool:
    """Whether no row has more than one scale."""
    return tensor.block_size[-1] >= tensor.shape[-1]


def _reason(name: str, tensor: Any) -> str:
    """Why torchao's own forward is another function than the product with W, or W cannot be had."""
    is_stack = tensor.dim() == 3
    if tensor.requires_grad:
        return TRAINED
    if name not in (_STACKS if is_stack else _MATRICES):
        return _CALLED.get(name, f"torchao's {name} is not known")
    quantises = "activation_quantization" if name.startswith("Intx") else "act_quant_kwargs"
    if getattr(tensor, quantises, None) is not None:
        return QUANTISES_X
    if name != "Int8Tensor":
        return ""
    if tensor.act_pre_scale is not None:
        return SCALES_X
    if _is_of_rows(tensor):
        if not is_stack and tensor.scale.numel() not in (1, tensor.shape[0]):
            return ROW_BLOCKS
        if has_zero_points(tensor.zero_point):
            return ZERO_POINTS
    return ""


def _fit(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a stack's parts are plain tensors, together, with a scale for each block of each
    matrix."""
    parts = [codes, scale] if zero is None else [codes, scale, zero]
    if not all(is_plain(part) and part.device == codes.device for part in parts):
        return False
    if codes.dtype not in _CODES or dtype not in (torch.float32, *HALVES):
        return False
    if scale.dim() != 3 or (zero is not None and zero.shape != scale.shape):
        return False
    count, down, across = scale.shape
    if 0 in scale.shape or count not in (1, codes.shape[0]):
        return False
    return codes.shape[1] % down == 0 and codes.shape[2] % across == 0


class NF4Weight(QuantizedWeight):
    """The weight of an NF4Tensor, whose own method `dequantize` is a different function, of its
    table only.

    On the CPU this package's kernel writes it, bit for bit as torchao but without temporary
    tensors; on other devices, and while a graph is traced, torchao computes it.
    """

    format = "nf4"

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)
        self.device, self.dtype = tensor.device, tensor.dtype
        self.by_kernel = self.device.type == "cpu" and not torch.compiler.is_compiling()

    def tensors(self) -> list[Tensor]:
        names = self.tensor.__tensor_flatten__()[0]
        return [getattr(self.tensor, name) for name in names]

    def writes(self, dtype: torch.dtype) -> bool:
        return self.by_kernel and dtype == self.dtype

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        tensor = self.tensor
        if not self.by_kernel:
            return tensor.get_original_weight().to(dtype)
        scale = tensor.dequantize_scalers(
            tensor.quantized_scalers, tensor.quantization_factor, tensor.scaler_block_size
        )
        codes, table = tensor.quantized_data.contiguous(), tensor.nf4.float()
        blocks = (table, tensor.block_size, self.shape, self.dtype)
        made = FourBits(codes, scale.float(), None, self.format, *blocks)
        made.is_cast = True
        return made.dequantize(dtype, out)


def has_zero_points(points: Tensor | None) -> bool:
    """Whether any is not 0; no, where their values cannot be read."""
    if points is None or points.is_meta or torch.compiler.is_compiling():
        return False
    # Reading them from a GPU synchronises with it.
    return kept(points, "", (_version(points),), lambda: bool(points.any()))


def _version(points: Tensor | None) -> int:
    return 0 if points is None or points.is_inference() else points._version


_MATRICES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "NF4Tensor")
_STACKS = ("Int8Tensor", "Float8Tensor")
_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
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
