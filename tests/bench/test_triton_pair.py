"""The Triton baseline computes the layer: on a GPU, or in Triton's interpreter."""

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


def run(device, tolerance, **environment):
    code = CODE.replace("DEVICE", repr(device)).replace("TOLERANCE", repr(tolerance))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_in_the_interpreter():
    pytest.importorskip("triton")
    run("cpu", 1e-5, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu(cuda):
    pytest.importorskip("triton")
    assert torch.cuda.is_available()
    run("cuda", 5e-3)  # tf32
