"""A failure turns each target red: what a green run says is worth no more than this."""

import subprocess
import sys

import pytest

from emulated import mutants
from emulator import build, run

pytestmark = pytest.mark.kernels

# A mutant that every flavour catches, whatever else it looks for: the result is wrong.
WRONG_RESULT = {
    "lora_gemm_sm80": "gemm/sm80/loads.copy.i*kApart<rows:low",
    "lora_gemm_sm90a": "gemm/sm90a/store.store_slab.ptx::elect_sync():never",
    "lora_shrink_sm80": "tile/halves.sum_of_splits.split<splits:low",
    "lora_wgrad_sm80": "tile/halves.sum_of_splits.split<splits:low",
    "lora_dsdb_sm80": "tile/copy.copy_chunk.row<matrix.rows:low",
    "lora_split": "skinny/elementwise.lora_split.column<matrix.columns:never",
    "lora_grouped_segments": "grouped/segments.finish.thread==0:never",
    "lora_grouped_shrink": "grouped/shrink.store.column<columns:low",
    "lora_grouped_gemm": "grouped/gemm.multiply_rows.row<end:low",
    "lora_grouped_own_weights": "grouped/own_weights.multiply.k16<min((depth()-k0+15)/16,4):low",
    "lora_grouped_own_weights_sm90a": (
        "grouped/own_weights_sm90a.store_chunks.i*4<rows.count&&column<p.n:never"
    ),
    "lora_grouped_sequence": "grouped_s_without_keep_scale",
    "lora_grouped_wgrad": "grouped/wgrad.store.column>=rank:low",
    "lora_decode": "decode/finish.finish_y.row<p.m&&column<p.n:never",
    "dequantize": "dequantize/formats.dequantize_matrix.i<end:low",
    "lora_experts": "experts_place_as_perm",
}


@pytest.mark.parametrize("flavour", build.FLAVOURS)
@pytest.mark.parametrize("program", mutants.PROGRAMS)
def test_program_ends_with_an_error(program, flavour, programs):
    command = [str(build.BUILD / flavour / program), "--seeds"]
    assert run.execute([*command, "2:3"], timeout=300).returncode == 0
    planted = run.execute([*command, "1:10", "--fault", WRONG_RESULT[program]], timeout=300)
    assert planted.returncode != 0


# A flavour is a word of its command: one by day.
@pytest.mark.parametrize(
    "flavour", ["plain", pytest.param("race", marks=pytest.mark.nightly), "asan"]
)
def test_pytest_ends_with_an_error(flavour):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels"]
    command += ["tests/emulated/test_clean.py", "-k", f"alarm and lora_split and {flavour}"]
    assert subprocess.run(command, cwd=build.ROOT, capture_output=True).returncode == 0
    planted = [*command, "--plant", WRONG_RESULT["lora_split"]]
    done = subprocess.run(planted, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "replay with: " in done.stdout and WRONG_RESULT["lora_split"] in done.stdout
