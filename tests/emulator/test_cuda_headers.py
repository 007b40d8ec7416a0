"""Finding CUDA's headers: in a toolkit, in wheels, or a message that says what to install."""

from pathlib import Path

import pytest

from emulator import cuda_headers

pytestmark = pytest.mark.kernels


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(cuda_headers, "local_toolkits", lambda: [])
    monkeypatch.setattr(cuda_headers, "nvcc", lambda: None)
    monkeypatch.setattr(cuda_headers, "wheel_includes", lambda: [])
    monkeypatch.delenv("CUDA_HOME", raising=False)
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
    no_toolkit.setattr(cuda_headers, "wheel_includes", lambda: [folder])
    with pytest.raises(cuda_headers.CudaHeadersNotFound, match=r"pip install nvidia-cuda-crt$"):
        cuda_headers.include_dirs()


def test_takes_one_folder_of_each_wheel(no_toolkit, tmp_path):
    folders = [make(tmp_path / str(i), header) for i, header in enumerate(cuda_headers.HEADERS)]
    no_toolkit.setattr(cuda_headers, "wheel_includes", lambda: folders)
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
