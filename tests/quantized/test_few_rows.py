"""Layers with a product of their own for few rows: which of it and the op a call takes."""

import pytest
import torch
from helpers import BF16
from test_bitsandbytes import F4, K, N, four_bit_layer, randomize, with_lora
from torch import nn

import lora_ext
from lora_ext import LoraConfig, measure
from lora_ext.autotune import own_products
from lora_ext.quantized import few_rows
from lora_ext.quantized.layers import QuantizedBase, quantized_base
from lora_ext.quantized.of_bitsandbytes import FourBitWeight

needs_own_product = pytest.mark.skipif(
    not F4.has_avx512bf16(), reason="needs a CPU with AVX512_BF16"
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_measured():
    few_rows.measured.clear()
    yield
    few_rows.measured.clear()


def weight_of(layer):
    return FourBitWeight(layer.weight, layer.weight.quant_state)


def takes_own(layer, rows):
    return few_rows.own_product_wins(weight_of(layer), torch.ones(rows, K).to(BF16), BF16, 4)


def test_a_number_of_rows_decides_where_nothing_was_measured():
    layer = four_bit_layer()
    assert [takes_own(layer, rows) for rows in (0, 1, 4, 5, 100)] == [True] * 3 + [False] * 2


def test_what_was_measured_decides_by_the_nearest_number_of_rows():
    layer = four_bit_layer()
    times = ((1, 1.1), (16, 0.8), (256, 2.0))
    few_rows.measured[few_rows.kind_of(weight_of(layer), BF16)] = times
    assert [takes_own(layer, rows) for rows in (1, 3, 5, 16, 63, 65)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    other = four_bit_layer(k=2 * K)
    assert few_rows.own_product_wins(weight_of(other), torch.ones(1, 2 * K).to(BF16), BF16, 4)
    few_rows.measured.clear()
    assert takes_own(layer, 1)


@pytest.mark.parametrize("faster", ["own", "op"])
@pytest.mark.parametrize("kind", ["PEFT", "ours"])
@needs_own_product
def test_calls_go_by_the_faster(kind, faster, monkeypatch):
    """The clock is a double: each reading is of one call, in the order of their making."""
    if kind == "PEFT":
        model = lora_ext.accelerate(randomize(with_lora(four_bit_layer(bias=False)))).eval()
        at = lambda x: quantized_base(model.base_model.model[0].base_layer, x)  # noqa: E731
    else:
        model = lora_ext.apply_lora(nn.Sequential(four_bit_layer(bias=False)), LoraConfig(["0"]))
        at = lambda x: quantized_base(model[0], x, model[0].base_type)  # noqa: E731
        model.eval()

    def timer(device):
        def time(call):
            call()
            took = 1.0 if call.__name__ == faster else 2.0
            return lambda: took

        return time

    monkeypatch.setattr(measure, "timer", timer)
    said = []
    lines = own_products.measure(model, [16, 256], CPU, said.append)
    assert lines == said and len(lines) == 2 and f"nf4 in panels {K}x{N} bfloat16" in lines[0]
    product = "its own product" if faster == "own" else "the op"
    assert all(f"rows: {product} (own" in line for line in lines)
    with torch.no_grad():
        for rows in (1, 16, 300):
            x = torch.randn(rows, K).to(BF16)
            assert (at(x) == few_rows.FEW_ROWS) == (faster == "own")
            assert model(x).shape == (rows, N)
    assert isinstance(at(torch.randn(4, K).to(BF16).requires_grad_()), QuantizedBase)


@needs_own_product
def test_both_ways_agree_and_are_really_timed():
    model = lora_ext.accelerate(randomize(with_lora(four_bit_layer(bias=False)))).eval()
    own_products.measure(model, [8], CPU, lambda line: None)
    (kind,), x = few_rows.measured, torch.randn(8, K).to(BF16)
    with torch.no_grad():
        few_rows.measured[kind] = ((8, 0.5),)
        own = model(x)
        few_rows.measured[kind] = ((8, 2.0),)
        op = model(x)
    assert not torch.equal(own, op)  # other orders of sums: two ways indeed
    torch.testing.assert_close(own, op, rtol=2e-2, atol=3e-2)


def test_layers_without_such_a_product_are_not_timed():
    trained = lora_ext.accelerate(with_lora(four_bit_layer()))  # in training mode
    for model in (trained, nn.Sequential(nn.Linear(4, 4))):
        assert own_products.measure(model, [1], CPU, lambda line: None) == []
