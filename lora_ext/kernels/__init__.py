"""The CUDA kernels seen from Python: what they would do for a call, and whether they may."""

from .kernel_checks import set_check_timeout
from .kernel_plan import (
    CARDS,
    CallPlan,
    plan,
    set_cuda_route,
    set_early_launch,
    set_reserved_sms,
)

__all__ = [
    "CARDS",
    "CallPlan",
    "plan",
    "set_check_timeout",
    "set_cuda_route",
    "set_early_launch",
    "set_reserved_sms",
]
