"""The cost model of layers on quantised bases: bytes by hand, orders, and the table in the docs."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import quantized
from benchmarks.shapes import BACKWARD, FORWARD, STEP, Cell

LARGE = Cell(FORWARD, "bfloat16", 8192, 4096, 4096, rank=16, bias=False)
EXACT = cost_model.Machine("H100", 1000.0, 1000.0, gap_us=0.0)


def test_each_byte_of_codes_scales_and_weight_once():
    values = 4096 * 4096
    [launch] = quantized.dequantized_by("ours", values)
    assert launch.bytes == 8388608 + 262144 + 4096 + 33554432
    # Float scales are written, read and written for the offset, and read.
    theirs = sum(each.bytes for each in quantized.dequantized_by("bitsandbytes", values))
    assert theirs == 8388608 + 262144 + 4096 + 4 * 1048576 + 33554432


@pytest.mark.parametrize("name", sorted(cost_model.MACHINES))
@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, STEP])
def test_orders_that_must_hold(name, mode):
    machine, cell = cost_model.MACHINES[name], replace(LARGE, mode=mode)
    found = {each: quantized.quantized_us(machine, cell, each) for each in quantized.VARIANTS}
    assert found["ours"] < found["unsloth"] < found["peft"] < found["peft_default"]
    dense = cost_model.predicted_us(machine, cell, "ours")
    values = cell.in_features * cell.out_features
    [launch] = quantized.dequantized_by("ours", values)
    directions = 2 if mode == STEP else 1
    assert found["ours"] == pytest.approx(dense + directions * launch.us(machine))


def test_what_is_not_modelled_has_no_prediction():
    assert quantized.quantized_us(EXACT, replace(LARGE, dtype="float32"), "ours") is None


def test_the_table_in_the_docs_is_what_the_model_says():
    text = (Path(__file__).parents[2] / "docs" / "quantized.md").read_text()
    assert quantized.table() in text
