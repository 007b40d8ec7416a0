"""Packed GGUF layers of transformers and diffusers beside their own `dequantize` and products."""

import importlib.util

import pytest
import torch
from format_helpers import DTYPES, check_dequantize, check_product, found, make_x, needs
from helpers import BF16, F32, short

from lora_ext.quantized import of_gguf
from lora_ext.quantized.layers import is_quantized, quantized_base

pytestmark = needs("transformers")

# Where a block has scales of 16 bits: they must be numbers, all other bits may be any.
HALVES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ3_XXS": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ3_S": (0,),
    "IQ2_S": (0,),
    "IQ4_XS": (0,),
    "IQ1_M": (),
}


def module(name):
    return pytest.importorskip(f"transformers.integrations.gguf.{name}")


def type_of(name):
    return {name: number for number, name in module("dequant").GGML_NAME.items()}[name]


def random_blocks(name, count):
    """``[count, bytes of a block]`` of any bits."""
    generator = torch.Generator().manual_seed(1)
    _, size = module("dequant").GGML_BLOCK[type_of(name)]
    blocks = torch.randint(0, 256, (count, size), generator=generator, dtype=torch.uint8)
    for at in HALVES_AT[name]:
        scale = torch.rand(count, 1, generator=generator).mul(0.02).add(0.001).half()
        blocks[:, at : at + 2] = scale.view(torch.uint8)
    if name == "IQ1_M":  # whose scale is spread over the top bits of four words
        blocks[:, 55] = (blocks[:, 55] & 0x0F) | 0x20
    return blocks


def make_layer(name="Q4_0", rows=37, blocks=3, bias=True, permuted=False):
    kind = type_of(name)
    elements, _ = module("dequant").GGML_BLOCK[kind]
    layer = module("utils").GgufLinear(blocks * elements, rows, kind, bias)
    layer.weight.data = random_blocks(name, rows * blocks).view(rows, -1)
    generator = torch.Generator().manual_seed(2)
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator)
    if permuted:
        layer.input_permutation = torch.randperm(layer.in_features, generator=generator)
    return layer


def theirs_of(layer, through):
    """W as the forward has it for an x in a dtype, before autocast rounds it again."""
    values = module("dequant").dequantize(layer.weight, layer.ggml_type, through)
    return values.view(layer.out_features, layer.in_features)


@pytest.mark.parametrize("through", DTYPES, ids=short)
@pytest.mark.parametrize("name", HALVES_AT)
def test_dequantize(name, through, monkeypatch):
    """In the dtype of x, in pieces of rows."""
    layer = make_layer(name)
    assert is_quantized(layer)
    weight = found(layer, make_x(layer, through)).weight
    assert (weight.format, weight.dtype) == (name, through)
    values = theirs_of(layer, through)
    check_dequantize(weight, values.to)
    monkeypatch.setattr(of_gguf, "_CPU_CHUNK", 5 * layer.in_features + 1)
    check_dequantize(weight, values.to)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize("name", HALVES_AT)
def test_values(name):
    """Those of ggml's own package."""
    from gguf import GGMLQuantizationType, quants

    layer = make_layer(name)
    values = found(layer, None).weight.dequantize(F32)
    wanted = quants.dequantize(layer.weight.numpy(), GGMLQuantizationType(layer.ggml_type))
    assert torch.allclose(values, torch.from_numpy(wanted), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_product(name, dtype, bias):
    """As the layer's own from nine rows on, without a bias bit for bit."""
    layer = make_layer(name, bias=bias)
    check_product(layer, make_x(layer, dtype, 9), exact=not bias)
    check_product(layer.eval(), make_x(layer, dtype).view(1, -1, layer.in_features), not bias)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_product_under_autocast(dtype):
    """W is dequantised in x's dtype and then rounded to autocast's; y is in x's."""
    layer = make_layer("Q4_K")
    with torch.autocast("cpu", BF16):
        check_product(layer, make_x(layer, dtype))
        assert found(layer, make_x(layer, dtype)).weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_permuted_input(dtype, monkeypatch):
    """W with its columns in x's own order: the same terms, in another order."""
    layer = make_layer("Q8_0", permuted=True)
    weight, x = found(layer, make_x(layer, dtype)).weight, make_x(layer, dtype)
    values = theirs_of(layer, dtype)
    ordered = values[:, torch.argsort(layer.input_permutation)]
    check_dequantize(weight, ordered.to)
    monkeypatch.setattr(of_gguf, "_CPU_CHUNK", 1)
    check_dequantize(weight, ordered.to)
    check_product(layer, x)


def test_few_rows(monkeypatch):
    """A GPU's go to a kernel that reads the blocks; a CPU has none, and W is taken."""
    layer = make_layer()
    assert found(layer, make_x(layer, F32, 1)).dtype == F32
    with pytest.raises((AttributeError, TypeError)):
        layer(make_x(layer, F32, 8))
    layer = layer.to("meta")
    assert quantized_base(layer, make_x(layer, F32, 8)) == of_gguf.FEW_ROWS
    assert not isinstance(quantized_base(layer, make_x(layer, F32, 9)), str)


# ---- diffusers ----

OF_DIFFUSERS = ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def make_diffusers_layer(name, dtype, bias=True):
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType

    like = make_layer(name, bias=bias)
    layer = GGUFLinear(like.in_features, like.out_features, bias, compute_dtype=dtype)
    kind = GGMLQuantizationType[name]
    layer.weight = GGUFParameter(like.weight.data, quant_type=kind)
    layer.bias = like.bias
    return layer.requires_grad_(False)


@needs("diffusers")
@needs("gguf")
@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_dequantize_of_diffusers(name, monkeypatch):
    """To the compute dtype, in pieces of rows."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    for dtype in DTYPES:
        layer = make_diffusers_layer(name, dtype)
        weight = found(layer, make_x(layer, dtype)).weight
        assert (weight.format, weight.dtype) == (name, dtype) and is_quantized(layer)
        values = dequantize_gguf_tensor(layer.weight).to(dtype)
        check_dequantize(weight, values.to)
        monkeypatch.setattr(of_gguf, "_CPU_CHUNK", 5 * layer.in_features + 1)
        check_dequantize(weight, values.to)


@needs("diffusers")
@needs("gguf")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_product_of_diffusers(dtype, bias):
    layer = make_diffusers_layer("Q4_K", dtype, bias)
    check_product(layer, make_x(layer, dtype, 1), exact=not bias)
    check_product(layer, make_x(layer, dtype).view(1, -1, layer.in_features), not bias)
    other = F32 if dtype != F32 else BF16
    assert quantized_base(layer, make_x(layer, other)) == of_gguf.OTHER_DTYPE
    with torch.autocast("cpu", BF16):
        check_product(layer, make_x(layer, dtype))
    changed = found(layer, None).weight.tensors()[0]
    version = changed._version
    layer.weight.add_(1)
    assert changed._version > version
