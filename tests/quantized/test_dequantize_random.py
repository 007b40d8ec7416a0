"""Random sizes of the CPU's kernels that dequantise.

By itself: a machine with a GPU may lack hypothesis, and is to run the other tests.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dequantize import DTYPES, four_bit_case

from lora_ext import _C

ops = torch.ops.lora_ext


@settings(max_examples=60)
@given(
    count=st.integers(0, 3000),
    block=st.sampled_from([2, 32, 64, 96, 4096]),
    nested=st.sampled_from([None, 2, 256]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(_C.available_cpu_isas()),
)
def test_four_bits(count, block, nested, dtype, isa):
    packed, scale, parts, expected = four_bit_case(count, block, nested=nested)
    out = torch.full((count,), float("nan"), dtype=dtype)
    _C.set_cpu_isa(isa)
    try:
        ops.dequantize("4bit", packed, scale, out, **parts)
    finally:
        _C.set_cpu_isa("auto")
    assert torch.equal(out, expected.to(dtype))


@settings(max_examples=40)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 200),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(_C.available_cpu_isas()),
)
def test_eight_bits(rows, cols, dtype, isa):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-128, 128, (rows, cols), generator=generator).to(torch.int8)
    scale = torch.rand(rows, generator=generator) * 5
    out = torch.full((rows, cols), float("nan"), dtype=dtype)
    _C.set_cpu_isa(isa)
    try:
        ops.dequantize("8bit", codes, scale, out, multiplier=1.0 / 127.0)
    finally:
        _C.set_cpu_isa("auto")
    expected = codes.float() * (scale * torch.tensor(1.0 / 127.0))[:, None]
    assert torch.equal(out, expected.to(dtype))
