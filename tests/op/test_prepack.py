"""PackedWeight: the same numbers from a packed copy, wherever torch runs; what drops a pack."""

import copy
import pickle
import weakref

import pytest
import torch
from helpers import (
    BF16,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    by_pickle,
    by_torch_save,
    make_problem,
    masked,
    max_error,
    packable,
    pair_id,
    run_float64,
    run_ours,
)
from torch import nn

from lora_ext import lora_linear, pack_weight
from lora_ext.functional import PackedWeight

PACKED_PAIRS = [(F32, F32), (BF16, F32), (BF16, BF16)]


@pytest.fixture(params=PACKED_PAIRS, ids=pair_id)
def pair(request):
    if not packable(request.param[0]):
        pytest.skip(f"oneDNN does not pack {request.param[0]} on this processor")
    return request.param


def packed_weight(dtype=F32, shape=(70, 40), **options) -> PackedWeight:
    packed = pack_weight(torch.randn(shape).to(dtype), **options)
    assert packed.is_packed, packed.reason
    return packed


def call(weight, rows=60):
    """lora_linear of a fixed problem on a given weight."""
    problem = make_problem(rows, 40, 70, 5)
    return lora_linear(problem.x, weight, problem.lora_a, problem.lora_b)


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
    of_base, of_adapter = ("y", "dx"), ("dlora_a", "dlora_b")
    # The base product has no part in these, but its walk by vdpbf16ps makes S and dS itself.
    makes_s = isa == "avx512_bf16" and pair[0] is BF16
    for name in of_base + of_adapter * makes_s:
        wanted = getattr(exact, name)
        floor = 4 * torch.finfo(F32).eps * wanted.abs().max().item()
        bound = 2 * max_error(getattr(plain, name), wanted) + floor
        assert max_error(getattr(with_pack, name), wanted) <= bound, name
    for name in () if makes_s else of_adapter:
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


@pytest.mark.parametrize(("shape", "on"), [((70, 40), "meta"), ((0, 40), "cpu"), ((70, 0), "cpu")])
def test_nothing_to_pack(shape, on):
    packed = pack_weight(torch.empty(shape, device=on))
    assert not packed.is_packed
    assert packed.reason and (on == "meta") == ("meta" in packed.reason)


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


def test_route():
    packed = packed_weight()
    assert packed.route(64)[0] == "packed" and "packed, 11200 bytes" in repr(packed)
    route, reason = packed.route(1)
    assert route == "unpacked"
    assert "2 rows" in reason


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
        assert lora_linear(problem.x, packed, *tensors).dtype == F32
    else:
        with pytest.raises(TypeError):
            lora_linear(problem.x, packed, *tensors)


# ---- what drops a pack ----


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_copies_and_pickles_hold_the_weight_alone(how):
    packed = packed_weight(backward=True)
    other = how(packed)
    assert packed.is_packed
    assert not other.is_packed
    assert "pack_weight again" in other.reason
    assert torch.equal(other.weight, packed.weight)
    assert torch.equal(call(other), call(packed.weight))
    assert len(pickle.dumps(packed)) < 1.2 * packed.weight.nbytes + 1000


def test_to_another_dtype_or_device_drops_the_pack():
    packed = packed_weight()
    assert packed.to(F32) is packed
    assert packed.to("cpu") is packed
    for other in (packed.to(F64), packed.to("meta"), packed.to(F32, copy=True)):
        assert not other.is_packed
        assert ".to()" in other.reason
    assert packed.is_packed


WRITES = [torch.neg, torch.zeros_like]
WRITES += [lambda w: w * 1.001, lambda w: w + 0.01, lambda w: w.roll(1)]


@pytest.mark.parametrize("shape", [(70, 40), (300, 257)])
@pytest.mark.parametrize("write", WRITES)
def test_verify_finds_any_write_of_all_elements(shape, write):
    """It changes no version counter, and peft's merge writes so."""
    packed = packed_weight(shape=shape)
    packed.verify()
    packed.weight.data.copy_(write(packed.weight.data))
    with pytest.raises(RuntimeError, match="written to since; call pack_weight again"):
        packed.verify()


def test_a_write_to_weight_data_raises_in_debug_mode(monkeypatch):
    monkeypatch.setattr(PackedWeight, "debug", True)
    packed = packed_weight()
    call(packed)
    packed.weight.data += 0.01
    with pytest.raises(RuntimeError, match="written to"):
        call(packed)


def test_verify_of_what_is_not_packed():
    packed = packed_weight()
    packed.drop()
    packed.weight.data += 1
    packed.verify()
    pack_weight(torch.randn(4, 4, dtype=F64)).verify()


def test_drop():
    packed = packed_weight(backward=True)
    plain = call(packed.weight)
    packed.drop()
    assert not packed.is_packed
    assert packed.nbytes == 0
    assert packed.route(64) == ("unpacked", "dropped")
    assert torch.equal(call(packed), plain)
    packed.drop("again, for another reason")
    assert packed.reason == "again, for another reason"
    assert "unpacked: again" in repr(packed)


def test_drop_between_forward_and_backward():
    """Backward keeps the pack that its forward pass was given; nothing dangles."""
    packed = packed_weight(backward=True)
    problem = make_problem(60, 40, 70, 5)
    x = problem.x.requires_grad_()
    y = lora_linear(x, packed, problem.lora_a, problem.lora_b)
    packed.drop()
    y.backward(problem.grad)
    wanted = problem.grad @ (packed.weight + problem.lora_b @ problem.lora_a)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


def test_a_write_between_forward_and_backward_is_caught():
    packed = packed_weight(backward=True)
    problem = make_problem(60, 40, 70, 5)
    y = lora_linear(problem.x.requires_grad_(), packed, problem.lora_a, problem.lora_b)
    with torch.no_grad():
        packed.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.grad)


def test_a_pack_is_freed_with_its_last_user():
    packed = packed_weight(backward=True)
    watched = [weakref.ref(packed), weakref.ref(packed._packed), weakref.ref(packed._packed_t)]
    call(packed)
    del packed
    assert [ref() for ref in watched] == [None] * 3


# ---- changes of the weight ----


def changed_by(change):
    """A pack of an nn.Linear's weight, used, then changed: the layer, and the pack."""
    layer = nn.Linear(40, 70, bias=False).requires_grad_(False)
    layer.memory = torch.randn(70, 40).numpy()
    layer.weight.data = torch.from_numpy(layer.memory)
    packed = pack_weight(layer.weight)
    assert packed.is_packed
    call(packed)
    change(layer)
    return layer, packed


def at_its_address(layer):
    """As a cast and a cast back often leave it: a new storage in the place of the old one."""
    layer.weight.data = torch.empty(0)
    layer.memory += 1
    layer.weight.data = torch.from_numpy(layer.memory)


CHANGES = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "double": lambda layer: layer.double(),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(70, 40)),
    "other strides": lambda layer: setattr(layer.weight, "data", torch.randn(40, 70).t()),
    "in place": lambda layer: layer.weight.add_(1),
    "other data at its address": at_its_address,
    "data of inference mode": lambda layer: setattr(layer.weight, "data", inference_weight()),
}


def inference_weight():
    with torch.inference_mode():
        return torch.randn(70, 40)


@pytest.mark.parametrize("change", CHANGES)
def test_a_pack_does_not_outlive_a_change(change):
    """Modules cast and move by `weight.data = ...`: the same Parameter, of the same version."""
    layer, packed = changed_by(CHANGES[change])
    dtype = layer.weight.dtype
    route, reason = packed.route(60)
    assert route == "unpacked" and "changed" in reason
    problem = make_problem(60, 40, 70, 5)
    operands = [problem.x.to(dtype), problem.lora_a.to(dtype), problem.lora_b.to(dtype)]
    x, lora_a, lora_b = operands
    wanted = lora_linear(x, layer.weight.detach(), lora_a, lora_b)
    assert torch.equal(lora_linear(x, packed, lora_a, lora_b), wanted)
    assert not packed.is_packed
    assert "replaced, moved or cast since it was packed" in packed.reason


def test_a_weight_of_inference_mode_is_not_packed():
    packed = pack_weight(inference_weight())
    assert not packed.is_packed
    assert "tensor of torch.inference_mode" in packed.reason
    with torch.inference_mode():  # a weight from outside may be
        assert pack_weight(torch.randn(70, 40)).reason == packed.reason
    weight = torch.randn(70, 40)
    with torch.inference_mode():
        assert pack_weight(weight).is_packed


@pytest.mark.parametrize("is_near", [False, True])
def test_a_packed_transpose_does_not_outlive_a_change_before_backward(is_near):
    """`weight.data = other` between forward and backward: dX is of the other, as torch's is; also
    where the other is in the same storage."""
    problem = make_problem(60, 40, 70, 5)
    dy = torch.randn(60, 70)
    grads = []
    for is_packed in (True, False):
        both = torch.stack([problem.weight, problem.weight.flip(0)])
        weight = both[0] if is_near else problem.weight.clone()
        operand = pack_weight(weight, backward=True) if is_packed else weight
        x = problem.x.clone().requires_grad_()
        y = lora_linear(x, operand, problem.lora_a, problem.lora_b)
        weight.data = both[1] if is_near else weight.flip(0)
        y.backward(dy)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    wanted = dy @ (problem.weight.flip(0) + problem.lora_b @ problem.lora_a)
    torch.testing.assert_close(grads[0], wanted, rtol=1e-4, atol=1e-3)
