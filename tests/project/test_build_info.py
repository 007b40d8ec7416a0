"""What an installation says of itself: version, files, build_info, and under another torch."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
from setuptools.command.build_py import build_py

import lora_ext

# By its module name: the attribute lora_ext.build_info is the function.
info_module = importlib.import_module("lora_ext.build_info")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lora_ext.__file__).parent
KEYS = [
    "version",
    "extension",
    "torch_built",
    "torch_running",
    "torch_cuda",
    "compiler",
    "openmp",
    "cuda",
    "cuda_version",
    "cuda_archs",
    "cuda_reason",
    "cuda_driver",
    "cpu_isa",
    "cpu_isas_available",
    "cpu_panels",
]


@pytest.fixture
def facts(monkeypatch, tmp_path):
    """Replaces the facts of the build by what the test writes; returns the function to do so."""
    path = tmp_path / "_build.json"
    monkeypatch.setattr(info_module, "_FACTS_FILE", path)
    return path.write_text


# ---- version and files ----


def test_version_has_one_source():
    stated = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated == [lora_ext.__version__]
    assert importlib.metadata.version("lora_ext") == lora_ext.__version__
    assert json.loads((PACKAGE / "_build.json").read_text())["version"] == lora_ext.__version__
    for path in [ROOT / "setup.py", *PACKAGE.rglob("*.py")]:
        assert lora_ext.__version__ not in path.read_text(), f"{path.name} repeats the version"


def test_metadata_asks_for_torch_and_what_adapter_files_take():
    needed = [
        requirement
        for requirement in importlib.metadata.requires("lora_ext") or []
        if "extra ==" not in requirement
    ]
    assert sorted(needed) == ["regex", "safetensors>=0.4.3", "torch>=2.11"]


def test_a_build_that_was_asked_for_kernels_has_them():
    """As `.ci/run` asks, whose other tests would pass without."""
    if os.environ.get("LORA_EXT_CUDA") != "1":
        pytest.skip("nobody asked for kernels")
    assert lora_ext.build_info()["cuda"] is True


def test_a_wheel_ships_every_file_of_the_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    command = build_py(distribution)
    command.ensure_finalized()
    modules = {Path(path).resolve() for _, _, path in command.find_all_modules()}
    data = {
        Path(folder, name).resolve() for _, folder, _, names in command.data_files for name in names
    }
    wanted = {
        path
        for path in (ROOT / "lora_ext").rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name in {"py.typed", "_build.json"}
    }
    assert wanted <= modules | data
    assert set(distribution.package_data) <= set(distribution.packages)
    assert ROOT / "lora_ext" / "py.typed" in data
    assert len(wanted) > 5


def test_one_openmp_runtime_is_loaded():
    """A second one would ignore torch.set_num_threads: setup.py links none."""
    if lora_ext.build_info()["openmp"] is not True:
        pytest.skip("built without OpenMP: torch's runtime does not answer this compiler")
    script = (
        "import lora_ext, re; maps = open('/proc/self/maps').read(); "
        r"print(*set(re.findall(r'\S*/lib(?:gomp|omp|iomp5)\S*', maps)))"
    )
    loaded = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).split()
    assert len(loaded) == 1, loaded


# ---- build_info ----


def test_build_info_describes_this_build():
    info = lora_ext.build_info()
    recorded = json.loads((PACKAGE / "_build.json").read_text())
    assert list(info) == KEYS
    assert info["extension"] == "loaded"
    assert info["version"] == lora_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert info["torch_built"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["torch_cuda"] == torch.version.cuda
    assert info["cuda"] == recorded["cuda"] == lora_ext._C.with_cuda
    assert info["cpu_isa"] in [*info["cpu_isas_available"], "library"]
    with_panels = {x for x in ("float32", "bfloat16") if lora_ext._C.cpu_panels(getattr(torch, x))}
    assert {entry.split(":")[0] for entry in info["cpu_panels"]} - {"float16"} == with_panels
    assert re.search(r"\d+\.\d+", info["compiler"])
    if info["cuda"]:
        assert info["cuda_archs"]
        assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
        assert info["cuda_reason"] == ""
        assert re.match(r"\d+\.\d|none", info["cuda_driver"])
    else:
        assert info["cuda_archs"] == []
        assert info["cuda_version"] is None
        assert info["cuda_driver"] is None
        assert info["cuda_reason"].endswith("reinstall.")


def test_build_info_prints_a_table():
    lines = str(lora_ext.build_info()).splitlines()
    assert [line.split()[0] for line in lines] == KEYS
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1
    assert f"version             {lora_ext.__version__}" in lines
    assert not any(re.search(r"True|False|None|\[", line) for line in lines)


def test_python_m_lora_ext_prints_the_table():
    printed = subprocess.check_output([sys.executable, "-m", "lora_ext"], cwd=ROOT, text=True)
    assert printed == f"{lora_ext.build_info()}\n"
    command = [sys.executable, "-m", "lora_ext"]
    assert "a table for bug reports" in subprocess.check_output(
        [*command, "--help"], cwd=ROOT, text=True
    )
    assert subprocess.run([*command, "--no-such"], cwd=ROOT, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("written", "complaint"),
    [(None, "is missing"), ("{", "cannot be read"), ("[1]", "holds no table")],
)
def test_build_info_says_what_is_wrong_with_its_facts(facts, written, complaint):
    if written is not None:
        facts(written)
    info = lora_ext.build_info()
    assert complaint in info["torch_built"]
    assert "pip install ." in info["torch_built"]
    assert str(info)


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), RuntimeError("boom")])
def test_build_info_survives_an_extension_that_does_not_load(monkeypatch, error):
    real_import = importlib.import_module

    def failing_import(name):
        if name == "lora_ext._C":
            raise error
        return real_import(name)

    monkeypatch.setattr(importlib, "import_module", failing_import)
    info = lora_ext.build_info()
    assert list(info) == KEYS
    assert info["extension"] == f"not loaded: {error}"
    assert info["cpu_isa"].startswith("unknown")
    assert info["cpu_isas_available"] == info["cpu_panels"] == []


@pytest.mark.parametrize(
    ("built", "running", "installer", "cure"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", None, ""),
        ("2.13.0+cpu", "2.13.1+cu130", None, ""),
        ("2.1.0", "2.13.0", None, "run `pip install .`"),
        ("2.13.0", "2.14.0", "pip\n", "run `pip install .` in"),
        # It builds with the newest torch from outside the tree: to install again does it again.
        ("2.13.0", "2.14.0", "uv\n", "run `uv pip install .` inside"),
    ],
)
def test_torch_mismatch_compares_releases_and_says_what_helps_with_the_installer(
    facts, monkeypatch, built, running, installer, cure
):
    facts(json.dumps({"torch": built}))
    monkeypatch.setattr(info_module, "_running_torch", lambda: (running, None))
    copy = SimpleNamespace(read_text={"INSTALLER": installer}.get)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: copy)
    message = info_module.torch_mismatch()
    assert bool(message) == bool(cure)
    if cure:
        assert built in message and running in message and cure in message
        assert message in info_module.import_error_hint()


def test_torch_mismatch_of_a_wheel_names_what_pip_can_get(facts, monkeypatch):
    """Who installed a wheel may have neither the sources nor a compiler."""
    facts(json.dumps({"version": "0.1.0+torch2.13.cu130", "torch": "2.13.0+cu130"}))
    monkeypatch.setattr(info_module, "_running_torch", lambda: ("2.14.1+cu130", None))
    assert info_module.torch_mismatch() == (
        "lora_ext was built with torch 2.13.0+cu130, but torch 2.14.1+cu130 is running: "
        "install torch==2.13.*, or a wheel of lora_ext named +torch2.14"
    )


def test_import_error_hint_without_a_build(facts):
    hint = info_module.import_error_hint()
    assert "_build.json is missing" in hint
    assert "pip install ." in hint
