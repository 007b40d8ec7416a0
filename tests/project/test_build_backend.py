"""The build backend chooses the torch that the target is going to hold (PEP 517)."""

import importlib
import json
import subprocess
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
