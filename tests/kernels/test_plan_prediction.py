"""Which route the planner takes where nothing was measured: by what it predicts, and how far."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plans, sizes

import lora_ext
from lora_ext import _C

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "docs" / "kernels.md"
HEADER = ROOT / "csrc" / "kernels" / "plan" / "rates.h"
COUNTED = ("A100", "L40S", "H100")  # the columns of its tables
NUMBER = r"\d\.\d{3}"
shapes = st.tuples(sizes, sizes, sizes, st.integers(1, 512))
options = st.fixed_dictionaries(
    {
        "card": st.sampled_from(sorted(lora_ext.kernels.CARDS)),
        "adapter_dtype": st.sampled_from([torch.bfloat16, torch.float32]),
        "dropout": st.booleans(),
        "aligned": st.booleans(),
    }
)


def counted(table: str) -> list[float]:
    """The numbers of one of the header's tables."""
    text = HEADER.read_text().split(f"{table}[] = " if "Dsdb" in table else f"{table} = ")[1]
    return [float(number) for number in re.findall(NUMBER, text.partition(";")[0])]


def route_of(plan):
    return "library" if not plan.kernel else "hybrid" if plan.hybrid else "kernel"


def problem_of(shape, card, adapter_dtype, dropout, aligned):
    rows, in_features, out_features, rank = shape
    problem = _C.Problem(rows, out_features, in_features, rank)
    problem.float_adapters, problem.dropout = adapter_dtype == torch.float32, dropout
    problem.aligned = problem.aligned_weight = problem.aligned_a = problem.aligned_b = aligned
    return lora_ext.kernels.CARDS[card], problem


@settings(deadline=None, max_examples=200)
@given(shape=shapes, named=options)
def test_our_base_product_is_taken_where_it_leads_by_more_than_a_prediction_may_be_off(
    shape, named
):
    card, problem = problem_of(shape, **named)
    decodes = _C.plan_forward(card, problem, "kernel").tile == "decode"
    for backward, plan in enumerate(plans(*shape, **named)):
        times = plan.predicted_us
        other = min(times[name] for name in ("library", "hybrid") if name in times)
        one_launch = decodes and not backward
        if shape[0] < 64:
            assert ("kernel" in times) == one_launch
        if times.get("kernel", other) < (1.0 if one_launch else 0.9) * other:
            assert route_of(plan) == "kernel" and plan.reason.startswith("predicted")
        else:
            assert times[route_of(plan)] == other and plan.reason.startswith("predicted")


@settings(deadline=None, max_examples=200)
@given(shape=shapes, named=options)
def test_a_route_is_predicted_to_take_the_sum_of_its_launches(shape, named):
    card, problem = problem_of(shape, **named)
    rates = _C.sustained_by(card)
    for backward, plan in enumerate(plans(*shape, **named)):
        planner = _C.plan_backward if backward else _C.plan_forward
        for name, us in plan.predicted_us.items():
            asked = planner(card, problem, name)
            found = _C.predicted_launches(card, problem, asked, bool(backward))
            by_hand = sum(
                max(one.flop / rates.tflops / 1e6, one.bytes / rates.dram_gb_s / 1e3)
                + one.times * rates.gap_us
                for one in found
            )
            assert us == pytest.approx(by_hand) and f"{us:.1f} us" in str(plan)


@settings(deadline=None)
@given(rows=st.integers(1, 63), named=options)
def test_few_rows_leave_the_base_product_to_the_library_or_take_one_launch(rows, named):
    forward, backward = plans(rows, 4096, 4096, 16, **named)
    assert route_of(backward) != "kernel" and "fewer than 64 rows" in backward.reason
    if named["dropout"] or not named["aligned"]:
        assert route_of(forward) != "kernel" and "fewer than 64 rows" in forward.reason
    elif route_of(forward) != "kernel":  # whose memory is faster than the loop for so many rows
        assert named["card"] == "B200" and rows > 16
        us = dict(forward.predicted_us)
        assert us.pop("kernel") >= min(us.values())
    else:
        assert forward.tile == "decode" and "one launch" in forward.reason


@pytest.mark.parametrize("card", sorted(set(lora_ext.kernels.CARDS) - {"H100"}))
@pytest.mark.parametrize("rows", [64, 512, 2048, 8192, 32768])
@pytest.mark.parametrize(("k", "n"), [(1024, 1024), (4096, 4096), (4096, 14336), (8192, 8192)])
@pytest.mark.parametrize("dropout", [False, True])
def test_main_loops_on_mma_sync_are_taken_with_a_lead_alone(card, rows, k, n, dropout):
    """On cards with 100 KiB of shared memory, whose deep tile saves launches; on an A100 where a
    product is so small that they weigh most."""
    for adapters in (torch.bfloat16, torch.float32):
        for plan in plans(rows, k, n, 16, card=card, adapter_dtype=adapters, dropout=dropout):
            if route_of(plan) == "kernel" and plan.tile != "decode":
                small = (rows, k, n) == (512, 1024, 1024)
                assert plan.tile == ("128 x 64" if card == "A100" else "deep 128 x 128")
                assert small or card != "A100"
                us = dict(plan.predicted_us)
                assert us.pop("kernel") < 0.9 * min(us.values())


@pytest.mark.parametrize("name", ["A100", "H100"])
@pytest.mark.parametrize("dropout", [False, True])
def test_kernels_of_few_columns_go_by_what_their_loops_were_counted_to_reach(name, dropout):
    column = COUNTED.index(name)
    rates = {f"lora_{kernel}": counted(f"k{kernel.title()}Rate") for kernel in ("shrink", "wgrad")}
    rates = {kernel: (row[2 * column], row[2 * column + 1]) for kernel, row in rates.items()}
    rates["lora_dsdb"] = [counted("kDsdbRate")[column]]  # of 16 columns
    library = counted("kLibraryRate")[column]
    card, problem = problem_of((8192, 4096, 4096, 16), name, torch.bfloat16, dropout, True)
    instruction = 0.65 if name == "H100" else 1.0
    products = {"lora_shrink": 128, "lora_wgrad": 128, "lora_dsdb": 64}  # of an element
    sms = card.sms
    for backward in (False, True):
        planner = _C.plan_backward if backward else _C.plan_forward
        plan = planner(card, problem, "hybrid")
        for launch in _C.predicted_launches(card, problem, plan, backward):
            if launch.name not in products:
                continue
            masked = dropout and launch.name != "lora_dsdb"
            share = rates[launch.name][masked] / library * instruction
            expected = 8192 * 4096 * products[launch.name] / share
            blocks = {
                "lora_shrink": 128 * plan.shrink_splits,
                "lora_wgrad": 32 * plan.dlora_a_splits,
                "lora_dsdb": plan.panels * plan.dlora_b_splits,
            }[launch.name]
            expected *= -(-blocks // sms) * sms / blocks  # the last SM has as many as any
            assert launch.flop == pytest.approx(expected), launch.name


def test_hopper_takes_ours_where_launches_and_passes_weigh_most():
    wide, _ = plans(8192, 1024, 1024, 16, card="H100")
    assert wide.tile == "fused-shrink 128 x 256" and not wide.hybrid
    assert "over 10 % faster" in str(wide)
    large, _ = plans(8192, 8192, 8192, 16, card="H100")
    assert route_of(large) == "library" and large.predicted_us["kernel"] < 1.1 * sum(
        [large.predicted_us["library"]]
    )


def test_float32_adapters_are_not_left_to_the_library():
    for card in lora_ext.kernels.CARDS:
        for plan in plans(4096, 4096, 4096, 16, card=card, adapter_dtype=torch.float32):
            assert plan.predicted_us["hybrid"] < plan.predicted_us["library"]


def test_a_card_has_what_its_generation_has_for_each_sm():
    h100, half = lora_ext.kernels.CARDS["H100"], _C.Card(90, 66, 233472, 232448)
    whole, part = _C.sustained_by(h100), _C.sustained_by(half)
    assert part.tflops == pytest.approx(whole.tflops / 2)
    assert part.dram_gb_s == pytest.approx(whole.dram_gb_s / 2) and part.gap_us == whole.gap_us
    between = _C.sustained_by(_C.Card(87, 72, 167936, 166912))  # as 8.6, the last before it
    assert between.tflops == pytest.approx(_C.sustained_by(lora_ext.kernels.CARDS["A10"]).tflops)


def test_an_epilogue_weighs_more_in_a_shallow_product():
    def gemm(k):
        card, problem = problem_of((8192, k, 4096, 16), "H100", torch.bfloat16, False, True)
        plan = _C.plan_forward(card, problem, "kernel")
        assert plan.tile == "fused-shrink 128 x 256"
        *_, last = _C.predicted_launches(card, problem, plan, False)
        return last.flop

    # 8 waves of 66 pairs of tiles, k, the rank and 64 columns deep. T is late for the first by what
    # two jobs take longer than a tile: in each step 128 rows of x and 8 of lora_a, 64 columns wide,
    # at 37.1 bytes a clock, a fifth slower beside tiles, which take 1024 clocks.
    late = 1.2 * 2 * 2 * 64 * (128 + 8) / 37.1 / 1024 - 1
    share = _C.main_loop_share(
        lora_ext.kernels.CARDS["H100"], "fused-shrink 128 x 256", masked=False
    )
    for k in (512, 4096):
        assert gemm(k) == pytest.approx((8 + late) * 132 * 2 * 128 * 256 * (k + 16 + 64) / share)


def test_a_main_loop_goes_by_what_its_card_was_counted_to_reach():
    cards, share = lora_ext.kernels.CARDS, _C.main_loop_share
    # As the header has it, over the library's.
    tiles = re.findall(r"^ {4}\{(.+)\},  // (.+)$", HEADER.read_text(), re.MULTILINE)
    assert len(tiles) == 6
    for text, tile in tiles:
        row = [float(number) for number in re.findall(NUMBER, text)]
        for column, card in enumerate(COUNTED):
            instruction = 0.65 if card == "H100" else 1.0  # mma.sync's rate over wgmma's
            of_one = 1.0 if re.match("wgmma|fused-shrink|pingpong", tile) else instruction
            for rate, masked in zip(row[2 * column : 2 * column + 2], (False, True), strict=True):
                expected = rate / counted("kLibraryRate")[column] * of_one
                assert share(cards[card], tile, masked) == pytest.approx(expected)
    assert share(cards["A10"], "128 x 64", False) == share(cards["L40S"], "128 x 64", False)
    # Compute capability 8.7 has shared memory for all tiles.
    orin = _C.Card(87, 16, 167936, 166912)
    assert share(orin, "128 x 128", False) == share(cards["A100"], "128 x 128", False)


def cell(plan):
    times = plan.predicted_us
    other = min(times[name] for name in ("library", "hybrid") if name in times)
    name = plan.tile if route_of(plan) == "kernel" else route_of(plan)
    return f"{name} {times['kernel'] / other:.2f}" if "kernel" in times else name


def test_the_table_of_choices_in_the_docs_is_what_the_planner_says():
    row = r"^\| (\w+) \| (\d+) x (\d+) \| (\d+) \|((?: [^|]+ \|){4})$"
    found = re.findall(row, KERNELS.read_text(), re.MULTILINE)
    assert {card for card, *_ in found} == {"A100", "L40S", "H100"}
    for card, k, n, rows, cells in found:
        shape = (int(rows), int(k), int(n), 16)
        half = plans(*shape, card=card)
        wide = plans(*shape, card=card, adapter_dtype=torch.float32, dropout=True)
        expected = [cell(plan) for plan in (*half, *wide)]
        assert [text.strip() for text in cells.split("|")[:-1]] == expected, (card, k, n, rows)


def test_a_product_of_the_library_is_whole_waves():
    # 64 x 16 tiles of 128 x 256 on 132 SMs: 7.76 waves, so 8.
    found = _C.library_product(lora_ext.kernels.CARDS["H100"], 8192, 4096, 4096)
    assert found.flop == pytest.approx(2 * 8 * 132 * 128 * 256 * 4096)
    assert found.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096)
