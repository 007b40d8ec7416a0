"""In the package of build.py: CUDA tensors, what the op asks of CUDA, and calls that fail."""

import ctypes
import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import lora_ext
from emulated.comparisons import close, same  # noqa: F401
from lora_ext import _C
from lora_ext.kernels.kernel_plan import CallPlan, explain_cuda_call

_runtime = ctypes.CDLL(_C.__file__)
for _name in ("record", "pool", "ops"):
    getattr(_runtime, f"emulated_cuda_{_name}").restype = ctypes.c_char_p
_runtime.emulated_cuda_counts.restype = ctypes.c_void_p
_runtime.emulated_cuda_device_of.argtypes = [ctypes.c_void_p]


def _handle(device: torch.device | None) -> int:
    """Of the current stream, as torch says it: those that are default streams all have 0."""
    index = current_device() if device is None or device.index is None else device.index
    number = _runtime.emulated_cuda_stream(index)
    return number and 1 + 2 * number + index


torch.cuda._lazy_init = lambda: None  # which a torch without CUDA raises an error in
torch.cuda.current_device = lambda: _runtime.emulated_cuda_device()
torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=_handle(device))
torch.cuda.is_current_stream_capturing = lambda: False

OUT_OF_MEMORY, INVALID_DEVICE, NO_IMAGE, LAUNCH_FAILURE = 2, 101, 209, 719
OLDEST_DRIVER = 11080  # of an earlier major version than any toolkit that builds the kernels

be = _runtime.emulated_cuda_be  # (arch, driver version, whether a graph is being captured)
be_unlike = _runtime.emulated_cuda_be_unlike  # (device, arch, SMs, clusters of two at a time)
set_device = _runtime.emulated_cuda_set_device
set_stream = _runtime.emulated_cuda_set_stream  # (device, number)
count_only = _runtime.emulated_cuda_count_only
keep_busy = _runtime.emulated_cuda_keep_busy
waiting = _runtime.emulated_cuda_waiting
counts = _runtime.emulated_cuda_counts  # (device, count): their address, or None
device_of = _runtime.emulated_cuda_device_of  # of an address of cudaMalloc's
open_pool = _runtime.emulated_cuda_open_pool
current_device = _runtime.emulated_cuda_device
last_error = _runtime.emulated_cuda_last_error


def card(
    arch: int, version: int = 99000, capturing: bool = False, route: str | None = None
) -> None:
    be(arch, version, int(capturing))
    lora_ext.kernels.set_check_timeout(None)  # a machine that is busy would take the library
    if route is not None:
        _C.set_cuda_route(route)


def fail(call: str, nth: int, error: int) -> None:
    """The nth call of a function from now fails."""
    _runtime.emulated_cuda_fail(call.encode(), nth, error)


def load_in(call: str) -> None:
    """In this function kernels are loaded, for which a device that is kept busy lets it wait."""
    _runtime.emulated_cuda_load_in(call.encode())


def plant(mutant: str) -> None:
    _runtime.emulated_cuda_plant(mutant.encode())


def pool() -> set[int]:
    """Addresses of what lives in the pool that open_pool(1) has opened."""
    return set(map(int, _runtime.emulated_cuda_pool().split()))


def ops() -> list[str]:
    """Torch's own ops on CUDA tensors since the last time."""
    return _runtime.emulated_cuda_ops().decode().split()


def settled() -> bool:
    """Whether the failures that were asked for have happened, and nothing is left of them."""
    return _runtime.emulated_cuda_still_to_fail() == 0 and last_error() == 0


def record() -> list[dict]:
    """What was asked since the last time; nothing of it may have been refused."""
    lines = _runtime.emulated_cuda_record().decode().splitlines()
    calls = [json.loads(line) for line in lines]
    assert not [call for call in calls if "refused" in call], calls
    return calls


def kernel_of(launch: dict) -> str:
    """LoraShrinkParams -> "shrink": the family, by the type of its first parameter."""
    name = re.search(r"::(?:Lora)?(\w+?)(?:Params|Maps)\b", launch["parameters"])
    assert name, launch
    return name[1].lower()


def launches(calls: list[dict]) -> list[dict]:
    return [each for each in calls if each["call"] == "cudaLaunchKernelEx"]


def kernels(calls: list[dict]) -> list[str]:
    return [kernel_of(each) for each in launches(calls)]


@dataclass
class Call:
    """Operands of one call on a device, whose rows may lie apart, and how it runs."""

    rows: int = 300
    k: int = 328
    n: int = 520
    rank: int = 40
    device: torch.device = torch.device("cuda", 1)  # noqa: RUF009
    float_adapters: bool = False
    dropout_p: float = 0.0
    apart: int = 0  # elements between the rows of x, weight, lora_a and the gradient
    between: float = float("nan")  # their value
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        adapters = torch.float32 if self.float_adapters else self.dtype

        def normal(rows: int, columns: int, dtype: torch.dtype, std: float) -> torch.Tensor:
            whole = torch.full((rows, columns + self.apart), self.between, dtype=dtype)
            whole[:, :columns] = std * torch.randn(rows, columns)
            return whole.to(self.device)[:, :columns]

        self.x = normal(self.rows, self.k, self.dtype, 1.0)
        self.grad = normal(self.rows, self.n, self.dtype, 1.0)
        self.weight = normal(self.n, self.k, self.dtype, self.k**-0.5)
        self.lora_a = normal(self.rank, self.k, adapters, self.k**-0.5)
        self.lora_b = normal(self.n, self.rank, adapters, 0.1)
        self.seed = torch.tensor(7).to(self.device) if self.dropout_p else None

    def forward(self) -> list[torch.Tensor]:
        """Y and S."""
        return list(torch.ops.lora_ext.lora_forward(*self.operands()))

    def backward(self, s: torch.Tensor) -> list[torch.Tensor]:
        """dX, dA and dB."""
        wanted = [True, True, True, False]
        found = torch.ops.lora_ext.lora_backward(self.grad, s, wanted, *self.operands())
        return list(found[:3])

    def operands(self) -> tuple:
        """As the op has them."""
        factors = (self.lora_a, self.lora_b)
        return (self.x, self.weight, None, *factors, 2.0, None, self.dropout_p, self.seed)

    def both(self) -> list[torch.Tensor]:
        results = self.forward()
        return [tensor.cpu() for tensor in [*results, *self.backward(results[1])]]

    def library(self) -> list[torch.Tensor]:
        """From rows without NaN between them: on AMX, oneDNN's products let it leak if K % 32 != 0
        (oneDNN issue 5717).
        """
        route = _C.cuda_route()
        _C.set_cuda_route("library")
        try:
            return replace(self, apart=0).both()
        finally:
            _C.set_cuda_route(route)

    def plan(self) -> CallPlan:
        return explain_cuda_call(self.x, self.weight, self.lora_a, self.lora_b, self.dropout_p)


__all__ = [name for name in dir() if not name.startswith("_")] + ["_C", "lora_ext", "pytest"]
