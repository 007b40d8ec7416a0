"""PackedWeight: the same numbers from a packed copy, wherever torch runs."""

import pytest
import torch
from helpers import (
    BF16,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    make_problem,
    masked,
    max_error,
    pair_id,
    run_float64,
    run_ours,
)
from pack_helpers import call, packable, packed_weight

import lora_ext
from lora_ext import lora_linear, pack_weight

PACKED_PAIRS = [(F32, F32), (BF16, F32), (BF16, BF16)]


@pytest.fixture(params=PACKED_PAIRS, ids=pair_id)
def pair(request):
    if not packable(request.param[0]):
        pytest.skip(f"oneDNN does not pack {request.param[0]} on this processor")
    return request.param


# ---- numbers ----


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(2, 40, 70, 5), (61, 129, 95, 8), (200, 256, 192, 16)], ids=str)
def test_packed_agrees_with_unpacked(isa, pair, backward, bias, dropout_p, sizes):
    """Both are bounded by the errors that a product in this dtype makes against float64."""
    problem = make_problem(*sizes, pair, bias=bias)
    packed = pack_weight(problem.weight, backward=backward)
    assert packed.is_packed
    plain = run_ours(problem, dropout_p)
    with_pack = run_ours(problem, dropout_p, weight=packed)
    exact = run_float64(problem, *masked(problem, dropout_p))
    for name in ("y", "dx"):
        wanted = getattr(exact, name)
        floor = 4 * torch.finfo(F32).eps * wanted.abs().max().item()
        bound = 2 * max_error(getattr(plain, name), wanted) + floor
        assert max_error(getattr(with_pack, name), wanted) <= bound, name
    for name in ("dlora_a", "dlora_b"):  # the base product has no part in them
        assert torch.equal(getattr(with_pack, name), getattr(plain, name)), name


@pytest.mark.parametrize("rows", [2, 17, 60])
def test_packed_integers_are_exact(isa, pair, rows):
    problem = make_problem(rows, 77, 83, 4, pair, scaling=0.5, integers=1)
    packed = pack_weight(problem.weight, backward=True)
    exact = run_float64(problem)
    run = run_ours(problem, weight=packed)
    for name, value in run.items():
        assert torch.equal(value, getattr(exact, name).to(value.dtype)), name


@pytest.mark.parametrize("view", ["expanded", "transposed", "gaps", "shifted", "three dimensions"])
def test_packed_takes_any_strides_of_x(pair, view):
    packed = packed_weight(pair[0], (70, 40), backward=True)
    x = {
        "expanded": lambda: torch.randn(1, 40).to(pair[0]).expand(60, 40),
        "transposed": lambda: torch.randn(40, 60).to(pair[0]).t(),
        "gaps": lambda: torch.randn(60, 50).to(pair[0])[:, 3:43],
        "shifted": lambda: torch.randn(60 * 40 + 1).to(pair[0])[1:].view(60, 40),
        "three dimensions": lambda: torch.randn(3, 20, 40).to(pair[0]),
    }[view]()
    lora_a, lora_b = torch.randn(5, 40).to(pair[1]), torch.randn(70, 5).to(pair[1])
    results = []
    for weight in (packed, packed.weight):
        leaf = x.detach().requires_grad_()
        y = lora_linear(leaf, weight, lora_a, lora_b)
        y.sum().backward()
        results.append((y, leaf.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if pair[0] == F32 else {"rtol": 2e-2, "atol": 0.25}
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("backward", [False, True])
def test_the_pack_is_really_used(backward):
    """With another weight's pack y, or dx, is that weight's: proof of the route, and no more."""
    wrong, right = packed_weight(backward=True), packed_weight(backward=True)
    name = "_packed_t" if backward else "_packed"
    setattr(wrong, name, getattr(right, name))
    results = []
    for weight in (wrong, wrong.weight, right.weight):
        problem = make_problem(60, 40, 70, 5)
        x = problem.x.requires_grad_()
        y = lora_linear(x, weight, problem.lora_a, problem.lora_b)
        y.backward(problem.grad)
        results.append(x.grad if backward else y)
    got, of_wrong, of_right = results
    assert torch.allclose(got, of_right, atol=1e-4)
    assert not torch.allclose(got, of_wrong, atol=1e-1)


def test_empty_batch_and_one_row():
    packed = packed_weight()
    assert call(packed, rows=0).shape == (0, 70)
    assert torch.equal(call(packed, rows=1), call(packed.weight, rows=1))  # float32: unpacked


# ---- what is packed, and what not, and why ----


@pytest.mark.parametrize(
    ("dtype", "on"),
    [(F16, "cpu"), (F64, "cpu"), pytest.param(F32, "cuda", marks=pytest.mark.gpu)],
    ids=str,
)
def test_what_stays_unpacked_has_a_reason(dtype, on):
    if on == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    packed = pack_weight(torch.randn(70, 40, device=on).to(dtype))
    assert not packed.is_packed
    assert packed.nbytes == 0
    assert (on if on == "cuda" else str(dtype)) in packed.reason
    assert packed.route(64) == ("unpacked", packed.reason)
    problem = make_problem(60, 40, 70, 5, (dtype, dtype), on)
    tensors = (problem.lora_a, problem.lora_b)
    y = lora_linear(problem.x, packed, *tensors)
    assert torch.equal(y, lora_linear(problem.x, packed.weight, *tensors))


def test_other_devices_stay_unpacked_with_a_reason():
    packed = pack_weight(torch.empty(70, 40, device="meta"))
    assert not packed.is_packed
    assert "meta" in packed.reason


@pytest.mark.parametrize("shape", [(0, 40), (70, 0)])
def test_nothing_to_pack(shape):
    packed = pack_weight(torch.empty(shape))
    assert not packed.is_packed
    assert packed.reason


def test_the_original_weight_is_kept_and_not_changed():
    weight = torch.randn(70, 40)
    before, version = weight.clone(), weight._version
    packed = pack_weight(weight, backward=True)
    assert packed.weight is weight
    assert torch.equal(weight, before)
    assert weight._version == version
    assert packed.reason == ""


@pytest.mark.parametrize("layout", ["transposed", "gaps", "shifted"])
def test_a_strided_weight(layout):
    weight = {
        "transposed": lambda: torch.randn(40, 70).t(),
        "gaps": lambda: torch.randn(70, 50)[:, 3:43],
        "shifted": lambda: torch.randn(70 * 40 + 1)[1:].view(70, 40),
    }[layout]()
    packed = pack_weight(weight, backward=True)
    assert packed.is_packed
    assert torch.allclose(call(packed), call(weight), atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nbytes(dtype):
    if not packable(dtype):
        pytest.skip("not packed on this processor")
    one, two = (packed_weight(dtype, (64, 32), backward=b) for b in (False, True))
    assert one.nbytes == 64 * 32 * dtype.itemsize
    assert two.nbytes == 2 * one.nbytes


def test_route():
    packed = packed_weight()
    assert packed.route(64)[0] == "packed"
    route, reason = packed.route(1)
    assert route == "unpacked"
    assert "2 rows" in reason
    with torch.no_grad():
        packed.weight.add_(1)
    route, reason = packed.route(64)
    assert route == "unpacked"
    assert "was changed" in reason


def test_repr_says_what_it_is():
    packed = packed_weight()
    assert "packed, 11200 bytes" in repr(packed)
    packed.drop("for a merge")
    assert "unpacked: for a merge" in repr(packed)


# ---- together with the rest of torch ----


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_under_autocast(dtype):
    """A pack in the autocast dtype is used; any other gives way to a cast of the weight."""
    if not packable(dtype):
        pytest.skip("not packed on this processor")
    packed = packed_weight(dtype, backward=True)
    results = []
    for weight in (packed, packed.weight):
        problem = make_problem(60, 40, 70, 5)
        x = problem.x.requires_grad_()
        with torch.autocast("cpu", BF16):
            y = lora_linear(x, weight, problem.lora_a, problem.lora_b)
        y.backward(problem.grad.to(BF16))
        results.append((y, x.grad))
    torch.testing.assert_close(*results, rtol=2e-2, atol=0.1)


def test_float64_under_autocast_gives_way_to_the_weight():
    """Autocast leaves float64 alone, so that the pack of a bfloat16 weight does not fit x."""
    if not packable(BF16):
        pytest.skip("bfloat16 is not packed on this processor")
    packed = packed_weight(BF16)
    problem = make_problem(60, 40, 70, 5, (F64, F64))
    with torch.autocast("cpu", BF16):
        y, plain = (
            lora_linear(problem.x, weight, problem.lora_a, problem.lora_b)
            for weight in (packed, packed.weight)
        )
    assert torch.equal(y, plain)


def test_weight_that_requires_grad_later_is_refused():
    packed = packed_weight()
    packed.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="expected a frozen weight"):
        call(packed)


@pytest.mark.parametrize("backward", [False, True])
def test_compile_falls_back_to_the_weight(forget_graphs, counter, backward):
    packed = packed_weight(backward=backward)
    problem = make_problem(60, 40, 70, 5)

    @torch.compile(backend=counter, fullgraph=True)
    def step(x):
        return lora_linear(x, packed, problem.lora_a, problem.lora_b)

    assert torch.equal(step(problem.x), call(packed.weight))
    assert packed.is_packed
    assert counter.frame_count == 1


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
def test_every_dtype_runs_or_raises(pair):
    """Of a packed float32 weight: no route reads it as another dtype."""
    packed = pack_weight(torch.randn(70, 40))
    problem = make_problem(60, 40, 70, 5, pair)
    tensors = (problem.lora_a, problem.lora_b)
    if pair[0] == F32:
        assert lora_ext.lora_linear(problem.x, packed, *tensors).dtype == F32
    else:
        with pytest.raises(TypeError):
            lora_ext.lora_linear(problem.x, packed, *tensors)
