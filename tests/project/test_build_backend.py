"""The build backend chooses the torch that the target is going to hold (PEP 517)."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    return importlib.import_module("lora_ext_backend")


@pytest.fixture
def target(backend, monkeypatch):
    """Lets the test say which torch the target holds, and what its pip reports (None: no pip)."""

    def pretend(held, report):
        def run_in_target(arguments):
            if "pip" not in arguments:
                return json.dumps([held, ["site-packages"]])
            if report is None:
                raise subprocess.CalledProcessError(1, arguments)
            return json.dumps(report)

        monkeypatch.setattr(backend, "run_in_target", run_in_target)
        monkeypatch.setattr(backend.shutil, "which", lambda name: name)

    return pretend


def test_backend_finds_the_torch_that_is_installed(backend):
    assert torch.__path__[0].startswith(tuple(backend.target_path()))


@pytest.mark.parametrize("held", ["", "2.10.1+cu126", "2.14.0"])
def test_backend_requires_the_torch_that_pip_will_install(backend, target, held):
    target(held, {"install": [{"metadata": {"name": "torch", "version": "2.12.1"}}]})
    assert backend.build_requirements() == ["torch==2.12.1"]


def test_backend_requires_no_torch_where_pip_keeps_the_one_there(backend, target):
    target("2.12.1", {"install": []})
    assert backend.build_requirements() == []


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        *((old, ["torch>=2.11"]) for old in ("", "1.13", "2.9.1", "2.10.1")),
        *((recent, []) for recent in ("2.11.0", "2.100.0+cpu", "10.0")),
    ],
)
def test_backend_without_pip_looks_for_torch_itself(backend, target, held, wanted):
    target(held, None)
    assert backend.build_requirements() == wanted


def test_backend_asks_for_ninja_where_there_is_none(backend, target, monkeypatch):
    target("2.12.1", {"install": []})
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert backend.build_requirements() == ["ninja"]


def test_an_editable_installation_is_a_path(tmp_path):
    """A .pth file, from which pyright and editors know where the package is; no hook."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "lora_ext", tree / "lora_ext", ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = f"import lora_ext_backend; lora_ext_backend.build_editable({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend")}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info" not in name]
        assert names == [name for name in names if name.endswith(".pth")] and len(names) == 1
        assert file.read(names[0]).decode().strip() == str(tree)
