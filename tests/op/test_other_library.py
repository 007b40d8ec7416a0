"""The switch `--other-library` itself: what it makes red, and what it leaves as it was."""

import pytest
import torch
from helpers import BF16, F16, F32, F64, make_problem, max_error
from other_library import other_library

import lora_ext

CALLS = {
    "mm": lambda x, w, b: x @ w.T,
    "mm, transposed": lambda x, w, b: (w @ x.T).T,
    "linear": lambda x, w, b: torch.nn.functional.linear(x, w, b) - b,
    "out": lambda x, w, b: torch.addmm(b, x, w.T, out=x.new_empty(0)) - b,
    "out is an operand": lambda x, w, b: torch.addmm(y := w.new_ones(6, 20), x, w.T, beta=0, out=y),
    "in place": lambda x, w, b: x.new_ones(6, 20).addmm_(x, w.T, beta=0.5, alpha=2).sub_(0.5) / 2,
    "bmm": lambda x, w, b: torch.bmm(x[None], w.T[None])[0],
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.T[None])[0] - b,
    "mv": lambda x, w, b: torch.stack([x @ row for row in w], 1),
    "addmv": lambda x, w, b: torch.stack([torch.addmv(b, w, row) for row in x]) - b,
    "dot": lambda x, w, b: torch.stack([row @ w[0] for row in x])[:, None].expand(6, 20),
}
ERRORS = {
    "sizes": lambda x, w, b: x @ w,
    "a start that does not expand": lambda x, w, b: torch.addmm(b[:3], x, w.T),
    "dtypes": lambda x, w, b: torch.mm(x.int(), w.T),
    "batches": lambda x, w, b: torch.bmm(x[None], w.T.expand(2, -1, -1)),
    "dot": lambda x, w, b: x[0].dot(b),
    "out overlaps": lambda x, w, b: torch.mm(x, w.T, out=x.new_empty(1).expand(6, 20)),
    "out of another dtype": lambda x, w, b: torch.mm(x, w.T, out=torch.empty(0).int()),
    "in place, too small": lambda x, w, b: b.clone().addmm_(x, w.T),
}


def operands(dtype=F32):
    return [torch.randn(*sizes).to(dtype) for sizes in ((6, 300), (20, 300), (20,))]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_call_has_the_same_bits_and_they_are_near(call, dtype):
    given = x, w, _ = operands(dtype)
    exact = x.double() @ (w[:1].expand_as(w) if call == "dot" else w).double().T
    plain = CALLS[call](*given)
    with other_library(3) as calls:
        found = CALLS[call](*given)
        assert calls.total() > 0 and torch.equal(CALLS[call](*given), found)
    assert torch.equal(CALLS[call](*given), plain)
    assert max_error(found, exact) <= 3 * max_error(plain, exact) + 1e-13


@pytest.mark.parametrize("call", ERRORS)
def test_errors_are_torchs(call):
    messages = []
    for given in (operands(), operands()):
        with pytest.raises(RuntimeError) as caught:
            ERRORS[call](*given)
        messages.append(str(caught.value))
        with other_library(3), pytest.raises(RuntimeError) as caught:
            ERRORS[call](*given)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


def test_what_compares_the_bits_of_two_calls_is_red():
    x, w, b = operands()
    shifted = torch.empty(len(x) * x.shape[1] + 1)[1:].view_as(x).copy_(x)
    alike = x[:1].repeat(6, 1)
    reds = dict.fromkeys(["fewer rows", "a start", "strides", "alignment", "odd rows"], 0)
    for seed in range(8):
        with other_library(seed):
            y, narrow = x @ w.T, alike @ w[:9].T
            assert (alike @ w.T).unique(dim=0).shape[0] == 1
            reds["fewer rows"] += not torch.equal(x[:5] @ w.T, y[:5])
            reds["a start"] += not torch.equal(torch.addmm(b, x, w.T), y + b)
            reds["strides"] += not torch.equal(x @ w.T.contiguous(), y)
            reds["alignment"] += not torch.equal(shifted @ w.T, y)
            reds["odd rows"] += not torch.equal(narrow[1], narrow[0])
            assert torch.equal(narrow[2], narrow[0])
    assert min(reds.values()) >= 6, reds


def test_products_of_the_extension_come_by_it():
    """From C++, in float64: those of the forward, of dX's backward and of the adapters'."""
    problem = make_problem(7, 20, 30, 4, (F64, F64))
    x, *factors = (t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b))
    with other_library(0) as calls:
        y = lora_ext.lora_linear(x, problem.weight, *factors, problem.bias)
        assert calls == {"addmm": 1, "mm": 1, "addmm_": 1}
        for wanted, count in (([x], 3), (factors, 3)):
            calls.clear()
            torch.autograd.grad(y, wanted, problem.grad, retain_graph=True)
            assert calls.total() == count
