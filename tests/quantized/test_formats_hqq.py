"""HQQ's layers beside their own `dequantize` and products."""

import pytest
import torch
from format_helpers import (
    DTYPES,
    check_dequantize,
    check_product,
    found,
    make_x,
    needs,
    plain_linear,
)
from helpers import BF16, F16, F32, short

from lora_ext.quantized import of_hqq
from lora_ext.quantized.layers import is_quantized, quantized_base

pytestmark = needs("hqq")

# (bits, group, axis): 3 bits are padded in their words.
FORMS = [(8, 64, 1), (4, 64, 1), (4, 8, 0), (3, 64, 1), (3, 8, 0), (2, 16, 1), (1, 8, 1)]
FORMS += [(4, None, 1), (4, None, 0)]


def quantized(form=(4, 64, 1), dtype=F32, bias=True, rows=30, cols=64, **words):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    bits, group, axis = form
    settings = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, **words)
    settings["weight_quant_params"]["optimize"] = False  # which looks for better zeros, for long
    layer = plain_linear(rows, cols, bias)
    return HQQLinear(layer, settings, compute_dtype=dtype, device="cpu")


@pytest.fixture(autouse=True)
def default_backend():
    from hqq.core.quantize import HQQBackend, HQQLinear

    yield
    HQQLinear.set_backend(HQQBackend.PYTORCH)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dequantize(form, dtype):
    layer = quantized(form, dtype)
    assert is_quantized(layer)
    base = found(layer, None)
    assert base.dtype == base.y_dtype == base.weight.dtype == dtype
    assert base.weight.format == f"HQQ's {form[0]} bits"
    check_dequantize(base.weight, lambda wanted: layer.dequantize().to(wanted))


def test_codes_kept_as_floats():
    layer = quantized(dtype=F16, view_as_float=True)
    weight = found(layer, None).weight
    check_dequantize(weight, lambda wanted: layer.dequantize().to(wanted))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backend", ["PYTORCH", "PYTORCH_FORWARD"])
def test_product(backend, dtype, bias):
    """As the layer's own, without a bias bit for bit."""
    from hqq.core.quantize import HQQBackend, HQQLinear

    layer = quantized(dtype=dtype, bias=bias)
    HQQLinear.set_backend(HQQBackend[backend])
    check_product(layer, make_x(layer, dtype), exact=not bias)
    check_product(layer.eval(), make_x(layer, dtype, 1), exact=not bias)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_product_under_autocast(dtype):
    """In autocast's dtype, which HQQ's own backward takes only where compute_dtype is the same."""
    layer = quantized(dtype=BF16)
    with torch.autocast("cpu", BF16):
        check_product(layer, make_x(layer, dtype))
        other = quantized(dtype=F32)
        base = found(other, make_x(other, dtype))
        y = other(make_x(other, dtype))
    assert (base.dtype, base.y_dtype) == (BF16, y.dtype) == (BF16, BF16)


def test_x_in_another_dtype():
    layer = quantized()
    x = make_x(layer, BF16)
    with pytest.raises(RuntimeError):
        layer(x)
    assert quantized_base(layer, x) == of_hqq.OTHER_DTYPE


def test_other_backends():
    layer = quantized()
    from hqq.core.quantize import HQQBackend, HQQLinear

    HQQLinear.backend = HQQBackend.ATEN
    assert quantized_base(layer, make_x(layer, F32)) == of_hqq.OTHER_BACKEND


def test_not_yet_quantised():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = HQQLinear(None, BaseQuantizeConfig(), compute_dtype=F32, device="cpu")
    assert quantized_base(layer, None) == of_hqq.NOT_YET


def test_bias_is_frozen():
    """Of a layer that was trainable when it was quantised, its clone leads to the former bias."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    plain = plain_linear(30, 64).requires_grad_()
    layer = HQQLinear(plain, BaseQuantizeConfig(), compute_dtype=F32, device="cpu")
    base = found(layer, None)
    assert not base.bias.requires_grad and torch.equal(base.bias, layer.bias)
