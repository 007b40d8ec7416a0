"""What ships the project and runs its tests: the sdist, uv's keys, `.ci/run` and `make nightly`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts import nightly

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


@pytest.mark.parametrize("failing", ["", "lint", "test-oldest", "nightly"])
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
    own = ["lint", "test", "test-rest", "test", "test-oldest", "test-newest"]
    assert ran[1:] == [*own, "test-kernels", "nightly"]
    assert done.returncode == bool(failing)
    assert ("failed: " in done.stdout) == bool(failing)


def test_nightly_runs_all_slices_names_those_that_fail_and_draws_new_seeds(
    tmp_path, monkeypatch, capsys
):
    commands = []

    def call(command, **words):
        commands.append(command)
        return int("tests/quantized/test_qlora.py" in command)

    monkeypatch.setattr(nightly.subprocess, "call", call)
    monkeypatch.setattr(nightly, "RECORD", tmp_path / "nightly.json")
    monkeypatch.setattr(sys, "argv", ["nightly.py", "--record"])
    seeds = set()
    for _ in range(3):
        assert nightly.main() == 1
        assert capsys.readouterr().out.partition("failed:\n")[2] == "QLoRA\n"
        seeds |= set(re.findall(r"--first-seed (\d+)", " ".join(commands)))
    assert len(seeds) > 1 and not re.search("PYTHON|MAKE|SEED", " ".join(commands))
    kept = json.loads((tmp_path / "nightly.json").read_text())
    assert [name for name in kept if not kept[name]["passed"]] == ["QLoRA"]
    assert kept.keys() == nightly.SLICES.keys()


def test_each_slice_has_its_turn_and_each_test_of_the_night_a_slice(monkeypatch):
    ran, names = [], list(nightly.SLICES)
    monkeypatch.setattr(nightly, "run", lambda name, seed: ran.append(name) or {"passed": True})
    for turn in (0, 1, len(names) - 1, len(names), 7 * len(names) + 3):
        monkeypatch.setattr(sys, "argv", ["nightly.py", "--turn", str(turn)])
        assert nightly.main() == 0
    assert ran == [names[0], names[1], names[-1], names[0], names[3]]
    commands = " ".join(each.command for each in nightly.SLICES.values())
    marked = [path for path in TRACKED if re.match("tests/.*/test_.*py", path)]
    marked = [path for path in marked if re.search(r"mark\.nightly", (ROOT / path).read_text())]
    lost = [path for path in marked if not any(f" {f}" in commands for f in folders(path))]
    assert lost == [] and len(marked) > 8


def folders(path: str) -> list[str]:
    """The file itself and the folders that it is in, below tests/."""
    return [path, *(f"{each} " for each in map(str, Path(path).parents) if "/" in each)]
