"""The ops as torch sees them: schemas, dispatch keys, shapes without data, compile, export; of one
adapter and of many."""

from dataclasses import replace

import op_calls
import pytest
import torch
from helpers import BF16, F16, F32, F64, HALVES, leaf, make_problem, run_ours, short
from many_helpers import GRADIENTS, assert_at_most_twice, assert_equal, make_many, run, run_loop
from test_many_adapters import has_half_pairs
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ext
from lora_ext import _C

OPS = torch.ops.lora_ext
PUBLIC = ("lora", "lora_grouped")
NAMES = [f"{name}{part}" for name in PUBLIC for part in ("", "_forward", "_backward")]


# ---- registration ----


@pytest.mark.parametrize("name", [*NAMES, "dropout_mask"])
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA"])
def test_every_op_has_a_kernel_for(name, key):
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"lora_ext::{name}", key)
    assert has == (_C.with_cuda or (name, key) != ("dropout_mask", "CUDA"))


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", "MkldnnCPU"])
def test_public_ops_have_a_kernel_for(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{name}", key)


@pytest.mark.parametrize("name", [*NAMES, "dropout_mask"])
def test_ops_declare_no_mutation(name):
    op = getattr(OPS, name).default
    assert not op._schema.is_mutable
    assert torch.Tag.pt2_compliant_tag in op.tags
    aliased = (*op._schema.arguments, *op._schema.returns)
    assert all(argument.alias_info is None for argument in aliased)


# ---- opcheck ----

SAMPLES = {
    "plain": ((60,), (F32, F32), {}),
    "one row": ((), (F32, F32), {}),
    "batch": ((2, 3, 10), (BF16, BF16), {"bias": False}),
    "wide adapters": ((60,), (BF16, F32), {}),
    "float16": ((7,), (F16, F32), {}),
    "float64": ((60,), (F64, F64), {}),
    "no rows": ((0,), (F32, F32), {}),
}


def sample(name, device):
    lead, pair, options = SAMPLES[name]
    return make_problem(lead, 16, 24, 3, pair, device, **options)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck_lora_linear(device, name, dropout_p):
    problem = sample(name, device)
    seed = torch.tensor(3, device=device) if dropout_p else None
    leaves = [leaf(t) for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias)]
    inputs = op_calls.linear_inputs(
        leaves[0], problem.weight, *leaves[1:], 0.7, dropout_p, seed, 2, 1
    )
    torch.library.opcheck(OPS.lora.default, inputs)


def many_sample(name, device, **options):
    lead, pair, _ = SAMPLES[name]
    return make_many(lead, 16, 24, (3, 1, 5), pair, device, **options)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("update", [False, True], ids=["linear", "update"])
def test_opcheck_of_many_adapters(device, name, dropout_p, update):
    many = many_sample(name, device, given=SAMPLES[name][1][0] if update else None)
    many = many.each(leaf, GRADIENTS)
    seed = torch.tensor(3, device=device) if dropout_p else None
    groups = op_calls.grouped(many.scaling, many.index)
    operands = (many.x, many.weight, many.y, many.lora_a, many.lora_b)
    inputs = (*operands, *groups, many.bias, dropout_p, seed, 2, 1)
    torch.library.opcheck(OPS.lora_grouped.default, inputs)


@pytest.mark.parametrize("by", ["index", "offs"])
def test_opcheck_of_a_pool(device, by):
    a, b = torch.randn(4, 5, 16, device=device), torch.randn(4, 24, 5, device=device)
    ranks = torch.tensor([5, 0, 1, 3], dtype=torch.int32, device=device)
    many = make_many(30, 16, 24, (1,) * 4, device=device)
    offs = torch.tensor([3, 9, 9, 25], dtype=torch.int32, device=device)
    groups = (many.index, None, ranks) if by == "index" else (None, offs, ranks)
    rest = op_calls.grouped(many.scaling, *groups)
    inputs = (leaf(many.x), many.weight, None, [leaf(a)], [leaf(b)], *rest)
    torch.library.opcheck(OPS.lora_grouped.default, inputs)


def test_opcheck_strided_inputs(device):
    problem = sample("plain", device)
    x = torch.cat([problem.x] * 2, 1)[:, 16:].requires_grad_()
    rest = (t.t().contiguous().t() for t in (problem.weight, problem.lora_a, problem.lora_b))
    torch.library.opcheck(OPS.lora.default, op_calls.linear_inputs(x, *rest))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck_lora_linear_forward(device, name, dropout_p):
    problem = sample(name, device)
    seed = torch.tensor(3, device=device) if dropout_p else None
    operands = (*problem.operands, problem.bias, 0.7, dropout_p, seed, 2, 1)
    inputs = op_calls.linear_inputs(*operands)
    torch.library.opcheck(OPS.lora_forward.default, inputs)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    "mask", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
)
def test_opcheck_lora_linear_backward(device, name, mask):
    problem = sample(name, device)
    seed = torch.tensor(3, device=device)
    operands = (*problem.operands, problem.bias, 0.7, 0.5, seed, 2, 1)
    operands = op_calls.linear_inputs(*operands)
    _, s = OPS.lora_forward(*operands)
    inputs = (problem.grad, s, [bool(m) for m in mask], *operands)
    torch.library.opcheck(OPS.lora_backward.default, inputs)


@pytest.mark.parametrize("shape", [(7, 9), (0, 9), (1, 130)])
def test_opcheck_dropout_mask(device, shape):
    seed = torch.tensor(3, device=device)
    torch.library.opcheck(OPS.dropout_mask.default, (seed, *shape, 0.3, 5, 3))


# ---- shapes without data ----


@pytest.mark.parametrize("name", SAMPLES)
def test_meta_agrees_with_real(device, name):
    """Shape, dtype and strides of every output."""
    problem = sample(name, device)
    tail = (0.7, 0.0, None, 0, 0, False, None)

    def outputs(place):
        there = problem.to(place)
        y, s = op_calls.lora_linear_forward(*there.operands, there.bias, *tail)
        grads = op_calls.lora_linear_backward(there.grad, *there.operands, s, *tail, [True] * 4)
        return (op_calls.lora_linear(*there.operands, there.bias), y, s, *grads)

    assert_agree(outputs(device), outputs("meta"))


def assert_agree(every, every_meta):
    for real, meta in zip(every, every_meta, strict=True):
        assert (real is None) == (meta is None)
        if real is not None:
            assert (real.shape, real.dtype) == (meta.shape, meta.dtype)
            assert real.stride() == meta.stride()


MASKS = [
    ([True, True], [True] * 3, [True] * 3),
    ([False, False], [True, False, True], [False] * 3),
    ([True, False], [False] * 3, [False, True, False]),
    ([False, True], [False] * 3, [False] * 3),
]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_meta_agrees_with_real_of_many_adapters(device, name, mask):
    """And which outputs there are."""
    many = many_sample(name, device)

    def outputs(place):
        there = many.each(lambda t: t.to(place))
        groups = (many.scaling.to(place), many.index.to(place))
        operands = (there.x, there.weight, there.lora_a, there.lora_b)
        y, s = op_calls.lora_linear_grouped_forward(*operands, groups, there.bias)
        dx, da, db, dbias = op_calls.lora_linear_grouped_backward(
            there.grad, *operands, s, groups, mask
        )
        assert (len(da), len(db)) == (sum(mask[1]), sum(mask[2]))
        return y, s, dx, *da, *db, dbias

    assert_agree(outputs(device), outputs("meta"))


def test_meta_of_a_layer_larger_than_memory():
    x = torch.empty(8, 4096, 2**20, dtype=BF16, device="meta")
    weight = torch.empty(2**20, 2**20, dtype=BF16, device="meta")
    lora_a, lora_b = torch.empty(64, 2**20, device="meta"), torch.empty(2**20, 64, device="meta")
    assert lora_ext.lora_linear(x, weight, lora_a, lora_b, dropout_p=0.1).shape == x.shape


# ---- torch.compile ----


def run_step(step, problem):
    tensors = [leaf(t) for t in (problem.x, problem.lora_a, problem.lora_b)]
    torch.manual_seed(11)
    y = step(*tensors, problem.weight, problem.bias)
    y.backward(problem.grad)
    return y.detach(), *(t.grad for t in tensors)


def test_compiled_with_dynamic_rows_does_not_recompile(forget_graphs, device, counter):
    def step(x, lora_a, lora_b, weight, bias):
        return lora_ext.lora_linear(x, weight, lora_a, lora_b, bias, 0.7, dropout_p=0.3)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (8, 60, 51, 130, 1000):
        problem = make_problem(rows, 16, 24, 3, device=device)
        assert all(map(torch.equal, run_step(compiled, problem), run_step(step, problem)))
    assert counter.frame_count == 1


def test_many_adapters_with_dynamic_rows_do_not_recompile(forget_graphs, device, counter):
    compiled = torch.compile(lora_ext.lora_linear, backend=counter, fullgraph=True)
    for rows in (9, 60, 51, 130):
        many = make_many(rows, 16, 24, device=device, bias=False)
        many = replace(many, x=leaf(many.x))
        torch._dynamo.mark_dynamic(many.x, 0)
        torch._dynamo.mark_dynamic(many.index, 0)
        y = compiled(**many.arguments)
        y.backward(many.grad)
        assert_equal({"y": y, "dx": many.x.grad}, run(many, wanted=("x",)))
    assert counter.frame_count == 1


def test_export_of_many_adapters(device):
    many = make_many(60, 16, 24, device=device)

    class Layer(torch.nn.Module):
        def forward(self, x, index):
            return lora_ext.lora_linear(**many.arguments | {"x": x, "index": index})

    program = torch.export.export(Layer(), (many.x, many.index))
    index = many.index.flip(0)
    assert torch.equal(program.module()(many.x, index), Layer()(many.x, index))


@pytest.mark.slow
@pytest.mark.usefixtures("cxx_compiler")
def test_inductor(device):
    """Code generation too: its own generator draws the seed, so that only the masks must agree."""
    torch._dynamo.reset()
    weight = torch.zeros(24, 16, device=device)
    lora_a, lora_b = torch.ones(1, 16, device=device), torch.ones(24, 1, device=device)

    @torch.compile(fullgraph=True)
    def step(x):
        return lora_ext.lora_linear(x, weight, lora_a, lora_b, dropout_p=0.5)

    # x = 2^k in column k: a row of y spells its mask in binary, and dx is the mask times 2 N.
    x = torch.exp2(torch.arange(16.0, device=device)).repeat(60, 1).requires_grad_()
    y = step(x)
    y.sum().backward()
    forward_mask = (y[:, :1].long() // 2) >> torch.arange(16, device=device) & 1
    assert torch.equal(x.grad, forward_mask * 48.0)
    assert 0.3 < forward_mask.float().mean().item() < 0.7
    torch._dynamo.reset()


# ---- autocast ----


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [20, 90])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_autocast_does_not_round_the_adapters(isa, device, dtype, rows, dropout_p):
    """The bits of a call on x and weight already cast, with the float32 adapters as they are."""
    problem = make_problem(rows, 40, 70, 5, device=device)
    cast = {n: getattr(problem, n).to(dtype) for n in ("x", "weight", "bias", "grad")}
    by_hand = run_ours(replace(problem, **cast), dropout_p)
    leaves = [leaf(t) for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias)]
    with torch.autocast(device, dtype):
        seed = torch.tensor(1, device=device)
        y = op_calls.lora_linear(leaves[0], problem.weight, *leaves[1:], 0.7, dropout_p, seed)
    y.backward(cast["grad"])
    assert torch.equal(y, by_hand.y)
    assert torch.equal(leaves[0].grad, by_hand.dx.float())
    assert torch.equal(leaves[1].grad, by_hand.dlora_a)
    assert torch.equal(leaves[2].grad, by_hand.dlora_b)
    torch.testing.assert_close(leaves[3].grad.to(dtype), by_hand.dbias)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("rows", [9, 70])
def test_autocast_of_many_adapters(isa, device, dtype, rows):
    many = make_many(rows, 40, 24, device=device)
    with torch.autocast(device, dtype):
        ours = run(many)
    # Adapters stay float32, as do the gradients of the leaves, which are.
    half = replace(many.to(dtype), lora_a=many.lora_a, lora_b=many.lora_b)
    theirs, exact = run_loop(half), run_loop(half, dtype=F64)
    assert ours["y"].dtype == dtype
    theirs = {name: value.to(ours[name].dtype) for name, value in theirs.items()}
    assert_at_most_twice(ours, theirs, exact, (dtype, F32), has_half_pairs(isa, (dtype, F32)))


@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, F16), (F16, BF16)], ids=short)
@pytest.mark.parametrize("given", [None, F32], ids=["linear", "update"])
@pytest.mark.parametrize("pooled", [False, True], ids=["list", "pool"])
def test_autocast_casts_half_adapters_of_another_dtype(device, dtype, adapter, given, pooled):
    """Both factors, with the bits of a cast by hand; gradients have the leaves' dtype."""
    many = make_many(9, 40, 24, (8, 8), device=device, given=given, bias=False)
    a, b = ([t.to(adapter) for t in factors] for factors in (many.lora_a, many.lora_b))
    if pooled:
        a, b = [torch.stack(a)], [torch.stack(b)]
    many = replace(many, lora_a=a, lora_b=b)
    with torch.autocast(device, dtype):
        ours = run(many)
    wanted = run(replace(many.to(dtype), y=many.y, grad=many.grad.to(given or dtype)))
    assert ours["dlora_a[0]"].dtype == ours["dlora_b[0]"].dtype == adapter
    assert_equal(ours, {name: value.to(ours[name].dtype) for name, value in wanted.items()})


def test_autocast_leaves_float64_alone(device):
    """As torch's own linear: autocast never casts float64."""
    problem = make_problem(60, 40, 70, 5, (F64, F64), device)
    with torch.autocast(device, BF16):
        y = op_calls.lora_linear(*problem.operands)
    assert torch.equal(y, op_calls.lora_linear(*problem.operands))


def test_autocast_switched_off_inside(device):
    problem = make_problem(60, 40, 70, 5, device=device)
    with torch.autocast(device, BF16), torch.autocast(device, enabled=False):
        y = op_calls.lora_linear(*problem.operands)
    assert torch.equal(y, op_calls.lora_linear(*problem.operands))


def test_backward_inside_an_autocast_region(isa, device):
    """It is what some training loops do; the gradients are the same."""
    problem = make_problem(60, 40, 70, 5, device=device)
    gradients = []
    for inside in (False, True):
        leaves = [leaf(t) for t in (problem.x, problem.lora_a, problem.lora_b)]
        with torch.autocast(device, BF16):
            y = op_calls.lora_linear(leaves[0], problem.weight, *leaves[1:])
            if inside:
                y.backward(problem.grad.to(BF16))
        if not inside:
            y.backward(problem.grad.to(BF16))
        gradients.append([t.grad for t in leaves])
    assert all(map(torch.equal, *gradients))


# ---- other modes ----


def test_inference_mode_tensors(isa, device):
    with torch.inference_mode():
        problem = make_problem(60, 40, 70, 5, device=device)
        inside = lora_ext.lora_linear(*problem.operands, dropout_p=0.5)
        assert inside.is_inference()
    assert lora_ext.lora_linear(*problem.operands).shape == (60, 70)


def test_dispatch_modes_see_the_ops(device):
    """Flop counters and other modes see each op once, by name."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    problem = make_problem(60, 40, 70, 5, device=device)
    with Recorder():
        run_ours(problem)
    assert "lora_ext.lora_forward.default" in seen
    assert "lora_ext.lora_backward.default" in seen
    assert len([name for name in seen if name.startswith("lora_ext")]) == 2
