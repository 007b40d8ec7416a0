"""torchao's weights beside its own `dequantize` and products."""

import copy

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
from torch import nn

from lora_ext.quantized import of_torchao
from lora_ext.quantized.layers import is_quantized, quantized_base

pytestmark = needs("torchao")

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def config(name):
    from torchao import quantization as ao
    from torchao.quantization import granularity

    group, tensor = granularity.PerGroup(32), granularity.PerTensor()
    asymmetric = {"mapping_type": ao.MappingType.ASYMMETRIC}
    plain = {
        "int8 rows": lambda: ao.Int8WeightOnlyConfig(),
        "int8 tensor": lambda: ao.Int8WeightOnlyConfig(granularity=tensor),
        "int8 groups": lambda: ao.Int8WeightOnlyConfig(granularity=group),
        "float8 rows": lambda: ao.Float8WeightOnlyConfig(),
        "float8 tensor": lambda: ao.Float8WeightOnlyConfig(granularity=tensor),
        "int8 quantises x": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "intx quantises x": lambda: ao.Int8DynamicActivationIntxWeightConfig(),
        "intx rows": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "intx asymmetric": lambda: ao.IntxWeightOnlyConfig(torch.int4, group, **asymmetric),
    }
    if name in plain:
        return plain[name]()
    return ao.IntxWeightOnlyConfig(getattr(torch, name.removeprefix("intx ")), group)


def quantized(name, dtype=F32, bias=True, rows=33, cols=96):
    layer = plain_linear(rows, cols, bias, dtype)
    if name == "nf4":
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        layer.weight = nn.Parameter(to_nf4(layer.weight.data, 32, 9), requires_grad=False)
        return layer
    from torchao.quantization import quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, config(name))
    return holder[0]


INT8 = ["int8 rows", "int8 tensor", "int8 groups"]
INTX = ["intx rows", "intx asymmetric", *(f"intx int{bits}" for bits in BITS)]
FLOAT8 = ["float8 rows", "float8 tensor"]
EACH = ["intx rows", "intx asymmetric", "intx int3", *INT8, *FLOAT8, "nf4"]


def theirs_of(name, weight):
    if name in ("int8 rows", "int8 tensor"):
        return weight.dequantize
    if name == "nf4":
        return lambda dtype: weight.get_original_weight().to(dtype)
    return lambda dtype: weight.dequantize().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", [*INT8, *INTX, *FLOAT8, "nf4"])
def test_dequantize(name, dtype):
    layer = quantized(name, dtype)
    assert is_quantized(layer)
    base = found(layer, None)
    assert base.dtype == base.weight.dtype == dtype
    check_dequantize(base.weight, theirs_of(name, layer.weight))


@pytest.mark.parametrize("name", [*INT8, "intx int4", "intx asymmetric", "nf4", "float8 rows"])
def test_kernels(name, monkeypatch):
    """What the CPU's kernels write; where a graph is traced, or on a GPU, torch's functions do."""
    layer = quantized(name, BF16)
    weight = found(layer, None).weight
    assert weight.by_kernel and weight.writes(BF16)
    assert weight.writes(F32) == (name in INT8[:2])
    with monkeypatch.context() as patch:
        if name not in ("intx asymmetric", "float8 rows"):
            patch.setattr(torch, "mul", None)
        weight.dequantize(BF16)
    weight.by_kernel = False
    assert weight.writes(BF16) == (name != "nf4")
    check_dequantize(weight, theirs_of(name, layer.weight))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", EACH)
def test_product(name, dtype, bias):
    """As the layer's own; the bits where it, too, multiplies by W and then adds the bias."""
    layer = quantized(name, dtype, bias)
    exact = name not in INT8[:2] and (not bias or name in INTX)
    check_product(layer, make_x(layer, dtype), exact)
    check_product(layer.eval(), make_x(layer, dtype, 1), exact)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
@pytest.mark.parametrize("name", EACH)
def test_product_under_autocast(name, dtype, bias):
    layer = quantized(name, F32, bias)
    with torch.autocast("cpu", BF16):
        check_product(layer, make_x(layer, dtype))


@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=short)
@pytest.mark.parametrize("name", [*INT8, "nf4"])
def test_x_in_another_dtype(name, weight_dtype):
    """Their forward brings W to x's dtype, from the dtype in which it dequantises."""
    layer = quantized(name, weight_dtype, bias=False)
    other = BF16 if weight_dtype == F32 else F32
    assert found(layer, make_x(layer, other)).dtype == other
    check_product(layer, make_x(layer, other), exact=name in ("int8 groups", "nf4"))


@pytest.mark.parametrize("name", ["intx rows", "float8 rows"])
def test_x_in_a_dtype_that_is_refused(name):
    layer = quantized(name)
    x = make_x(layer, BF16)
    with pytest.raises(RuntimeError):
        layer(x)
    assert quantized_base(layer, x) == of_torchao.OTHER_DTYPE


@pytest.mark.parametrize("name", ["int8 quantises x", "intx quantises x"])
def test_quantises_x(name):
    layer = quantized(name)
    assert quantized_base(layer, make_x(layer, F32)) == of_torchao.QUANTISES_X


def test_scales_x():
    layer = quantized("int8 rows")
    layer.weight.act_pre_scale = torch.ones(96)
    assert quantized_base(layer, make_x(layer, F32)) == of_torchao.SCALES_X


def test_float8_that_quantises_x():
    """Its config asks for a GPU; the words of its weight do not."""
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    layer = plain_linear(33, 96)
    words = QuantizeTensorToFloat8Kwargs()
    layer.weight = nn.Parameter(
        Float8Tensor.from_hp(layer.weight, act_quant_kwargs=words), requires_grad=False
    )
    assert quantized_base(layer, make_x(layer, F32)) == of_torchao.QUANTISES_X


def test_zero_points_that_the_product_leaves_out():
    """Looked at once for each version of them."""
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quant_primitives import MappingType

    layer = plain_linear(33, 96)
    weight = Int8Tensor.from_hp(layer.weight, PerRow(), MappingType.ASYMMETRIC)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = make_x(layer, F32)
    assert quantized_base(layer, x) == of_torchao.ZERO_POINTS
    layer.weight.zero_point.zero_()
    check_product(layer, x)


def test_scale_shared_by_rows():
    from torchao.quantization import Int8Tensor

    layer = plain_linear(32, 96)
    codes = torch.ones(32, 96, dtype=torch.int8)
    weight = Int8Tensor(codes, torch.ones(4, 1), [8, 96], F32)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert quantized_base(layer, make_x(layer, F32)) == of_torchao.ROW_BLOCKS


def test_trained_weight():
    layer = quantized("nf4")
    layer.weight.requires_grad_(True)
    assert quantized_base(layer, make_x(layer, F32)) == of_torchao.TRAINED


def test_weights_that_only_kernels_read():
    """Every quantised tensor of torchao's own is either taken or has its reason."""
    from torchao import quantization

    named = {*of_torchao._MATRICES, *of_torchao._CALLED}
    kinds = [kind for kind in vars(quantization).values() if isinstance(kind, type)]
    kinds = {kind.__name__ for kind in kinds if issubclass(kind, torch.Tensor)}
    assert len(kinds) >= 5 and kinds <= named
    from torchao.quantization import Int4Tensor

    layer = plain_linear(32, 64, dtype=BF16)
    scale = torch.ones(2, 32, dtype=BF16)
    codes = torch.zeros(32, 32, dtype=torch.int8)
    weight = Int4Tensor(codes, scale, scale, [1, 32], torch.Size([32, 64]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert "mslk" in quantized_base(layer, make_x(layer, BF16))


def test_other_layers():
    plain = plain_linear(33, 96)
    assert quantized_base(plain, make_x(plain, F32)) is None

    class Customized(nn.Linear):
        pass

    layer = quantized("int8 rows")
    layer.__class__ = Customized
    assert quantized_base(layer, make_x(layer, F16)) is None


def test_copies():
    """A copy of the layer has a weight of its own."""
    layer = quantized("int8 rows")
    other = copy.deepcopy(layer)
    other.weight.scale.mul_(2)
    x = make_x(layer, F32)
    first, second = found(layer, x).weight, found(other, x).weight
    assert torch.equal(2 * first.dequantize(F32), second.dequantize(F32))
