"""In the package of build.py: one call, on the kernels and on the library, and what is emulated."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lora_ext
from emulated.comparisons import close, same  # noqa: F401
from lora_ext import _C
from lora_ext.kernels.kernel_checks import check_kernels, check_results
from lora_ext.kernels.kernel_plan import CallPlan, explain_cuda_call

cpu = torch.device("cpu")
card = _C.cuda_card(cpu)


def emulate(what: str, value: str = "") -> None:
    """As device.cpp says."""
    os.environ["LORA_EXT_EMULATED_" + what] = value


def operands() -> list[torch.Tensor]:
    """x, weight, lora_a and lora_b."""
    torch.manual_seed(0)
    x, w = torch.randn(70, 96, dtype=torch.bfloat16), torch.randn(136, 96, dtype=torch.bfloat16)
    return [x, w, 0.1 * torch.randn(16, 96), 0.1 * torch.randn(136, 16)]


def forward() -> torch.Tensor:
    return lora_ext.lora_linear(*operands(), None, 2.0)


def checked() -> str:
    return explain_cuda_call(*operands(), 0.0).forward_check


def call() -> tuple[list[torch.Tensor], CallPlan]:
    """Y, dX, dA and dB with dropout, and their plan."""
    x, w, a, b = operands()
    inputs = [each.requires_grad_() for each in (x, a, b)]
    y = lora_ext.lora_linear(x, w, a, b, None, 2.0, 0.1)
    y.sum().backward()
    plan = explain_cuda_call(x.detach(), w, a.detach(), b.detach(), 0.1)
    return [y.detach(), *(each.grad for each in inputs)], plan


def by_library(run: Callable[[], Any]) -> Any:
    route = _C.cuda_route()
    _C.set_cuda_route("library")
    try:
        return run()
    finally:
        _C.set_cuda_route(route)


def library() -> list[torch.Tensor]:
    return by_library(call)[0]


def named(start: str) -> list:
    return [each for each in _C.all_kernels(card, True) if each.name.startswith(start)]


__all__ = [name for name in dir() if not name.startswith("_")]
__all__ += ["_C", "check_kernels", "check_results", "pytest", "warnings"]
