"""The cost model: figures worked out by hand, orders that must hold, and nothing it cannot know."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import lora_ext
from benchmarks import cost_model
from benchmarks.shapes import FORWARD, STEP, Cell
from lora_ext import _C

LARGE = Cell(FORWARD, "bfloat16", 8192, 4096, 4096, rank=16, bias=False)
EXACT = cost_model.Machine("H100", 1000.0, 1000.0, gap_us=0.0)


def us(machine, cell, variant):
    found = cost_model.predicted_us(machine, cell, variant)
    assert found is not None
    return found


def test_a_launch_is_the_longer_of_arithmetic_and_memory():
    assert cost_model.Launch("a", bytes=3e6, flop=1e9).us(EXACT) == pytest.approx(3.0)
    assert cost_model.Launch("a", bytes=1e6, flop=4e9).us(EXACT) == pytest.approx(4.0)
    assert cost_model.Launch("a", 0).us(replace(EXACT, gap_us=2.5)) == pytest.approx(2.5)


def test_a_product_is_whole_waves():
    # 64 x 16 tiles of 128 x 256 on 132 SMs: 7.76 waves, so 8.
    expected = 2 * 8 * 132 * 128 * 256 * 4096 / 1e15 * 1e6
    assert us(EXACT, LARGE, "merged") == pytest.approx(expected)


def test_few_rows_take_as_long_as_the_weight():
    cell = replace(LARGE, rows=1)
    weight = 2 * 4096 * 4096 / 1e12 * 1e6
    assert us(EXACT, cell, "merged") == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("name", sorted(cost_model.MACHINES))
@pytest.mark.parametrize("mode", [FORWARD, STEP])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_orders_that_must_hold(name, mode, dropout_p):
    machine = cost_model.MACHINES[name]
    cell = replace(LARGE, mode=mode, dropout_p=dropout_p)
    floor = us(machine, cell, "merged" if mode == FORWARD else "frozen")
    assert floor < us(machine, cell, "unsloth") < us(machine, cell, "naive")
    assert us(machine, cell, "naive") < us(machine, cell, "peft_default")
    assert us(machine, cell, "ours") < us(machine, cell, "ours_fp32")
    assert us(machine, cell, "ours") < us(machine, cell, "naive")
    assert us(machine, cell, "ours_fp32") < us(machine, cell, "ours_fp32_library")


@pytest.mark.parametrize("name", sorted(cost_model.MACHINES))
@pytest.mark.parametrize("rows", [2048, 8192])
@pytest.mark.parametrize("width", [4096, 8192])
@pytest.mark.parametrize("adapters", ["ours", "ours_fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_the_planner_takes_the_fastest_route(name, rows, width, adapters, dropout_p):
    """Less 10 %, which a prediction may be off, in favour of the library's base product."""
    machine = cost_model.MACHINES[name]
    cell = replace(
        LARGE, mode=STEP, rows=rows, in_features=width, out_features=width, dropout_p=dropout_p
    )
    others = [us(machine, cell, f"{adapters}_{route}") for route in ("kernel", "library")]
    assert us(machine, cell, adapters) <= 1.0 / 0.9 * min(others)


def test_what_is_not_modelled_has_no_prediction():
    assert cost_model.predicted_us(EXACT, LARGE, "compiled") is None
    assert cost_model.predicted_us(EXACT, replace(LARGE, dtype="float32"), "ours") is None
    assert cost_model.predicted_us(EXACT, replace(LARGE, mode=STEP), "merged") is None


def test_machines_are_found_by_the_device_name():
    assert cost_model.machine_named("NVIDIA H100 80GB HBM3") is cost_model.MACHINES["H100"]
    assert cost_model.machine_named("NVIDIA A100-SXM4-40GB") is cost_model.MACHINES["A100"]
    assert cost_model.machine_named("NVIDIA GeForce RTX 5090") is cost_model.MACHINES["RTX 5090"]
    assert cost_model.machine_named("Tesla V100") is None


def test_calibration_replaces_both_ceilings():
    machine = cost_model.calibrated(cost_model.MACHINES["H100"], 700.0, 2500.0)
    assert (machine.tflops, machine.dram_gb_s, machine.calibrated) == (700.0, 2500.0, True)
    assert us(machine, LARGE, "merged") > us(cost_model.MACHINES["H100"], LARGE, "merged")


def test_the_longest_launch_is_named():
    launches = cost_model.launches_of(EXACT, LARGE, "ours_kernel")
    assert cost_model.limiting(launches, EXACT) == "lora_gemm"
    assert [launch.name for launch in launches] == ["flags", "lora_gemm"]
    launches = cost_model.launches_of(EXACT, replace(LARGE, rank=128), "ours_kernel")
    assert [launch.name for launch in launches] == ["lora_shrink", "lora_reduce", "lora_gemm"]


def test_gradients_of_the_weights_fill_the_last_wave_of_dx():
    machine = cost_model.MACHINES["H100"]

    def wgrad(rows, dropout_p=0.0):
        cell = replace(LARGE, mode=STEP, rows=rows, dropout_p=dropout_p)
        found = {each.name: each for each in cost_model.launches_of(machine, cell, "ours_kernel")}
        return found["lora_wgrad"].bytes / (2 * rows * 4096)

    # 512 tiles on 66 clusters: 16 of them idle in the last wave, as long as two thirds of it take.
    assert 0.3 < wgrad(8192) < 0.4
    assert 0.4 < wgrad(8192, 0.05) < 0.6  # and draws take longer than products
    assert wgrad(8448) > 1.0  # 528: none
    assert wgrad(1024) > 1.0  # one wave: the first loops end when all is over


def test_the_table_in_the_docs_is_what_the_model_says():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    found = re.findall(r"^\| (\w+) \| (forward|step) \|((?: [\d.]+ \|)+)$", text, re.MULTILINE)
    assert {(name, mode) for name, mode, _ in found} == {
        (name, mode) for name in ("A100", "L40S", "H100") for mode in (FORWARD, STEP)
    }
    variants = ("ours", "ours_kernel", "ours_library", "ours_fp32", "peft", "peft_default")
    for name, mode, figures in found:
        cell = replace(LARGE, mode=mode, dropout_p=0.0 if mode == FORWARD else 0.05)
        machine = cost_model.MACHINES[name]
        floor = us(machine, cell, "merged" if mode == FORWARD else "frozen")
        expected = [f"{us(machine, cell, each) / floor:.2f}" for each in variants]
        assert figures.replace("|", " ").split() == expected


def test_s_in_the_same_grid_costs_little_and_less_than_before_it():
    machine = cost_model.MACHINES["H100"]
    for rows, k, n in ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192)):
        cell = replace(LARGE, rows=rows, in_features=k, out_features=n)
        merged = us(machine, cell, "merged")
        in_grid = us(machine, cell, "ours_kernel") / merged
        external = us(machine, replace(cell, dropout_p=0.05), "ours_kernel") / merged
        # our main loop as counted, and an epilogue of 64 columns of k
        share = _C.main_loop_share(machine.planned, "in-grid 128 x 256", masked=False)
        loop = (k + 64) / k / share
        assert loop < in_grid <= 1.03 * loop and in_grid < external


def dx_us(machine, problem, route):
    """Of the launch that makes dX alone, without the gap to the next."""
    name = {"library": "dX", "kernel": "lora_gemm"}[route]
    plan = _C.plan_backward(machine.planned, problem, route)
    launches = _C.predicted_launches(machine.planned, problem, plan, True)
    [found] = [each for each in launches if each.name == name]
    return cost_model.Launch(name, found.bytes, found.flop, 0).us(machine)


@pytest.mark.parametrize(
    ("name", "whole_call", "masked"), [("A100", 0.90, 0.90), ("H100", 0.95, 0.93)]
)
def test_what_main_loops_come_to_at_4096(name, whole_call, masked):
    """Of the library's rate, as docs/main_loops.md says."""
    machine = cost_model.MACHINES[name]
    cell = replace(LARGE, rows=4096, in_features=4096, out_features=4096)
    found = us(machine, cell, "merged") / us(machine, cell, "ours_kernel")
    assert found >= whole_call
    problem = _C.Problem(4096, 4096, 4096, 16)
    problem.dropout = True
    alone = [dx_us(machine, problem, route) for route in ("library", "kernel")]
    assert alone[0] / alone[1] >= masked
    text = (Path(__file__).parents[2] / "docs" / "main_loops.md").read_text()
    assert f"{found:.2f}" in text.split("of a whole call")[1].split("\n\n")[0]
    assert f"{alone[0] / alone[1]:.2f}" in text.split("Of masked dX")[1].split("\n\n")[0]


def test_masked_tiles_wait_for_t_where_that_is_predicted_to_be_faster():
    card, machine = lora_ext.kernels.CARDS["H100"], cost_model.MACHINES["H100"]

    def predicted(rows: int, in_grid: bool) -> float:
        problem = _C.Problem(rows, 4096, 4096, 64)
        problem.dropout = True
        tile = f"{'in-grid' if in_grid else 'wgmma'} 128 x 256"
        plan = _C.plan_as_asked(card, problem, backward=True, choice="kernel", tile=tile)
        assert plan.tile == tile
        launches = _C.predicted_launches(card, problem, plan, True)
        return sum(
            cost_model.Launch(e.name, e.bytes, e.flop, e.times).us(machine) for e in launches
        )

    for rows in (2048, 3072, 3584, 4096, 6144, 8192, 16384, 65536):
        chosen = lora_ext.kernels.plan(
            rows, 4096, 4096, 64, card="H100", route="kernel", dropout=True
        )
        times = {in_grid: predicted(rows, in_grid) for in_grid in (False, True)}
        assert times[chosen.backward.in_grid] <= 1.01 * min(times.values()), (rows, times)
    assert predicted(2048, False) < predicted(2048, True)
    assert predicted(16384, True) < predicted(16384, False)
