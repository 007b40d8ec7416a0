"""What the op has no formula for is refused and points to the reference, which has it all."""

import pytest
import torch
from helpers import F64, leaf, make_problem
from torch.autograd import forward_ad, gradgradcheck

import lora_ext
from lora_ext import reference

INPUTS = ("x", "lora_a", "lora_b")


@pytest.fixture(params=["lora_linear", "lora_update"])
def name(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["one", "many"])
def call(request, device, name):
    """Function of (x, lora_a, lora_b), by the reference if that is given."""
    problem = make_problem(6, 5, 4, 3, (F64, F64), device)
    index = torch.zeros(6, dtype=torch.int32, device=device)
    scaling = torch.ones(1, device=device)

    def made(x, lora_a, lora_b, by=None):
        by = by or getattr(lora_ext, name)
        first = (x, problem.weight) if name == "lora_linear" else (problem.grad, x)
        if request.param:
            return by(*first, [lora_a], [lora_b], scaling=scaling, index=index)
        return by(*first, lora_a, lora_b)

    return made


@pytest.fixture
def leaves(device):
    problem = make_problem(6, 5, 4, 3, (F64, F64), device)
    return {name: leaf(getattr(problem, name)) for name in INPUTS}


@pytest.mark.parametrize("wanted", INPUTS)
def test_double_backward_raises_for_every_gradient(call, name, leaves, wanted):
    y = call(**leaves)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[wanted], create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(NotImplementedError, match=rf"{name}: expected first derivatives only.*ref"):
        gradient.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("wanted", INPUTS)
def test_a_tangent_is_not_dropped_in_silence(call, name, leaves, wanted, requires_grad):
    primal = leaves[wanted].detach().requires_grad_(requires_grad)
    with forward_ad.dual_level():
        leaves[wanted] = forward_ad.make_dual(primal, torch.ones_like(primal))
        with pytest.raises(NotImplementedError, match=rf"lora_ext\.{name}: .*forward-mode tangent"):
            call(**leaves)


def test_functions_transformed_by_torch_func_name_the_reference(call, name, leaves):
    x, *factors = (tensor.detach() for tensor in leaves.values())
    of_reference = getattr(reference, f"{name}_reference")
    with pytest.raises(NotImplementedError, match=rf"lora_ext\.{name}: .*{name}_reference there"):
        torch.func.grad(lambda x: call(x, *factors).square().sum())(x)
    dx = torch.func.grad(lambda x: call(x, *factors, of_reference).square().sum())(x)
    call(**leaves).square().sum().backward()
    torch.testing.assert_close(dx, leaves["x"].grad)


def test_the_reference_has_second_derivatives(call, name, leaves):
    by = getattr(reference, f"{name}_reference")
    assert gradgradcheck(lambda *tensors: call(*tensors, by), tuple(leaves.values()))


@pytest.mark.parametrize("name", ["lora_linear", "lora_update"])
def test_batched_gradients_are_those_of_a_loop(device, name):
    """`is_grads_batched` is a vmap over the backward, which cannot take lists of tensors."""
    problem = make_problem(6, 5, 4, 3, (F64, F64), device)
    leaves = [leaf(getattr(problem, each)) for each in INPUTS]
    x, *factors = leaves
    first = (x, problem.weight) if name == "lora_linear" else (problem.grad, x)
    y = getattr(lora_ext, name)(*first, *factors)
    grads = torch.stack([problem.grad, problem.grad * 2])
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    one = torch.autograd.grad(y, leaves, problem.grad)
    for batched, single in zip(found, one, strict=True):
        torch.testing.assert_close(batched, torch.stack([single, single * 2]))
