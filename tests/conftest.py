"""Fixtures: a test runs once for each device, and on the CPU for each instruction set it asks for.

A test that takes `device` runs on the CPU and on CUDA. One that takes `isa` runs on the CPU under
every kernel set of this processor and under "library" (ATen alone); one that takes both also runs
on CUDA, once. What runs on CUDA has the marker `gpu`.
"""

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
def device(request) -> str:
    reason = why_no_cuda() if request.param == "cuda" else ""
    if reason:
        pytest.skip(reason)
    return request.param


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
