"""What ships the project and runs its tests: the sdist, uv's keys, `.ci/run` and `make nightly`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
BUILDS_FROM = ("csrc/", "build_backend/", "lora_ext/", "setup.py", "pyproject.toml")


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_an_sdist_of_a_clean_tree_has_what_a_build_needs(tmp_path):
    for name in TRACKED:
        if name.startswith((*BUILDS_FROM, "MANIFEST.in", "README.md", "LICENSE")):
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "tree" / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as made:
        packed = {name.partition("/")[2] for name in made.getnames()}
    assert {name for name in TRACKED if name.startswith(BUILDS_FROM)} - packed == set()


def test_uv_builds_again_after_an_edit_of_any_source():
    text = (ROOT / "pyproject.toml").read_text()
    keys = re.findall(r'{ file = "(.*)" }', text.partition("cache-keys")[2])
    seen = {path.relative_to(ROOT).as_posix() for key in keys for path in ROOT.glob(key)}
    compiled = [name for name in TRACKED if name.startswith(("csrc/", "build_backend/"))]
    assert set(compiled) - seen == set() and len(compiled) > 100


@pytest.mark.parametrize("failing", ["", "lint", "test-oldest", "test-kernels"])
def test_ci_fails_with_any_part_and_runs_all(tmp_path, failing):
    script(tmp_path / "make", f'echo "ran $1"; [ "$1" != "{failing}" ]')
    shutil.copytree(ROOT / ".ci", tmp_path / "tree" / ".ci")
    done = subprocess.run(
        [tmp_path / "tree" / ".ci" / "run"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    ran = re.findall("^ran (.*)", done.stdout, re.M)
    assert ran[1:] == ["lint", "test", "test-rest", "test-oldest", "test-kernels"]
    assert done.returncode == bool(failing)
    assert ("failed: " in done.stdout) == bool(failing)


def test_nightly_runs_all_parts_names_those_that_fail_and_draws_new_seeds(tmp_path):
    venv = tmp_path / "venv"
    script(venv / "bin" / "python", 'echo "ran $*"; case "$*" in *tests/quantized*) exit 3; esac')
    for stamp in (".torch", ".built-cpu", ".extras", ".kernel-oracles", ".cuda-headers", ".tools"):
        (venv / stamp).touch()
    (venv / ".integrations").touch()
    script(tmp_path / "make", 'echo "ran make $*"')
    command = [shutil.which("make"), "--silent", f"VENV={venv}", "nightly"]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "SEED", "LORA"))
    }
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    seeds = set()
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        assert len(re.findall("^ran ", done.stdout, re.M)) == 7
        failed = done.stdout.partition("failed:")[2]
        assert "tests/quantized" in failed and "verdicts" not in failed
        (seed,) = set(re.findall(r"--first-seed (\d+)", done.stdout))
        seeds.add(seed)
    assert len(seeds) > 1
