"""The cost model: figures worked out by hand, orders that must hold, and nothing it cannot know."""

from dataclasses import replace

import pytest

from benchmarks import model
from benchmarks.shapes import FORWARD, STEP, Cell

LARGE = Cell(FORWARD, "bfloat16", 8192, 4096, 4096, rank=16, bias=False)
EXACT = model.Machine("H100", 1000.0, 0.5, 1000.0, gap_us=0.0)


def us(machine, cell, variant):
    found = model.predicted_us(machine, cell, variant)
    assert found is not None
    return found


def test_a_launch_is_the_longer_of_arithmetic_and_memory():
    assert model.Launch("a", bytes=3e6, flop=1e9).us(EXACT) == pytest.approx(3.0)
    assert model.Launch("a", bytes=1e6, flop=4e9).us(EXACT) == pytest.approx(4.0)
    assert model.Launch("a", bytes=1e6, flop=4e9, share=0.5).us(EXACT) == pytest.approx(8.0)
    assert model.Launch("a", 0).us(replace(EXACT, gap_us=2.5)) == pytest.approx(2.5)


def test_a_product_is_whole_waves():
    # 64 x 16 tiles of 128 x 256 on 132 SMs: 7.76 waves, so 8.
    expected = 2 * 8 * 132 * 128 * 256 * 4096 / 1e15 * 1e6
    assert us(EXACT, LARGE, "merged") == pytest.approx(expected)


def test_few_rows_take_as_long_as_the_weight():
    cell = replace(LARGE, rows=1)
    weight = 2 * 4096 * 4096 / 1e12 * 1e6
    assert us(EXACT, cell, "merged") == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("name", sorted(model.MACHINES))
@pytest.mark.parametrize("mode", [FORWARD, STEP])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_orders_that_must_hold(name, mode, dropout_p):
    machine = model.MACHINES[name]
    cell = replace(LARGE, mode=mode, dropout_p=dropout_p)
    floor = us(machine, cell, "merged" if mode == FORWARD else "frozen")
    assert floor < us(machine, cell, "unsloth") < us(machine, cell, "naive")
    assert us(machine, cell, "naive") < us(machine, cell, "peft_default")
    assert us(machine, cell, "ours") < us(machine, cell, "ours_fp32")
    assert us(machine, cell, "ours") < us(machine, cell, "naive")
    assert us(machine, cell, "ours_fp32") < us(machine, cell, "ours_fp32_library")


@pytest.mark.parametrize("name", sorted(model.MACHINES))
@pytest.mark.parametrize("rows", [2048, 8192])
@pytest.mark.parametrize("width", [4096, 8192])
@pytest.mark.parametrize("adapters", ["ours", "ours_fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_the_planner_takes_the_fastest_route(name, rows, width, adapters, dropout_p):
    """csrc/plan.cpp has no rates; the model, which has, agrees with it to 3 %.

    On Hopper the planner leaves up to 10 % to the library's base product, which is known to be fast
    and to end, until our kernel on wgmma has been measured.
    """
    allowed = 1.10 if name == "H100" else 1.03
    machine = model.MACHINES[name]
    cell = replace(
        LARGE, mode=STEP, rows=rows, in_features=width, out_features=width, dropout_p=dropout_p
    )
    others = [us(machine, cell, f"{adapters}_{route}") for route in ("kernel", "library")]
    assert us(machine, cell, adapters) <= allowed * min(others)


def test_what_is_not_modelled_has_no_prediction():
    assert model.predicted_us(EXACT, LARGE, "compiled") is None
    assert model.predicted_us(EXACT, replace(LARGE, dtype="float32"), "ours") is None
    assert model.predicted_us(EXACT, replace(LARGE, mode=STEP), "merged") is None


def test_machines_are_found_by_the_device_name():
    assert model.machine_named("NVIDIA H100 80GB HBM3") is model.MACHINES["H100"]
    assert model.machine_named("NVIDIA A100-SXM4-40GB") is model.MACHINES["A100"]
    assert model.machine_named("NVIDIA GeForce RTX 5090") is model.MACHINES["RTX 5090"]
    assert model.machine_named("Tesla V100") is None


def test_calibration_replaces_both_ceilings():
    machine = model.calibrated(model.MACHINES["H100"], 700.0, 2500.0)
    assert (machine.tflops, machine.dram_gb_s, machine.calibrated) == (700.0, 2500.0, True)
    assert us(machine, LARGE, "merged") > us(model.MACHINES["H100"], LARGE, "merged")


def test_the_longest_launch_is_named():
    launches = model.launches_of(EXACT, LARGE, "ours_kernel")
    assert model.limiting(launches, EXACT) == "lora_gemm"
    assert [launch.name for launch in launches] == ["flags", "lora_gemm"]
    launches = model.launches_of(EXACT, replace(LARGE, rank=128), "ours_kernel")
    assert [launch.name for launch in launches] == ["lora_shrink", "lora_reduce", "lora_gemm"]


def test_workers_take_the_next_job_when_they_are_free():
    assert model._makespan([1.0] * 6, 3) == 2.0
    assert model._makespan([0.5, 0.5, 1.0, 1.0, 1.0], 3) == 1.5
    assert model._makespan([1.0] * 7, 3) == 3.0


def test_s_in_the_same_grid_costs_little_and_less_than_before_it():
    machine = replace(model.MACHINES["H100"], wgmma_share=1.0)
    for rows, k, n in ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192)):
        cell = replace(LARGE, rows=rows, in_features=k, out_features=n)
        merged = us(machine, cell, "merged")
        in_grid = us(machine, cell, "ours_kernel") / merged
        external = us(machine, replace(cell, dropout_p=0.05), "ours_kernel") / merged
        assert 1.0 < in_grid <= 1.03 and in_grid < external
