"""What replays of a CUDA graph compute, and streams side by side, while memory comes and goes.

On the CPU, in small, calls stand for replays.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F16, F32, short
from torch import nn

from benchmarks.agreement import TOLERANCE, error_of
from benchmarks.cuda_timing import captured
from lora_ext import _C, AdapterPool, LoraConfig, lora_linear

RANK, SCALING = 16, 2.0
WORKERS = 4
CAPACITY = 8


@pytest.fixture
def ours(device):
    """Of y, dx, dlora_a, dlora_b: what our kernels alone make. torch's products may choose their
    split by the stream's workspace, and owe nobody equal bits."""
    route = _C.cuda_route() if device == "cuda" else "kernel"
    if route == "library":
        pytest.skip("none of our kernels runs")
    return slice(4) if route == "kernel" else slice(2, 4)


def replayed(function, device):
    return captured(lambda: function) if device == "cuda" else function


def leave_nan(turn, device):
    """In memory that is free again: what is read after its memory was given back would show."""
    torch.full((1 << (10 + turn % 8),), float("nan"), device=device)


def assert_same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def step_of(device, seed, size):
    """A training step on tensors of its own; returns y and the gradients."""
    rows, k, n, rank = size if device == "cuda" else (48, 64, 96, 8)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, BF16)

    x, a, b = leaves = [normal(*s).requires_grad_() for s in ((rows, k), (rank, k), (n, rank))]
    weight, grad = normal(n, k), normal(rows, n)

    def step():
        y = lora_linear(x, weight, a, b, None, SCALING)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return step


# On Hopper S and dS of rank 16 come from grids of their own, those of rank 40 from Y's and dX's.
sizes = pytest.mark.parametrize("size", [(1024, 1024, 2048, 16), (4096, 2048, 2048, 40)])


@sizes
def test_replays_of_a_step_have_the_same_bits(device, ours, size):
    step, found = step_of(device, 0, size), []
    expected = [tensor.clone() for tensor in step()]

    def keep():
        found[:] = step()

    again = replayed(keep, device)
    for _ in range(1000 if device == "cuda" else 20):
        again()
        assert_same(found[ours], expected[ours])


@sizes
def test_steps_side_by_side_have_the_bits_of_each_alone(device, ours, size):
    steps = [step_of(device, seed, size) for seed in range(WORKERS)]
    expected = [[tensor.clone() for tensor in step()] for step in steps]

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
            for turn in range(100 if device == "cuda" else 10):
                leave_nan(turn, device)
                assert_same(steps[number]()[ours], expected[number][ours])

    if device == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))


@pytest.mark.parametrize("each", [False, True], ids=["one adapter", "one each"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 31, 64])
@torch.no_grad()
def test_few_rows_are_right_and_replays_have_their_bits(device, ours, rows, dtypes, each):
    """Of a pool the first adapter for all rows, or each its own and every fifth none."""
    (dtype, wide), (k, n) = dtypes, (1096, 2056) if device == "cuda" else (72, 96)
    x, weight = (0.1 * torch.randn(*s, device=device, dtype=dtype) for s in ((rows, k), (n, k)))
    shapes = (max(2, rows), RANK, k), (max(2, rows), n, RANK)
    a, b = (0.1 * torch.randn(*s, device=device, dtype=wide) for s in shapes)
    index = torch.arange(rows, dtype=torch.int32, device=device)
    index[4::5] = -1
    given = (a, b, {"index": index}) if each else (a[0], b[0], {})

    def call():
        return lora_linear(x, weight, *given[:2], scaling=SCALING, **given[2])

    def exact(x, weight, a, b):
        own = (index if each else torch.zeros_like(index)).long()
        s = torch.einsum("mk,mrk->mr", x, a[own]) * (own >= 0)[:, None]
        return F.linear(x, weight) + SCALING * torch.einsum("mr,mnr->mn", s, b[own])

    operands = [tensor.double() for tensor in (x, weight, a, b)]
    y, expected, size = call(), exact(*operands), exact(*(tensor.abs() for tensor in operands))
    # One rounding of Y; T's, of some of the products; float32 sums.
    allowed = torch.finfo(dtype).eps * (expected.abs() + size / 4) + k * 2.0**-22 * size
    assert ((y.double() - expected).abs() <= allowed).all()
    if ours != slice(4):
        return
    found = []

    def keep():
        found[:] = [call()]

    again = replayed(keep, device)
    for _ in range(200 if device == "cuda" else 3):
        again()
        assert_same(found, [y])


def change(pool, index, dice):
    """Gives rows to others, or adds, replaces, writes to or removes an adapter."""
    possible = ["rows"] if len(pool) == CAPACITY else ["rows", "add"]
    what = dice.choice([*possible, *(["replace", "write", "remove"] if len(pool) else [])])
    if what == "rows":
        index.copy_(torch.randint(-1, CAPACITY, index.shape))
        return what
    free = (name for name in map(str, range(CAPACITY)) if name not in pool)
    name = next(free) if what == "add" else dice.choice(pool.names)
    if what == "remove":
        pool.delete_adapter(name)
        return f"remove {name}"
    if what != "write":
        paths = dice.choice([["first"], ["second"], ["first", "second"]])
        config = LoraConfig(paths, r=dice.randint(1, RANK), lora_alpha=dice.randint(1, 20))
        getattr(pool, f"{what}_adapter")(name, config)
    for parameter in pool.parameters(name):
        parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return f"{what} {name}"


def one_after_the_other(pool, path, layer, x, index):
    """What a layer of a pool is to compute, in float32."""
    y = F.linear(x.float(), layer.weight.float())
    y += 0.0 if layer.bias is None else layer.bias.float()
    for name in pool:
        if spec := pool.specs(name).get(path):
            a, b = (pool.tensors(name)[f"{path}.{key}"].float() for key in ("lora_a", "lora_b"))
            own = (index == pool.slot(name))[:, None]
            y += own * spec.scaling * (x.float() @ a.t() @ b.t())
    return y


@pytest.mark.parametrize("dtype", [BF16, F32], ids=short)  # of the factors
@pytest.mark.parametrize("size", [(32, 2048, 2048), (1000, 1024, 2048)], ids=["decode", "train"])
@torch.no_grad()
def test_a_pool_that_changes_between_replays_agrees_with_a_loop(device, ours, size, dtype):
    """Captured while the pool is empty."""
    rows, k, n = size if device == "cuda" else (12, 24, 40)
    model = nn.ModuleDict({"first": nn.Linear(k, n), "second": nn.Linear(k, n // 2, bias=False)})
    pool = AdapterPool(model.to(device, BF16), CAPACITY, RANK, adapter_dtype=dtype)
    x = torch.randn(rows, k, device=device, dtype=BF16)
    index = torch.randint(-1, CAPACITY, (rows,), dtype=torch.int32).to(device)
    found = {}

    def forward():
        for path, layer in pool.layers.items():
            a, b, scaling, ranks = layer.pool.updates
            operands = (x, layer.weight, a, b, layer.bias, scaling)
            found[path] = lora_linear(*operands, index=index, ranks=ranks)

    again, dice = replayed(forward, device), random.Random(0)
    for turn in range(200 if device == "cuda" else 40):
        what = change(pool, index, dice)
        leave_nan(turn, device)
        again()
        for path, layer in pool.layers.items():
            error = error_of(found[path], one_after_the_other(pool, path, layer, x, index))
            assert error.within(TOLERANCE[BF16]), f"replay {turn}, {path}, after {what}: {error}"
