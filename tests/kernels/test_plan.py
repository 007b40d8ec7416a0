"""The planner: pure arithmetic, for cards that need not be here."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lora_ext
from lora_ext import _C
from lora_ext.kernels.kernel_checks import check_kernels

sizes = st.integers(1, 20000)


def plans(*shape, **options):
    found = lora_ext.kernels.plan(*shape, **options)
    return found.forward, found.backward


def plans_of(card, problem, choice="auto"):
    return [plan(card, problem, choice) for plan in (_C.plan_forward, _C.plan_backward)]


@settings(deadline=None, max_examples=300)
@example(2048, 4096, 4096, 256, "H100", torch.bfloat16, False, True)
@example(2048, 4096, 4096, 257, "H100", torch.bfloat16, False, True)
@given(
    rows=sizes,
    in_features=sizes,
    out_features=sizes,
    rank=st.integers(1, 512),
    card=st.sampled_from(sorted(lora_ext.kernels.CARDS)),
    adapters=st.sampled_from([torch.bfloat16, torch.float32]),
    dropout=st.booleans(),
    aligned=st.booleans(),
)
def test_every_plan_can_be_launched(
    rows, in_features, out_features, rank, card, adapters, dropout, aligned
):
    shape = (rows, in_features, out_features, rank)
    options = {"adapter_dtype": adapters, "dropout": dropout, "aligned": aligned, "card": card}
    forward, backward = plans(*shape, route="kernel", **options)
    sms = lora_ext.kernels.CARDS[card].sms
    for plan, steps in ((forward, in_features), (backward, out_features)):
        assert plan.kernel
        assert 1 <= plan.blocks <= 3 * sms
        assert plan.columns >= rank * (2 if adapters == torch.float32 else 1)
        assert 0 < plan.workspace < 2**40 and plan.workspace % 256 == 0
        for splits in (plan.shrink_splits, plan.dlora_a_splits, plan.dlora_b_splits):
            assert 0 <= splits <= max(1, -(-max(steps, rows) // 64)) and splits < 65536
        assert str(plan).startswith(
            "kernels: " if aligned else "hybrid: the library's base product"
        )
    assert (forward.tile == "decode") == (rows <= 64 and aligned and not dropout)
    assert backward.dlora_a_splits >= 1 and backward.dlora_b_splits >= 1
    assert (backward.shrink_splits == 0) == backward.one_pass
    assert backward.one_pass == (backward.panels > 0)
    every = (backward,) if forward.tile == "decode" else (forward, backward)
    if not aligned:
        assert {plan.tile for plan in every} == {"128 x 64"}
    for plan in every:
        assert plan.wgmma == (card == "H100" and aligned and rank <= 256)
        assert ("without wgmma: " in str(plan)) == (card == "H100" and aligned and rank > 256)
        assert ("launched with PDL" in str(plan)) == plan.wgmma
    assert backward.wgrad_uses_pdl == backward.wgmma and not forward.wgrad_uses_pdl
    assert (forward.shrink_splits == 0) == (forward.tile == "decode")
    again = plans(*shape, route="kernel", **options)
    assert [str(plan) for plan in again] == [str(forward), str(backward)]


def test_a_negative_count_of_reserved_sms_is_refused():
    with pytest.raises(ValueError, match="expected a count of SMs, but got -1"):
        lora_ext.kernels.set_reserved_sms(-1)


def test_a_route_that_is_asked_for_is_taken():
    for plan in plans(8192, 4096, 4096, 16, route="hybrid", dropout=True):
        assert plan.kernel and plan.hybrid and plan.tile == "128 x 64"
        assert "the library's base product, onto it" in str(plan)
    for plan in plans(8192, 4096, 4096, 16, route="kernel"):
        assert plan.kernel and not plan.hybrid and plan.reason == "the kernels were asked for"
    for plan in plans(8192, 4096, 4096, 16, route="library"):
        assert not plan.kernel and plan.reason == "the library route was asked for"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16"),
        ({"dtype": torch.float64}, "bfloat16 and float16"),
        ({"route": "library"}, "asked for"),
    ],
)
def test_what_kernels_cannot_compute_has_a_reason(options, reason):
    for plan in plans(64, 64, 64, 8, **options):
        assert not plan.kernel and reason in plan.reason and str(plan) == f"library: {plan.reason}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": 75}, "compute capability 8.0"),
        ({"rank": 513}, "above 512"),
        ({"m": 2**31}, "2^30"),
        ({"row_major": False}, "not row-major"),
    ],
)
def test_limits_of_the_kernels_have_reasons(change, reason):
    card = _C.Card(change.get("arch", 80), 108, 167936, 166912)
    problem = _C.Problem(change.get("m", 64), 64, 64, change.get("rank", 8))
    problem.weight_row_major = change.get("row_major", True)
    for planned in plans_of(card, problem, "kernel"):
        assert not planned.kernel and reason in planned.reason


def test_a_transposed_weight_is_no_obstacle_to_the_hybrid_route():
    problem = _C.Problem(64, 64, 64, 8)
    problem.weight_row_major = problem.aligned_weight = False
    problem.float_adapters = True
    card = lora_ext.kernels.CARDS["A100"]
    for planned in plans_of(card, problem):
        assert planned.hybrid and "element-wise" not in str(planned)


def test_large_problems_fill_the_card():
    forward, backward = plans(8192, 4096, 4096, 16, route="kernel")
    assert forward.tile == backward.tile == "128 x 128" and forward.blocks == 2 * 108
    assert backward.one_pass and backward.panels == 4
    _, masked = plans(8192, 4096, 4096, 16, route="kernel", dropout=True)
    assert masked.tile == "128 x 128" and masked.blocks == 2 * 108
    small, _ = plans(512, 1024, 1024, 16, route="kernel")
    assert small.tile == "128 x 64"  # 32 tiles of 128 x 128 would leave 76 SMs idle


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"tensor_maps": False}, "the driver encodes no tensor maps"),
        ({"sm90a_code": False}, "this build has no code for 9.0a"),
    ],
)
def test_what_wgmma_needs_may_be_missing(missing, reason):
    problem = _C.Problem(8192, 4096, 4096, 16)
    card = _C.Card(90, 132, 233472, 232448, **missing)
    for planned in plans_of(card, problem, "kernel"):
        assert planned.kernel and not planned.wgmma
        assert f"without wgmma: {reason}" in str(planned)
    tiles = _C.tiles_of(card, backward=False, float_adapters=False, dropout=False)
    assert tiles == ["128 x 128", "128 x 64", "decode"]


@pytest.mark.parametrize(
    ("change", "backward", "reason"),
    [
        ({}, False, None),
        ({"m": 16384}, False, None),
        ({"dropout": True, "float_adapters": True}, True, None),
        ({"weight_row_major": False}, False, None),
        ({"k": 40}, False, None),
        ({"k": 40, "weight_row_major": False}, False, "the depth is below 64, or no multiple of 8"),
        ({"n": 1540}, True, "the depth is below 64, or no multiple of 8"),
        ({"aligned": False}, False, "rows do not begin at multiples of 16 bytes"),
        ({"aligned_weight": False}, True, "rows do not begin at multiples of 16 bytes"),
        ({"rank": 512}, True, None),
    ],
)
def test_experts_take_wgmma_where_it_can_have_their_operands(change, backward, reason):
    shape = {"m": 32768, "n": 1536, "k": 2048, "rank": 16} | change
    problem = _C.Problem(*(shape.pop(name) for name in ("m", "n", "k", "rank")))
    for name, value in shape.items():
        setattr(problem, name, value)
    card, tile = lora_ext.kernels.CARDS["H100"], "wgmma 128 x 256"
    asked = {"backward": backward, "choice": "kernel", "groups": 128, "own_weights": True}
    plan = _C.plan_as_asked(card, problem, tile=tile, **asked)
    assert plan.tile == ("128 x 64" if reason else tile)
    assert set(change) - {"m"} or _C.plan_as_asked(card, problem, **asked).tile == tile
    assert ("without wgmma: " in str(plan)) == (reason is not None)
    assert reason is None or f"without wgmma: {reason}" in str(plan)
    assert "PDL" not in str(plan) and plan.blocks <= (3 * 132 if reason else 132)


@pytest.mark.parametrize(
    ("name", "tiles", "resident"),
    [
        ("A100", ["128 x 128", "128 x 64"], 2),  # blocks of two stages on an SM
        ("L40S", ["deep 128 x 128", "128 x 64"], 1),  # of three
        ("A10", ["deep 128 x 128", "128 x 64"], 1),
    ],
)
def test_rings_are_as_deep_as_shared_memory_allows(name, tiles, resident):
    card = lora_ext.kernels.CARDS[name]
    for backward, dropout in ((False, False), (True, False), (True, True)):
        call = {"backward": backward, "float_adapters": False, "dropout": dropout}
        few = [] if backward or dropout else ["decode"]
        assert _C.tiles_of(card, **call) == [*tiles, *few]
    forward, backward = plans(8192, 4096, 4096, 16, card=name, route="kernel", dropout=True)
    assert forward.tile == backward.tile == tiles[0]
    assert forward.blocks == backward.blocks == resident * card.sms


def test_hopper_s_tiles_fit_the_problem():
    shapes = ((8192, 4096, 4096), (2048, 1024, 1024), (512, 4096, 1024))
    tiles = {plans(*shape, 16, card="H100", route="kernel")[0].tile for shape in shapes}
    assert tiles == {"wgmma 128 x 256", "pingpong 128 x 192"}
    for rank in (16, 64):
        dropped = plans(8192, 4096, 4096, rank, card="H100", route="kernel", dropout=True)
        assert [plan.tile for plan in dropped] == ["wgmma 128 x 256"] * 2


def test_one_pass_over_dy_ends_where_its_sums_cost_as_much_as_a_second():
    wide = {"adapter_dtype": torch.float32}
    assert plans(4096, 4096, 4096, 32)[1].one_pass
    assert not plans(4096, 4096, 4096, 33)[1].one_pass
    assert plans(4096, 4096, 4096, 16, **wide)[1].one_pass
    assert not plans(4096, 4096, 4096, 17, **wide)[1].one_pass
    assert not plans(4096, 4096, 64, 16)[1].one_pass  # 64 columns of dY, and 16 of sums


@pytest.mark.parametrize(
    ("rows", "out_features", "panels", "splits"),
    [
        (1024, 1024, 1, 16),  # a block for each 64 rows, of which there are fewer than 132 SMs
        (4096, 1024, 1, 64),
        (1024, 4096, 4, 16),
        (4096, 4096, 4, 32),  # of two steps: 33 for each of 132 SMs to have a block
        (8192, 14336, 14, 9),
    ],
)
def test_one_pass_over_dy_has_a_block_for_every_sm_if_there_are_rows(
    rows, out_features, panels, splits
):
    backward = plans(rows, 4096, out_features, 16, card="H100", route="hybrid")[1]
    assert (backward.panels, backward.dlora_b_splits) == (panels, splits)


def test_workspace_is_small_beside_the_activations():
    for plan in plans(8192, 4096, 4096, 16):
        assert plan.workspace <= 0.2 * 2 * 8192 * 4096


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match=r"expected one of A100, .*, but got 'V100'"):
        lora_ext.kernels.plan(1, 1, 1, 1, card="V100")
    with pytest.raises(ValueError, match="sizes of at least 1"):
        lora_ext.kernels.plan(0, 1, 1, 1)
    with pytest.raises(ValueError, match="expected one of auto, hybrid, kernel, library"):
        lora_ext.kernels.plan(1, 1, 1, 1, route="fast")


def test_explain_of_tensors_on_the_cpu_says_what_runs():
    x, w = torch.randn(5, 64, 48), torch.randn(32, 48)
    a, b = torch.randn(8, 48), torch.randn(32, 8)
    assert str(lora_ext.explain(x, w, a, b)) == f"{_C.cpu_isa()} kernels"
    assert "library" in str(lora_ext.explain(x.double(), w.double(), a.double(), b.double()))


@pytest.mark.skipif(_C.with_cuda, reason="the build has CUDA kernels")
def test_without_kernels_there_is_no_route_to_choose():
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        lora_ext.kernels.set_cuda_route("kernel")
    assert "no CUDA kernels" in _C.cuda_card(torch.device("cpu")).error


@pytest.mark.gpu
def test_explain_of_tensors_on_cuda_shows_plan_and_check(cuda):
    half = {"device": cuda, "dtype": torch.bfloat16}
    x, w = torch.randn(64, 128, **half), torch.randn(256, 128, **half)
    a, b = torch.randn(8, 128, device=cuda), torch.randn(256, 8, device=cuda)
    lora_ext.lora_linear(x, w, a, b)
    text = str(lora_ext.explain(x, w, a, b))
    assert "lora_gemm" in text and "check on this device: passed" in text


@pytest.mark.gpu
def test_all_kernels_pass_their_check_on_this_card(cuda):
    assert check_kernels(cuda) == {}


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 33, 64])
def test_few_rows_take_one_launch_that_fills_the_card(rows):
    for card, sms in (("A100", 108), ("H100", 132)):
        forward, _ = plans(rows, 8192, 8192, 16, card=card, route="kernel")
        assert forward.tile == "decode" and forward.shrink_splits == 0
        assert forward.blocks == sms * (2 if rows <= 16 else 1)
        at = _C.plan_numbers(forward)
        assert at["batch"] == next(batch for batch in (8, 16, 32, 64) if batch >= rows)
        assert "lora_decode, " in str(forward)
    assert plans(65, 8192, 8192, 16, route="kernel")[0].tile != "decode"


@pytest.mark.parametrize(
    "change",
    [{"dropout": True}, {"aligned": False}, {"aligned_weight": False}, {"factor_rows": False}],
    ids=str,
)
def test_few_rows_that_one_launch_cannot_take(change):
    problem = _C.Problem(8, 4096, 4096, 16)
    for name, value in change.items():
        setattr(problem, name, value)
    plan = _C.plan_forward(lora_ext.kernels.CARDS["A100"], problem, "kernel")
    assert plan.kernel and plan.tile != "decode"


def test_small_products_are_cut_into_no_more_than_what_gets_copies_going():
    forward, _ = plans(8, 1024, 1024, 16, card="A100", route="kernel")
    assert forward.blocks == 16 * 16 // 4  # 16 tiles, 16 steps along k, four a block
    assert plans(8, 64, 64, 16, card="A100", route="kernel")[0].blocks == 1
