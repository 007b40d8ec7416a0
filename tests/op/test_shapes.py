"""Every shape and every memory layout: exact integers, so that one wrong index is a failure."""

import math
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import op_calls
import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    HALVES,
    KERNEL_ROWS,
    Problem,
    assert_same_bits,
    make_problem,
    pair_id,
    run_integers,
    run_ours,
)
from hypothesis import HealthCheck, example, given, settings

import lora_ext

OP = op_calls.lora_linear
EXACT_PAIRS = [(F64, F64), (F32, F32), (BF16, F32), (F16, F32)]

# Fixtures that last a function are set once for all examples, which is what is wanted here.
properties = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ---- layouts: each takes a contiguous tensor and returns an equal one that lies differently ----
#
# Any stride of a dimension of one is in test_peer_bugs.


def contiguous(t):
    return t.contiguous()


def transposed(t):
    """The last two dimensions swapped in memory."""
    return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)


def permuted(t):
    """All dimensions reversed in memory."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def shifted(t, between=7.0):
    """One element into its storage: 2 bytes off any alignment for a half."""
    storage = torch.full((t.numel() + 2,), between, dtype=t.dtype, device=t.device)
    return storage[1:-1].view(t.shape).copy_(t)


def gaps(t, between=7.0):
    """Rows apart in memory, something else between them and around."""
    if t.dim() == 0:
        return t
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), between)
    return wide[..., 2:-3].copy_(t)


def every_other(t, between=7.0):
    """Stride 2 in the last dimension."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), between)
    return wide[..., ::2].copy_(t)


def expanded(t):
    """The first row repeated with stride 0: another tensor, not an equal one."""
    return t if t.dim() < 2 or t.shape[0] == 0 else t[:1].expand(t.shape)


layouts = st.sampled_from([contiguous, transposed, permuted, shifted, gaps, every_other, expanded])


def laid_out(problem: Problem, **how) -> Problem:
    given = {name: getattr(problem, name) for name in how}
    return replace(problem, **{name: how[name](t) for name, t in given.items() if t is not None})


# ---- properties ----

ROWS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 127, 128, 129]
widths = st.one_of(st.integers(0, 40), st.sampled_from([0, 63, 64, 65, 127, 129, 257]))


def ways(rows, dims):
    """Leading dimensions whose product is a number of rows."""
    if dims == 1:
        return [(rows,)]
    divisors = [d for d in range(1, max(rows, 1) + 1) if rows % d == 0]
    return [(d, *rest) for d in divisors for rest in ways(rows // d, dims - 1)]


shapes = st.tuples(st.sampled_from(ROWS), st.integers(1, 3))
NOTHING = {"lead": (60,), "in_features": 19, "out_features": 23, "rank": 4, "pair": (F32, F32)}
NOTHING |= {"dropout_p": 0.5, "bias": True, "seed": 0, "how": {}}
leads = st.just(()) | shapes.flatmap(lambda shape: st.sampled_from(ways(*shape)))


@given(
    lead=leads,
    in_features=widths,
    out_features=widths,
    rank=st.one_of(st.integers(1, 20), st.integers(1, 257)),
    pair=st.sampled_from(EXACT_PAIRS),
    dropout_p=st.sampled_from([0.0, 0.5]),
    bias=st.booleans(),
    how=st.fixed_dictionaries(
        {name: layouts for name in ("x", "weight", "lora_a", "lora_b", "grad")}
    ),
    seed=st.integers(0, 1000),
)
@example(**NOTHING | {"lead": (2, 0, 3)})
@example(**NOTHING | {"in_features": 0})
@example(**NOTHING | {"out_features": 0})
@properties
def test_any_shape_and_layout(
    isa, device, lead, in_features, out_features, rank, pair, dropout_p, bias, how, seed
):
    sizes = (lead, in_features, out_features, rank)
    problem = make_problem(*sizes, pair, device, bias=bias, scaling=0.25, seed=seed, integers=2)
    problem = laid_out(problem, **how)
    run = run_integers(problem, dropout_p, seed)
    assert run.y.shape == (*lead, out_features)
    assert run.dx.shape == (*lead, in_features)


# ---- what is not finite, and NaN in memory that is not ours to read ----
#
# The base product is torch's, and in many sizes oneDNN's bfloat16 product multiplies what lies
# behind a row of x by the zeros that pad the weight: a NaN there reaches y without lora_ext. So y
# and dx are looked at in sizes where torch keeps rows apart, and in odd sizes what the kernels
# alone compute: S, dlora_a and dlora_b.

ALL_PAIRS = [*EXACT_PAIRS, (BF16, BF16), (F16, F16)]
EVEN, ODD = (96, 64, 32), (77, 83, 5)  # in_features, out_features, rank


def s_of(problem, dropout_p=0.0):
    seed = torch.tensor(1, device=problem.x.device)
    tail = (problem.bias, problem.scaling, dropout_p, seed, 0, 0, False, None)
    return op_calls.lora_linear_forward(*problem.operands, *tail)[1]


def in_nan(problem):
    """Guard bands: whatever reads one element too far brings a NaN home."""
    bands = dict.fromkeys(("x", "weight", "lora_a", "lora_b", "grad"), gaps) | {"bias": shifted}
    return laid_out(problem, **{n: partial(f, between=float("nan")) for n, f in bands.items()})


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=pair_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [17, 61])
def test_nan_around_every_input_stays_outside(isa, device, pair, dropout_p, rows):
    problem = in_nan(make_problem(rows, *EVEN, pair, device))
    for name, value in run_ours(problem, dropout_p).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=pair_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [8, 17, KERNEL_ROWS, 61])
def test_kernels_read_no_nan_around_odd_sizes(isa, device, pair, dropout_p, rows):
    if isa == "library" and pair[0] == BF16:
        pytest.skip("torch's own product reads it")
    problem = in_nan(make_problem(rows, *ODD, pair, device))
    assert s_of(problem, dropout_p).isfinite().all()
    run = run_ours(problem, dropout_p)
    assert run.dlora_a.isfinite().all()
    assert run.dlora_b.isfinite().all()
    if pair[0] != BF16:
        assert run.y.isfinite().all()
        assert run.dx.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pair", ALL_PAIRS, ids=pair_id)
@pytest.mark.parametrize("rows", [9, 67])
def test_what_is_not_finite_stays_in_its_row(isa, device, value, pair, rows):
    problem = make_problem(rows, *EVEN, pair, device)
    plain = run_ours(problem)
    bad_rows = torch.tensor([0, 3, rows - 1], device=device)
    problem.x[bad_rows, torch.tensor([0, 38, 95], device=device)] = value
    y = run_ours(problem).y
    assert not y[bad_rows].isfinite().any()
    others = torch.ones(rows, dtype=torch.bool, device=device)
    others[bad_rows] = False
    assert torch.equal(y[others], plain.y[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pair", ALL_PAIRS, ids=pair_id)
def test_kernels_keep_odd_rows_apart(isa, device, value, pair):
    if isa == "library" and pair[0] == BF16:
        pytest.skip("torch's own product mixes them")
    problem = make_problem(67, *ODD, pair, device)
    plain = s_of(problem)
    problem.x[[0, 3, 66], [0, 38, 76]] = value
    s = s_of(problem)
    assert not s[[0, 3, 66]].isfinite().any()
    others = [row for row in range(67) if row not in (0, 3, 66)]
    assert torch.equal(s[others], plain[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [9, 67])
@pytest.mark.parametrize("pair", ALL_PAIRS, ids=pair_id)
def test_a_gradient_that_is_not_finite_stays_in_its_row(isa, device, value, rows, pair):
    """A loss scaler finds an overflow by what is not finite in any gradient."""
    problem = make_problem(rows, *EVEN, pair, device)
    plain = run_ours(problem)
    problem.grad[4, 7] = value
    run = run_ours(problem)
    assert not run.dx[4].isfinite().any()
    others = [row for row in range(rows) if row != 4]
    assert torch.equal(run.dx[others], plain.dx[others])
    assert not run.dlora_a.isfinite().any()
    assert not run.dlora_b[7].isfinite().any()
    assert run.dbias.isfinite().sum() == EVEN[1] - 1


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=pair_id)
@pytest.mark.parametrize("rows", [9, 67])
def test_inf_times_a_zero_lora_b_is_nan(isa, device, pair, rows):
    """As the naive formula has it: a fresh adapter does not hide an overflow in x."""
    problem = make_problem(rows, *EVEN, pair, device, bias=False)
    problem.weight.fill_(1)
    problem.lora_b.zero_()
    problem.x[2, 3] = float("inf")
    y = run_ours(problem).y
    assert y[2].isnan().all()
    assert y.isnan().any(1).sum() == 1


FACTORS = [(dtype, 3.4e38, 1e-30) for dtype in (F32, BF16)]
FACTORS += [(dtype, 1e-30, 1.2345e30) for dtype in (F32, *HALVES)]


@pytest.mark.parametrize(("dtype", "a", "b"), FACTORS)
@pytest.mark.parametrize("rows", [9, 67])
def test_float32_adapters_keep_their_range(isa, device, dtype, rows, a, b):
    """A large one, which would round to infinity in bfloat16, is still a number; small ones, as a
    decayed adapter has, do not vanish."""
    if dtype == F16 and isa is None:
        pytest.skip("CUDA's kernels keep float32 adapters as pairs of float16: 2^-36 to 65504")
    problem = make_problem(rows, 33, 31, 2, (dtype, F32), device, bias=False, scaling=1.0)
    for tensor in problem.operands:
        tensor.zero_()
    problem.x[:, 0], problem.lora_a[0, 0], problem.lora_b[:, 0] = 1, a, b
    y = run_ours(problem).y
    torch.testing.assert_close(y.double(), torch.full_like(y, a * b).double(), rtol=4e-3, atol=0)


# ---- determinism ----


REPEATED = [(F32, F32), (BF16, F32), (F16, F16)]


@pytest.mark.parametrize("pair", REPEATED, ids=pair_id)
@pytest.mark.parametrize("sizes", [(150, 130, 140, 9), (7, 65, 70, 9)], ids=lambda s: f"M{s[0]}")
def test_50_repeats_have_the_same_bits(isa, device, two_threads, deterministic, pair, sizes):
    problem = make_problem(*sizes, pair, device)
    first = run_ours(problem, 0.3)
    for _ in range(49):
        assert_same_bits(run_ours(problem, 0.3), first)


@pytest.mark.parametrize(
    "pair", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=pair_id
)
@pytest.mark.parametrize(
    "sizes",
    [(300, 900, 800, 16), *((rows, 1800, 1600, 90) for rows in (*range(1, 9), 20, 47))],
    ids=lambda s: f"M{s[0]}r{s[3]}",
)
def test_number_of_threads_does_not_change_the_bits(isa, pair, sizes, request):
    """The sizes give each of two threads work in every pass.

    The weight is zero: the base product is the library's, and so are its promises.
    """
    problem = make_problem(*sizes, pair)
    problem.weight.zero_()
    one = run_ours(problem, 0.3)
    request.getfixturevalue("two_threads")
    assert torch.get_num_threads() == 2
    two = run_ours(problem, 0.3)
    for name in ("y", "dx", "dlora_a", "dlora_b"):
        if isa == "library":  # its own products
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0.01, atol=0.01)
        else:
            assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)], ids=pair_id)
@pytest.mark.parametrize("rows", [2, 7, 20, 70])
def test_other_rows_and_places_change_no_bit(isa, pair, rows):
    """The base product is the library's: NaN may pass it at odd widths."""
    if isa == "library":
        return  # its own products
    problem = make_problem(rows, 64, 96, 40, pair, bias=False)
    runs = [run_ours(problem)]
    place = torch.arange(rows).roll(1)
    others = torch.full_like(problem.x, math.nan), torch.full_like(problem.grad, math.nan)
    others[0][1], others[1][1] = problem.x[0], problem.grad[0]
    moved = replace(problem, x=problem.x[place], grad=problem.grad[place])
    runs += [run_ours(moved), run_ours(replace(problem, x=others[0], grad=others[1]))]
    for name in ("y", "dx"):
        first, second, third = (getattr(run, name) for run in runs)
        assert torch.equal(first[place], second), name
        assert torch.equal(first[:1], third[1:2]), name


def test_rows_of_x_may_be_one_row(isa, device):
    """Stride 0 over rows: nothing of ours may write through x, and each row of y is the same."""
    row = make_problem(1, 77, 83, 5, device=device)
    problem = make_problem(64, 77, 83, 5, device=device)
    before = row.x.clone()
    y = OP(row.x.expand(64, 77), problem.weight, problem.lora_a, problem.lora_b)
    assert torch.equal(row.x, before)
    if isa == "library":  # MKL sums the last rows in another order on some processors
        torch.testing.assert_close(y, y[:1].expand_as(y))
    else:
        assert torch.equal(y, y[:1].expand_as(y))


def test_negative_view(device):
    """A lazily negated tensor, as .imag of a conjugate is."""
    z = torch.randn(60, 40, dtype=torch.complex64, device=device)
    problem = make_problem(60, 40, 30, 3, device=device)
    rest = (problem.weight, problem.lora_a, problem.lora_b)
    negated = z.conj().imag
    assert negated.is_neg()
    assert torch.equal(OP(negated, *rest), OP(negated.resolve_neg(), *rest))


def test_parameters_and_subclasses_of_tensor(device):
    problem = make_problem(60, 40, 30, 3, device=device)
    rest = [torch.nn.Parameter(t, requires_grad=False) for t in (problem.weight, problem.lora_a)]
    y = lora_ext.lora_linear(problem.x, *rest, torch.nn.Parameter(problem.lora_b))
    assert type(y) is torch.Tensor
    assert y.requires_grad
