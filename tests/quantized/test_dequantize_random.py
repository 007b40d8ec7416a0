"""Random sizes of the CPU's kernels that dequantise.

By itself: a machine with a GPU may lack hypothesis, and is to run the other tests.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dequantize import DTYPES, eight_bit_case, four_bit_case

from lora_ext import _C

ops = torch.ops.lora_ext


@settings(max_examples=60)
@given(
    count=st.integers(0, 3000),
    block=st.sampled_from([2, 32, 64, 96, 4096]),
    nested=st.sampled_from([None, 2, 256]),
    dtype=st.sampled_from(DTYPES),
    low_first=st.booleans(),
    isa=st.sampled_from(_C.available_cpu_isas()),
)
def test_four_bits(count, block, nested, dtype, low_first, isa):
    packed, scale, parts, expected = four_bit_case(count, block, 0, nested, low_first)
    out = torch.full((count,), float("nan"), dtype=dtype)
    _C.set_cpu_isa(isa)
    try:
        ops.dequantize("4bit", packed, scale, out, **parts)
    finally:
        _C.set_cpu_isa("auto")
    assert torch.equal(out, expected.to(dtype))


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 70), st.integers(0, 200)),
    block=st.tuples(st.sampled_from([1, 3, 16, 70]), st.sampled_from([1, 20, 33, 128, 200])),
    kind=st.sampled_from(["int8", "float8"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(_C.available_cpu_isas()),
)
def test_eight_bits(shape, block, kind, dtype, isa):
    codes, scale, parts, expected = eight_bit_case(shape, block, kind)
    out = torch.full(codes.shape, float("nan"), dtype=dtype)
    _C.set_cpu_isa(isa)
    try:
        ops.dequantize("8bit", codes, scale, out, **parts)
    finally:
        _C.set_cpu_isa("auto")
    assert torch.equal(out, expected.to(dtype))
