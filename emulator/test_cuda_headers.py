"""Finding CUDA's headers and nvdisasm: in a toolkit, in wheels, or a message of what to install."""

from pathlib import Path

import pytest

from emulator import cuda_headers

pytestmark = pytest.mark.kernels


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(cuda_headers, "local_toolkits", lambda: [])
    monkeypatch.setattr(cuda_headers, "of_wheels", lambda folder: [])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    return monkeypatch


def make(folder: Path, *headers: str) -> Path:
    for header in headers:
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).touch()
    return folder


def test_every_header_is_there():
    folders = cuda_headers.include_dirs()
    for header in [*cuda_headers.HEADERS, "cuda.h", "cuda_fp16.h", "vector_types.h"]:
        assert any((folder / header).is_file() for folder in folders), header


def test_says_what_to_install(no_toolkit):
    with pytest.raises(cuda_headers.CudaHeadersNotFound) as error:
        cuda_headers.include_dirs()
    assert str(error.value).endswith(
        "pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def test_names_the_missing_wheel_alone(no_toolkit, tmp_path):
    folder = make(tmp_path / "include", "cuda_bf16.h", "nv/target")
    no_toolkit.setattr(cuda_headers, "of_wheels", lambda name: [folder])
    with pytest.raises(cuda_headers.CudaHeadersNotFound, match=r"pip install nvidia-cuda-crt$"):
        cuda_headers.include_dirs()


def test_takes_one_folder_of_each_wheel(no_toolkit, tmp_path):
    folders = [make(tmp_path / str(i), header) for i, header in enumerate(cuda_headers.HEADERS)]
    no_toolkit.setattr(cuda_headers, "of_wheels", lambda name: folders)
    assert cuda_headers.include_dirs() == folders


def test_takes_cuda_home(no_toolkit, tmp_path):
    folder = make(tmp_path / "include", *cuda_headers.HEADERS)
    no_toolkit.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_headers.include_dirs() == [folder]


def test_passes_over_an_incomplete_toolkit(no_toolkit, tmp_path):
    make(tmp_path / "old" / "include", "cuda_bf16.h")
    whole = make(tmp_path / "new" / "include", *cuda_headers.HEADERS)
    no_toolkit.setattr(cuda_headers, "local_toolkits", lambda: [tmp_path / "old", tmp_path / "new"])
    assert cuda_headers.include_dirs() == [whole]


def make_program(path: Path, text: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_toolkit_there_is_no_program(no_toolkit):
    assert cuda_headers.nvcc() is None and cuda_headers.disassembler("nvdisasm") is None


def test_nvdisasm_is_found_on_path_then_in_a_toolkit_then_in_a_wheel(no_toolkit, tmp_path):
    wheel = make_program(tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm")
    no_toolkit.setattr(cuda_headers, "of_wheels", lambda folder: [Path(wheel).parent])
    assert cuda_headers.disassembler("nvdisasm") == wheel
    toolkit = make_program(tmp_path / "toolkit" / "bin" / "nvdisasm")
    no_toolkit.setattr(cuda_headers, "local_toolkits", lambda: [tmp_path / "toolkit"])
    assert cuda_headers.disassembler("nvdisasm") == toolkit
    on_path = make_program(tmp_path / "path" / "nvdisasm")
    no_toolkit.setenv("PATH", str(tmp_path / "path"))
    assert cuda_headers.disassembler("nvdisasm") == on_path


def test_nvdisasm_is_found_where_a_wrapper_of_nvcc_says_that_it_is(no_toolkit, tmp_path):
    beside = make_program(tmp_path / "toolkit" / "bin" / "nvdisasm")
    make_program(tmp_path / "path" / "nvcc", f"echo '#$ _HERE_={Path(beside).parent}' >&2")
    no_toolkit.setenv("PATH", str(tmp_path / "path"))
    assert cuda_headers.disassembler("nvdisasm") == beside


def test_a_wheel_of_the_environment_that_lends_its_packages_counts(tmp_path, monkeypatch):
    make_program(tmp_path / "nvidia" / "cu99" / "bin" / "nvdisasm")
    monkeypatch.syspath_prepend(tmp_path)
    assert tmp_path / "nvidia" / "cu99" / "bin" in cuda_headers.of_wheels("bin")
