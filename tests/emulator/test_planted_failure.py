"""A failure turns each target red: what a green run says is worth no more than this."""

import subprocess
import sys

import pytest

from emulator import build, mutants, run

pytestmark = pytest.mark.kernels

# A mutant that every flavour catches, whatever else it looks for: the result is wrong.
WRONG_RESULT = {
    "reduction": "max.elements:low",
    "gemm_mma_sync": "copy.rows:low",
    "gemm_wgmma": "consumer.s_rows:low",
    "lora_gemm_sm80": "copy.rows:low",
    "lora_gemm_sm90a": "epilogue.sender:never",
    "lora_gemm_in_grid_sm90a": "in_grid.row_inside:never",
    "lora_shrink_sm80": "reduce.splits:low",
    "lora_wgrad_sm80": "reduce.splits:low",
    "lora_dsdb_sm80": "copy.rows:low",
    "lora_split": "split.inside:never",
}


@pytest.mark.parametrize("flavour", build.FLAVOURS)
@pytest.mark.parametrize("specimen", mutants.SOURCES)
def test_specimen_ends_with_an_error(specimen, flavour, programs):
    command = [str(build.BUILD / flavour / specimen), "--seeds", "1:10"]
    assert run.execute(command, timeout=120).returncode == 0
    planted = run.execute([*command, "--fault", WRONG_RESULT[specimen]], timeout=120)
    assert planted.returncode != 0


@pytest.mark.parametrize("flavour", build.FLAVOURS)
def test_pytest_ends_with_an_error(flavour):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels"]
    command += ["tests/emulator/test_clean.py", "-k", f"alarm and reduction and {flavour}"]
    assert subprocess.run(command, cwd=build.ROOT, capture_output=True).returncode == 0
    planted = [*command, "--plant", WRONG_RESULT["reduction"]]
    done = subprocess.run(planted, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "replay with: " in done.stdout and WRONG_RESULT["reduction"] in done.stdout


def test_failing_selftest_ends_with_an_error():
    [program] = build.build_programs([("plain", "selftests/planted/failing.cpp")])
    assert run.execute([str(program)], timeout=60).returncode != 0
