"""Our fragments, swizzles and descriptors against CuTe's, and proof that each check can fail."""

import re
import subprocess
from pathlib import Path

import pytest

from emulator import build, cuda_headers
from emulator.oracles import oracle_tools

pytestmark = pytest.mark.kernels

SUMMARY = re.compile(r"^(.+): (\d+) comparisons, (\d+) mismatches$", re.MULTILINE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("layouts") / "layouts"
    folders = [oracle_tools.cutlass_include()]
    for folder in cuda_headers.include_dirs():
        folders += [folder, folder / "cccl"]
    command = [*build.CXX, "-std=c++20", "-O0", "-w"]
    command += [f"-I{folder}" for folder in (oracle_tools.CSRC, oracle_tools.ROOT)]
    command += [f"-isystem{folder}" for folder in folders]
    oracle_tools.run([*command, str(oracle_tools.FOLDER / "layouts.cpp"), "-o", str(target)])
    return target


def mismatches(program: Path, *arguments: str) -> tuple[int, dict[str, int]]:
    """Runs the program; returns its exit status and the mismatches of each check."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, {name: int(count) for name, _, count in SUMMARY.findall(done.stdout)}


def test_layouts_are_those_of_cute(program):
    status, found = mismatches(program)
    assert len(found) > 40
    assert (status, {name for name, count in found.items() if count}) == (0, set())


def test_one_wrong_value_fails_its_check(program):
    for name in mismatches(program)[1]:
        if name != "all":
            status, found = mismatches(program, "--perturb", name)
            assert (status, {check for check, count in found.items() if count}) == (
                1,
                {name, "all"},
            )
