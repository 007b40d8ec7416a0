"""transformers' FP8 layers on a CPU, where they have no kernel: dequantised, in the bits of
transformers; used as they are, where a weight is kept in more than one byte."""

import re

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
    words = {"block_size": (16, 16), **words}
    layer = module.FP8Linear(cols, rows, has_bias=bias, **words).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, cols, generator=generator)
    layer.weight = nn.Parameter(values.to(dtype or layer.weight.dtype), requires_grad=False)
    scale = torch.rand(layer.weight_scale_inv.shape, generator=generator)
    layer.weight_scale_inv.data = scale.to(layer.weight_scale_inv.dtype)
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator).to(dtype or F32)
    return layer


@pytest.mark.parametrize(
    "words",
    [{}, {"activation_scheme": "static"}, {"scale_fmt": "ue8m0"}, {"block_size": None}],
    ids=str,
)
def test_dequantised(words):
    layer = make_layer(rows=48, cols=32, **words)
    weight = found(layer, make_x(layer, BF16)).weight
    theirs = transformers_own()._dequantize_one
    check_dequantize(weight, lambda to: theirs(layer.weight, layer.weight_scale_inv, to))
    with pytest.raises(Exception, match=r"kernel|Triton|driver|CUDA"):
        layer(make_x(layer, BF16))  # of which a CPU has none


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_the_last_blocks_have_fewer(bias):
    """As transformers' backward has them, which rounds scales to dx's dtype first: float32."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "_dequantize_fp8_weight"):
        pytest.skip("this transformers has no backward")
    layer = make_layer(bias=bias)
    base, scale = found(layer, make_x(layer, F32)), layer.weight_scale_inv
    wanted = module._dequantize_fp8_weight(layer.weight, scale, (16, 16), F32)
    assert torch.equal(base.weight.dequantize(F32), wanted)
    assert base.bias is layer.bias and base.y_dtype == F32


def test_four_bits():
    layer = make_layer(torch.int8, rows=48, cols=64)
    layer.weight.data = torch.arange(-768, 768).view(48, 32).to(torch.int8)
    layer.weight_scale_inv = nn.Parameter(torch.rand(48, 2) + 0.1, requires_grad=False)
    weight = found(layer, make_x(layer, F32)).weight
    theirs = transformers_own()._dequantize_one
    check_dequantize(weight, lambda to: theirs(layer.weight, layer.weight_scale_inv, to))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "its weight has no scales"),
        (torch.ones(3, 2), r"fp8 of \[33, 45\] in blocks of 16 x 16 has scales of \[3, 3\], but"),
        (torch.ones(3, 3).half(), "scales in float32 or float8_e8m0fnu or uint8, but .* float16"),
    ],
)
def test_what_does_not_fit_is_named(scale, message):
    layer = make_layer()
    layer.weight_scale_inv = None if scale is None else nn.Parameter(scale, requires_grad=False)
    assert is_quantized(layer)
    assert re.search(message, quantized_base(layer, make_x(layer, F32)))


def test_a_gpus_own_forward_quantises_x():
    layer = make_layer().to("meta")
    assert quantized_base(layer, torch.empty(2, 45, device="meta")) == of_fp8.QUANTISES_X


def transformers_own():
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module.Fp8Dequantize, "_dequantize_one"):
        pytest.skip("this transformers has another one")
    return module.Fp8Dequantize(None)


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
