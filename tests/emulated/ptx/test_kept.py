"""PTX that is kept runs without nvcc; without both, the error says what to install."""

from pathlib import Path

import pytest

import emulator.build
from emulated.ptx import build
from emulator import cuda_headers

pytestmark = pytest.mark.kernels

# Writes what nvcc would: an object, and PTX of each architecture beside its scratch.
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "nvcc of the test" && exit
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2" ;;
    --keep-dir) scratch="$2" ;;
    -c) stem=$(basename "$2" .cu) ;;
  esac
  shift
done
echo object > "$out"
for arch in %s; do echo "ptx of $arch" > "$scratch/$stem.compute_$arch.ptx"; done
"""


@pytest.fixture
def compile_units(tmp_path, monkeypatch):
    """build.compile_units() of one unit, in empty folders, with the nvcc of this path or None."""
    unit = build.Unit("csrc/kernels/launch/dropout.cu", "dropout", ())
    monkeypatch.setattr(build, "units", lambda: [unit])
    monkeypatch.setattr(build, "KEPT", tmp_path / "kept")

    def compile_units(nvcc: Path | None, units: str) -> str:
        monkeypatch.setattr(build, "UNITS", tmp_path / units)
        monkeypatch.setattr(cuda_headers, "nvcc", lambda: nvcc and str(nvcc))
        build.compile_units()
        return "".join(path.read_text() for path in unit.outputs())

    return compile_units


def test_kept_ptx_needs_no_nvcc(compile_units, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC % " ".join(build.ARCHS))
    nvcc.chmod(0o755)
    made = compile_units(nvcc, "with")
    assert made.startswith("object\nptx of ")
    assert compile_units(None, "without") == made


def test_without_nvcc_and_kept_ptx_the_error_says_what_to_install(compile_units):
    with pytest.raises(RuntimeError, match="put a CUDA toolkit on PATH, or install the wheels"):
        compile_units(None, "units")


def test_the_runtime_that_launches_ptx_compiles():
    """The programs themselves are linked by `make test-ptx` alone, which takes minutes."""
    [runtime] = [
        each
        for each in build.objects_of("dropout")
        if each.source == "tests/emulated/ptx/runtime.cpp"
    ]
    emulator.build.compile_all([runtime])
