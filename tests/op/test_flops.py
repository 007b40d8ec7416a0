"""What `FlopCounterMode` counts: as many as for the reference's products, made one by one."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from helpers import leaf, make_problem
from many_helpers import make_many
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lora_ext
from lora_ext import LoraConfig, reference
from lora_ext.experts import ops, projection
from lora_ext.experts.operands import Gradient, Projection
from lora_ext.experts.routing import Routes

ROWS, IN, OUT = 20, 32, 48
FROZEN = 2 * ROWS * IN * OUT


def count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_model():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).requires_grad_(False)
    x = torch.randn(4, 5, IN)
    frozen = count(lambda: model(x))
    assert frozen == 2 * FROZEN
    lora_ext.apply_lora(model, LoraConfig("all-linear", r=4))
    update = 2 * ROWS * 4 * (IN + OUT) * 2
    with torch.no_grad():
        assert count(lambda: model(x)) == frozen + update
    # dX of the second layer; dA and dB of both, of which the first needs dS, but no dX.
    backward = FROZEN + 2 * ROWS * 4 * (2 * IN + 2 * OUT + IN + 2 * OUT)
    assert count(lambda: model(x).sum().backward()) == frozen + update + backward


@pytest.mark.parametrize("wanted", range(1, 8), ids=lambda bits: f"{bits:03b}")
@pytest.mark.parametrize("given", [False, True], ids=["linear", "update"])
def test_every_gradient(given, wanted):
    """Of x, lora_a and lora_b."""
    problem = make_problem(ROWS, IN, OUT, 5)
    base = problem.grad if given else problem.weight
    pick = ("lora_update" if given else "lora_linear", "_reference")

    def run(function):
        tensors = (problem.x, problem.lora_a, problem.lora_b)
        x, a, b = (leaf(t) if wanted >> i & 1 else t for i, t in enumerate(tensors))
        first = (base, x) if given else (x, base)
        function(*first, a, b).backward(problem.grad)

    ours = count(partial(run, getattr(lora_ext, pick[0])))
    assert ours == count(partial(run, getattr(reference, "".join(pick))))


@pytest.mark.parametrize("given", [None, torch.float32], ids=["linear", "update"])
@pytest.mark.parametrize("kind", ["mixed", "none", "offs", "pool"])
def test_many_adapters(given, kind):
    """Each row with the rank of its own adapter; one factor is frozen."""
    many = make_many(
        ROWS, IN, OUT, (3, 8, 5), kind="none" if kind == "none" else "mixed", given=given
    )
    name = "lora_update" if given else "lora_linear"
    index = many.index.sort().values[many.index.lt(0).sum() :] if kind == "offs" else many.index
    index = torch.nn.functional.pad(index, (0, ROWS - len(index)), value=-1)
    groups = {"index": index}
    if kind == "offs":
        groups = {
            "offs": (index[None] <= torch.arange(3)[:, None]).logical_and(index >= 0).sum(1).int()
        }

    def run(function, groups, pooled):
        x, base = leaf(many.x), many.weight if given is None else many.y
        first = (x, base) if given is None else (base, x)
        a, b = [leaf(t) for t in many.lora_a], [leaf(t) for t in many.lora_b]
        if not pooled:
            a[1].requires_grad_(False)
        else:
            a, b = torch.zeros(3, 8, IN), torch.zeros(3, OUT, 8, requires_grad=True)
        function(*first, a, b, **groups).backward(many.grad)

    theirs = getattr(reference, f"{name}_reference")
    if kind == "pool":
        each = torch.tensor([3, 0, 5], dtype=torch.int32)
        ranks = sum(int(each[g]) for g in index.tolist() if g >= 0)
        wanted = (FROZEN * 2 if given is None else 0) + 2 * ranks * (2 * IN + 3 * OUT)
        assert (
            count(partial(run, getattr(lora_ext, name), groups | {"ranks": each}, True)) == wanted
        )
        return
    ours = count(partial(run, getattr(lora_ext, name), groups, False))
    assert ours == count(partial(run, theirs, {"index": index}, False))


def test_traced_rows_count_with_the_largest_rank():
    with FakeTensorMode():
        many = make_many(ROWS, IN, OUT, (3, 8, 5))
        ours = count(lambda: lora_ext.lora_linear(**many.arguments))
    assert ours == FROZEN + 2 * ROWS * 8 * (IN + OUT)


@pytest.mark.parametrize("by_row", [False, True])
def test_experts(by_row):
    """The op of traced programs counts what the eager products do."""
    experts, ranks = 4, (2, 3)
    weight = torch.randn(experts, OUT, IN)
    a = [torch.randn(experts * r, IN) for r in ranks]
    b = [torch.randn(OUT, experts * r) for r in ranks]
    ends = [1, 2, 3, 3, 3, 3, 5, 5, 10, 10, 13, 17]  # of the base alone, and of two adapters
    ends = torch.tensor(ends, dtype=torch.int32) if by_row else None
    offs = torch.tensor([3, 3, 10, 17], dtype=torch.int32)  # three rows are no expert's
    order = torch.arange(ROWS)
    each = Projection(weight, None, Routes(order, order, offs, ends), a, b, [0.5, 0.5])
    x, grad = torch.randn(ROWS, IN), torch.randn(ROWS, OUT)
    _, s = projection.forward(x, each)
    eager = count(lambda: projection.forward(x, each))
    assert eager == count(lambda: ops.forward(x, each))
    ranks = 4 * 2 + 10 * 3 if by_row else 17 * 5  # summed over rows
    assert eager == 2 * (17 * IN * OUT + ranks * (IN + OUT))
    gradient = Gradient(grad, None, s, True, (True, True), (True, True))
    eager = count(lambda: projection.backward(gradient, x, each))
    assert eager == count(lambda: ops.backward(gradient, x, each))


def test_a_projection_of_experts():
    """Of the rows that are an expert's; nothing of chunks that pad the rank."""
    weight, a, b = (torch.zeros(4, *sizes).bfloat16() for sizes in ((OUT, IN), (8, IN), (OUT, 8)))
    offs = torch.tensor([3, 3, 10, 17], dtype=torch.int32)
    x, grad, s = weight.new_zeros(ROWS, IN), weight.new_zeros(ROWS, OUT), torch.zeros(ROWS, 5)
    product, backward = (
        torch.ops.lora_ext.experts_product,
        torch.ops.lora_ext.experts_product_backward,
    )
    factors = weight, a, b, 5, 1.0, offs, None
    own = count(lambda: product(x, weight, None, *factors[1:], None, 0.0, None))
    assert own == 17 * 2 * (IN * OUT + 5 * (IN + OUT))
    wanted = [True, False, True]
    own = count(lambda: backward(grad, x, s, None, wanted, *factors, None, None, 0.0, None))
    assert own == 17 * 2 * (IN * OUT + 5 * (IN + 2 * OUT))
