"""What the tests of setup.py share."""

import runpy
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_py(monkeypatch):
    """The names that setup.py defines, without a build."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for variable in ("CUDA_HOME", "CXX", "LORA_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return runpy.run_path("setup.py")


@pytest.fixture
def build_ext(setup_py, monkeypatch):
    """setup.py's build command for an extension of no sources."""
    monkeypatch.setenv("MAX_JOBS", "1")
    extension = setuptools.Extension("lora_ext._C", [])
    return setup_py["BuildExt"](setuptools.Distribution({"ext_modules": [extension]})), extension
