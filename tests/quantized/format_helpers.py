"""Checks of a quantised layer of another library beside its own forward and `dequantize`."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F16, F32
from torch import Tensor, nn

from lora_ext.quantized.layers import QuantizedBase, quantized_base
from lora_ext.quantized.weight import QuantizedWeight, dense

DTYPES = [F32, BF16, F16]
ROWS = 11  # more than GGUF's kernels for few rows take


def needs(package: str):
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


def make_x(layer: nn.Module, dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, layer.in_features, generator=generator).to(dtype)


def found(layer: nn.Module, x: Tensor | None) -> QuantizedBase:
    base = quantized_base(layer, x)
    assert isinstance(base, QuantizedBase), base
    assert base.weight.shape == (layer.out_features, layer.in_features)
    assert base.weight.device.type == "cpu"
    assert base.weight.format and not base.weight.requires_grad
    return base


def check_dequantize(weight: QuantizedWeight, theirs: Callable[[torch.dtype], Tensor]) -> None:
    """The bits of the library's, in each dtype, into a tensor that is given and into another."""
    for dtype in DTYPES:
        wanted = theirs(dtype)
        assert wanted.dtype == dtype and not wanted.isnan().any()
        out = torch.full(weight.shape, float("nan"), dtype=dtype) if weight.writes(dtype) else None
        for values in (weight.dequantize(dtype), weight.dequantize(dtype, out)):
            assert values.dtype == dtype
            assert torch.equal(values, wanted)
        assert out is None or torch.equal(out, wanted)


def check_product(layer: nn.Module, x: Tensor, exact: bool = False) -> None:
    """y and dx of the layer are those of a product with our weight.

    The bits where `exact`; else up to two roundings of each of the terms to the product's dtype,
    and float32's of their sums in another order.
    """
    base = found(layer, x)
    x = x.detach().requires_grad_()
    y = layer(x)
    assert y.dtype == base.y_dtype
    given = x.detach().to(base.dtype)
    bias = None if base.bias is None else base.bias.detach().to(base.dtype)
    with torch.autocast("cpu", enabled=False), dense(base.weight, given) as matrix:
        assert matrix.dtype == base.dtype
        ours = F.linear(given, matrix, bias).to(base.y_dtype)
        terms = F.linear(given.abs().float(), matrix.abs().float())
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
        dx = (grad.to(base.dtype) @ matrix).to(x.dtype)
        dx_terms = grad.abs().float() @ matrix.abs().float()
    if bias is not None:
        terms = terms + bias.abs().float()
    y.backward(grad)
    if exact:
        assert torch.equal(y, ours) and torch.equal(x.grad, dx)
        return
    limit = 2 * torch.finfo(base.dtype).eps + max(matrix.shape) * torch.finfo(F32).eps
    assert ((y - ours).abs().float() <= limit * terms).all()
    assert ((x.grad - dx).abs().float() <= limit * dx_terms).all()


def plain_linear(
    rows: int, cols: int, bias: bool = True, dtype: torch.dtype = F32, seed: int = 0
) -> nn.Linear:
    """A frozen nn.Linear of values that do not depend on its dtype."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(cols, rows, bias=bias)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer.to(dtype).requires_grad_(False)
