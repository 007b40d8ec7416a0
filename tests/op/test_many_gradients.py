"""Many adapters' gradients: which of them exist, of shared factors, and under autocast."""

from dataclasses import replace

import pytest
import torch
from helpers import BF16, F16, F32, F64, leaf, short
from many_helpers import RANKS, assert_at_most_twice, assert_equal, make_many, run, run_loop
from test_many_adapters import has_half_pairs

import lora_ext

SUBSETS = [("x",), ("a",), ("b",), ("bias",), ("x", "a"), ("a", "b"), ("x", "b", "bias")]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.parametrize("rows", [9, 70])
def test_only_what_is_wanted_is_computed(isa, device, wanted, rows):
    """Of factors only those of some adapters."""
    many = make_many(rows, 40, 24, device=device)
    everything = run(many)
    many = many.each_factor(torch.clone)
    many.x.requires_grad_("x" in wanted)
    many.bias.requires_grad_("bias" in wanted)
    for g in (0, 2):
        many.lora_a[g].requires_grad_("a" in wanted)
        many.lora_b[g].requires_grad_("b" in wanted)
    lora_ext.lora_linear(**many.arguments).backward(many.grad)
    for name, tensor in (("dx", many.x), ("dbias", many.bias)):
        assert (tensor.grad is None) != (name[1:] in wanted)
        assert tensor.grad is None or torch.equal(tensor.grad, everything[name])
    for g in range(len(RANKS)):
        for kind, factors in (("a", many.lora_a), ("b", many.lora_b)):
            gradient = factors[g].grad
            assert (gradient is not None) == (kind in wanted and g in (0, 2))
            assert gradient is None or torch.equal(gradient, everything[f"dlora_{kind}[{g}]"])


def test_two_lists_may_share_factors(device):
    """One adapter named twice has the sum of both gradients."""
    many = make_many(30, 16, 12, (3, 3), (F64, F64), device, kind="ranges")
    a, b = leaf(many.lora_a[0]), leaf(many.lora_b[0])
    y = lora_ext.lora_linear(many.x, many.weight, [a, a], [b, b], None, 2.0, index=many.index)
    y.backward(many.grad)
    once = replace(many, index=many.index.clamp(max=0), bias=None, scaling=torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(a.grad, run(once)["dlora_a[0]"])


@pytest.mark.parametrize("scaling", [2.0, [2.0, 2.0, 2.0, 2.0], torch.full((4,), 2.0)], ids=repr)
def test_a_scaling_for_all_or_for_each(device, scaling):
    many = make_many(30, 16, 12, device=device)
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.to(device)
    two = torch.full((4,), 2.0, device=device)
    y = lora_ext.lora_linear(**many.arguments | {"scaling": scaling})
    assert torch.equal(y, run(replace(many, scaling=two))["y"])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=short)
@pytest.mark.parametrize("rows", [9, 70])
def test_autocast(isa, device, dtype, rows):
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
    by_hand = replace(many.to(dtype), y=many.y, grad=many.grad.to(given or dtype))
    wanted = run(by_hand)
    assert ours["dlora_a[0]"].dtype == ours["dlora_b[0]"].dtype == adapter
    assert_equal(ours, {name: value.to(ours[name].dtype) for name, value in wanted.items()})
