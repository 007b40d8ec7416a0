"""Accelerated layers of random shapes, ranks, dtypes and bases beside PEFT's own forward."""

import pytest
import torch
from helpers import BF16, F16, F32, F64, HALVES, max_error
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_helpers import accelerated, as_float64, exact_model, paths, peft_model, step
from torch import nn
from transformers.pytorch_utils import Conv1D

ROWS = st.sampled_from([0, 1, 2, 7, 8, 47, 48, 65, 129])
WIDTHS = st.integers(1, 70)
RANKS = st.integers(1, 40)


class Other(nn.Linear):
    """A base that is called as it is."""


@st.composite
def problems(draw):
    """(base, adapters, dtype, half adapters, leading sizes of x)"""
    k, n, kind = draw(WIDTHS), draw(WIDTHS), draw(st.sampled_from(["linear", "conv1d", "other"]))
    bias = draw(st.booleans()) or kind == "conv1d"
    torch.manual_seed(draw(st.integers(0, 1000)))
    if kind == "conv1d":
        base = Conv1D(n, k)
        nn.init.normal_(base.weight, std=k**-0.5)
    else:
        base = {"linear": nn.Linear, "other": Other}[kind](k, n, bias=bias)
    adapters = {}
    count = draw(st.integers(1, 3))
    dora = count == 1 and kind != "other" and draw(st.booleans())
    for name in "abc"[:count]:
        words = {"r": draw(RANKS), "lora_alpha": draw(st.sampled_from([1, 4, -3, 16]))}
        words["use_rslora"] = draw(st.booleans())
        if dora:
            words["use_dora"] = True
        elif bias:
            words["lora_bias"] = draw(st.booleans())
        adapters[name] = words
    lead = draw(st.sampled_from([(), (1,), (2,)]))
    dtype = draw(st.sampled_from([F64, F32, BF16, F16]))
    half_adapters = draw(st.booleans())
    return base, adapters, dtype, half_adapters, (*lead, draw(ROWS)), k


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_random_layers(problem):
    """y, dx and all gradients: at most twice PEFT's error against float64, plus a floor."""
    base, adapters, dtype, half_adapters, lead, k = problem
    model = peft_model(nn.Sequential(base), adapters, ["0"], dtype, half_adapters)
    fast, x = accelerated(model), torch.randn(*lead, k, dtype=F64).to(dtype)
    assert set(paths(fast).values()) <= {"fused", "added", "library"}
    found, theirs = step(fast, x), step(model, x)
    wanted = step(exact_model(model), as_float64(x), dtype=dtype)
    assert found.keys() == theirs.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape, name
        if value.numel() == 0:
            continue
        # A half y or dx of few elements may round unluckily: two units in its last place.
        unit = torch.finfo(value.dtype).eps
        scale = wanted[name].abs().max().item()
        floor = scale * max(2 * unit if value.dtype in HALVES else 2e-6, 1e-5 * (dtype in HALVES))
        error, limit = (max_error(tensor, wanted[name]) for tensor in (value, theirs[name]))
        assert error <= 2 * limit + floor, name


@pytest.mark.parametrize("rows", [0, 1, 60])
def test_ranks_beyond_the_ops(rows):
    """Above 512 torch adds the updates, one after the other."""
    words = {"a": {"r": 400, "lora_alpha": 8}, "b": {"r": 200, "lora_alpha": 4}}
    model = peft_model(nn.Sequential(nn.Linear(24, 40)), words, ["0"], F64)
    fast, x = accelerated(model), torch.randn(rows, 24, dtype=F64)
    assert paths(fast) == {"0": "added"}
    torch.testing.assert_close(step(fast, x), step(model, x), rtol=1e-9, atol=1e-9)
