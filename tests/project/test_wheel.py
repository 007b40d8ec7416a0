"""`make wheel`: its steps, what the wheel's name and metadata say, what its check refuses.

The whole of it, from a clone to the tests without a compiler, is in test_fresh_clone (nightly).
"""

import base64
import csv
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lora_ext

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"version": "0.1.0", "torch": "2.13.1+cpu", "cuda": True, "cuda_version": "13.0"}
# On every Linux that a manylinux tag speaks of.
OF_THE_SYSTEM = re.compile(
    r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*)\.so"
)


@pytest.fixture(scope="module")
def tie_wheel():
    return runpy.run_path(str(ROOT / "scripts" / "tie_wheel.py"))


@pytest.fixture(scope="module")
def check_wheel():
    return runpy.run_path(str(ROOT / "scripts" / "check_wheel.py"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    venv = tmp_path_factory.mktemp("make") / "venv"
    command = ["make", "--dry-run", f"VENV={venv}", "wheel"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def own_metadata() -> str:
    """As the build backend writes it; an editable build leaves it in the tree by another name."""
    installed = importlib.metadata.distribution("lora_ext")
    return installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""


def wheel_of(folder: Path, files: dict[str, str], tags: str = "cp311-cp311-linux_x86_64") -> Path:
    path = folder / f"lora_ext-0.1.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def compiled(folder: Path, **facts) -> Path:
    return wheel_of(
        folder,
        {
            "lora_ext/_C.cpython-311-x86_64-linux-gnu.so": "machine code",
            "lora_ext/_build.json": json.dumps({**FACTS, **facts}),
            "lora_ext-0.1.0.dist-info/METADATA": own_metadata(),
            "lora_ext-0.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\n",
            "lora_ext-0.1.0.dist-info/RECORD": "stale",
        },
    )


# ---- the steps ----


def test_the_steps_come_in_their_order(recipe):
    steps = [
        "pip wheel|pip .* wheel",
        "tie_wheel.py",
        "auditwheel repair",
        "check_wheel.py",
        "dist/",
    ]
    found = [re.search(step, recipe) for step in steps]
    assert all(found), recipe[-2000:]
    places = [match.start() for match in found if match]
    assert places == sorted(places)


def test_the_build_is_isolated(recipe):
    (command,) = re.findall(r"^.*pip .*\bwheel .*$", recipe, re.MULTILINE)
    assert "--no-build-isolation" not in command and command.endswith(" .")


def test_what_torch_brings_stays_out_of_the_wheel(recipe):
    excluded = re.findall(r"--exclude '([^']+)'", recipe)
    folder = Path(torch.__file__).parent / "lib"
    own = {path.name for path in folder.glob("lib*") if re.match(r"lib(torch|c10)", path.name)}
    brought = {name for name in own if name.endswith(".so")} | {"libcudart.so.13", "libc10_cuda.so"}
    assert len(brought) > 4
    for name in brought:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in excluded), name


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_extension_needs_the_system_and_what_torch_brings(recipe):
    """Whatever else it is linked with, auditwheel would copy into the wheel."""
    said = subprocess.check_output(["readelf", "-d", lora_ext._C.__file__], text=True)
    excluded = re.findall(r"--exclude '([^']+)'", recipe)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert "libtorch_cpu.so" in needed
    others = [
        name
        for name in needed
        if not OF_THE_SYSTEM.match(name)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in excluded)
    ]
    assert others == []


# ---- the name and the metadata ----


@pytest.mark.parametrize(
    ("facts", "label"),
    [({}, "torch2.13.cu130"), ({"cuda": False, "cuda_version": None}, "torch2.13.cpu")],
)
def test_a_wheel_is_named_for_its_torch(tie_wheel, tmp_path, facts, label):
    tied = tie_wheel["tie"](compiled(tmp_path, **facts), tmp_path / "tied")
    assert tied.name == f"lora_ext-0.1.0+{label}-cp311-cp311-linux_x86_64.whl"
    (found,) = importlib.metadata.distributions(path=[str(tied)])
    assert found.version == f"0.1.0+{label}"
    wanted = [
        "torch==2.13.*" if line.startswith("torch>=") else line
        for line in re.findall(r"^Requires-Dist: (.*)$", own_metadata(), re.MULTILINE)
    ]
    assert "torch==2.13.*" in wanted and found.requires == wanted
    assert (
        json.loads(zipfile.ZipFile(tied).read("lora_ext/_build.json"))["version"] == found.version
    )


def test_the_record_holds_every_file_as_it_is(tie_wheel, tmp_path):
    tied = zipfile.ZipFile(tie_wheel["tie"](compiled(tmp_path), tmp_path / "tied"))
    (record,) = [name for name in tied.namelist() if name.endswith("/RECORD")]
    lines = list(csv.reader(tied.read(record).decode().splitlines()))
    assert sorted(name for name, _, _ in lines) == sorted(tied.namelist())
    for name, digest, size in lines:
        content = tied.read(name)
        sha = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert name == record or (digest, size) == (f"sha256={sha}", str(len(content)))
    assert tied.read("lora_ext/_C.cpython-311-x86_64-linux-gnu.so") == b"machine code"


def test_what_cannot_be_tied_is_an_error(tie_wheel, tmp_path):
    tied = tie_wheel["tie"](compiled(tmp_path), tmp_path / "tied")
    with pytest.raises(ValueError, match="tied already"):
        tie_wheel["tie"](tied, tmp_path / "twice")
    for lines in ("Version: 1\n", "Version: 1\nRequires-Dist: torchao\n", 2 * own_metadata()):
        with pytest.raises(ValueError, match=r"METADATA: expected one line .* but got [02]"):
            tie_wheel["tied_metadata"](lines, "1+torch2.13.cpu", "2.13")


# ---- the check ----


@pytest.mark.parametrize(
    ("tags", "libraries", "complaint"),
    [
        ("cp311-cp311-manylinux_2_34_x86_64", ["lora_ext/_C.so"], ""),
        ("cp311-cp311-linux_x86_64", ["lora_ext/_C.so"], "expected a manylinux tag"),
        (
            "cp311-cp311-manylinux_2_34_x86_64",
            ["lora_ext/_C.so", "lora_ext.libs/libgomp-a34b.so.1.0.0"],
            "expected lora_ext/_C alone.*libgomp",
        ),
        ("cp311-cp311-manylinux_2_34_x86_64", [], "expected lora_ext/_C alone"),
    ],
)
def test_a_wheel_with_libraries_of_others_is_refused(
    check_wheel, tmp_path, tags, libraries, complaint
):
    wheel = wheel_of(tmp_path, dict.fromkeys([*libraries, "lora_ext/__init__.py"], ""), tags)
    if not complaint:
        check_wheel["check_files"](wheel)
        return
    with pytest.raises(SystemExit, match=complaint):
        check_wheel["check_files"](wheel)


def test_the_check_leads_to_no_compiler_and_to_no_other_package(check_wheel, monkeypatch, tmp_path):
    for name in ("CC", "CXX", "CUDA_HOME", "PYTHONPATH", "PYTEST_ADDOPTS", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "somewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "kept")
    env = check_wheel["clean_environment"](tmp_path)
    assert env["PATH"] == str(tmp_path) and env["PIP_INDEX_URL"] == "kept"
    assert not [name for name, value in env.items() if value == "somewhere"]


def test_without_a_compiler_inductors_tests_are_skipped_by_that_name(tmp_path):
    test = "tests/op/test_registration.py::test_inductor"
    env = {key: value for key, value in os.environ.items() if key != "CXX"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cpu", test],
        cwd=ROOT,
        env={**env, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "1 skipped" in done.stdout and "needs a C++ compiler" in done.stdout, done.stdout
