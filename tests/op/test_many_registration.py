"""The ops of many adapters as torch sees them: opcheck, meta, compile, checkpoint, export."""

from dataclasses import replace

import pytest
import torch
from helpers import BF16, F32, F64, leaf
from many_helpers import make_many, run
from op_calls import OPS, grouped, lora_linear_grouped_backward, lora_linear_grouped_forward

import lora_ext

SAMPLES = {
    "plain": ((60,), (F32, F32)),
    "one row": ((1,), (F32, F32)),
    "batch": ((2, 3, 10), (BF16, BF16)),
    "wide adapters": ((60,), (BF16, F32)),
    "float64": ((9,), (F64, F64)),
    "no rows": ((0,), (F32, F32)),
}


def sample(name, device, **options):
    lead, pair = SAMPLES[name]
    return make_many(lead, 16, 24, (3, 1, 5), pair, device, **options)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck_lora_linear_grouped(device, name, dropout_p):
    many = sample(name, device).each_factor(leaf)
    seed = torch.tensor(3, device=device) if dropout_p else None
    rest = (*grouped(many.scaling, many.index), leaf(many.bias), dropout_p, seed, 2, 1)
    inputs = (leaf(many.x), many.weight, None, many.lora_a, many.lora_b, *rest)
    torch.library.opcheck(OPS.lora_grouped.default, inputs)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_lora_update_grouped(device, name):
    many = sample(name, device, given=SAMPLES[name][1][0]).each_factor(leaf)
    seed = torch.tensor(3, device=device)
    rest = (*grouped(many.scaling, many.index), None, 0.5, seed, 2, 1)
    inputs = (leaf(many.x), None, leaf(many.y), many.lora_a, many.lora_b, *rest)
    torch.library.opcheck(OPS.lora_grouped.default, inputs)


@pytest.mark.parametrize("by", ["index", "offs"])
def test_opcheck_of_a_pool(device, by):
    a, b = torch.randn(4, 5, 16, device=device), torch.randn(4, 24, 5, device=device)
    ranks = torch.tensor([5, 0, 1, 3], dtype=torch.int32, device=device)
    many = make_many(30, 16, 24, (1,) * 4, device=device)
    offs = torch.tensor([3, 9, 9, 25], dtype=torch.int32, device=device)
    groups = (many.index, None, ranks) if by == "index" else (None, offs, ranks)
    rest = grouped(many.scaling, *groups)
    inputs = (leaf(many.x), many.weight, None, [leaf(a)], [leaf(b)], *rest)
    torch.library.opcheck(OPS.lora_grouped.default, inputs)


MASKS = [
    ([True, True], [True] * 3, [True] * 3),
    ([False, False], [True, False, True], [False] * 3),
    ([True, False], [False] * 3, [False, True, False]),
    ([False, True], [False] * 3, [False] * 3),
]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_meta_agrees_with_real(device, name, mask):
    """Shape, dtype and strides of every output, and which there are."""
    many = sample(name, device)

    def outputs(place):
        x, weight, bias, grad = (t.to(place) for t in (many.x, many.weight, many.bias, many.grad))
        lists = ([a.to(place) for a in many.lora_a], [b.to(place) for b in many.lora_b])
        groups = (many.scaling.to(place), many.index.to(place))
        y, s = lora_linear_grouped_forward(x, weight, *lists, groups, bias)
        dx, da, db, dbias = lora_linear_grouped_backward(grad, x, weight, *lists, s, groups, mask)
        assert len(da) == sum(mask[1])
        assert len(db) == sum(mask[2])
        return y, s, dx, *da, *db, dbias

    for real, meta in zip(outputs(device), outputs("meta"), strict=True):
        assert (real is None) == (meta is None)
        if real is not None:
            assert (real.shape, real.dtype) == (meta.shape, meta.dtype)
            assert real.stride() == meta.stride()


def test_compiled_with_dynamic_rows_does_not_recompile(forget_graphs, device, counter):
    def step(x, index, lora_a, lora_b, weight, scaling):
        return lora_ext.lora_linear(x, weight, lora_a, lora_b, None, scaling, index=index)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for rows in (9, 60, 51, 130):
        many = make_many(rows, 16, 24, device=device, bias=False)
        rest = (many.index, many.lora_a, many.lora_b, many.weight, many.scaling)
        x = leaf(many.x)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(many.index, 0)
        y = compiled(x, *rest)
        y.backward(many.grad)
        assert torch.equal(y, run(many)["y"])
        assert torch.equal(x.grad, run(many)["dx"])
    assert counter.frame_count == 1


def test_saved_for_backward_are_no_copies(device):
    """x, the factors, index and scaling as they are; and S and a seed of 8 bytes."""
    many = make_many(60, 16, 24, (3, 5), device=device)
    many = replace(many.each_factor(leaf), x=leaf(many.x))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_ext.lora_linear(**many.arguments, dropout_p=0.5)
    operands = (many.x, many.weight, *many.lora_a, *many.lora_b, many.scaling, many.index)
    given = {t.data_ptr() for t in operands}
    own = [t for t in saved if t.data_ptr() not in given]
    assert sorted(t.nbytes for t in own) == [8, 60 * 5 * 4]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(device, mode):
    many = make_many(60, 16, 24, device=device)
    with mode():
        y = lora_ext.lora_linear(**many.arguments)
    assert torch.equal(y, run(many)["y"])


def test_export(device):
    many = make_many(60, 16, 24, device=device)

    class Layer(torch.nn.Module):
        def forward(self, x, index):
            return lora_ext.lora_linear(**many.arguments | {"x": x, "index": index})

    program = torch.export.export(Layer(), (many.x, many.index))
    index = many.index.flip(0)
    assert torch.equal(program.module()(many.x, index), Layer()(many.x, index))
