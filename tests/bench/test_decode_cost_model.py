"""The cost model of few rows: bytes by hand, limits that hold or are said to be missed."""

import re
from pathlib import Path

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import decode
from lora_ext import _C

TEXT = (Path(__file__).parents[2] / "docs" / "decode.md").read_text()
CASES = [
    (card, width, rows) for card in decode.CARDS for width in decode.WIDTHS for rows in (1, 8, 64)
]


HEADER = Path(__file__).parents[2] / "csrc" / "plan" / "main_loop_rates.h"
STEP_US = {
    card: float(steps.split(",")[3])
    for card, steps in re.findall(
        r"kMainLoopsOn(\w+) = .*?\n    \{([\d., ]+)\},\n\};", HEADER.read_text(), re.DOTALL
    )
}


def test_each_byte_of_the_operands_once_and_both_ends():
    card = cost_model.MACHINES["H100"].planned
    problem = _C.Problem(8, 4096, 4096, 16)
    plan = _C.plan_forward(card, problem, "kernel")
    [launch] = [e for e in _C.predicted_launches(card, problem, plan, False) if e.bytes > 0]
    once = 2 * (4096 * 4096 + 2 * 8 * 4096 + 2 * 16 * 4096)
    ends = 1.5 * 1e3 * _C.sustained_by(card).dram_gb_s
    assert launch.bytes == pytest.approx(once + ends)


@pytest.mark.parametrize(("card", "width", "rows"), CASES)
def test_few_rows_take_little_longer_than_reading_the_weight(card, width, rows):
    found = decode.over_once(cost_model.MACHINES[card], width, rows)
    assert 1 < found <= decode.limit_of(width, rows)


@pytest.mark.parametrize(("card", "width", "rows"), CASES)
def test_the_planner_takes_what_is_predicted_to_be_faster(card, width, rows):
    machine = cost_model.MACHINES[card]
    plan = decode.plan_of(machine, width, rows)
    ours, library = (
        decode.over_once(machine, width, rows, f"ours_{r}") for r in ("kernel", "library")
    )
    assert (plan.kernel and plan.tile == "decode") == (ours < library)


def test_the_tables_in_the_docs_are_what_the_model_says():
    assert decode.table() in TEXT and decode.table_of_many() in TEXT


@pytest.mark.parametrize("card", decode.CARDS)
def test_each_adapter_more_waits_for_loads_of_its_own(card):
    machine = cost_model.MACHINES[card]
    few, many = (decode.many_over_once(machine, 4096, 64, each)["kernel"] for each in (4, 64))
    assert many > few  # 16 times their number, four at a time


@pytest.mark.parametrize("card", decode.CARDS)
@pytest.mark.parametrize("width", decode.WIDTHS)
def test_a_block_takes_as_long_as_its_steps(card, width):
    """Of 64 rows, where a step takes an SM longer than DRAM needs for its bytes of W."""
    machine = cost_model.MACHINES[card]
    problem = _C.Problem(64, width, width, 16)
    plan = _C.plan_forward(machine.planned, problem, "kernel")
    steps = width // 128 * width // 64 + 2 * -(-width // 128)
    [launch] = _C.predicted_launches(machine.planned, problem, plan, False)
    rates = _C.sustained_by(machine.planned)
    us = launch.flop / rates.tflops / 1e6 - 1.5
    assert us / -(-steps // plan.blocks) == pytest.approx(STEP_US[card], abs=0.001)
