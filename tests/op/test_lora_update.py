"""lora_update: the low-rank part alone, added onto what any base returned."""

import op_calls
import pytest
import torch
from helpers import (
    BF16,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    accumulation_dtype,
    leaf,
    made_of_half_pairs,
    make_problem,
    masked,
    max_error,
    pair_id,
    short,
)
from many_helpers import assert_equal
from torch.autograd import gradcheck

import lora_ext
from lora_ext.reference import lora_update_reference

OP = op_calls.lora_update
OPS = op_calls.OPS
NAMES = ("out", "dy", "dx", "dlora_a", "dlora_b")
SHAPES = [(67, 129, 95, 5), (130, 257, 64, 17), (48, 33, 257, 16), (9, 64, 31, 1), (3, 40, 24, 4)]

pairs = pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
dropouts = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


def make(lead, in_features, out_features, rank, pair=(F32, F32), device="cpu", dtype=None, **words):
    """(a problem, a y of its shape in a dtype, x's by default)"""
    shape = (lead, in_features, out_features, rank)
    problem = make_problem(*shape, pair, device, bias=False, **words)
    y = make_problem(*shape, pair, device, seed=7, **words).grad
    dtype = dtype or pair[0]
    return problem, y.to(dtype), problem.grad.to(dtype)


def differentiated(call, y, problem, grad):
    leaves = [leaf(t) for t in (y, problem.x, problem.lora_a, problem.lora_b)]
    before = [t.detach().clone() for t in (*leaves, grad)]
    out = call(*leaves)
    out.backward(grad)
    after = [t.detach() for t in (*leaves, grad)]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return dict(zip(NAMES, (out.detach(), *(t.grad for t in leaves)), strict=True))


def run(y, problem, grad, dropout_p=0.0, seed=1, row_offset=0, col_offset=0):
    seeds = torch.tensor(seed, device=y.device) if dropout_p else None
    tail = (problem.scaling, dropout_p, True, seeds, row_offset, col_offset)
    return differentiated(lambda *leaves: lora_ext.lora_update(*leaves, *tail), y, problem, grad)


def reference(y, problem, grad, dropout_p=0.0, dtype=None):
    mask = masked(problem, dropout_p)
    if dtype is not None:
        y, problem, grad = y.to(dtype), problem.to(dtype), grad.to(dtype)
    tail = (problem.scaling, *mask)
    return differentiated(lambda *leaves: lora_update_reference(*leaves, *tail), y, problem, grad)


# ---- values ----


@pairs
@dropouts
@pytest.mark.parametrize("dtype", [None, F64, F32, BF16, F16], ids=lambda d: d and short(d))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_y_and_gradients_dy_dx_da_db_with_and_without_dropout(
    isa, device, pair, dropout_p, dtype, shape
):
    """Errors at most twice those of torch."""
    problem, y, grad = make(*shape, pair, device, dtype, scaling=1.3)
    ours = run(y, problem, grad, dropout_p)
    exact, theirs = (reference(y, problem, grad, dropout_p, wide) for wide in (F64, None))
    eps = torch.finfo(accumulation_dtype(pair[0])).eps
    for name, wanted in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        floor = 8 * eps * wanted.abs().max().item()
        if made_of_half_pairs(isa, pair, dtype):
            floor = 1e-5 * wanted.abs().max().item()
        bound = 2 * max_error(theirs[name], wanted) + floor
        assert max_error(ours[name], wanted) <= bound, name


@pairs
@pytest.mark.parametrize("rows", [3, 60])
def test_integers_are_exact(isa, device, pair, rows):
    """Small integers, which no dtype rounds: a term that is lost or counted twice shows."""
    problem, y, grad = make(rows, 32, 24, 4, pair, device, integers=1, scaling=0.5)
    assert_equal(run(y, problem, grad), reference(y, problem, grad, dtype=F64))


@dropouts
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
def test_gradcheck(device, dropout_p, lead):
    problem, y, _ = make(lead, 7, 6, 3, (F64, F64), device)
    seed = torch.tensor(9, device=device)
    leaves = [leaf(t) for t in (y, problem.x, problem.lora_a, problem.lora_b)]
    assert gradcheck(lambda *tensors: OP(*tensors, 0.7, dropout_p, seed), leaves)


@pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_update_of_zero_is_that_of_lora_linear(isa, device, pair, dropout_p):
    """With the same seed, offsets and mask; integers, so that no route rounds them."""
    problem, y, _ = make(60, 40, 24, 5, pair, device, integers=1)
    seed = torch.tensor(5, device=device)
    tail = (0.5, dropout_p, seed, 3, 2)
    factors = (problem.lora_a, problem.lora_b)
    zeros = torch.zeros_like(problem.weight)
    alone = OP(torch.zeros_like(y), problem.x, *factors, *tail)
    assert torch.equal(alone, op_calls.lora_linear(problem.x, zeros, *factors, None, *tail))
    if dropout_p:
        other = OP(torch.zeros_like(y), problem.x, *factors, *tail[:3], 4, 2)
        assert not torch.equal(alone, other)


@pairs
@pytest.mark.parametrize("is_many", [False, True])
def test_both_functions_take_the_same_training_and_seed(isa, device, pair, is_many):
    problem, y, _ = make(60, 40, 24, 5, pair, device, integers=1)
    zeros, none = torch.zeros_like(problem.weight), torch.zeros_like(y)
    factors = (problem.lora_a, problem.lora_b)
    index = torch.arange(60, device=device, dtype=torch.int32) % 3 - 1 if is_many else None
    factors = [[factor, 2 * factor] for factor in factors] if is_many else factors

    def both(*words):
        first = lora_ext.lora_linear(problem.x, zeros, *factors, None, 0.5, *words, index=index)
        second = lora_ext.lora_update(none, problem.x, *factors, 0.5, *words, index=index)
        assert torch.equal(first, second)
        return first

    seeds = [torch.tensor(seed, device=device) for seed in (5, 6)]
    one, other = (both(0.5, True, seed) for seed in seeds)
    assert not torch.equal(one, other)
    plain = both(0.0)
    assert torch.equal(both(0.5, False), plain) and torch.equal(both(0.5, False, seeds[0]), plain)
    assert not torch.equal(one, plain)


def test_a_seed_is_drawn_where_none_is_given(device):
    problem, y, _ = make(9, 40, 24, 5, device=device)
    operands = (y, problem.x, problem.lora_a, problem.lora_b, 0.5, 0.5)
    torch.manual_seed(3)
    first, second = (lora_ext.lora_update(*operands) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(lora_ext.lora_update(*operands), first)
    assert not torch.equal(first, second)


# ---- shapes and strides ----


@pytest.mark.parametrize(
    ("lead", "in_features", "out_features"),
    [((0,), 16, 24), ((4, 0), 16, 24), ((5,), 0, 24), ((5,), 16, 0), ((), 16, 24)],
    ids=str,
)
def test_empty_and_single(device, lead, in_features, out_features):
    problem, y, grad = make(lead, in_features, out_features, 3, device=device)
    ours, exact = run(y, problem, grad, 0.5), reference(y, problem, grad, 0.5, F64)
    for name, wanted in exact.items():
        assert ours[name].shape == wanted.shape
        torch.testing.assert_close(ours[name], wanted.float(), msg=name)


@pytest.mark.parametrize("rows", [3, 60])
def test_any_strides(isa, device, rows):
    """Of integers, whose sums are exact in any order: a library's order may go by the strides."""
    problem, y, _ = make((2, rows), 40, 24, 5, device=device, integers=2)
    wanted = OP(y, problem.x, problem.lora_a, problem.lora_b)

    def strided(tensor):
        return tensor.mT.contiguous().mT

    tensors = [strided(t) for t in (y, problem.x, problem.lora_a, problem.lora_b)]
    assert not any(tensor.is_contiguous() for tensor in tensors)
    out = OP(*tensors)
    assert out.is_contiguous() and torch.equal(out, wanted)
    rows_apart = OP(torch.cat([y, y], -1)[..., 24:], *tensors[1:])
    assert torch.equal(rows_apart, wanted)
    expanded = OP(y[:1].expand_as(y), *tensors[1:])
    assert torch.equal(expanded[:1], wanted[:1])


# ---- autograd ----


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=short)
@pytest.mark.parametrize("adapter", [F32, BF16, F16], ids=short)
def test_autocast(device, dtype, adapter):
    """x goes to the autocast dtype, float32 factors stay, and y has its own."""
    problem, y, grad = make(60, 40, 24, 5, device=device)
    y, grad = y.to(dtype), grad.to(dtype)
    factors = (problem.lora_a.to(adapter), problem.lora_b.to(adapter))
    with torch.autocast(torch.device(device).type, BF16):
        out = lora_ext.lora_update(y, problem.x, *factors, 0.5)
    own = [f if adapter == F32 else f.to(BF16) for f in factors]
    assert out.dtype == dtype
    assert torch.equal(out, OP(y, problem.x.to(BF16), *own, 0.5))


# ---- as torch sees it ----


@dropouts
@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32), (F64, F64)], ids=pair_id)
def test_opcheck(device, pair, dropout_p):
    problem, y, grad = make((2, 30), 16, 24, 3, pair, device, F32)
    seed = torch.tensor(3, device=device) if dropout_p else None
    tensors = (y, problem.x, problem.lora_a, problem.lora_b)
    tail = (0.7, dropout_p, seed, 2, 1)
    torch.library.opcheck(OPS.lora.default, op_calls.update_inputs(*map(leaf, tensors), *tail))
    inputs = op_calls.update_inputs(*tensors, *tail)
    torch.library.opcheck(OPS.lora_forward.default, inputs)
    _, s = op_calls.lora_update_forward(*tensors, *tail)
    operands = op_calls.update_inputs(None, *tensors[1:], *tail)
    inputs = (grad, s, [True, False, True, False], *operands)
    torch.library.opcheck(OPS.lora_backward.default, inputs)
