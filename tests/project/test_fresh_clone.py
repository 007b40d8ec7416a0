"""Targets of the Makefile from a fresh clone of the last commit, whose environment they make."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.nightly

TARGETS = {
    "lint": [],
    "sass": [],
    "docs": [],
    "wheel": [],
    "gpu": ["QUICK=1", "DEVICE=cpu", "ARGS=--budget 60 --out gpu"],
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone that borrows this Python's torch."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_works_from_a_fresh_clone(clone, target):
    if target == "sass" and shutil.which("nvcc") is None:
        pytest.skip("machine code comes from nvcc: put it on PATH")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTEST", "VIRTUAL"))}
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", target, *TARGETS[target]],
        cwd=clone,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
