"""The Triton baselines compute the layer: on a GPU, or in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import torch
from benchmarks.triton_pair import TritonPair

blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 8}
torch.manual_seed(0)
for m, n, k, r in ((70, 45, 96, 5), (33, 64, 130, 16)):
    for dropout_p in (0.0, 0.3):
        x, w = torch.randn(m, k), torch.randn(n, k) * k**-0.5
        leaves = [x, torch.randn(r, k) * k**-0.5, torch.randn(n, r)]
        leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
        w = w.to(DEVICE)
        y = TritonPair.apply(leaves[0], w, *leaves[1:], 2.0, dropout_p, blocks)
        mask = y.grad_fn.saved_tensors[5]
        kept = 1.0 if mask is None else mask / (1 - dropout_p)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = exact[0] @ w.double().t() + 2 * ((exact[0] * kept) @ exact[1].t()) @ exact[2].t()
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad.double())
        pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact))]
        for got, wanted in pairs:
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error < TOLERANCE, (m, n, k, r, dropout_p, error)
"""


EXPERTS = """
import torch
from benchmarks.triton_experts import Stack, experts

blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
torch.manual_seed(0)
tokens, slots, count, hidden, inner, r = 43, 2, 5, 40, 33, 5  # two tiles of an expert; one has none
index = torch.rand(tokens, count - 1).topk(slots).indices
index = index.masked_fill(index == 2, 4).to(DEVICE)

def drawn(*sizes):
    return (torch.randn(*sizes) * sizes[-1]**-0.5).to(DEVICE)

def gate(z):
    return z[:, ::2] * z[:, 1::2].sigmoid()

up, down = drawn(count, hidden, 2 * inner).transpose(1, 2), drawn(count, hidden, inner)
bias = drawn(count, 2 * inner)
sizes = (r, hidden), (2 * inner, r), (r, inner), (hidden, r)
leaves = [drawn(tokens, hidden), drawn(tokens, slots), *(drawn(count, *each) for each in sizes)]
leaves = [leaf.requires_grad_() for leaf in leaves]
stacks = Stack(up, bias, *leaves[2:4]), Stack(down, None, *leaves[4:])
y = experts(leaves[0], index, leaves[1], *stacks, gate, 2.0, blocks)
exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
x, weights, a, b, c, d = exact
first, second = up.double() + 2 * b @ a, down.double() + 2 * d @ c
z = torch.einsum("th,tknh->tkn", x, first[index]) + bias.double()[index]
h = gate(z.flatten(0, 1)).view(tokens, slots, inner)
expected = (torch.einsum("tki,tkhi->tkh", h, second[index]) * weights[..., None]).sum(1)
grad = torch.randn_like(y)
y.backward(grad)
expected.backward(grad.double())
assert (leaves[2].grad[2] == 0).all() and (leaves[5].grad[2] == 0).all()
pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact))]
for place, (got, wanted) in enumerate(pairs):
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error < TOLERANCE, (place, error)
"""


def run(code, device, tolerance, **environment):
    code = code.replace("DEVICE", repr(device)).replace("TOLERANCE", repr(tolerance))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", [CODE, EXPERTS])
def test_in_the_interpreter(code):
    pytest.importorskip("triton")
    run(code, "cpu", 1e-5, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("code", [CODE, EXPERTS])
def test_on_a_gpu(cuda, code):
    pytest.importorskip("triton")
    assert torch.cuda.is_available()
    run(code, "cuda", 5e-3)  # tf32
