"""The layer in one pass on the CPU, with panels of each dtype: integers without tolerance at the
edges of tiles, panels and blocks, bits, and what is not read."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    make_problem,
    masked,
    max_error,
    packable,
    pair_id,
    run_float64,
    run_in_order,
    run_integers,
    run_ours,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many_helpers import KINDS, make_many, run_loop
from many_helpers import run as run_many

import lora_ext
from lora_ext import _C

PAIRS = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)]


# (dtype of the panels, dtypes of x and of the adapters)
CASES = [*(("float32", pair) for pair in PAIRS), *(("bfloat16", pair) for pair in PAIRS[1:3])]
cases = pytest.mark.parametrize(
    ("panels", "pair"),
    [pytest.param(name, pair, id=f"{name}-{pair_id(pair)}") for name, pair in CASES],
    indirect=["panels"],
)


@pytest.fixture
def panels(request):
    """Sets the panels; skips where nothing may take them: `warmup` offers what is run here."""
    panels = getattr(torch, request.param)
    if panels not in _C.cpu_panel_candidates(BF16):
        pytest.skip(f"no product is offered panels of {request.param} here")
    _C.set_cpu_panels(request.param)
    assert _C.cpu_panels(BF16) == panels
    yield request.param
    _C.set_cpu_panels("auto")


def with_weight_of(problem, layout):
    """The same weight, [in, out] in memory as Conv1D's, or rows of a wider matrix with NaN."""
    weight = problem.weight
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "part":
        wide = torch.full((len(weight), weight.shape[1] + 3), float("nan"), dtype=weight.dtype)
        wide[:, : weight.shape[1]] = weight
        weight = wide[:, : weight.shape[1]]
    return replace(problem, weight=weight)


# M, K, N, r: one tile, tails in each dimension, and a depth of three blocks of floats and two of
# bfloat16, forward and backward.
SHAPES = [(8, 1, 1, 1), (64, 64, 64, 16), (67, 95, 129, 5), (131, 1291, 65, 3), (203, 63, 1299, 17)]


@cases
@pytest.mark.parametrize("layout", ["rows", "transposed", "part"])
@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_integers_are_exact(panels, pair, layout, sizes):
    problem = make_problem(*sizes, pair, scaling=0.25, integers=1 if max(sizes) > 999 else 8)
    run_integers(with_weight_of(problem, layout), 0.5)


@cases
def test_y_and_dx_are_rounded_once(panels, pair):
    """Halves by half a unit of their own, beside float32's sums; the second rounding of a base that
    the library computes adds a quarter to the error. float32 as products in order, twice."""
    problem = make_problem(130, 1291, 257, 16, pair)
    mask = masked(problem, 0.3)
    ours, exact = run_ours(problem, 0.3), run_float64(problem, *mask)
    theirs = run_in_order(problem, *mask)
    for name in ("y", "dx"):
        value, wanted = getattr(ours, name), getattr(exact, name)
        of_sums = 1e-5 * wanted.abs().max()
        if pair[0] is F32:
            assert max_error(value, wanted) <= 2 * max_error(getattr(theirs, name), wanted)
        else:
            half_unit = torch.finfo(pair[0]).eps / 2 * wanted.abs()
            assert ((value.double() - wanted).abs() <= half_unit + of_sums).all(), name


@cases
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 150), st.integers(1, 40))
def test_any_shape(panels, pair, rows, in_features, out_features, rank):
    sizes = (rows, in_features, out_features, rank)
    run_integers(make_problem(*sizes, pair, scaling=0.25, integers=4), 0.5)


@cases
@pytest.mark.parametrize("rank", [7, 40])
def test_a_row_has_the_same_bits_in_any_batch_and_number_of_threads(panels, pair, rank):
    problem = make_problem(301, 700, 190, rank, pair, bias=False)
    x, weight, lora_a, lora_b = problem.operands
    grad = problem.grad

    def run(rows):
        leaf = x[:rows].clone().requires_grad_()
        y = lora_ext.lora_linear(leaf, weight, lora_a, lora_b, None, 0.7)
        return y, torch.autograd.grad(y, leaf, grad[:rows])[0]

    whole = run(301)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            for rows in (8, 9, 16, 31, 65, 130, 301):
                for part, all_rows in zip(run(rows), whole, strict=True):
                    assert torch.equal(part, all_rows[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("panels", ["float32", "bfloat16"], indirect=True)
def test_only_what_belongs_to_x_is_read(panels):
    """Rows of a wider tensor, at an odd depth: panels of bfloat16 are padded to an even one."""
    problem = make_problem(70, 131, 66, 4, (BF16, BF16))
    wide = torch.full((70, 200), float("nan"), dtype=BF16)
    wide[:, :131] = problem.x
    run, other = run_ours(problem), run_ours(replace(problem, x=wide[:, :131]))
    for name in ("y", "dx", "dlora_a", "dlora_b"):
        assert torch.equal(getattr(run, name), getattr(other, name)), name


@cases
@pytest.mark.parametrize(
    "pitch", [0, 3, 2**23], ids=["one row for all", "rows that overlap", "far"]
)
def test_rows_at_any_pitch(panels, pair, pitch):
    """The library's kernels want rows that do not overlap; offsets within a tile of 64 rows of the
    last ones do not fit 32 bits."""
    weight, lora_a, lora_b = make_problem(1, 21, 30, 4, pair).operands[1:]

    def strided(columns):
        rows = torch.empty_strided((65, columns), (pitch, 1), dtype=pair[0])
        for row in rows:
            row.copy_(torch.randn(columns))
        return rows

    def run(x, grad):
        x.requires_grad_()
        y = lora_ext.lora_linear(x, weight, lora_a, lora_b, None, 0.25)
        return y, torch.autograd.grad(y, x, grad)[0]

    x, grad = strided(21), strided(30)
    copies = x.contiguous(), grad.contiguous()
    assert (x.stride(), copies[0].stride()) == ((pitch, 1), (21, 1))
    for ours, wanted in zip(run(x, grad), run(*copies), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("panels", ["float32", "bfloat16"], indirect=True)
def test_nan_in_a_row_stays_in_it(panels):
    problem = make_problem(70, 40, 66, 4, (BF16, BF16))
    problem.x[5, 3] = float("nan")
    y = run_ours(problem).y
    assert y[5].isnan().all() and not y[:5].isnan().any() and not y[6:].isnan().any()


@pytest.mark.skipif(not packable(F32), reason="this torch has no oneDNN")
@pytest.mark.parametrize("panels", ["float32"], indirect=True)
def test_a_pack_is_taken_where_there_is_one(panels):
    problem = make_problem(32, 64, 48, 4)
    packed = lora_ext.pack_weight(problem.weight, backward=True)
    for weight, is_library in ((packed, True), (problem.weight, False)):
        x = problem.x.clone().requires_grad_()
        with torch.autograd.profiler.profile() as profile:
            y = lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b)
            y.backward(problem.grad)
        calls = [event.name for event in profile.function_events]
        assert calls.count("mkldnn::_linear_pointwise") == 2 * is_library


@pytest.mark.parametrize("panels", ["float32"], indirect=True)
def test_other_dtypes_have_none(panels):
    assert _C.cpu_panels(torch.float64) is None
    p, q = torch.arange(80).view(8, 10), torch.arange(60).view(10, 6)
    for dtype in (torch.float64, torch.int32):
        out = torch.empty(8, 6, dtype=dtype)
        _C.cpu_product(p.to(dtype), q.to(dtype), None, out)
        assert torch.equal(out.long(), p @ q)


@pytest.mark.parametrize("panels", ["float32"], indirect=True)
def test_a_product_is_torchs_in_all_else(panels):
    """Views that only the dispatcher resolves, slices, versions, and what torch refuses."""
    p, q, bias = torch.randn(8, 10), torch.randn(10, 6), torch.randn(6)
    out = torch.empty(8, 6)
    version = out._version
    views = ((p._neg_view(), q, bias), (p, q._neg_view(), bias), (p, q, bias._neg_view()))
    for args in (*views, (p, q, torch.randn(12)[::2])):
        _C.cpu_product(*args, out)
        assert torch.allclose(out, torch.addmm(args[2], *args[:2]), atol=1e-5)
    _C.cpu_product(p, q, bias, out)
    assert out._version == version + 5
    for other in (q[:9], q.double(), q.clone().requires_grad_()):
        with pytest.raises(RuntimeError):
            _C.cpu_product(p, other, None, out)
    with pytest.raises(RuntimeError):
        _C.cpu_product(p, q, bias[:, None], out)
    with pytest.raises(RuntimeError):
        _C.cpu_product(p, q, None, torch.empty(6).expand(8, 6))


@pytest.mark.parametrize("panels", ["float32"], indirect=True)
def test_the_librarys_switch_is_obeyed(panels):
    with torch.backends.mkldnn.flags(enabled=False):
        assert _C.cpu_panels(F32) is None
        run_integers(make_problem(20, 9, 7, 2, integers=4, scaling=0.25))


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="expected one of auto, none, float32, bfloat16, but got"):
        _C.set_cpu_panels("half")
    for panel in (torch.int64, torch.bool, torch.float16):
        with pytest.raises(ValueError, match="expected panels of float32, of bfloat16 or none"):
            _C.set_measured_panels(torch.float32, 8, 8, True, [(4, panel)])


CHILD = """
import torch, lora_ext
from lora_ext import _C
from test_fused_gemm import BF16, F16, F32, make_problem, run_integers
if _C.cpu_isa() in ("amx", "avx512_bf16"):
    _C.set_cpu_isa("avx512")  # walks of our own, whose products are not the library's
for name in ("auto", "float32", "bfloat16"):
    _C.set_cpu_panels(name)
    for dtype in (F32, BF16, F16):
        run_integers(make_problem(70, 95, 66, 5, (dtype, F32), scaling=0.25, integers=8), 0.5)
        print(name, str(dtype)[6:], str(_C.cpu_panels(dtype))[6:])
"""


@pytest.mark.skipif("avx2" not in _C.available_cpu_isas(), reason="the library has no limit here")
@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_a_processor_without_products_of_halves(limit):
    """The library's kernels as on an older processor; without a walk of our own none are offered
    for bfloat16."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": limit}
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    run = [sys.executable, "-c", CHILD]
    child = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    said = child.stdout.splitlines()
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"float32 {dtype} float32" in said
    assert "bfloat16 bfloat16 bfloat16" not in said
    assert "auto bfloat16 bfloat16" not in said


# ---- an adapter for each row ----


@cases
@pytest.mark.parametrize("kind", ["ranges", "mixed"])
def test_rows_have_the_bits_of_a_call_with_their_adapter_alone(panels, pair, kind):
    """Wherever they are in the batch; rows without one have those of the base."""
    ranks, dropout_p = (1, 16, 33), 0.3
    many = make_many(300, 700, 190, ranks, pair, kind=kind)
    bias = many.bias
    seed = torch.tensor(1)

    def of_one(g):
        leaf = many.x.clone().requires_grad_()
        factors = [f.clone().requires_grad_() for f in (many.lora_a[g], many.lora_b[g])]
        scaling = many.scaling[g].item()
        y = torch.ops.lora_ext.lora(
            leaf, many.weight, None, *factors, scaling, bias=bias, dropout_p=dropout_p, seed=seed
        )
        y.backward(many.grad)
        return {"y": y.detach(), "dx": leaf.grad}

    together = run_many(many, dropout_p)
    for g in range(-1, len(ranks)):
        rows = (many.index == g).nonzero().flatten()
        assert len(rows) > 50  # a factor of fewer rows is read in its own layout, by other sums
        if g < 0:
            zeros = [torch.zeros_like(f) for f in many.lora_b]
            alone = run_many(replace(many, lora_b=zeros), dropout_p)
        else:
            alone = of_one(g)
        for name, value in alone.items():
            if name in ("y", "dx"):
                assert torch.equal(together[name][rows], value[rows]), (g, name)


@cases
@pytest.mark.parametrize("kind", KINDS)
def test_many_adapters_on_integers_are_exact(panels, pair, kind):
    many = make_many(203, 95, 129, (5, 1, 17), pair, kind=kind, integers=2)
    exact = run_loop(many, dtype=F64)
    for name, value in run_many(many).items():
        assert torch.equal(value, exact[name].to(value.dtype)), name


@cases
def test_factors_that_are_views_of_one_matrix(panels, pair):
    """One adapter's have the address of the other's, and not its pitch: a pack is of one alone."""
    many = make_many(96, 64, 48, (16, 16), pair, integers=2)
    wide, tall = (torch.randint(-2, 3, sizes).to(pair[1]) for sizes in ((16, 128), (96, 16)))
    many = replace(many, lora_a=[wide[:, :64], wide[:, ::2]], lora_b=[tall[:48], tall[::2]])
    exact = run_loop(many, dtype=F64)
    for name, value in run_many(many).items():
        assert torch.equal(value, exact[name].to(value.dtype)), name
