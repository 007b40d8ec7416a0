"""The switch `--other-library` itself: what it makes red, and what it leaves as it was."""

import pytest
import torch
from helpers import BF16, F32, F64, make_problem, max_error
from other_library import other_library

import lora_ext

# x w^T of [6, 300] and [20, 300]; b [20].
CALLS = {
    "mm": lambda x, w, b: x @ w.T,
    "addmm": lambda x, w, b: torch.nn.functional.linear(x, w, b) - b,
    "out": lambda x, w, b: torch.addmm(b, x, w.T, out=x.new_empty(0)) - b,
    "out is an operand": lambda x, w, b: torch.addmm(y := w.new_ones(6, 20), x, w.T, beta=0, out=y),
    "in place": lambda x, w, b: x.new_ones(6, 20).addmm_(x, w.T, beta=0.5, alpha=2).sub_(0.5) / 2,
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.T[None])[0] - b,
    "mv": lambda x, w, b: torch.stack([x @ row for row in w], 1),
    "dot": lambda x, w, b: torch.stack([row @ one for row in x for one in w]).view(6, 20),
}
ERRORS = {
    "sizes": lambda x, w, b: x @ w,
    "a start that does not expand": lambda x, w, b: torch.addmm(b[:3], x, w.T),
    "dtypes": lambda x, w, b: torch.mm(x.int(), w.T),
    "batches": lambda x, w, b: torch.bmm(x[None], w.T.expand(2, -1, -1)),
    "out overlaps": lambda x, w, b: torch.mm(x, w.T, out=x.new_empty(1).expand(6, 20)),
    "in place, too small": lambda x, w, b: b.clone().addmm_(x, w.T),
}


def operands(dtype=F32):
    return [torch.randn(*sizes).to(dtype) for sizes in ((6, 300), (20, 300), (20,))]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_call_has_the_same_bits_and_they_are_near(call, dtype):
    given = x, w, _ = operands(dtype)
    plain, exact = CALLS[call](*given), x.double() @ w.double().T
    with other_library(3) as calls:
        found = CALLS[call](*given)
        assert calls.total() > 0 and torch.equal(CALLS[call](*given), found)
    assert torch.equal(CALLS[call](*given), plain)
    assert max_error(found, exact) <= 3 * max_error(plain, exact) + 1e-13


@pytest.mark.parametrize("call", ERRORS)
def test_errors_are_torchs(call):
    with pytest.raises(RuntimeError) as plain:
        ERRORS[call](*operands())
    with other_library(3), pytest.raises(RuntimeError) as found:
        ERRORS[call](*operands())
    assert str(found.value) == str(plain.value)


def test_what_compares_the_bits_of_two_calls_is_red():
    x, w, b = operands()
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    alike, red = x[:1].repeat(6, 1), torch.zeros(5)
    for seed in range(8):
        with other_library(seed):
            y, narrow = x @ w.T, alike @ w[:9].T
            others = x[:5] @ w.T, CALLS["addmm"](x, w, b), x @ w.T.contiguous(), shifted @ w.T
            pairs = [*((one, y[: len(one)]) for one in others), (narrow[1], narrow[0])]
            red += torch.tensor([not torch.equal(*pair) for pair in pairs])
    assert red.min() >= 6, red


def test_products_of_the_extension_come_by_it():
    """From C++, in float64: those of the forward, of dX's backward and of the adapters'."""
    problem = make_problem(7, 20, 30, 4, (F64, F64))
    x, *factors = (t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b))
    with other_library(0) as calls:
        y = lora_ext.lora_linear(x, problem.weight, *factors, problem.bias)
        assert calls == {"addmm": 1, "mm": 1, "addmm_": 1}
        for wanted in ([x], factors):
            calls.clear()
            torch.autograd.grad(y, wanted, problem.grad, retain_graph=True)
            assert calls.total() == 3
