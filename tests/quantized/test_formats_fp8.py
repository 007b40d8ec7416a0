"""transformers' FP8 layers: called, but for a weight that is kept in more than one byte."""

import pytest
import torch
from format_helpers import DTYPES, check_dequantize, check_product, found, make_x, needs
from helpers import BF16, F32, short
from torch import nn

from lora_ext.quantized import of_fp8
from lora_ext.quantized.layers import is_quantized, quantized_base

pytestmark = needs("transformers")


def make_layer(dtype=None, bias=False, rows=33, cols=45, **words):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = module.FP8Linear(cols, rows, (16, 16), has_bias=bias, **words).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, cols, generator=generator)
    layer.weight = nn.Parameter(values.to(dtype or layer.weight.dtype), requires_grad=False)
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator).to(dtype or F32)
    return layer


@pytest.mark.parametrize("words", [{}, {"activation_scheme": "static"}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.int8], ids=["float8", "4 bits"])
def test_quantises_x(dtype, words):
    layer = make_layer(dtype, **words)
    assert is_quantized(layer)
    assert quantized_base(layer, make_x(layer, BF16)) == of_fp8.QUANTISES_X
    with pytest.raises(Exception, match=r"kernel|Triton|driver|CUDA"):
        layer(make_x(layer, BF16))  # of which a CPU has none


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_stored_weight(dtype, bias):
    layer = make_layer(dtype, bias)
    weight = found(layer, None).weight
    assert weight.dtype == dtype and weight.workspace_bytes(dtype) == 0
    assert weight.dequantize(dtype).data_ptr() == layer.weight.data_ptr()
    check_dequantize(weight, layer.weight.to)
    check_product(layer, make_x(layer, dtype), exact=True)
    with torch.autocast("cpu", BF16):
        check_product(layer, make_x(layer, F32), exact=True)


def test_stored_weight_refused():
    layer = make_layer(F32)
    assert quantized_base(layer, make_x(layer, BF16)) == of_fp8.OTHER_DTYPE
    layer.weight.requires_grad_(True)
    assert quantized_base(layer, make_x(layer, F32)) == of_fp8.TRAINED


def test_grouped_layers_are_another_class():
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "FP8GroupedLinear"):
        pytest.skip("this transformers has no grouped layer")
    layer = module.FP8GroupedLinear(32, 64, 2, (16, 16))
    assert quantized_base(layer, torch.randn(3, 2, 32)) is None
