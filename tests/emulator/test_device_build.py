"""The specimens are CUDA: nvcc compiles them, without spills and without serialised wgmmas."""

import re
import subprocess

import pytest

from emulator import build, cuda_headers

pytestmark = pytest.mark.kernels

ARCHITECTURES = {"sm_80": "device_build_sm80.cu", "sm_90a": "device_build_sm90a.cu"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specimens_compile_for_the_device(architecture, tmp_path):
    nvcc = cuda_headers.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc found: put a CUDA toolkit's nvcc on PATH or set CUDA_HOME")
    cubin = tmp_path / "specimens.cubin"
    source = build.EMULATOR / "specimens" / ARCHITECTURES[architecture]
    command = [nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
    command += [f"-I{build.ROOT / 'csrc'}", f"-I{build.ROOT / 'tests'}", str(source), "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    report = done.stderr
    kernels = report.count("Compiling entry function")
    assert kernels >= 5
    assert report.count("0 bytes spill stores, 0 bytes spill loads") == kernels
    # C7504 to C7519: setmaxnreg ignored, or wgmma serialised. Only notes to ptxas, but a kernel
    # three times slower.
    assert not re.search(r"C75\d\d", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= (168 if architecture == "sm_90a" else 128)
    # Nothing of the fault sites is left.
    assert b"consumer." not in cubin.read_bytes() and b"copy." not in cubin.read_bytes()
