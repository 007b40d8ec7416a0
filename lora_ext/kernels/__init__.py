"""The CUDA kernels from Python: the plan of a call, and the checks of the kernels."""

from .kernel_checks import set_check_timeout
from .kernel_plan import CARDS, CallPlan, plan, set_cuda_route, set_pdl, set_reserved_sms

__all__ = [
    "CARDS",
    "CallPlan",
    "plan",
    "set_check_timeout",
    "set_cuda_route",
    "set_pdl",
    "set_reserved_sms",
]
