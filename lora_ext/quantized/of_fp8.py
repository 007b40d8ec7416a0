"""The weights of transformers' FP8 layers and experts: e4m3 or e2m1 with scales of blocks.

    FP8Linear, FP8Experts    W = code * scale of its block of m x n (`weight_block_size`)
    their 4-bit form         W = code * scale of 32 of a row, two codes a byte

Their own forwards also quantise x, in kernels of Triton or DeepGEMM, of which a CPU has none: there
x is multiplied by the dequantised weight, as transformers does in backward. On other devices the
layer's own forward is called. A weight with more than one byte for each element, as from a
checkpoint that was not quantised, is used directly in the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import HALVES
from ..torch_state import compute_dtype, is_plain
from .codes import Codes, ScaledCodes
from .devices import has_kernels
from .formats import codes_of
from .stack import QuantizedStack, kept
from .weight import QuantizedBase, QuantizedWeight, stored_base

QUANTISES_X = "it quantises x, too"
OTHER_DTYPE = "x is not in the weight's dtype, which its product needs"
TRAINED = "the base weight is trained"
_SCALES = "_scale_inv"


class StoredWeight(QuantizedWeight):
    """The weight of an `FP8Linear` if it has a floating dtype that the op supports."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        rows, cols = weight.shape
        self.shape, self.device, self.dtype = (rows, cols), weight.device, weight.dtype
        self.format = str(weight.dtype).removeprefix("torch.")

    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.weight.to(dtype)

    def workspace_bytes(self, dtype: torch.dtype) -> int:
        return 0 if dtype == self.weight.dtype else super().workspace_bytes(dtype)


def fp8_base(layer: Any, x: Tensor | None) -> QuantizedBase | str:
    """The base of an `FP8Linear`, or why it has to be called."""
    weight = layer._parameters["weight"]
    if weight.element_size() > 1:
        if weight.requires_grad:
            return TRAINED
        return stored_base(StoredWeight(weight), layer.bias, x, OTHER_DTYPE)
    if weight.device.type != "cpu":
        return QUANTISES_X
    bias = layer.bias
    dtype = torch.bfloat16 if bias is None else bias.dtype
    found = _codes(layer, "weight", dtype)
    if isinstance(found, str):
        return found
    if found.shape[1] != layer.in_features:
        return f"its weight is of {found.shape[1]} input features, not {layer.in_features}"
    if x is not None:
        dtype = compute_dtype(x)
    return QuantizedBase(found, bias, dtype, dtype)


def is_scale(parameters: Mapping[str, Tensor | None], name: str) -> bool:
    """Whether a parameter has the scales of another one."""
    codes = parameters.get(name.removesuffix(_SCALES)) if name.endswith(_SCALES) else None
    return codes is not None and codes.element_size() == 1


def fp8_stack(module: nn.Module, name: str, codes: Tensor) -> QuantizedStack | str | None:
    """The stack of a parameter of `FP8Experts`, or why it is not supported; None for one without
    scales."""
    scale = module._parameters.get(name + _SCALES)
    if scale is None or codes.element_size() > 1 or codes.dim() != 3:
        return None

    # What the model's other layers compute in; the codes do not say.
    dtype = getattr(getattr(module, "config", None), "dtype", None)
    if dtype not in (torch.float32, *HALVES):
        dtype = torch.bfloat16

    def make() -> QuantizedStack | str:
        found = _codes(module, name, dtype)
        return QuantizedStack(found) if isinstance(found, Codes) else found

    if torch.compiler.is_compiling():
        return make()
    # Scales that are not floats are converted once.
    version = 0 if scale.is_inference() else scale._version
    key = (codes.data_ptr(), codes.device, codes.dtype, scale.data_ptr(), scale.dtype)
    return kept(module, name, (*key, version, dtype), make)


def _codes(module: Any, name: str, dtype: torch.dtype) -> Codes | str:
    """The codes of a layer's or of experts' parameter, or what does not fit."""
    codes, scale = module._parameters[name], module._parameters.get(name + _SCALES)
    if scale is None:
        return f"its {name} has no scales"
    if not (is_plain(codes) and is_plain(scale)):
        return f"its {name} is sharded"
    codes, scale = codes.detach(), scale.detach()
    if codes.dtype != torch.float8_e4m3fn:
        found = codes_of("fp4", codes, scale, dtype)
    else:
        block, rows = module.block_size, codes.shape[-2]
        if scale.dim() < 2:  # one of all of W
            scale = scale.view((1,) * codes.dim())
        if block is not None and scale.shape[-2] != -(-rows // block[0]):
            # Experts' gate and up have a scale each, though both have fewer rows than a block.
            block = None
        found = codes_of(
            "fp8", codes, scale, dtype, None if block is None else (block[0], block[1])
        )
    if isinstance(found, str):
        return f"its {name} is not as expected: {found}"
    if isinstance(found, ScaledCodes):
        found.by_kernel = has_kernels(codes.device)
    return found
