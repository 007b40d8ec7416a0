"""Autograd: gradients by finite differences, which of them exist, and what is kept for them."""

import itertools
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import op_calls
import pytest
import torch
from helpers import (
    BF16,
    DTYPE_PAIRS,
    F32,
    F64,
    HALVES,
    accumulation_dtype,
    assert_same_bits,
    leaf,
    make_problem,
    masked,
    pair_id,
    run_float64,
    run_ours,
)
from many_helpers import make_many
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

import lora_ext

ROOT = Path(__file__).resolve().parents[2]
OP = op_calls.lora_linear
INPUTS = ("x", "lora_a", "lora_b", "bias")


def arguments(problem, wanted=INPUTS):
    """{name: tensor} of one call; those wanted are leaves that require grad."""
    tensors = {name: getattr(problem, name) for name in (*INPUTS, "weight")}
    return {
        name: tensor.detach().clone().requires_grad_() if name in wanted else tensor
        for name, tensor in tensors.items()
        if tensor is not None
    }


# ---- values ----


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
def test_gradcheck(device, dropout_p, bias, lead):
    problem = make_problem(lead, 7, 6, 3, (F64, F64), device, bias=bias)
    seed = torch.tensor(9, device=device)
    leaves = arguments(problem)
    weight = leaves.pop("weight")

    def layer(x, lora_a, lora_b, bias=None):
        return OP(x, weight, lora_a, lora_b, bias, 0.7, dropout_p, seed)

    assert gradcheck(layer, tuple(leaves.values()))


def test_gradcheck_would_see_a_wrong_mask_in_backward(device):
    """The mask of another seed in backward alone is caught: the test above rests on it."""
    problem = make_problem(5, 7, 6, 3, (F64, F64), device, bias=False)
    rest = (problem.weight, problem.lora_a, problem.lora_b, None, 0.7, 0.4)

    class OtherMaskInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return OP(x, *rest, torch.tensor(9, device=device))

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                y = OP(x, *rest, torch.tensor(10, device=device))
            return torch.autograd.grad(y, x, grad)

    x = problem.x.requires_grad_()
    assert not gradcheck(OtherMaskInBackward.apply, x, raise_exception=False)


# ---- which gradients exist ----

SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(INPUTS, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@pytest.mark.parametrize("rows", [7, 9, 60])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_any_combination_of_requires_grad(isa, device, wanted, rows, dropout_p):
    """Each gradient has the same bits whatever else is asked for, and the rest stay None."""
    problem = make_problem(rows, 40, 70, 5, device=device, scaling=0.5, integers=3)
    seed = torch.tensor(1, device=device)
    leaves = arguments(problem, wanted)
    y = OP(**leaves, scaling=0.5, dropout_p=dropout_p, seed=seed)
    y.backward(problem.grad)
    exact = run_float64(problem, *masked(problem, dropout_p))
    for name, tensor in leaves.items():
        assert tensor.requires_grad == (name in wanted)
        if name in wanted:
            assert torch.equal(tensor.grad.double(), getattr(exact, f"d{name}")), name
        else:
            assert tensor.grad is None, name


def test_no_base_gemm_without_dx(library_route):
    """x of the first layer needs no gradient: dX = dY W, the largest product, is not computed."""
    problem = make_problem(60, 40, 70, 5)

    def matmuls_of_backward(wanted):
        leaves = arguments(problem, wanted)
        y = OP(**leaves)
        with torch.autograd.profiler.profile() as profile:
            y.backward(problem.grad)
        return sum(event.name in ("aten::mm", "aten::addmm") for event in profile.function_events)

    all_of_them = matmuls_of_backward(INPUTS)
    assert matmuls_of_backward(("lora_a", "lora_b")) < all_of_them
    assert matmuls_of_backward(("lora_b",)) == 1
    assert matmuls_of_backward(("bias",)) == 0


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
def test_gradients_have_the_dtype_of_their_tensor(isa, device, pair):
    problem = make_problem(60, 40, 70, 5, pair, device)
    run = run_ours(problem, 0.5)
    assert run.dx.dtype == run.dbias.dtype == run.y.dtype == pair[0]
    assert run.dlora_a.dtype == run.dlora_b.dtype == pair[1]
    for name, value in run.items():
        assert value.is_contiguous(), name


def test_output_without_any_requires_grad_is_a_leaf(isa, device):
    problem = make_problem(60, 40, 70, 5, device=device)
    assert not OP(**arguments(problem, wanted=())).requires_grad


# ---- the weight is frozen ----


def test_weight_that_requires_grad_is_an_error_under_grad_mode(device):
    problem = make_problem(60, 40, 70, 5, device=device)
    problem.weight.requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected a frozen weight.*requires_grad_"):
        OP(**arguments(problem))
    with pytest.raises(RuntimeError, match="expected a frozen weight"):
        OP(**arguments(problem, wanted=()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weight_that_requires_grad_is_fine_without_grad_mode(isa, device, mode):
    problem = make_problem(60, 40, 70, 5, device=device)
    frozen = OP(**arguments(problem, wanted=()))
    problem.weight.requires_grad_()
    with mode():
        y = OP(**arguments(problem))
    assert not y.requires_grad
    assert torch.equal(y, frozen)


# ---- what is saved ----


def storages_saved_by(call):
    """call()'s result, {address: bytes} of the storages that autograd saves, the tensors saved."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    by_address = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return result, by_address, saved


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [20, 96])
def test_saved_is_x_and_s_and_a_seed(isa, device, pair, dropout_p, rows):
    problem = make_problem(rows, 64, 80, 5, pair, device)
    leaves = arguments(problem)
    call = partial(lora_ext.lora_linear, **leaves, scaling=0.7, dropout_p=dropout_p)
    _, storages, _ = storages_saved_by(call)
    references = {address(leaves[name]) for name in ("weight", "lora_a", "lora_b")}
    assert references <= set(storages), "they are saved as they are, not copied"
    assert address(leaves["x"]) in storages
    of_our_own = {k: v for k, v in storages.items() if k not in references}
    x_bytes = leaves["x"].untyped_storage().nbytes()
    s_bytes = rows * 5 * accumulation_dtype(pair[0]).itemsize
    assert sum(of_our_own.values()) == x_bytes + s_bytes + (8 if dropout_p else 0)


def test_many_adapters_save_no_copies(device):
    """x, the factors, index and scaling as they are; and S and a seed of 8 bytes."""
    many = make_many(60, 16, 24, (3, 5), device=device)
    many = replace(many.each_factor(leaf), x=leaf(many.x))
    call = partial(lora_ext.lora_linear, **many.arguments, dropout_p=0.5)
    operands = (many.x, many.weight, *many.lora_a, *many.lora_b, many.scaling, many.index)
    own = [t for t in storages_saved_by(call)[2] if address(t) not in map(address, operands)]
    assert sorted(t.nbytes for t in own) == [8, 60 * 5 * 4]


@pytest.mark.parametrize("view", ["transposed", "gaps", "expanded"])
def test_no_copy_of_a_strided_x_is_saved(isa, device, view):
    x = {
        "transposed": lambda: torch.randn(64, 96, device=device).t(),
        "gaps": lambda: torch.randn(96, 80, device=device)[:, 3:67],
        "expanded": lambda: torch.randn(1, 64, device=device).expand(96, 64),
    }[view]()
    problem = make_problem(96, 64, 80, 5, device=device)
    lora_a = problem.lora_a.requires_grad_()
    _, storages, _ = storages_saved_by(lambda: OP(x, problem.weight, lora_a, problem.lora_b))
    assert address(x) in storages
    s_bytes = 96 * 5 * 4
    assert sum(storages.values()) == s_bytes + sum(
        t.untyped_storage().nbytes() for t in (x, problem.weight, lora_a, problem.lora_b)
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_saves_the_weight_itself(isa, device, dtype):
    problem = make_problem(96, 64, 80, 5, device=device)
    leaves = arguments(problem)

    def call():
        with torch.autocast(device, dtype):
            return OP(**leaves)

    y, storages, saved = storages_saved_by(call)
    assert y.dtype == dtype
    assert address(leaves["weight"]) in storages
    copies = [t for t in saved if t.shape == leaves["weight"].shape and t.dtype == dtype]
    assert not copies, "a cast copy of the weight is saved"
    assert address(leaves["lora_a"]) in storages
    assert address(leaves["lora_b"]) in storages


def test_nothing_is_saved_without_grad(isa, device):
    problem = make_problem(96, 64, 80, 5, device=device)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert storages_saved_by(lambda: OP(**arguments(problem)))[1] == {}
    assert storages_saved_by(lambda: OP(**arguments(problem, wanted=())))[1] == {}


def test_saved_tensors_may_be_moved_by_hooks(isa, device):
    """Offloading packs copies: backward reads what unpack returns, not what forward held."""
    problem = make_problem(96, 64, 80, 5, device=device)
    plain = run_ours(problem, 0.3)
    with saved_tensors_hooks(lambda t: t.clone().cpu(), lambda t: t.clone().to(device)):
        offloaded = run_ours(problem, 0.3)
    assert_same_bits(offloaded, plain)


# ---- inputs are read only ----


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [20, 96])
def test_no_input_is_written_to(isa, device, pair, dropout_p, rows):
    problem = make_problem(rows, 64, 80, 5, pair, device)
    before = [tensor.clone() for tensor in problem.tensors]
    versions = [tensor._version for tensor in problem.tensors]
    run_ours(problem, dropout_p)
    for tensor, copy, version in zip(problem.tensors, before, versions, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


def test_outputs_share_no_memory_with_inputs(isa, device):
    problem = make_problem(96, 64, 64, 5, device=device)
    run = run_ours(problem, 0.5)
    addresses = [address(t) for t in (*problem.tensors, *(value for _, value in run.items()))]
    assert len(set(addresses)) == len(addresses)


def test_output_may_be_changed_in_place(isa, device):
    """y is not saved: relu_ on it, as models do, is allowed and leaves the gradients right."""
    problem = make_problem(96, 64, 80, 5, device=device)
    gradients = []
    for relu in (torch.relu, torch.relu_):
        leaves = arguments(problem)
        relu(OP(**leaves)).backward(problem.grad)
        gradients.append([leaves[name].grad for name in INPUTS])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
def test_writing_to_a_saved_tensor_is_caught(device, name):
    problem = make_problem(96, 64, 80, 5, device=device)
    leaves = arguments(problem)
    inputs = leaves | {name: leaves[name] * 1 for name in ("x", "lora_a", "lora_b")}
    y = OP(**inputs)
    with torch.no_grad():
        inputs[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.grad)


def test_retain_graph(isa, device):
    problem = make_problem(96, 64, 80, 5, (BF16, F32), device)
    leaves = arguments(problem)
    y = lora_ext.lora_linear(**leaves, dropout_p=0.5)
    y.backward(problem.grad, retain_graph=True)
    first = {name: leaves[name].grad.clone() for name in INPUTS}
    for tensor in leaves.values():
        tensor.grad = None
    y.backward(problem.grad)
    for name, gradient in first.items():
        assert torch.equal(gradient, leaves[name].grad), name
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(problem.grad)


def test_accumulate_grad_sees_a_tensor_of_its_own(device):
    """Hooks that change a gradient in place change nothing else."""
    problem = make_problem(60, 40, 70, 5, device=device)
    leaves = arguments(problem)
    for name in INPUTS:
        leaves[name].register_hook(lambda gradient: gradient.zero_())
    OP(**leaves).backward(problem.grad)
    assert all(not leaves[name].grad.any() for name in INPUTS)


IN_A_SMALL_STACK = """
import threading, torch
from lora_ext import _C, lora_linear
torch.set_num_threads(1)  # passes of this thread alone
threading.stack_size(256 << 10)
def step(dtype):
    x, a, b = (torch.ones(40, 256, requires_grad=True) for _ in range(3))
    y = lora_linear(x.to(dtype), torch.ones(256, 256, dtype=dtype), a[:16], b[:16].t())
    y.sum().backward()
    print(int(a.grad[0, 0]), int(b.grad[0, 0]), int(x.grad[0, 0]))
for isa in _C.available_cpu_isas():
    _C.set_cpu_isa(isa)
    for dtype in torch.float32, torch.bfloat16:
        thread = threading.Thread(target=step, args=[dtype])
        thread.start()
        thread.join()
"""


@pytest.mark.slow
def test_a_thread_with_a_stack_of_256_kilobytes():
    """As musl's and those of servers: the sums of wgrad alone take so much at the largest rank."""
    run = [sys.executable, "-c", IN_A_SMALL_STACK]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert set(done.stdout.splitlines()) == {"10240 10240 4352"}
