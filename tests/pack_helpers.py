"""What the tests of packed weights share."""

import torch
from helpers import F32, make_problem

from lora_ext import lora_linear, pack_weight
from lora_ext.functional import PackedWeight


def packable(dtype) -> bool:
    supported = torch.backends.mkldnn.is_available()
    return supported and (dtype == F32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_weight(dtype=F32, shape=(70, 40), **options) -> PackedWeight:
    packed = pack_weight(torch.randn(shape).to(dtype), **options)
    assert packed.is_packed, packed.reason
    return packed


def call(weight, rows=60, **options):
    """lora_linear of a fixed problem on a given weight."""
    problem = make_problem(rows, 40, 70, 5)
    return lora_linear(problem.x, weight, problem.lora_a, problem.lora_b, **options)
