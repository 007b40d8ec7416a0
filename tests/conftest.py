"""Fixtures: a test runs once for each device, and on the CPU for each instruction set it asks for.

A test that takes `device` runs on the CPU and on CUDA. One that takes `isa` runs on the CPU under
every kernel set of this processor and under "library" (ATen alone); one that takes both also runs
on CUDA, once. What runs on CUDA has the marker `gpu`.
"""

import os

# Read when cuBLAS starts: without it torch refuses products under use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from lora_ext import _C

CUDA = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
CUDA_ONCE = pytest.param("cuda", None, id="cuda", marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        names = [*_C.available_cpu_isas(), "library"]
        if "device" in metafunc.fixturenames:
            on_cpu = [pytest.param("cpu", name, id=f"cpu-{name}") for name in names]
            metafunc.parametrize(("device", "isa"), [*on_cpu, CUDA_ONCE], indirect=True)
        else:
            metafunc.parametrize("isa", names, indirect=True)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param("cpu", id="cpu"), CUDA], indirect=True)


def why_no_cuda() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if _C.with_cuda else "lora_ext was built without CUDA kernels"


@pytest.fixture
def device(request):
    if request.param != "cuda":
        yield request.param
        return
    reason = why_no_cuda()
    if reason:
        pytest.skip(reason)
    # cuBLAS may add the parts of a half product in half, where integers are not exact.
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield "cuda"
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


@pytest.fixture
def isa(request):
    """The CPU kernel set in use, None on CUDA."""
    if request.param is None:
        yield None
        return
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("auto")


@pytest.fixture
def library_route():
    """The CPU's ATen route, whatever the number of rows."""
    _C.set_cpu_isa("library")
    yield
    _C.set_cpu_isa("auto")


@pytest.fixture(autouse=True)
def one_thread():
    """At the sizes of tests a second thread on a busy machine costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
