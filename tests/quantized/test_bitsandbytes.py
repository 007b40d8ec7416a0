"""bitsandbytes' layers as bases: weights bit for bit as it dequantises them, and all its ways."""

import copy
import warnings

import pytest
import torch
from helpers import BF16, F16, F32, short
from peft import LoraConfig, get_peft_model
from peft_helpers import accelerated, paths, randomize, reasons
from torch import nn

import lora_ext
from lora_ext.quantized.layers import QuantizedBase, quantized_base
from lora_ext.quantized.of_bitsandbytes import FourBitWeight, eight_bit_weight

bnb = pytest.importorskip("bitsandbytes")
F4 = bnb.functional

K, N = 192, 96


def four_bit_layer(dtype=BF16, kind="nf4", nested=True, k=K, n=N, bias=True, compute=None):
    torch.manual_seed(0)
    plain = nn.Linear(k, n, bias)
    words = {"compress_statistics": nested, "quant_type": kind, "bias": bias}
    layer = bnb.nn.Linear4bit(k, n, compute_dtype=compute or dtype, **words)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer).to("cpu")[0]


def eight_bit_layer():
    torch.manual_seed(0)
    plain = nn.Linear(K, N)
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer).to("cpu")[0]


def with_lora(layer, adapter="default", **words):
    holder = nn.Sequential(layer)
    holder.is_loaded_in_4bit = isinstance(layer, bnb.nn.Linear4bit)
    holder.is_loaded_in_8bit = not holder.is_loaded_in_4bit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(holder, LoraConfig(r=8, target_modules=["0"], **words), adapter)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(64, 256), (33, 64), (1, 4096)], ids=str)
def test_four_bits(shape, block, kind, nested, dtype, isa):
    if shape[1] % block:
        pytest.skip("blocks would straddle rows")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)
    words = {"blocksize": block, "quant_type": kind, "compress_statistics": nested}
    packed, state = F4.quantize_4bit(weight, **words)
    asked = copy.copy(state)
    asked.dtype = dtype
    assert torch.equal(
        FourBitWeight(packed, state).dequantize(dtype), F4.dequantize_4bit(packed, asked)
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_made_under_another_default_dtype(kind):
    """Which rounds the table of codes; bitsandbytes' kernels do not read that."""
    torch.set_default_dtype(BF16)
    try:
        packed, state = F4.quantize_4bit(torch.randn(64, 256), quant_type=kind)
    finally:
        torch.set_default_dtype(F32)
    assert state.code.dtype == BF16
    found = FourBitWeight(packed, state).dequantize(BF16)
    assert torch.equal(found, F4.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
def test_eight_bits(dtype):
    """The weight by which the layer multiplies in training, out of its own backward."""
    layer = eight_bit_layer()
    x = torch.eye(K, dtype=dtype)
    layer.bias = None
    dense = eight_bit_weight(layer.weight.CB, layer.weight.SCB).dequantize(dtype)
    assert torch.equal(layer(x), dense.t())


def test_blocks_that_straddle_rows_are_called():
    """bitsandbytes 0.50 reads them wrongly on the CPU; as the base is, so is ours."""
    layer = four_bit_layer(k=96)
    assert "spans two rows" in quantized_base(layer, torch.zeros(1, 96, dtype=BF16))
    model, x = lora_ext.accelerate(with_lora(layer)), torch.randn(8, 96).to(BF16)
    assert torch.equal(model(x), layer(x))


def test_a_weight_that_is_not_quantised_yet_is_called():
    layer = bnb.nn.Linear4bit(K, N)
    assert quantized_base(layer, None) == "its weight is not quantised yet"
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    assert quantized_base(layer, None) == "its weight is not quantised yet"
    assert quantized_base(bnb.nn.Linear8bitLt(K, N), None) == "its weight is not quantised yet"


def test_an_x_in_another_dtype():
    """Without autocast the base rounds x, and the update must not; under autocast both do."""
    layer = four_bit_layer(compute=BF16)
    model, x = accelerated(randomize(with_lora(layer))), torch.randn(40, K)
    reason = "its compute_dtype is not x's, which the update keeps"
    assert quantized_base(layer, x) == reason
    assert model(x).dtype == F32
    with torch.autocast("cpu", dtype=BF16):
        assert isinstance(quantized_base(layer, x), QuantizedBase)
        y = model(x)
        wanted = lora_ext.decelerate(model)(x)
    assert y.dtype == wanted.dtype == F32
    # PEFT's adapters are rounded to bfloat16 there.
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=6e-2)
    with torch.autocast("cpu", dtype=F16):
        assert quantized_base(layer, x) == "its compute_dtype is not autocast's"


@pytest.mark.skipif(not F4.has_avx512bf16(), reason="needs a CPU with AVX512_BF16")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_order_to_which_eval_switches(kind):
    """After a forward in eval the weight lies in panels, in which bitsandbytes cannot train."""
    layer = four_bit_layer(kind=kind, bias=False)
    model = lora_ext.accelerate(with_lora(layer))
    x = torch.randn(40, K).to(BF16)
    before = FourBitWeight(layer.weight, layer.weight.quant_state).dequantize(F32)
    layer.eval()
    with torch.no_grad():
        by_panels = layer(x)
    layer.train()
    weight = FourBitWeight(layer.weight, layer.weight.quant_state)
    assert weight.codes.in_panels and weight.format == f"{kind} in panels"
    after = weight.dequantize(F32)
    # Scales are rounded to bfloat16 there.
    assert (after - before).abs().max() <= 2**-8 * before.abs().max()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    assert set(paths(model).values()) == {"fused"}
    torch.testing.assert_close(y, by_panels, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    wanted = after.to(BF16).float().sum(0).expand(40, K)
    torch.testing.assert_close(leaf.grad.float(), wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(not F4.has_avx512bf16(), reason="needs a CPU with AVX512_BF16")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
def test_the_order_to_which_saving_switches_back(dtype, nested):
    """Scales are quantised again, around an offset in the dtype that the weight had."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = F4.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    packed, state = F4._convert_weight_packed_for_cpu(packed, state)
    assert FourBitWeight(packed, state).codes.in_panels
    packed, state = F4._convert_weight_packed_for_cpu_inverse(packed, state)
    found = FourBitWeight(packed, state)
    assert not found.codes.in_panels and state.nested == nested
    for asked in (F32, BF16):
        state.dtype = asked
        assert torch.equal(found.dequantize(asked), F4.dequantize_4bit(packed, state))


@pytest.mark.skipif(not F4.has_avx512bf16(), reason="needs a CPU with AVX512_BF16")
def test_few_rows_in_eval_take_its_own_kernel():
    layer = four_bit_layer(bias=False)
    model, x = lora_ext.accelerate(randomize(with_lora(layer))).eval(), torch.randn(200, K).to(BF16)
    reason = "few rows, for which the quantising package has a product of its own"
    with torch.no_grad():
        assert isinstance(quantized_base(layer, x), QuantizedBase)
        many = model(x)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert quantized_base(layer, x[:5]) == reason
        few = model(x[:5])
    assert layer.weight.quant_state.packing_format_for_cpu
    torch.testing.assert_close(few, many[:5], rtol=2e-2, atol=3e-2)
    assert isinstance(quantized_base(layer, x[:5].requires_grad_()), QuantizedBase)
    assert isinstance(quantized_base(layer.train(), x[:5].detach()), QuantizedBase)


@pytest.mark.skipif(not F4.has_avx512bf16(), reason="needs a CPU with AVX512_BF16")
@pytest.mark.parametrize("dtype", [F32, F16], ids=short)
def test_its_kernel_that_rounds_x_is_not_replaced(dtype):
    """An adapter of zeros is the base, bit for bit, whatever the rows, as with PEFT."""
    layer = four_bit_layer(dtype, bias=False)
    model, x = lora_ext.accelerate(with_lora(layer)).eval(), torch.randn(200, K).to(dtype)
    reason = "in eval bitsandbytes' kernel rounds x and y to bfloat16"
    assert quantized_base(layer, x) == reason and reasons(model) == {("added", reason)}
    with torch.no_grad():
        assert torch.equal(model(x), layer(x))
        assert torch.equal(lora_ext.decelerate(model)(x), layer(x))
    assert isinstance(quantized_base(layer, x.requires_grad_()), QuantizedBase)
    assert isinstance(quantized_base(layer.train(), x.detach()), QuantizedBase)


def test_a_base_with_a_hook_is_called():
    layer = four_bit_layer()
    model = lora_ext.accelerate(with_lora(layer))
    calls = []
    layer.register_forward_hook(lambda *given: calls.append(1))
    reason = "the base layer has hooks, or its forward was replaced"
    assert reasons(model) == {("added", reason)}
    model(torch.randn(4, K).to(BF16))
    assert calls == [1]
