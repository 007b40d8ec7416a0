"""`lora_linear` on a quantised weight: bit for bit the op on the dequantised one, nothing kept."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F16, F32, F64, make_problem, pair_id
from quantized_helpers import quantized_rows
from torch.utils.checkpoint import checkpoint

import lora_ext
from benchmarks.memory import peak_bytes
from lora_ext.call.op import base_linear
from lora_ext.quantized import workspace

pytestmark = pytest.mark.usefixtures("fresh_workspace")

PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
SHAPES = [((60,), 96, 130, 8), ((2, 33), 128, 64, 16), ((1,), 40, 24, 4), ((0,), 40, 24, 4)]


def operands(lead, k, n, rank, pair, **words):
    problem = make_problem(lead, k, n, rank, pair, **words)
    weight = quantized_rows(problem.weight)
    return problem, weight, weight.dequantize(pair[0])


def run(problem, weight, others=(), scaling=0.5, p=0.0, **groups):
    """y and the gradients of x, bias and the factors; others: problems with further adapters."""
    problems = [problem, *others]
    factors = [one.lora_a for one in problems] + [one.lora_b for one in problems]
    x, bias, *factors = (
        t.detach().clone().requires_grad_() for t in (problem.x, problem.bias, *factors)
    )
    a, b = factors[: len(problems)], factors[len(problems) :]
    if not others:
        (a,), (b,) = a, b
    torch.manual_seed(5)
    y = lora_ext.lora_linear(x, weight, a, b, bias, scaling, p, **groups)
    y.backward(problem.grad)
    return [y.detach(), *(leaf.grad for leaf in (x, bias, *factors))]


def assert_same_bits(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_on_the_dequantised_weight(shape, pair, p):
    problem, weight, dense = operands(*shape, pair)
    words = {"scaling": problem.scaling, "p": p}
    assert_same_bits(run(problem, weight, **words), run(problem, dense, **words))


@pytest.mark.parametrize("training", [True, False])
def test_training_and_seed_are_as_on_the_dequantised_weight(training):
    problem, *weights = operands((60,), 40, 24, 4, (BF16, F32))
    words = (problem.lora_a, problem.lora_b, None, 0.5, 0.5, training)
    seeded, dense, other = (
        lora_ext.lora_linear(problem.x, weight, *words, torch.tensor(seed))
        for weight, seed in zip((*weights, weights[0]), (5, 5, 6), strict=True)
    )
    assert torch.equal(seeded, dense) and torch.equal(seeded, other) == (not training)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_many_adapters(pair, p):
    problem, weight, dense = operands((50,), 96, 64, 8, pair)
    words = {"others": [make_problem(50, 96, 64, 4, pair, seed=1)], "scaling": [0.5, 2.0], "p": p}
    words["index"] = torch.arange(50, dtype=torch.int32) % 3 - 1
    assert_same_bits(run(problem, weight, **words), run(problem, dense, **words))


def test_many_adapters_of_which_some_are_frozen():
    problem, weight, dense = operands((50,), 96, 64, 8, (F32, F32))
    other = make_problem(50, 96, 64, 4, (F32, F32), seed=1)
    index = torch.arange(50, dtype=torch.int32) % 3 - 1
    for trained in ((0, 3), (1, 2), (3,), ()):
        results = []
        for w in (weight, dense):
            factors = [problem.lora_a, other.lora_a, problem.lora_b, other.lora_b]
            factors = [f.clone().requires_grad_(i in trained) for i, f in enumerate(factors)]
            x = problem.x.clone().requires_grad_()
            y = lora_ext.lora_linear(x, w, factors[:2], factors[2:], index=index)
            y.backward(problem.grad)
            results.append([x.grad, *(f.grad for f in factors)])
        assert_same_bits(*results)


def test_a_pool():
    problem, weight, dense = operands((30,), 64, 48, 8, (F32, F32))
    a, b = problem.lora_a[None].repeat(3, 1, 1), problem.lora_b[None].repeat(3, 1, 1)
    groups = {
        "index": torch.arange(30, dtype=torch.int32) % 4 - 1,
        "ranks": torch.tensor([8, 0, 3], dtype=torch.int32),
    }
    found = lora_ext.lora_linear(problem.x, weight, a, b, **groups)
    assert torch.equal(found, lora_ext.lora_linear(problem.x, dense, a, b, **groups))


def test_only_what_is_wanted():
    """Without dX nothing is dequantised in backward, and one that needs no gradient has none."""
    problem, weight, _ = operands((40,), 64, 32, 4, (F32, F32))
    weight.calls = 0
    b = problem.lora_b.clone().requires_grad_()
    y = lora_ext.lora_linear(problem.x, weight, problem.lora_a, b, problem.bias)
    assert weight.calls == 1
    y.backward(problem.grad)
    assert weight.calls == 1 and b.grad is not None
    x = problem.x.clone().requires_grad_()
    lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b).backward(problem.grad)
    assert weight.calls == 3 and x.grad is not None
    assert not lora_ext.lora_linear(
        x.detach(), weight, problem.lora_a, problem.lora_b
    ).requires_grad


def test_two_layers_share_one_workspace():
    """The second writes over the first's weight, which is dequantised again in backward."""
    first, weight, dense = operands((70,), 64, 96, 8, (BF16, BF16))
    second, weight2, dense2 = operands((70,), 96, 128, 8, (BF16, BF16))

    def both(w1, w2):
        x = first.x.clone().requires_grad_()
        a = first.lora_a.clone().requires_grad_()
        h = lora_ext.lora_linear(x, w1, a, first.lora_b)
        lora_ext.lora_linear(h, w2, second.lora_a, second.lora_b).backward(second.grad)
        return x.grad, a.grad

    assert_same_bits(both(weight, weight2), both(dense, dense2))
    assert workspace.nbytes() == workspace.nbytes("cpu") == 96 * 128 * 2
    workspace.release()
    assert workspace.nbytes() == 0


def test_a_format_that_has_tensors_of_its_own():
    problem, _, dense = operands((40,), 64, 32, 4, (F32, F32))
    weight = quantized_rows(problem.weight, writes_out=False)
    assert_same_bits(run(problem, weight), run(problem, dense))
    assert workspace.nbytes() == 0


def test_threads_do_not_share_a_weight():
    problems = [operands((64,), 128, 160, 8, (F32, F32), seed=seed) for seed in range(4)]
    wrong = []

    def work(problem, weight, dense):
        wanted = run(problem, dense)
        for _ in range(40):
            found = run(problem, weight)
            if not all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)):
                wrong.append(problem)

    threads = [threading.Thread(target=work, args=case) for case in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_of_full_size_is_saved():
    problem, weight, _ = operands((16,), 512, 1024, 4, (F32, F32))
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = problem.x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b, dropout_p=0.1)
    assert y.requires_grad
    assert max(tensor.numel() for tensor in saved) < 512 * 1024 // 8

    def step():
        leaf = problem.x.clone().requires_grad_()
        lora_ext.lora_linear(leaf, weight, problem.lora_a, problem.lora_b).backward(problem.grad)

    step()
    del y
    gc.collect()
    # Rows makes temporaries of its own; the workspace is there already.
    assert peak_bytes(step) <= 512 * 1024 * (4 + 4) + 2**20


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    problem, weight, dense = operands((40,), 64, 32, 4, (F32, F32))

    def layer(x, w, a):
        return lora_ext.lora_linear(x, w, a, problem.lora_b, problem.bias, 0.5, 0.2)

    gradients = []
    for w in (weight, dense):
        x, a = problem.x.clone().requires_grad_(), problem.lora_a.clone().requires_grad_()
        torch.manual_seed(3)
        checkpoint(layer, x, w, a, use_reentrant=reentrant).backward(problem.grad)
        gradients.append((x.grad, a.grad))
    assert_same_bits(*gradients)


@pytest.mark.parametrize("pair", [(F32, F32), (F32, BF16), (BF16, F32)], ids=pair_id)
def test_autocast(pair):
    problem, weight, _ = operands((40,), 64, 32, 4, (pair[0], F32))
    dense = weight.dequantize(BF16)
    a, b = problem.lora_a.to(pair[1]), problem.lora_b.to(pair[1])
    results = []
    for w in (weight, dense):
        leaves = [t.clone().requires_grad_() for t in (problem.x, a, b)]
        with torch.autocast("cpu", dtype=BF16):
            y = lora_ext.lora_linear(leaves[0], w, leaves[1], leaves[2], problem.bias)
        assert y.dtype == BF16
        y.backward(problem.grad.to(BF16))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert_same_bits(*results)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compile(p):
    problem, weight, _ = operands((40,), 64, 32, 4, (F32, F32))

    def layer(x, a, b):
        return lora_ext.lora_linear(x, weight, a, b, problem.bias, 0.5, p).sin()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
        torch.manual_seed(3)
        y = function(*leaves)
        y.backward(problem.grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compile_without_gradients():
    """One adapter, whose factors are the only ones."""
    x, weight, lora_a, lora_b = (
        torch.randn(shape) for shape in ((9, 32), (24, 32), (4, 32), (24, 4))
    )
    rows = quantized_rows(weight)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        return lora_ext.lora_linear(x, rows, lora_a, lora_b)

    torch._dynamo.reset()
    with torch.no_grad():
        wanted = lora_ext.lora_linear(x, rows, lora_a, lora_b)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lead", [(), (0,), (5, 8)], ids=str)
def test_the_base_alone(lead, autocast):
    problem, weight, dense = operands((20,), 64, 32, 4, (F32, F32))
    x_values = torch.randn(*lead, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for w in (weight, dense):
        x, bias = x_values.clone().requires_grad_(), problem.bias.clone().requires_grad_()
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            y = base_linear(x, w, bias)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    if not autocast:
        assert torch.equal(results[0][0], F.linear(x_values, dense, problem.bias))


def test_errors():
    problem, weight, _ = operands((40,), 64, 32, 4, (F32, F32))
    a, b = problem.lora_a, problem.lora_b
    with pytest.raises(TypeError, match="float32, bfloat16 or float16 with a quantised weight"):
        lora_ext.lora_linear(problem.x.to(F64), weight, a.to(F64), b.to(F64))
    with pytest.raises(RuntimeError, match="expected the quantised weight on x's device, meta"):
        lora_ext.lora_linear(problem.x.to("meta"), weight, a, b)
    with pytest.raises(RuntimeError, match="dropout_p"):
        lora_ext.lora_linear(problem.x, weight, a, b, dropout_p=1.0)
    with pytest.raises(RuntimeError, match="lora_a"):
        lora_ext.lora_linear(problem.x, weight, a[:, 1:], b)
    x = problem.x.clone().requires_grad_()
    y = lora_ext.lora_linear(x, weight, a, b)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        dx.sum().backward()
