"""The census of plans: what the kernels of a plan are called, and which no plan takes."""

import sys
from pathlib import Path

import pytest

import lora_ext
from lora_ext import _C

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import census


@pytest.mark.parametrize(
    ("change", "backward", "groups", "expected"),
    [
        ({}, False, 0, {"lora_shrink", "lora_reduce", "lora_gemm 128x64"}),
        ({"aligned": False}, True, 0, {"lora_dsdb 16 element", "lora_wgrad element"}),
        ({"dropout": True}, True, 3, {"lora_grouped_wgrad masked", "lora_grouped_scan"}),
        ({"float_adapters": True}, False, 3, {"lora_grouped_gemm 128x64 float"}),
    ],
)
def test_a_plan_s_kernels_are_called_as_the_disassembly_calls_them(
    change, backward, groups, expected
):
    problem = _C.Problem(4096, 4096, 4096, 16)
    for name, value in change.items():
        setattr(problem, name, value)
    card = lora_ext.kernels.CARDS["A100"]
    plan = _C.plan_as_asked(card, problem, backward=backward, choice="hybrid", groups=groups)
    assert expected <= census.kernels_of(plan, problem, backward, groups)


def test_a_kernel_at_no_plan_is_named():
    """In whichever type. What can be launched is at some plan, or has a reason."""
    assert census.untaken({"lora_gemm 64x64 bf16", "lora_gemm 128x64 fp16"}) == [
        "lora_gemm 64x64 bf16"
    ]
    for card in census.CARDS.values():
        assert census.untaken(census.launched(card)) == []
