"""nvcc compiles the same source, without spills and without serialised wgmmas."""

import pytest

from emulator import cuda_headers, device_build

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("name", device_build.BUILDS)
def test_kernels_compile_for_the_device(name, tmp_path):
    if cuda_headers.nvcc() is None:
        pytest.skip("no nvcc found: put a CUDA toolkit's nvcc on PATH or set CUDA_HOME")
    cubin = tmp_path / "kernels.cubin"
    report = device_build.compile_kernels(device_build.BUILDS[name], cubin)
    assert device_build.objections(device_build.BUILDS[name], report) == []
    # Nothing of the fault sites is left.
    assert b"consumer." not in cubin.read_bytes() and b"copy." not in cubin.read_bytes()


GOOD_KERNEL = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("0 bytes stack", "128 bytes stack"),
        ("0 bytes spill stores", "8 bytes spill stores"),
        ("Used 168", "Used 176"),
        ("used 1 barriers", "(C7510) wgmma.mma_async instructions are serialized"),
        ("Compiling entry function", "Compiling"),
    ],
)
def test_a_bad_report_is_objected_to(good, bad):
    assert device_build.objections(device_build.SPECIMENS_SM90A, GOOD_KERNEL * 5) == []
    worse = GOOD_KERNEL * 4 + GOOD_KERNEL.replace(good, bad)
    assert len(device_build.objections(device_build.SPECIMENS_SM90A, worse)) == 1
